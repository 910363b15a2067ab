"""`specplug demo`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from specplug.cli import demo as demo_module
from specplug.cli.run import demo as demo_run
from specplug.cli.run.demo_prompts import PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable

OWN_VERIFY = '''
from specplug import Proposal, Verdict, hookimpl

class Careless:
    """Keeps whatever it drafted: not lossless."""

    @hookimpl
    def propose(self, batch):
        return Proposal([[7] * min(row.budget.max_nodes, 2) for row in batch.rows])

    @hookimpl
    def verify(self, batch, proposal, target):
        paths = [tuple(range(len(draft))) for draft in proposal.tokens]
        return Verdict(paths, [7] * len(paths))

@hookimpl
def load_speculator(config, target):
    return Careless()
'''

MEMORISER = """
from specplug import Proposal, SpeculatorTraits, hookimpl

class Memoriser:
    traits = SpeculatorTraits(learns=True)
    known = {}

    @hookimpl
    def propose(self, batch):
        return Proposal([self.draft(row.tokens[:], row.num_prompt_tokens, row.budget.max_nodes) for row in batch.rows])

    def draft(self, tokens, length, count):
        known = self.known.setdefault(tuple(tokens[:length]), [])
        if len(tokens) > len(known):
            known[:] = tokens
        return known[len(tokens) : len(tokens) + count]

@hookimpl
def load_speculator(config, target):
    return Memoriser()
"""


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "_REPETITIONS", 1)


def test_piped(run: Callable[..., Any], installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUG_DENY_PLUGINS", "specplug-ngram,specplug-draft-model,specplug-eagle")
    installed("acme-lookup", methods={"lookup": ""})
    installed("acme-future", methods={"future": ""}, requires="specplug>=9")
    installed("acme-broken", methods={"broken": ""}, source="import a_module_that_is_missing\n")
    result = run("demo", "--max-tokens", "60")
    text = result.stdout
    assert result.exit_code == 0, result.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert [line for line in text.splitlines() if len(line) > 80 and "left out" not in line] == []
    assert "drafts the next tokens" in text.splitlines()[0]
    assert len(re.findall(r"^  [1-6]/6 .* \d+\.\d\d s$", text, re.MULTILINE)) == 12
    for part in ("target weights", "target KV cache", "draft weights", "draft KV cache", "verification buffers"):
        assert re.search(rf"^  {part} .* [KMG]?i?B +\d+%$", text, re.MULTILINE), part
    assert text.count("totals[word] = totals.get(word, 0) + 1") == 2
    assert re.search(r"^future of acme-future is left out: incompatible", text, re.MULTILINE)
    assert re.search(r"^  broken is left out: .*a_module_that_is_missing", text, re.MULTILINE)
    row = re.search(r"^lookup +\d+ \((\d+\.\d)x\) +(\d\.\d\d) +(\d+) +yes$", text, re.MULTILINE)
    assert row, text
    plain = re.search(r"^plain decoding +\d+ \(1\.0x\) +- +(\d+) +-$", text, re.MULTILINE)
    assert plain, text
    assert float(row[2]) > 2
    assert int(row[3]) < int(plain[1])
    assert "On your own model:" in text


@pytest.mark.slow
def test_what_learns_is_timed_on_prompts_that_are_new_to_it(
    run: Callable[..., Any], installed: Callable[..., None]
) -> None:
    installed("acme-memoriser", methods={"memoriser": ""}, source=MEMORISER)
    result = run("demo", "--method", "memoriser", "--max-tokens", "20")
    assert result.exit_code == 0, result.output
    row = re.search(r"^memoriser +\d+ \(\d+\.\dx\) +(\S+) +(\d+) +yes$", result.stdout, re.MULTILINE)
    plain = re.search(r"^plain decoding +\d+ \(1\.0x\) +- +(\d+) +-$", result.stdout, re.MULTILINE)
    assert row is not None, result.stdout
    assert plain is not None, result.stdout
    assert (row[1], row[2]) == ("-", plain[1])
    assert "memoriser learns from requests: each prompt was measured once, when it was new." in result.stdout


def test_prompts_suit_the_model() -> None:
    """The renamed functions come out right, and the shown continuation does not end in the middle of a line."""
    from specplug import LLM, SamplingParams

    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=4, allowed_plugins=()) as llm:
        params = [SamplingParams(temperature=0.0, max_tokens=prompt.max_tokens) for prompt in PROMPTS]
        outputs = [output.outputs[0] for output in llm.generate([prompt.text for prompt in PROMPTS], params)]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        renaming = re.search(r"# After renaming (\w+) to (\w+):\n$", prompt.text)
        if renaming is None:
            assert output.text.endswith("other.height")
            continue
        before = prompt.text.removeprefix("# Before:\n").partition("\n# After")[0]
        assert output.text.strip() == re.sub(rf"\b{renaming[1]}\b", renaming[2], before).strip()
        assert output.finish_reason == "stop"


@pytest.mark.slow
def test_methods_can_be_chosen_and_outputs_cut(run: Callable[..., Any], lookup: str) -> None:
    result = run("demo", "--method", "lookup", "--max-tokens", "6", "--num-speculative-tokens", "2")
    assert result.exit_code == 0, result.output
    assert "Result: 18 tokens" in result.stdout
    assert result.stdout.count("== Speculator ") == 1
    assert lookup in result.stdout


def test_nothing_installed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "find_plugins", list)
    result = run("demo", "--max-tokens", "4")
    assert result.exit_code == 0
    assert "== Plain decoding" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("pip install specplug-ngram")


def test_another_output_is_an_error(run: Callable[..., Any], installed: Callable[..., None]) -> None:
    installed("acme-careless", methods={"careless": ""}, source=OWN_VERIFY)
    result = run("demo", "--method", "careless", "--max-tokens", "8")
    assert result.exit_code == 1
    assert re.search(r"^careless .* no$", result.stdout, re.MULTILINE)
    assert "careless has its own verification" in result.stdout
