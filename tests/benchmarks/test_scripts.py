"""The benchmarks run as their commands say, in small, and what they measured can be drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import acceptance
import busy_machine
import never_slower
import ngram_index
import plot_against_vllm
import plot_costs
import plot_never_slower
import pytest
import speculation_costs
import step_costs

from support.models import save_model

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script's `main` with a command line."""

    def start(script: Any, *words: object) -> None:
        monkeypatch.setattr("sys.argv", [script.__file__, *map(str, words)])
        script.main()

    return start


@pytest.mark.slow
def test_costs_of_steps(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "target", "llama")
    monkeypatch.setattr(step_costs, "Machine", partial(step_costs.Machine, 1 << 22))
    out = tmp_path / "steps.json"
    run(step_costs, folder, "--positions", 1200, "--repeats", 1, "--memory", "64MiB", "--threads", 1, "--json", out)
    report = json.loads(out.read_text())
    assert set(report["by_tokens"]) == {"1", "2", "4", "6", "8", "16", "32", "64"}
    assert set(report["by_context"]) == {"128", "1024"}
    assert all(0 < us < 1e6 for us in report["outside_the_forward_us"].values())


@pytest.mark.slow
def test_never_slower(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "never.json", tmp_path / "never.svg"
    small = ["--prompts", 2, "--tokens", 8, "--repeats", 2, "--engines", 2, "--queue", 2, "--lengths", 1, 2]
    small += ["--memory", "96MiB"]
    run(never_slower, "--methods", "ngram", "--batches", 2, "--workloads", "editing", *small, "--json", out)
    adversarial, good = json.loads(out.read_text())["rows"]
    assert adversarial["tau"] == 1.0
    assert set(good["fixed"]) == {"1", "2"}
    run(plot_never_slower, out, "--out", picture)
    assert "<svg" in picture.read_text()


@pytest.mark.slow
def test_costs_of_speculation(run: Run, tmp_path: Path) -> None:
    out, picture = tmp_path / "costs.json", tmp_path / "costs.svg"
    small = ["--gammas", 1, 2, "--prompts", 2, "--tokens", 8, "--repeats", 1]
    run(speculation_costs, "--method", "draft_model", *small, "--json", out)
    run(plot_costs, out, "--out", picture)
    assert "<svg" in picture.read_text()


def test_acceptance(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "acceptance.json"
    config = '{"method": "draft_model", "num_speculative_tokens": 2}'
    run(acceptance, config, "--temperatures", 0, "--prompts", 2, "--tokens", 8, "--batch", 2, "--json", out)
    assert out.stat().st_size


def test_the_ngram_index(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(ngram_index, "--context", 64, "--rows", 2, "--steps", 3, "--json")
    assert json.loads(capsys.readouterr().out)


def test_a_picture_of_the_comparison_with_vllm(run: Run, tmp_path: Path) -> None:
    ratio = {"median": 1.5, "low": 1.2, "high": 1.75}
    rows = [
        {"batch": 1, "temperature": 0.0, "method": "ngram", "peer": "vLLM ngram", "ratio": ratio},
        {"batch": 1, "temperature": 0.0, "method": "eagle3", "peer": "vLLM eagle3", "ratio": None},
        {"batch": 1, "temperature": 0.0, "method": "ngram", "peer": "transformers prompt lookup", "ratio": ratio},
    ]
    measured, picture = tmp_path / "measured.json", tmp_path / "picture.svg"
    measured.write_text(json.dumps({"editing": {"ratios": rows}}), encoding="utf-8")
    assert len(plot_against_vllm.read(f"some={measured}")) == 1
    run(plot_against_vllm, f"some={measured}", "--out", picture)
    assert "<svg" in picture.read_text()


@pytest.mark.slow
def test_a_busy_machine(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save_model(tmp_path / "target", "llama"), tmp_path / "busy.json"
    small = ("--tokens", 4, "--repetitions", 1, "--competitors", 0, 1, "--peers", "transformers")
    run(busy_machine, folder, *small, "--spins", 7, "--json", out)
    speeds = json.loads(out.read_text())["speeds"]
    assert set(speeds) - {"quota of 1.5 cores"} == {"0 busy", "1 busy"}
    for found in speeds.values():
        assert set(found) == {"specplug", "specplug spin 7", "transformers"}
        assert all(len(each) == 1 and each[0] > 0 for each in found.values())
    assert "of quiet" in capsys.readouterr().out
