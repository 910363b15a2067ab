"""Adaptive draft lengths in simulated time: what they make of known costs and acceptance, whatever the machine does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import attrs
import pytest

from specplug import SpeculatorTraits
from specplug.request import Request
from specplug.speculation.adaptive import AdaptiveDraftLength
from specplug.speculation.adaptive.settings import AdaptiveSettings
from support.marks import slow_except
from support.simulation import Asking, Link, Rate, Simulation, Target

TARGET = Target()
USELESS: dict[str, Callable[[], Link]] = {
    "tokens": lambda: Link.tokens(lambda row, at: 0.0),
    "tokens now and then": lambda: Link.tokens(lambda row, at: 0.0, fill=0.3),
    "slow tokens": lambda: Link.tokens(lambda row, at: 0.0, base=1e-3),
    **{
        f"model at {share} of a step a token": lambda share=share: Link.model(lambda row, at: 0.0, share, TARGET)
        for share in (0.05, 0.2, 0.4, 0.6)
    },
    "head at 0.3 of a step a token": lambda: Link.head(lambda row, at: 0.0, 0.3, TARGET),
}


def relative(
    make: Callable[[], Link], rows: int, *, fixed: int | None = None, seeds: int = 3, requests: int = 12
) -> float:
    """Throughput over plain decoding's, after some requests, mean over seeds."""
    ratios = []
    for seed in range(seeds):
        simulation = Simulation([make()], target=TARGET, rows=rows, fixed=fixed, seed=seed, noise=0.1)
        simulation.run(3)
        ratios.append(simulation.run(requests) / simulation.plain())
    return statistics.mean(ratios)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("name", slow_except(USELESS, "tokens"))
def test_a_useless_speculator_costs_less_than_three_percent(name: str, rows: int) -> None:
    assert relative(USELESS[name], rows, seeds=2, requests=6) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_head_that_has_long_been_useless_costs_less_than_one_percent(rows: int) -> None:
    """What it is shown of prompts, and probes. Beside a real batch its states are put aside too."""
    ratios = []
    for seed in range(6):
        link = Link.head(lambda row, at: 0.0, 0.3, TARGET)
        simulation = Simulation([link], target=TARGET, rows=rows, seed=seed, noise=0.1)
        simulation.run(8)
        ratios.append(simulation.run(12) / simulation.plain())
    assert statistics.mean(ratios) >= 0.99


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_useless_speculator_costs_little_from_the_start(rows: int) -> None:
    """Nothing is known at first; most of what is lost is taking in the first prompts."""
    simulation = Simulation([USELESS["model at 0.2 of a step a token"]()], target=TARGET, rows=rows, seed=1)
    assert simulation.run(3) / simulation.plain() > 0.92


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "share", "rate"),
    [
        (1, 0.0, 0.3),
        (1, 0.0, 0.95),
        (1, 0.2, 0.6),
        (1, 0.2, 0.95),
        (1, 0.4, 0.8),
        (4, 0.0, 0.6),
        (4, 0.05, 0.8),
        (4, 0.2, 0.8),
        (4, 0.4, 0.95),
        (16, 0.0, 0.6),
        (16, 0.05, 0.8),
        (16, 0.2, 0.95),
    ],
)
def test_a_good_speculator_is_used_as_well_as_at_its_best_length(rows: int, share: float, rate: float) -> None:
    def make() -> Link:
        chance: Rate = lambda row, at: rate  # noqa: E731
        return Link.model(chance, share, TARGET) if share else Link.tokens(chance)

    best = max(relative(make, rows, fixed=length, seeds=2) for length in range(1, 9))
    assert (
        relative(make, rows, seeds=8) >= 0.97 * best - 0.01
    )  # a percent of luck, since the best of eight is the luckiest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "rows", "turn", "within"),
    [(0.0, 1, 600, 24), (0.0, 16, 600, 24), (0.2, 1, 600, 64), (0.2, 4, 600, 64), (0.2, 16, 300, 200)],
)
def test_speculation_returns_when_the_text_becomes_predictable(share: float, rows: int, turn: int, within: int) -> None:
    """Rows that a costly model must catch up with, of which one alone would not pay, take their time; of sixteen that are 600
    tokens behind more than half never return, since by then what they gain no longer repays it."""
    assert statistics.median(tokens_until_return(share, rows, seed, turn=turn) for seed in range(32)) <= within


def tokens_until_return(share: float, rows: int, seed: int, *, turn: int, length: int = 1200) -> float:
    """Tokens of the median row between the turn and the third step on end in which it has a draft: a probe comes alone."""
    chance: Rate = lambda row, at: 0.9 if at >= turn else 0.0  # noqa: E731
    link = Link.model(chance, share, TARGET) if share else Link.tokens(chance)
    simulation = Simulation([link], target=TARGET, rows=rows, length=length, seed=seed)
    delays = dict.fromkeys((request.number for request in simulation.requests), length)
    streaks = dict.fromkeys(delays, 0)
    while simulation.made == rows:
        simulation.step()
        for request in simulation.requests:
            if request.number not in delays or request.num_output_tokens < turn:
                continue
            streaks[request.number] = streaks[request.number] + 1 if request.draft is not None else 0
            if streaks[request.number] >= 3:
                delays[request.number] = min(delays[request.number], request.num_output_tokens - turn)
    return statistics.median(delays.values())


@pytest.mark.slow
@pytest.mark.parametrize(("share", "rows"), [(0.0, 1), (0.2, 1), (0.2, 4)])
def test_speculation_ceases_when_the_text_ceases_to_be_predictable(share: float, rows: int) -> None:
    turn = 300
    chance: Rate = lambda row, at: 0.9 if at < turn else 0.0  # noqa: E731
    link = Link.model(chance, share, TARGET) if share else Link.tokens(chance)
    simulation = Simulation([link], target=TARGET, rows=rows, length=900, seed=5)
    while min(request.num_output_tokens for request in simulation.requests) < turn + 16:
        simulation.step()
    seconds, tokens = simulation.seconds, simulation.tokens
    while simulation.made == rows:
        simulation.step()
    assert (simulation.tokens - tokens) / (simulation.seconds - seconds) > 0.97 * simulation.plain()


@pytest.mark.slow
def test_text_that_is_predictable_in_stretches_gains_most_of_what_is_there() -> None:
    chance: Rate = lambda row, at: 0.95 if at // 64 % 2 else 0.02  # noqa: E731
    simulation = Simulation([Link.tokens(chance)], target=TARGET, rows=1, length=512, seed=2)
    simulation.run(1)
    assert simulation.run(4) / simulation.plain() > 1.45  # 1.7 if it were known when


def test_rows_are_judged_one_by_one() -> None:
    chance: Rate = lambda row, at: 0.9 if row % 4 == 0 else 0.02  # noqa: E731
    drafted: dict[bool, list[int]] = {True: [], False: []}
    gained = []
    for seed in range(8):
        link = Link.model(chance, 0.05, TARGET)
        simulation = Simulation([link], target=TARGET, rows=8, length=200, seed=seed)
        while simulation.made < 48:
            simulation.step()
            for request in simulation.requests:
                drafted[request.number % 4 == 0].append(len(request.draft or ()))
        gained.append(simulation.tokens / simulation.seconds / simulation.plain())
    assert statistics.mean(drafted[True]) > 1.5
    assert statistics.mean(drafted[False]) < 0.35
    assert min(gained) > 1.0
    assert statistics.mean(gained) > 1.04


@pytest.mark.slow
def test_what_finds_cold_caches_now_and_then_is_tried_for_some_steps() -> None:
    """Text becomes predictable, so that drafts pay; asked once in a while the speculator takes half as long again, and they
    seem not to."""
    chance: Rate = lambda row, at: 0.05 if row < 5 else 0.62  # noqa: E731
    cost = 0.5 * TARGET.seconds(1, 0)
    gained = []
    for seed in range(12):
        link = Link(Asking(0.2 * cost, 0.8 * cost, 0.0, cost / 60, cold=1.5), chance, SpeculatorTraits())
        simulation = Simulation([link], target=TARGET, rows=1, length=128, seed=seed, noise=0.06)
        simulation.run(16)
        gained.append(simulation.run(24) / simulation.plain())
    assert statistics.mean(gained) > 1.015  # 1.046 if one token were always drafted


def test_costs_that_change_are_followed() -> None:
    """Speculation pays, then the target becomes six times faster and the same drafts do not; then it pays again."""

    def scale(step: int) -> float:
        return 1 / 6 if 600 <= step < 2400 else 1.0

    target = Target(scale=scale)
    link = Link.model(lambda row, at: 0.7, 0.15, TARGET)
    simulation = Simulation([link], target=target, rows=1, length=128, seed=6)
    calls = []
    for until in (600, 1200, 2400, 3000, 3600):
        before, steps = link.calls, simulation.steps
        while simulation.steps < until:
            simulation.step()
        calls.append((link.calls - before) / (simulation.steps - steps))
    assert calls[0] > 0.9
    assert calls[2] < 0.1
    assert calls[4] > 0.9


def test_the_next_speculator_is_preferred_where_it_is_better() -> None:
    poor, good = Link.tokens(lambda row, at: 0.15), Link.model(lambda row, at: 0.9, 0.05, TARGET)
    simulation = Simulation([poor, good], target=TARGET, rows=1, seed=7)
    simulation.run(4)
    assert good.calls > 0.6 * simulation.steps
    alone = Simulation([Link.model(lambda row, at: 0.9, 0.05, TARGET)], target=TARGET, rows=1, seed=7)
    alone.run(4)
    assert simulation.run(8) > 0.93 * alone.run(8)


def test_an_early_link_that_rarely_drafts_is_asked_all_the_same() -> None:
    rare = Link.tokens(lambda row, at: 0.9, fill=0.03)
    simulation = Simulation([rare], target=TARGET, rows=1, seed=8)
    simulation.run(6)
    assert rare.calls > 0.9 * simulation.steps


def test_fixed_lengths_stay_what_they_are() -> None:
    simulation = Simulation([Link.tokens(lambda row, at: 0.5)], target=TARGET, rows=4, fixed=3)
    simulation.run(2)
    assert set(simulation.nodes[1:-30]) <= set(range(13))
    assert statistics.mean(simulation.nodes[1:-30]) > 11


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_sleeping_rows_are_mostly_left_alone_and_their_steps_are_timed_all_the_same(rows: int) -> None:
    simulation = Simulation([USELESS["model at 0.2 of a step a token"]()], target=TARGET, rows=rows, length=400, seed=1)
    simulation.run(1)
    auto = simulation.policy
    assert isinstance(auto, AdaptiveDraftLength)
    planned, begin = 0, auto.begin

    def count(requests: Sequence[Request]) -> bool:
        nonlocal planned
        begun = begin(requests)
        planned += begun
        return begun

    auto.begin = count  # type: ignore[method-assign]
    steps, timed = simulation.steps, auto.targets[rows].count
    simulation.run(1)
    assert planned < 0.35 * (simulation.steps - steps)
    assert auto.targets[rows].count - timed > simulation.steps - steps - 40  # but those that are still kept


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "share"), [(0.0, 0.16), (0.3, 0.06)])
def test_target_states_are_not_lost_while_taking_them_in_is_cheap(rate: float, share: float) -> None:
    """A head that never saw a part of a text drafts worse for the rest of it: so it is shown all in time."""
    lost, gained, requests = [], [], 8
    for seed in range(8):
        link = Link.head(lambda row, at: rate, 0.3, TARGET)
        simulation = Simulation([link], target=TARGET, rows=1, length=400, seed=seed)
        simulation.run(requests)
        lost.append(link.lost / requests / (simulation.prompt + 400))
        gained.append(simulation.tokens / simulation.seconds / simulation.plain())
    assert statistics.mean(lost) < share  # of a useless head more; 0.88 if it were never shown any but the last ones
    assert min(gained) > 0.97


@pytest.mark.slow
def test_a_batch_that_empties_drafts_on_as_it_did() -> None:
    """Numbers of rows that were never seen before are like those that were: there is no need to find out all anew."""

    def make() -> Link:
        return Link.model(lambda row, at: 0.8, 0.15, TARGET)

    best = max(relative(make, 2, fixed=length) for length in range(1, 9))
    gained = []
    for seed in range(16):
        simulation = Simulation([make()], target=TARGET, rows=4, seed=seed, length=2000, noise=0.1)
        while simulation.steps < 200:
            simulation.step()
        simulation.requests, simulation.rows = simulation.requests[:2], 2
        seconds, tokens = simulation.seconds, simulation.tokens
        while simulation.steps < 240:
            simulation.step()
        gained.append((simulation.tokens - tokens) / (simulation.seconds - seconds) / simulation.plain())
    assert statistics.mean(gained) > best  # of requests whose ends count too


@pytest.mark.slow
@pytest.mark.parametrize(("later", "least"), [(0.7, 1.15), (0.85, 1.35)])
def test_what_comes_right_behind_a_prompt_is_not_taken_for_all_that_follows(later: float, least: float) -> None:
    """A costly head whose drafts pay from the ninth token on; asked once in a while it takes a third longer."""
    cost = 0.3 * TARGET.seconds(1, 0)
    gained = []
    for seed in range(16):
        link = Link(
            Asking(0.2 * cost, 0.8 * cost, 0.0, cost / 60, cold=1.3),
            lambda row, at: 0.02 if at < 8 else later,
            SpeculatorTraits(hidden_states=("final",)),
        )
        simulation = Simulation([link], target=TARGET, rows=4, length=128, seed=seed, noise=0.06)
        simulation.run(6)
        gained.append(simulation.run(12) / simulation.plain())
    assert statistics.mean(gained) > least


@pytest.mark.slow
def test_bad_luck_with_the_first_texts_does_not_blind_a_head_to_all_others() -> None:
    """Where drafts seem not to pay prompts are not shown, and drafts without them do pay less: a way down without return."""

    def rate(row: int, at: int) -> float:
        return 0.35 if row < 3 else 0.85

    made = [Link.head(rate, 0.4, TARGET, blind_share=0.6) for _ in range(12)]
    rates = []
    for seed, link in enumerate(made):
        simulation = Simulation([link], target=TARGET, rows=1, seed=seed)
        simulation.run(20)
        rates.append(simulation.run(10) / simulation.plain())
    assert min(rates) > 1.1


@pytest.mark.slow
def test_a_speculator_that_knows_its_chances_beats_every_fixed_length() -> None:
    """It drafts on where it is sure, and stops where it is not, at a chance that is worked out from costs."""

    def chance(row: int, at: int) -> float:
        return 0.95 if hash((row, at // 6)) % 3 else 0.4

    def rate_of(fixed: int | None) -> float:
        link = Link.head(chance, 0.35, TARGET, chances=chance)
        simulation = Simulation([link], target=TARGET, rows=1, fixed=fixed, seed=2)
        simulation.run(4)
        return simulation.run(24) / simulation.plain()

    best = max(rate_of(length) for length in range(1, 8))
    assert rate_of(None) > 1.04 * best


NEWCOMER = Target(flat=1.0e-3, per_node=0.01e-3, per_row=0.04e-3, jump=0.25)


@pytest.mark.parametrize("fill", [1.0, 0.5])
def test_a_first_run_with_weak_drafts_that_are_costly_to_verify_loses_little(fill: float) -> None:
    """A newcomer's first benchmark, 1,500 tokens in all: eight rows, 64 tokens each; a fifth of the drafts is accepted, and
    verifying any costs a quarter of a step. The aim is 0.97."""
    ratios = []
    for seed in range(8):
        link = Link.tokens(lambda row, at: 0.2, base=30e-6, per_row=5e-6, fill=fill)
        simulation = Simulation([link], target=NEWCOMER, rows=8, length=64, prompt=32, seed=seed, noise=0.1)
        while simulation.tokens < 1500:
            simulation.step()
        ratios.append(simulation.tokens / simulation.seconds / simulation.plain())
    assert statistics.mean(ratios) >= 0.93


@attrs.frozen
class GpuTarget(Target):
    """An H200 with 6.9 billion parameters: plain steps overlap with the host's work, and those with drafts wait for it."""

    def seconds(self, rows: int, nodes: int, step: int = 0) -> float:
        plain = 4.28e-3 + 0.0245e-3 * rows
        waits = 0.7e-3 + 0.04e-3 * rows if nodes else 0.0
        return plain + waits + 0.011e-3 * max(0, min(nodes, rows + nodes - 64))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_on_a_gpu_a_smaller_batch_soon_drafts_again(seed: int) -> None:
    """With 64 rows drafts do not pay, and hardly any is timed; with 16 rows they bring two fifths."""

    def make(rows: int, fixed: int | None) -> Simulation:
        link = Link(Asking(0.1e-3, 0.08e-3, 0.009e-3, 0.004e-3), lambda row, at: 0.62, SpeculatorTraits())
        return Simulation(
            [link], target=GpuTarget(), rows=rows, fixed=fixed, length=128, prompt=256, seed=seed, noise=0.03
        )

    large = make(64, None)
    large.policy = AdaptiveDraftLength(large.speculators, AdaptiveSettings.where_steps_run_ahead())
    assert large.run(2) > 0.92 * large.plain()
    assert large.run(2) > 0.96 * large.plain()
    small = large.resized(16)
    assert small.run(1) > 0.85 * make(16, 3).run(1)
    assert small.run(2) > 0.95 * make(16, 3).run(2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("launch", [None, 0.4e-3])
def test_on_a_gpu_rows_catch_up_together(seed: int, launch: float | None) -> None:
    """A call that catches up takes as long for one row as for many, and may return before it is computed."""

    def make(rows: int, fixed: int | None) -> Simulation:
        asking = Asking(0.1e-3, 0.08e-3, 0.009e-3, 0.001e-3, per_catch_up=8e-3)
        link = Link(asking, lambda row, at: 0.62, SpeculatorTraits(), launch=launch)
        return Simulation(
            [link], target=GpuTarget(), rows=rows, fixed=fixed, length=128, prompt=256, seed=seed, noise=0.03
        )

    large = make(64, None)
    large.policy = AdaptiveDraftLength(large.speculators, AdaptiveSettings.where_steps_run_ahead())
    large.run(2)
    assert large.run(2) > 0.94 * large.plain()
    small = large.resized(16)
    small.run(1)
    assert small.run(3) > 0.9 * make(16, 3).run(3)
