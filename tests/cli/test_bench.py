"""`specplug bench`, on the embedded model."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'
DRAFT = '{"method": "draft_model", "num_speculative_tokens": 2}'
BENCH = ("bench", "tiny", "--device", "cpu", "--memory", "512MiB", "--max-tokens", "6", "--repetitions", "2", "-q")
CONFIG = "--speculative-config"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    lines = ["x = [1, 2, 3, 1, 2, 3, 1,", {"prompt": "def add(a, b):\n"}, {"prompt_token_ids": [5, 6, 7, 5, 6, 7, 5]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def test_a_report(run: Callable[..., Any], prompts: str) -> None:
    options = ("--dtype", "float32", "--prompts", prompts, "--batch", "1,2", "--temperature", "0,1", "--json", "-")
    result = run(*BENCH, *options, CONFIG, NGRAM, CONFIG, DRAFT)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert (report["target"], report["dtype"], report["device"]) == ("tiny", "float32", "cpu")
    assert (report["max_tokens"], report["repetitions"], len(report["prompt_tokens"])) == (6, 2, 3)
    assert report["prompt_tokens"][2] == 7
    assert {"processor", "cores", "threads", "memory_bytes", "system"} <= report["machine"].keys()
    assert {"python", "specplug", "torch", "transformers", "specplug-ngram"} <= report["versions"].keys()
    assert report["date"].startswith("20")
    shown = [(r["temperature"], r["batch"], r["method"]) for r in report["results"]]
    assert shown == [(t, b, m) for t in (0.0, 1.0) for b in (1, 2) for m in ("plain decoding", "ngram", "draft_model")]
    for line in report["results"]:
        check_result(line)


def check_result(line: dict[str, Any]) -> None:
    assert line["not_available"] is None
    for name in ("tokens_per_second", "ratio_to_plain"):
        assert 0 < line[name]["low"] <= line[name]["median"] <= line[name]["high"]
    for name in ("first_token_seconds", "inter_token_seconds"):
        assert 0 < line[name]["p50"] <= line[name]["p99"]
    assert len(line["tokens_per_second_by_repetition"]) == 2
    assert line["speculator_faults"] == 0
    assert line["unverified_methods"] == []
    if line["method"] == "plain decoding":
        assert line["speculative_config"] is None
        assert line["cost_model"] is None
        assert line["ratio_to_plain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        return
    assert line["speculative_config"]["method"] == line["method"]
    drafted, accepted = line["draft_tokens"], line["accepted_draft_tokens"]
    assert drafted >= accepted >= 0
    assert 1 <= line["acceptance_length"] <= 4
    shares = line["acceptance_by_position"]
    assert shares == sorted(shares, reverse=True)
    assert 1 + sum(shares) == pytest.approx(line["acceptance_length"], abs=1e-4)
    costs = line["cost_model"]
    assert costs["tokens_per_step"] >= 1
    assert min(costs[f"{name}_seconds"] for name in ("plain", "verify", "draft", "other")) > 0
    assert all(costs[name]["median"] > 0 for name in ("predicted", "measured", "of_predicted", "promised"))
    if line["temperature"] == 0:
        same, of = line["same_outputs_as_plain"]
        assert same == of > 0  # float32: token for token
    else:
        assert line["same_outputs_as_plain"] is None


@pytest.mark.slow
def test_a_table_a_report_and_a_picture(run: Callable[..., Any], prompts: str, tmp_path: Path) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    result = run(*BENCH, "--prompts", prompts, CONFIG, NGRAM, "--json", str(report), "--plot", str(plot))
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    table = result.stdout.splitlines()
    assert table[0].startswith("tiny, bfloat16, ")
    assert "== batch 1, temperature 0 ==" in table
    assert any(line.split()[:1] == ["ngram"] for line in table)
    assert json.loads(report.read_text(encoding="utf-8"))["results"][1]["method"] == "ngram"
    root = ElementTree.parse(plot).getroot()
    assert root.tag.endswith("svg")
    assert len(list(root.iter())) > 100


@pytest.mark.slow
def test_a_png_of_several_settings(run: Callable[..., Any], prompts: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result = run(*BENCH, "--prompts", prompts, CONFIG, NGRAM, "--batch", "1,2", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    data = plot.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert len(data) > 20_000


@pytest.mark.slow
def test_transformers_beside_it(run: Callable[..., Any], prompts: str) -> None:
    options = ("--dtype", "float32", "--prompts", prompts, "--batch", "1,2", "--peer", "transformers", "--json", "-")
    result = run(*BENCH, *options, CONFIG, NGRAM, CONFIG, DRAFT)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    lines = {(r["batch"], r["method"]): r for r in json.loads(result.stdout)["results"]}
    for name in ("generate", "prompt lookup", "assisted generation"):
        line = lines[1, f"transformers {name}"]
        assert line["kind"] == "peer"
        assert line["tokens_per_second"]["median"] > 0
        assert 0 < line["first_token_seconds"]["p50"] <= line["first_token_seconds"]["p99"]
        assert line["inter_token_seconds"]["p50"] > 0
        same, of = line["same_outputs_as_plain"]
        assert same == of == 6  # the same weights, and all the tokens
    assert lines[2, "transformers generate"]["not_available"] is None
    assert lines[2, "transformers prompt lookup"]["not_available"] == "one sequence at a time only"


@pytest.mark.slow
def test_the_peer_alone(run: Callable[..., Any], prompts: str) -> None:
    result = run(*BENCH, "--prompts", prompts, "--peer", "transformers", "--json", "-", "--temperature", "0.5")
    assert result.exit_code == 0, result.output
    methods = [line["method"] for line in json.loads(result.stdout)["results"]]
    assert methods == ["plain decoding", "transformers generate"]


@pytest.mark.slow
def test_one_engine_at_a_time(run: Callable[..., Any], prompts: str) -> None:
    result = run(*BENCH, "--prompts", prompts, CONFIG, NGRAM, "--one-at-a-time", "--json", "-")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert [len(r["tokens_per_second_by_repetition"]) for r in json.loads(result.stdout)["results"]] == [2, 2]


def test_built_in_prompts_and_startup_steps(run: Callable[..., Any]) -> None:
    loud = [option for option in BENCH if option != "-q"]
    result = run(*loud, "--repetitions", "1", CONFIG, NGRAM)
    assert result.exit_code == 0, result.output
    assert "6 prompts of " in result.stdout
    headings = [line for line in result.stderr.splitlines() if not line.startswith(" ")]
    assert headings == ["plain decoding", "ngram"]
    assert result.stderr.count("6/6 ready") == 2


LENIENT = """
from specplug import Proposal, Verdict, hookimpl

class Lenient:
    @hookimpl
    def propose(self, batch):
        return Proposal([[5] * min(row.budget.max_nodes, 1) for row in batch.rows])

    @hookimpl
    def verify(self, batch, proposal, target):
        return Verdict([list(range(len(tokens))) for tokens in proposal.tokens], [6] * len(proposal.tokens))

@hookimpl
def load_speculator(config, target):
    return Lenient()
"""


def test_a_rule_of_its_own_is_named(
    run: Callable[..., Any], installed: Callable[..., None], prompts: str, tmp_path: Path
) -> None:
    installed("acme-lenient", methods={"lenient": ""}, source=LENIENT)
    report = tmp_path / "report.json"
    config = '{"method": "lenient", "num_speculative_tokens": 2}'
    result = run(*BENCH, "--prompts", prompts, CONFIG, config, "--json", str(report))
    assert result.exit_code == 0, result.output
    assert "lenient verifies by a rule of its own, which specplug does not check." in result.stdout
    lines = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert [line["unverified_methods"] for line in lines] == [[], ["lenient"]]


BAD: list[tuple[tuple[str, ...], int, str]] = [
    ((), 2, "Missing option '--speculative-config' or '--peer' (see: specplug bench --help)"),
    ((CONFIG, NGRAM, "--batch", "1,0"), 2, "'1,0' is not a list of whole numbers of at least 1, such as 1,4,16"),
    ((CONFIG, NGRAM, "--batch", "many"), 2, "'many' is not a list of whole numbers"),
    ((CONFIG, NGRAM, "--temperature", "-1"), 2, "'-1' is not a list of numbers of at least 0, such as 0,1"),
    ((CONFIG, NGRAM, "--temperature", "nan"), 2, "'nan' is not a list of numbers"),
    ((CONFIG, NGRAM, "--max-tokens", "1"), 2, "Invalid value for '--max-tokens'"),
    ((CONFIG, NGRAM, "--repetitions", "0"), 2, "Invalid value for '--repetitions'"),
    ((CONFIG, NGRAM, "--peer", "vllm"), 2, "Invalid value for '--peer': 'vllm' is not 'transformers'"),
    ((CONFIG, "{method: ngram}"), 1, "--speculative-config: not valid JSON at line 1, column 2"),
    ((CONFIG, NGRAM, CONFIG, '{"num_speculative_tokens": 2}'), 1, "speculative_config needs 'method'"),
    ((CONFIG, '{"method": "ngran"}'), 1, "no speculator named 'ngran'; did you mean 'ngram'?"),
    ((CONFIG, '{"method": "ngram", "prompt_lookup": 2}'), 1, "unknown key 'prompt_lookup' for method 'ngram'"),
    (
        (CONFIG, NGRAM, "--batch", "8", "--max-num-seqs", "4"),
        1,
        "--batch 8 is more than --max-num-seqs 4; raise",
    ),
    (
        (CONFIG, NGRAM, "--max-tokens", "5000"),
        1,
        "built-in prompt 1: 115 prompt tokens and 5,000 to generate are more",
    ),
    ((CONFIG, NGRAM, "--memory", "1MiB"), 1, "to keep one at a time: --one-at-a-time"),
    ((CONFIG, NGRAM, "--plot", "picture.bmp"), 1, "'picture.bmp': the name must end in one of .png, .svg, .pdf"),
    ((CONFIG, NGRAM, "--plot", "nowhere/picture.png"), 1, "--plot 'nowhere/picture.png': there is no folder 'nowhere'"),
    ((CONFIG, NGRAM, "--json", "nowhere/report.json"), 1, "--json 'nowhere/report.json': there is no folder 'nowhere'"),
    ((CONFIG, NGRAM, "--prompts", "nowhere.jsonl"), 1, "--prompts 'nowhere.jsonl' cannot be read"),
    ((CONFIG, NGRAM, "--skip-tokenizer-init"), 1, "built-in prompt 1: "),
]


@pytest.mark.parametrize(("options", "status", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_input_is_one_line(
    run: Callable[..., Any],
    options: tuple[str, ...],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*BENCH, *options)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("specplug: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "sampling_params": {"n": 2}}', "line 1: 'sampling_params' are not supported here"),
        ('{"prompt_token_ids": [99999]}', "prompts.jsonl, line 1"),
    ],
)
def test_bad_prompts_are_named(run: Callable[..., Any], line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    result = run(*BENCH, "--prompts", str(file), CONFIG, NGRAM)
    assert (result.exit_code, result.stdout) == (1, "")
    (said,) = result.stderr.splitlines()
    assert message in said


def test_a_picture_needs_matplotlib(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(*BENCH, CONFIG, NGRAM, "--plot", "picture.png")
    assert result.exit_code == 1
    assert result.stderr == (
        "specplug: error: --plot needs matplotlib; install it with: pip install 'specplug[bench]'\n"
    )
