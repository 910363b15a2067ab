"""The peer's process: the protocol, and that it runs only while it is measured. vLLM itself is played by a small module."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peers.vllm_contestant import MODES, VllmContestant, environment

from specplug.bench.workload import BenchPrompt, Cell, Workload

pytestmark = pytest.mark.unit

VLLM = """
import sys

__version__ = "0.0-played"
print("noise on standard output")

class SamplingParams:
    def __init__(self, **options):
        self.max_tokens = options["max_tokens"]

class LLM:
    def __init__(self, model, speculative_config=None):
        if model == "broken":
            sys.exit("there is no such model")
        self.llm_engine = Engine(3 if speculative_config else 1)

class Engine:
    def __init__(self, pace):
        self.pace, self.left = pace, {}

    def add_request(self, name, prompt, params):
        assert len(self.left) < 2
        self.left[f"{name}-0123"] = [prompt["prompt_token_ids"][0], params.max_tokens, True]

    def step(self):
        return [self.advance(name) for name in list(self.left)]

    def advance(self, name):
        token, left, is_first = self.left[name]
        count = 1 if is_first else min(self.pace, left)
        self.left[name] = [token, left - count, False]
        if left == count:
            del self.left[name]
        return Output(name, [token] * count, left == count)

class Output:
    def __init__(self, name, tokens, finished):
        self.request_id, self.token_ids, self.finished = name, tokens, finished
        self.outputs = [self]
"""
WORKLOAD = Workload("test", [BenchPrompt("a", [7]), BenchPrompt("b", [8]), BenchPrompt("c", [9])], max_tokens=11)
Make = Callable[..., VllmContestant]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(VLLM, encoding="utf-8")
    (package / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 1\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made: list[VllmContestant] = []

    def make(config: dict[str, Any] | None = None, model: str = "fine") -> VllmContestant:
        made.append(
            VllmContestant(
                "played",
                Path(sys.executable),
                config,
                {"model": model},
                threads=1,
                mode=MODES[0],
                log=tmp_path / "logs" / "played.log",
            )
        )
        return made[-1]

    yield make
    for contestant in made:
        contestant.close()


def state(contestant: VllmContestant) -> str:
    """The letter by which the system calls what the process does; T: it is stopped."""
    assert contestant._process is not None
    text = Path(f"/proc/{contestant._process.pid}/stat").read_text(encoding="utf-8")
    return text.rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_stopped_while_others_are_measured(make: Make) -> None:
    contestant = make()
    contestant.open(lambda report: None)
    wait_for(lambda: state(contestant) == "T")
    seen: list[int] = []
    for batch, requests in ((1, 3), (2, 4)):
        run = contestant.run(WORKLOAD, Cell(batch, 0.0), seen.append)
        assert run.tokens == 11 * requests
        assert run.outputs == [[7] * 11, [8] * 11, [9] * 11, [7] * 11][:requests]
        assert len(run.first_token_seconds) == requests
        assert len(run.token_seconds) == 10 * requests
        assert run.stats is None
        wait_for(lambda: state(contestant) == "T")
    assert seen == [33, 44]
    process = contestant._process
    contestant.close()
    assert process is not None
    assert process.poll() is not None
    contestant.close()


def test_acceptance_is_seen_from_what_comes_together(make: Make) -> None:
    contestant = make({"method": "draft_model", "num_speculative_tokens": 3})
    contestant.open(lambda report: None)
    run = contestant.run(WORKLOAD, Cell(1, 0.0), lambda tokens: None)
    assert run.stats is not None
    assert run.stats.acceptance_histogram == [3, 0, 9]  # 1 + 3 + 3 + 3 + 1 tokens, three times
    assert run.stats.mean_acceptance_length == 2.5
    assert run.stats.num_draft_tokens == 36


def test_one_that_does_not_start_has_nothing_to_show(make: Make, tmp_path: Path) -> None:
    contestant = make(model="broken")
    contestant.open(lambda report: None)
    log = tmp_path / "logs" / "played.log"
    assert contestant.cannot(Cell(1, 0.0)) == f"does not start, see {log}"
    assert "there is no such model" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", MODES)
def test_it_gets_as_many_threads_as_it_is_told(mode: str) -> None:
    made = environment(Path(sys.executable), 1, mode)
    assert made["OMP_NUM_THREADS"] == "1"
    assert made["HF_HUB_OFFLINE"] == "1"
