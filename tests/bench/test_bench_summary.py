"""From repetitions to figures, on known data."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from specplug.bench.comparison import Comparison, Watcher, compare, tokens_to_generate
from specplug.bench.contestants import PLAIN, label_configs
from specplug.bench.measurement import DecodeCosts, Measurement
from specplug.bench.summary import cost_model, summarize
from specplug.bench.workload import BenchPrompt, Cell, Workload
from specplug.stats import SpeculationStats

pytestmark = pytest.mark.unit

WORKLOAD = Workload("test", [BenchPrompt("a", [1]), BenchPrompt("b", [2, 3])], max_tokens=10)
CELL = Cell(1, 0.0)


class Fake:
    """A contestant whose runs take as long as it is told."""

    is_taught = False

    def __init__(
        self, label: str, seconds: float, log: list[str] | None = None, most: int = 99, *, learns: bool = False
    ) -> None:
        self.label = label
        self.learns = learns
        self.kind = "plain" if label == PLAIN else "method"
        self.config: dict[str, Any] | None = None if label == PLAIN else {"method": label}
        self._seconds = seconds
        self._log = [] if log is None else log
        self._most = most

    def open(self, on_step: Any) -> None:
        self._log.append(f"open {self.label}")
        self.is_taught = False

    def close(self) -> None:
        self._log.append(f"close {self.label}")

    def cannot(self, cell: Cell) -> str | None:
        return "too many" if cell.batch > self._most else None

    def run(self, workload: Workload, cell: Cell, advance: Any) -> Measurement:
        self._log.append(self.label)
        self.is_taught = self.learns
        advance(workload.num_tokens(cell.batch))
        stats = SpeculationStats()
        if self.kind == "method":
            for accepted in (0, 1, 3, 3):
                stats.record(3, accepted, self.label)
        return Measurement(20, self._seconds, [0.5, 0.7], [0.1, 0.2, 0.3], [[1], [2]], None, stats)


def summaries(*contestants: Fake, cell: Cell = CELL) -> Any:
    return summarize(compare(contestants, [cell], WORKLOAD, 3, Watcher()))


def test_speed_beside_plain_decoding() -> None:
    plain, fast = summaries(Fake(PLAIN, 2.0), Fake("fast", 1.0))
    assert (plain.tokens_per_second.median, fast.tokens_per_second.median) == (10.0, 20.0)
    assert (plain.ratio.median, fast.ratio.median) == (1.0, 2.0)
    assert fast.first_token[0] == pytest.approx(0.6)
    assert fast.token[0] == pytest.approx(0.2)
    assert (plain.same_outputs, fast.same_outputs) == (None, (6, 6))


def test_acceptance_by_position() -> None:
    _, fast = summaries(Fake(PLAIN, 2.0), Fake("fast", 1.0))
    assert fast.acceptance_length == 1 + 7 / 4
    assert fast.by_position == [0.75, 0.5, 0.5]
    assert fast.draft_tokens == (36, 21)


def test_what_a_contestant_cannot_do_says_why() -> None:
    _, fast = summaries(Fake(PLAIN, 2.0), Fake("fast", 1.0, most=1), cell=Cell(4, 1.0))
    assert fast.missing == "too many"
    assert fast.tokens_per_second is None


def test_drawn_outputs_are_not_compared() -> None:
    assert summaries(Fake(PLAIN, 2.0), Fake("fast", 1.0), cell=Cell(1, 1.0))[1].same_outputs is None


def test_repetitions_are_interleaved_and_another_one_is_first_each_time() -> None:
    log: list[str] = []
    contestants = [Fake(PLAIN, 2.0, log), Fake("fast", 1.0, log)]
    compare(contestants, [CELL], WORKLOAD, 2, Watcher())
    order = [PLAIN, "fast"]
    assert log == ["open " + PLAIN, "open fast", *order, *order[::-1], *order, "close fast", "close " + PLAIN]


def test_one_at_a_time_holds_one() -> None:
    log: list[str] = []
    contestants = [Fake(PLAIN, 2.0, log), Fake("fast", 1.0, log)]
    result = compare(contestants, [CELL], WORKLOAD, 2, Watcher(), one_at_a_time=True)
    assert [len(runs) for runs in result.runs.values()] == [2, 2]
    held = 0
    for entry in log:
        held += entry.startswith("open") - entry.startswith("close")
        assert held in (0, 1)
    assert log.count("fast") == 4


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_the_tokens_to_come_are_known(one_at_a_time: bool) -> None:
    contestants = [Fake(PLAIN, 2.0), Fake("fast", 1.0, most=1), Fake("learner", 1.0, learns=True)]
    cells = [CELL, Cell(4, 0.0)]
    seen: list[int] = []
    total = tokens_to_generate(contestants, cells, WORKLOAD, 3, one_at_a_time=one_at_a_time)
    compare(contestants, cells, WORKLOAD, 3, Watcher(advance=seen.append), one_at_a_time=one_at_a_time)
    assert sum(seen) == total


def test_what_learns_is_opened_anew_for_every_counted_run() -> None:
    log: list[str] = []
    contestants = [Fake(PLAIN, 2.0, log), Fake("learner", 1.0, log, learns=True)]
    compare(contestants, [CELL], WORKLOAD, 2, Watcher())
    warm_and_counted = ["learner", "learner"]
    again = ["close learner", "open learner"]
    opened = ["open " + PLAIN, "open learner"]
    first, second = [*warm_and_counted, PLAIN], [PLAIN, *again, *warm_and_counted]
    assert log == [*opened, PLAIN, *first, *second, "close learner", "close " + PLAIN]


def test_what_learns_has_nothing_to_show_where_prompts_repeat() -> None:
    plain, learner = summaries(Fake(PLAIN, 2.0), Fake("learner", 1.0, learns=True), cell=Cell(2, 0.0))
    assert plain.missing is None
    assert learner.missing == "it learns: needs 4 different prompts, got 2"


def test_unrelated_prompts_have_the_lengths_of_the_workload_and_none_of_its_text() -> None:
    work = Workload("test", [BenchPrompt("a", list(range(100, 400))), BenchPrompt("b", [7, 8, 9])], 10)
    other = work.unrelated()
    assert [len(prompt.ids) for prompt in other.prompts] == [300, 3]
    pairs = {(a, b) for prompt in work.prompts for a, b in pairwise(prompt.ids)}
    seen = [pair for prompt in other.prompts for pair in pairwise(prompt.ids)]
    assert sum(pair in pairs for pair in seen) <= 3
    assert all(0 <= token < 400 for prompt in other.prompts for token in prompt.ids)


def test_a_batch_has_two_requests_for_every_place() -> None:
    assert [prompt.where for prompt in WORKLOAD.requests(1)] == ["a", "b"]
    assert [prompt.where for prompt in WORKLOAD.requests(3)] == ["a", "b"] * 3


def decoded(steps: int, tokens: int, forward: float, draft: float, rest: float) -> Measurement:
    """A run of one sequence that decoded, after half a second of prompt."""
    seconds = steps * (forward + draft + rest)
    costs = DecodeCosts(steps, steps, tokens, seconds, steps * forward, steps * draft)
    return Measurement(tokens, seconds + 0.5, decode=costs)


def test_the_cost_model_by_hand() -> None:
    plain = decoded(100, 100, forward=0.010, draft=0.0, rest=0.0)
    own = decoded(50, 100, forward=0.011, draft=0.005, rest=0.004)
    model = cost_model([own, own], [plain, plain])
    assert model is not None
    assert model.tokens_per_step == 2.0
    assert model.predicted.median == pytest.approx(2 * 0.010 / 0.016)
    assert model.measured.median == pytest.approx(2 * 0.010 / 0.020)
    assert model.of_predicted.median == pytest.approx(0.8)
    assert model.other_seconds == pytest.approx(0.004)
    assert model.promised.median == pytest.approx(1.5 / (0.5 + 1 / 1.25))


def test_without_steps_that_decode_there_is_no_cost_model() -> None:
    assert cost_model([Measurement(1, 1.0)], [decoded(2, 2, 0.1, 0.0, 0.0)]) is None
    assert cost_model([decoded(0, 0, 0.1, 0.0, 0.0)], [decoded(2, 2, 0.1, 0.0, 0.0)]) is None


def test_a_comparison_without_runs_is_empty() -> None:
    assert summarize(Comparison(WORKLOAD, [], [], 1, {})) == []


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        ([{"method": "ngram"}, {"method": "eagle3", "num_speculative_tokens": 3}], ["ngram", "eagle3"]),
        ([{"method": "a", "fallback": {"method": "b"}}], ["a+b"]),
        (
            [{"method": "a", "num_speculative_tokens": 3, "k": 1}, {"method": "a", "k": 1}],
            ["a 3 tokens", "a"],
        ),
        ([{"method": "a", "k": 1}, {"method": "a", "num_speculative_tokens": 2}], ["a k=1", "a 2 tokens"]),
        ([{"method": "a"}, {"method": "a"}, {"method": "a"}], ["a", "a (2)", "a (3)"]),
    ],
)
def test_labels_tell_configurations_apart(configs: list[dict[str, Any]], labels: list[str]) -> None:
    assert label_configs(configs) == labels
