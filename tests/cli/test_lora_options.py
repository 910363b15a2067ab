"""LoRA adapters on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from specplug import LLM, SamplingParams, resolve_model
from support.adapters import save_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = ("--dtype", "float32", "--device", "cpu")
PROMPT = "import os\n\nclass"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "a", Path(resolve_model("tiny")), size=0.05)


def test_generate_picks_adapters_by_name(run: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    with LLM("tiny", dtype="float32", device="cpu", lora_modules={"a": adapter}) as llm:
        params = SamplingParams(temperature=0, max_tokens=6)
        outputs = llm.generate([PROMPT, PROMPT], params, lora_request=["a", None], use_tqdm=False)
    adapted, plain = (output.outputs[0].token_ids for output in outputs)
    assert adapted != plain
    given = ("--lora-modules", f"a={adapter}", "--max-tokens", "6", "--json", "--quiet", *BASE)
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in (PROMPT, {"prompt": PROMPT, "lora": "a"})))

    def ids(*words: str) -> list[list[int]]:
        result = run("generate", "tiny", *words, *given)
        assert result.exit_code == 0, result.output
        return [json.loads(line)["token_ids"] for line in result.stdout.splitlines()]

    assert ids("--prompts", str(file)) == [plain, adapted]
    assert ids("--prompts", str(file), "--lora", "a") == [adapted, adapted]
    assert ids("--prompt", PROMPT, "--lora", "a") == [adapted]


def test_the_plan_counts_the_room(run: Callable[..., Any], adapter: Path) -> None:
    module = json.dumps({"name": "a", "path": str(adapter)})
    sizes = []
    for words in ((), ("--enable-lora",), ("--lora-modules", module, "--max-loras", "2", "--max-lora-rank", "8")):
        result = run("plan", "tiny", "--memory", "1GiB", "--json", *words, *BASE)
        assert result.exit_code == 0, result.output
        shown = json.loads(result.stdout)
        assert sum(shown["parts"].values()) == shown["total_bytes"]
        sizes.append(shown["parts"]["adapters"])
    assert (sizes[0], round(sizes[1] / sizes[2])) == (0, 4)  # four of rank 16; two of rank 8
    text = run("plan", "tiny", "--memory", "1GiB", "--lora-modules", f"a={adapter}", *BASE).stdout
    assert "  LoRA adapters " in text
    assert ", L LoRA adapters, . left" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "tiny", "--lora-modules", "a"), "--lora-modules a: expected NAME=PATH, or a JSON object"),
        (("plan", "tiny", "--lora-modules", '{"name": "a"}'), "lora_modules: {'name': 'a'}: expected a mapping"),
        (("plan", "tiny", "--lora-modules", "a=x", "--lora-modules", "a=y"), "two adapters have the lora_name 'a'"),
        (("plan", "tiny", "--max-loras", "2"), "need enable_lora=True or lora_modules"),
        (
            ("generate", "tiny", "--prompt", "x", "--lora", "a"),
            "--prompt: no adapter 'a' (none is given); give it with",
        ),
        (
            ("generate", "tiny", "--prompt", "x", "--lora", "b", "--lora-modules", "a=x"),
            "--prompt: no adapter 'b' (given: a); give it with --lora-modules",
        ),
        (("serve", "tiny", "--lora-modules", "tiny=x"), "the adapter 'tiny' has the name of the model"),
    ],
)
def test_what_is_wrong(run: Callable[..., Any], words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output


def test_lines_name_adapters_by_text(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "x", "lora": 3}))
    result = run("generate", "tiny", "--prompts", str(file))
    assert "line 1: 'lora': expected the name of an adapter, got 3" in str(result.exception) + result.output
