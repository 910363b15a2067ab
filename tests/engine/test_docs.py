"""Every Python snippet in README and docs runs; every hook is documented and exercised."""

from __future__ import annotations

import re
import runpy
import tomllib
from typing import Any

import pytest

from support.environment import ROOT
from support.pages import DOCS, EXAMPLES, MAKERS, PAGES, TUTORIALS, Block, blocks_of

LANGUAGES = {"python", "sh", "toml", "json", "text"}


def blocks(language: str) -> list[Block]:
    """The blocks that run in this process; those of tutorials run in order, in an environment of their own."""
    pages = [page for page in PAGES if page not in TUTORIALS]
    return [block for page in pages for block in blocks_of(page) if block.language == language]


def snippet_groups() -> list[tuple[str, str]]:
    """Snippets that continue the one before (they import nothing) run together with it."""
    groups: list[tuple[str, str]] = []
    for block in blocks("python"):
        same_page = groups and groups[-1][0].partition("#")[0] == block.name.partition("#")[0]
        if same_page and "import " not in block.text:
            groups[-1] = (groups[-1][0], groups[-1][1] + "\n" + block.text)
        else:
            groups.append((block.name, block.text))
    return groups


def test_there_is_something_to_run() -> None:
    assert len(snippet_groups()) >= 15


@pytest.mark.parametrize(("name", "code"), [pytest.param(*each, id=each[0]) for each in snippet_groups()])
def test_snippet(name: str, code: str) -> None:
    exec(compile(code, name, "exec"), {"__name__": "snippet"})


def test_every_fence_says_what_is_in_it() -> None:
    """A fence without a language would be a command that nothing runs."""
    for page in (*PAGES, *EXAMPLES, *MAKERS):
        for block in blocks_of(page):
            assert block.language in LANGUAGES, block.name


def test_toml_can_be_read() -> None:
    found = [block for page in PAGES for block in blocks_of(page) if block.language == "toml"]
    assert found
    for block in found:
        tomllib.loads(block.text)


def page_of_hooks() -> str:
    return (ROOT / "docs/hooks.md").read_text(encoding="utf-8")


def test_the_hook_reference_is_that_of_the_specifications(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    script = runpy.run_path(str(ROOT / "docs/make_hook_reference.py"))
    assert script["reference"]() == page_of_hooks(), "run: python docs/make_hook_reference.py"


def test_the_picture_of_a_step_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_step_picture.py"))
    assert script["draw"]().svg() == (ROOT / "docs/images/step.svg").read_text(encoding="utf-8")


def test_every_public_name_is_documented() -> None:
    import specplug

    page = page_of_hooks()
    names = [name for name in specplug.__all__ if name not in ("__version__", "hookimpl")]
    assert not [name for name in names if not re.search(rf"^(### {name}$|- `{name}`|\| `{name}` )", page, re.MULTILINE)]


def test_every_hook_is_specified_documented_and_has_an_example() -> None:
    from specplug.contract.hooks import SpeculatorHooks
    from specplug.plugins.implementations import HOOKS

    specified = {name for name, value in vars(SpeculatorHooks).items() if hasattr(value, "specplug_spec")}
    assert set(HOOKS) == specified
    for hook in HOOKS:
        section = page_of_hooks().partition(f"### {hook}\n")[2].partition("\n### ")[0]
        assert f"```text\n{hook}(" in section
        assert f"    def {hook}(" in section or f"\ndef {hook}(" in section


def test_every_hook_is_exercised_in_an_engine() -> None:
    """By what is shipped where something shipped implements it, else by a speculator of this test."""
    from specplug import LLM, Proposal, SamplingParams, hookimpl
    from specplug.plugins.implementations import HOOKS

    called = set()

    class Everything:
        @hookimpl
        def plan_memory(self, budget: Any) -> list[Any]:
            called.add("plan_memory")
            return []

        @hookimpl
        def warmup(self, resources: Any) -> None:
            called.add("warmup")

        @hookimpl
        def propose(self, batch: Any) -> Any:
            called.add("propose")
            return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])

        @hookimpl
        def verify(self, batch: Any, proposal: Any, target: Any) -> None:
            called.add("verify")

    @hookimpl
    def load_speculator(config: Any, target: Any) -> Any:
        called.add("load_speculator")
        return Everything()

    everything = {"method": "everything", "num_speculative_tokens": 2}
    with LLM("tiny", plugins={"everything": load_speculator}, speculative_config=everything, strict=True) as llm:
        llm.generate("import os\n", SamplingParams(temperature=0, max_tokens=8))
    assert called == set(HOOKS)


@pytest.mark.parametrize("hook", ["load_speculator", "plan_memory", "warmup", "propose"])
def test_a_shipped_plugin_implements(hook: str) -> None:
    sources = [path for path in ROOT.glob("plugins/*/src/**/*.py") if "train" not in path.parts]
    pattern = re.compile(rf"@hookimpl\n\s*def {hook}\(")
    assert any(pattern.search(path.read_text(encoding="utf-8")) for path in sources)


def test_the_supported_ranges_are_those_that_core_declares() -> None:
    project = tomllib.loads((ROOT / "core/pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", text).group(): text for text in project["dependencies"]}  # type: ignore[union-attr]
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert f"| Python | {project['requires-python']} |" in page
    for name in ("torch", "transformers", "pluggy"):
        assert f"| {name} | {declared[name].removeprefix(name)} |" in page


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, *EXAMPLES):
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_anchors_are_headings() -> None:
    for page in (*PAGES, *EXAMPLES):
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                there = (page.parent / link if link else page).read_text(encoding="utf-8")
                headings = {slug(heading) for heading in re.findall(r"^#+ (.*)$", there, re.MULTILINE)}
                assert anchor in headings, f"{page.name}: {link}#{anchor}"


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_page_is_in_the_navigation_once() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS)


def test_the_kits_page_has_a_section_for_every_check() -> None:
    from specplug.testing import CHECKS

    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    for check in CHECKS:
        section = text.partition(f"\n## {check.name}\n")[2].partition("\n## ")[0]
        assert section.strip() == check.explanation, check.name
