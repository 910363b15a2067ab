"""`specplug generate`: prompts from a file, and JSON."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from specplug import LLM, SamplingParams
from specplug.cli.run import generate as generate_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BASE = ("--dtype", "float32", "--device", "cpu", "--quiet", "--allow-plugin", "lookup")
PROMPTS = ["import os\nimport", "def f(x):\n    return", "class A:"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Prompts in every form; blank lines count, and hold nothing."""
    path = tmp_path / "prompts.jsonl"
    lines = [
        json.dumps(PROMPTS[0]),
        "",
        json.dumps({"prompt": PROMPTS[1], "sampling_params": {"max_tokens": 5, "n": 2, "temperature": 1, "seed": 3}}),
        json.dumps({"prompt_token_ids": [266, 289], "sampling_params": {}}),
    ]
    path.write_text("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]), encoding="utf-8")
    return str(path)


def test_each_output_has_a_header(run: Callable[..., Any], file: str) -> None:
    result = run("generate", "tiny", "--prompts", file, "--max-tokens", "6", *BASE)
    assert result.exit_code == 0, result.output
    headers = [line for line in result.stdout.splitlines() if line.startswith("== ")]
    assert headers == [
        "== 1: import os import ==",
        "== 2, completion 1: def f(x): return ==",
        "== 2, completion 2: def f(x): return ==",
        "== 3: 2 token ids ==",
    ]
    assert result.stderr == ""
    assert result.stdout.endswith("\n")


def test_json_is_what_the_python_api_gives(run: Callable[..., Any], file: str, lookup: str) -> None:
    result = run("generate", "tiny", "--prompts", file, "--max-tokens", "6", "--json", *BASE)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    base = SamplingParams(temperature=0.0, max_tokens=6)
    params = [base, SamplingParams(temperature=1, max_tokens=5, n=2, seed=3), base]
    with LLM("tiny", dtype="float32", device="cpu", max_num_seqs=4, allowed_plugins=()) as llm:
        outputs = llm.generate([*PROMPTS[:2], {"prompt_token_ids": [266, 289]}], params)
    expected = [
        {
            "request_id": output.request_id,
            "index": completion.index,
            "prompt": output.prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": "length",
            "stop_reason": None,
            "num_cached_tokens": 0,
            "unverified_methods": [],
        }
        for output in outputs
        for completion in output.outputs
    ]
    metrics = [line.pop("metrics") for line in lines]
    assert lines == expected
    assert set(metrics[0]) == {
        "num_steps",
        "num_spec_steps",
        "num_draft_tokens",
        "num_accepted_draft_tokens",
        "acceptance_histogram",
        "by_method",
        "mean_acceptance_length",
        "draft_acceptance_rate",
    }
    drafted = run("generate", "tiny", "--prompts", file, "--json", *BASE, "--speculative-config", lookup)
    last = json.loads(drafted.stdout.splitlines()[0])["metrics"]
    assert last["by_method"]["lookup"]["num_draft_tokens"] == last["num_draft_tokens"] > 0
    assert last["mean_acceptance_length"] > 1


def test_a_single_prompt_as_json_with_logprobs_and_a_stop(run: Callable[..., Any]) -> None:
    scores = ("--logprobs", "2", "--prompt-logprobs", "0")
    arguments = ("--prompt", "import os", "--max-tokens", "9", "--stop", "join", *scores)
    result = run("generate", "tiny", *arguments, "--json", *BASE)
    (item,) = map(json.loads, result.stdout.splitlines())
    assert (item["finish_reason"], item["stop_reason"]) == ("stop", "join")
    assert item["prompt"] == "import os"
    assert len(item["logprobs"]) == len(item["token_ids"])
    assert item["cumulative_logprob"] == pytest.approx(sum(position[0]["logprob"] for position in item["logprobs"]))
    first = item["logprobs"][0]
    assert len(first) == 2
    assert set(first[0]) == {"token_id", "logprob", "rank", "text"}
    assert item["text"].startswith(first[0]["text"])
    assert item["prompt_logprobs"][0] is None
    assert len(item["prompt_logprobs"]) > 1


def test_many_completions_of_one_prompt(run: Callable[..., Any]) -> None:
    result = run("generate", "tiny", "--prompt", "import", "--n", "2", "--max-tokens", "3", *BASE)
    assert re.findall("^== .* ==$", result.stdout, re.MULTILINE) == [
        "== 1, completion 1: import ==",
        "== 1, completion 2: import ==",
    ]


def test_prompts_from_standard_input_and_stats(run: Callable[..., Any], lookup: str) -> None:
    arguments = ("--prompts", "-", "--max-tokens", "30", "--stats", "--speculative-config", lookup, *BASE)
    result = run("generate", "tiny", *arguments, stdin='"import os"\n"import re"')
    assert result.exit_code == 0, result.output
    stats = dict(re.split(r" {2,}", line, maxsplit=1) for line in result.stderr.splitlines())
    assert set(stats) == {"prompts", "tokens", "speed", "target steps", "acceptance length", "lookup"}
    assert stats["prompts"] == "2, 2 completions"
    assert stats["tokens"] == "60"
    assert int(stats["target steps"]) < 60


def test_progress_is_shown_on_a_terminal_only(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    shown: list[bool] = []
    original = LLM.generate

    def generate(self: LLM, *args: Any, use_tqdm: bool, **options: Any) -> Any:
        shown.append(use_tqdm)
        return original(self, *args, use_tqdm=use_tqdm, **options)

    monkeypatch.setattr(LLM, "generate", generate)
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(
        "generate", "tiny", "--prompts", file, "--max-tokens", "2", *(each for each in BASE if each != "--quiet")
    )
    assert result.exit_code == 0
    assert shown == [False]


def test_batch_options_that_were_not_given_suit_the_prompts(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    engines: list[dict[str, Any]] = []
    monkeypatch.setattr(generate_run, "run_job", lambda job, out, err: engines.append(job.engine))
    for options in ((), ("--n", "50"), ("--max-num-batched-tokens", "3"), ("--max-num-seqs", "9")):
        assert run("generate", "tiny", "--prompts", file, *options).exit_code == 0
    assert [engine["max_num_seqs"] for engine in engines] == [4, 32, 3, 9]


def test_without_a_tokenizer_it_runs_on_ids(run: Callable[..., Any], file: str, tmp_path: Path) -> None:
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"prompt_token_ids": [14, 470]}')
    result = run("generate", "tiny", "--prompts", str(ids), "--skip-tokenizer-init", "--max-tokens", "3", *BASE)
    assert re.fullmatch(r"== 1: 2 token ids ==\n\d+ \d+ \d+\n", result.stdout), result.output
    refused = run("generate", "tiny", "--prompts", file, "--skip-tokenizer-init", *BASE)
    assert "a prompt given as text needs a tokenizer" in refused.stderr
    other = run("generate", "tiny", "--prompts", str(ids), "--tokenizer", str(tmp_path), "--max-tokens", "3", *BASE)
    assert "has no tokenizer that can be loaded" in other.stderr
