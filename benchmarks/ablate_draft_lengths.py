"""What each mechanism of the automatic draft lengths brings, in simulated time: each is switched off by itself.

    python benchmarks/ablate_draft_lengths.py --record          # once: drafts of the embedded models, into build/
    python benchmarks/ablate_draft_lengths.py --seeds 3         # all scenarios, one row per mechanism
    python benchmarks/ablate_draft_lengths.py --only plan       # mechanisms whose name contains a word

The simulator (`tests/support/simulation.py`) replays recorded drafts, or draws them at given rates; step and proposal times
come from the tables below with 10 % of noise, so results do not depend on the machine. Three settings: `steady` (a warmed-up
engine), `start` (the first 1,000 tokens of a new engine) and `change` (the number of rows changes every 30 steps, and
acceptance collapses and recovers). The score is throughput over that of the best single choice: plain decoding or one of the
fixed lengths. `cpu` is the policy's own CPU time per step.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from specplug import SpeculatorTraits
from specplug.request import Request
from specplug.speculation.adaptive import AdaptiveSettings
from specplug.speculation.adaptive.acceptance import RowAcceptance
from specplug.speculation.adaptive.cost_model import CostCurve
from support.simulation import Asking, Link, Simulation

TRACES = Path("build/draft-traces.json")
BEST = Path("build/best-fixed.json")
FIXED = (1, 2, 3, 5, 8)
SETTINGS = ("steady", "start", "change")
Position = tuple[int, int, list[float]]
"""At one position of a recorded text: tokens drafted, tokens accepted, and the probability the speculator gave each."""


# ---- cost profiles ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Profile:
    """Milliseconds of a target step by its number of tokens, and of proposals.

    Attributes:
        plain: (tokens, ms) of steps without drafts.
        drafted: (tokens, ms) of steps with drafts.
        ask: method → (ms of a call, ms per level of depth, ms per row, ms per token to catch up with, times when cold).
    """

    plain: Sequence[tuple[int, float]]
    drafted: Sequence[tuple[int, float]]
    ask: Mapping[str, tuple[float, float, float, float, float]]

    def seconds(self, rows: int, nodes: int, step: int = 0) -> float:
        """See `support.simulation.Target`."""
        return _on_line(self.drafted if nodes else self.plain, rows + nodes) * 1e-3

    def asking(self, method: str) -> Asking:
        """The costs of one method's proposals."""
        base, depth, row, gap, cold = self.ask[method]
        return Asking(base * 1e-3, depth * 1e-3, row * 1e-3, gap * 1e-3, cold=cold)


def _on_line(table: Sequence[tuple[int, float]], size: int) -> float:
    at = min(max(bisect.bisect_left(table, (size, 0.0)), 1), len(table) - 1)
    (low, before), (high, after) = table[at - 1], table[at]
    return before + (after - before) * max(size - low, 0) / (high - low)


_CPU = [(1, 3.3), (2, 3.4), (4, 3.7), (8, 4.3), (16, 5.4), (32, 7.6), (64, 12.0), (128, 21.0)]
_TINY = [(1, 1.0), (8, 1.35), (16, 1.5), (64, 2.6), (128, 4.0)]
PROFILES = {
    "cpu": Profile(
        _CPU,
        _CPU,
        {
            "ngram": (0.02, 0.0, 0.01, 0.0, 1.2),
            "draft_model": (0.2, 0.55, 0.02, 0.02, 1.6),
            "eagle3": (0.4, 0.6, 0.02, 0.02, 2.0),
        },
    ),
    "gpu": Profile(
        [(1, 5.7), (64, 5.7), (256, 6.2)],
        [(1, 6.9), (2, 6.9), (16, 7.1), (64, 7.5), (256, 9.5)],
        {
            "ngram": (0.1, 0.0, 0.02, 0.0, 1.2),
            "draft_model": (0.2, 0.8, 0.0, 0.005, 1.1),
            "eagle3": (0.3, 0.4, 0.0, 0.005, 1.1),
        },
    ),
    "newcomer": Profile(
        _TINY,
        [(size, 1.25 * ms) for size, ms in _TINY],
        {
            "ngram": (0.03, 0.0, 0.01, 0.0, 1.2),
            "recycling": (0.03, 0.0, 0.01, 0.0, 1.2),
            "draft_model": (0.1, 0.3, 0.02, 0.01, 1.6),
        },
    ),
}


# ---- scenarios -------------------------------------------------------------------------------------------------------


@attrs.frozen
class Scenario:
    """One load.

    Attributes:
        profile: name of the cost profile.
        methods: the speculators of the chain.
        rows: of the batch; in the setting `change` the first of several numbers.
        text: of which workload drafts were recorded; or None, where `rate` draws them.
        rate: (row, position) → probability that a draft is right.
        settings: in which it runs.
        length: tokens per request.
    """

    profile: str
    methods: tuple[str, ...]
    rows: int
    text: str | None = None
    rate: Callable[[int, int], float] | None = None
    settings: tuple[str, ...] = ("steady", "start")
    length: int = 96


def _useless(row: int, at: int) -> float:
    return 0.0


def _weak(row: int, at: int) -> float:
    return 0.2


def _stretches(row: int, at: int) -> float:
    return 0.92 if (at // 48 + row) % 2 else 0.03


def _differing(row: int, at: int) -> float:
    return 0.9 if row % 4 == 0 else 0.05


SCENARIOS = {
    "cpu ngram continuing 1": Scenario("cpu", ("ngram",), 1, "continuing"),
    "cpu ngram editing 4": Scenario("cpu", ("ngram",), 4, "editing", settings=SETTINGS),
    "cpu draft_model continuing 1": Scenario("cpu", ("draft_model",), 1, "continuing", settings=SETTINGS),
    "cpu draft_model editing 16": Scenario("cpu", ("draft_model",), 16, "editing"),
    "cpu eagle3 continuing 1": Scenario("cpu", ("eagle3",), 1, "continuing"),
    "cpu eagle3 editing 4": Scenario("cpu", ("eagle3",), 4, "editing", settings=SETTINGS),
    "gpu draft_model continuing 4": Scenario("gpu", ("draft_model",), 4, "continuing"),
    "gpu eagle3 continuing 16": Scenario("gpu", ("eagle3",), 16, "continuing", settings=SETTINGS),
    "newcomer ngram continuing 8": Scenario("newcomer", ("ngram",), 8, "continuing", length=64),
    "newcomer recycling 8": Scenario("newcomer", ("recycling",), 8, rate=_weak, settings=SETTINGS, length=64),
    "cpu useless draft_model 1": Scenario("cpu", ("draft_model",), 1, rate=_useless),
    "cpu useless eagle3 4": Scenario("cpu", ("eagle3",), 4, rate=_useless),
    "cpu ngram in stretches 1": Scenario("cpu", ("ngram",), 1, rate=_stretches, length=400),
    "cpu draft_model differing rows 8": Scenario("cpu", ("draft_model",), 8, rate=_differing),
    "cpu ngram, draft_model continuing 1": Scenario(
        "cpu", ("ngram", "draft_model"), 1, "continuing", settings=SETTINGS
    ),
}
_ROWS_IN_TURN = (1, 8, 16, 2, 8, 1, 16, 4)


class Load(Simulation):
    """A batch whose drafts were recorded, or are drawn; its rows and their acceptance may change."""

    def __init__(self, scenario: Scenario, fixed: int | None, seed: int) -> None:
        profile = PROFILES[scenario.profile]
        self._traces = [_trace(f"{method} {scenario.text}") if scenario.text else None for method in scenario.methods]
        self.is_spoiled = False
        links = []
        for method, trace in zip(scenario.methods, self._traces, strict=True):
            traits = SpeculatorTraits(
                token_only=method in ("ngram", "recycling"), hidden_states=("final",) if method == "eagle3" else ()
            )
            knows = trace is not None and any(chances for text in trace for _, _, chances in text)
            rate = scenario.rate or _useless
            links.append(Link(profile.asking(method), self._rate_of(rate), traits, chances=_useless if knows else None))
        self.policy_ns = 0
        super().__init__(
            links, target=profile, rows=scenario.rows, fixed=fixed, length=scenario.length, seed=seed, noise=0.1
        )  # type: ignore[arg-type]
        if fixed is None:
            for name in ("begin", "plan", "proposed", "trim", "end", "observe"):
                setattr(self.policy, name, self._timed(getattr(self.policy, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.thread_time_ns()
            result = call(*args, **options)
            self.policy_ns += time.thread_time_ns() - begin
            return result

        return timed

    def until(self, tokens: int) -> None:
        """Runs until so many tokens have come in all."""
        while self.tokens < tokens:
            self.step()

    def resize(self, rows: int) -> None:
        """Ends rows, or starts some."""
        self.rows = rows
        for request in self.requests[rows:]:
            self.policy.finish(request)
        self.requests = self.requests[:rows]
        while len(self.requests) < rows:
            self.requests.append(self._new())

    def _new(self) -> Request:
        self.seconds += self.target.seconds(self.prompt, 0)  # the target computes the prompt, with or without drafts
        return super()._new()

    def _rate_of(self, rate: Callable[[int, int], float]) -> Callable[[int, int], float]:
        return lambda row, at: 0.0 if self.is_spoiled else rate(row, at)

    def _recorded(self, request: Request, link: Link) -> Position | None:
        trace = self._traces[self.links.index(link)]
        if trace is None:
            return None
        text = trace[request.number % len(trace)]
        drafted, accepted, chances = text[min(request.num_output_tokens - 1, len(text) - 1)]
        return drafted, 0 if self.is_spoiled else accepted, chances

    def _draft(self, request: Request, link: Link, depth: int) -> list[int]:
        known = self._recorded(request, link)
        if known is None:
            return super()._draft(request, link, depth)
        at = len(request.tokens)
        return [at + ahead if ahead < known[1] else -1 for ahead in range(min(depth, known[0]))]

    def _chance(self, request: Request, link: Link, ahead: int) -> float:
        known = self._recorded(request, link)
        assert known is not None
        return known[2][ahead] if ahead < len(known[2]) else 1e-9

    def _ask(self, index: int, link: Link, asked: Any) -> Any:
        answer = super()._ask(index, link, asked)
        for request in self.requests:
            if request.draft is not None and not len(request.draft):
                request.draft = None
        return answer


@functools.cache
def _traces() -> dict[str, list[list[Position]]]:
    return json.loads(TRACES.read_text())


def _trace(name: str) -> list[list[Position]]:
    return _traces()[name]


def record() -> None:
    """Records drafts of the embedded models at every position of some texts."""
    import transformers
    from never_slower import METHODS
    from simulated_lengths import record as record_drafts
    from workloads import WORKLOADS

    from specplug import LLM, resolve_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("tiny"))
    traces = {}
    for workload in ("continuing", "editing"):
        prompts = WORKLOADS[workload](tokenizer, 8)
        for method, keys in METHODS.items():
            config = {**keys, "num_speculative_tokens": "auto"}
            with LLM("tiny", speculative_config=config, max_num_seqs=1, max_model_len=1024, memory="1GiB") as llm:
                traces[f"{method} {workload}"] = record_drafts(llm, prompts, 72)
    TRACES.parent.mkdir(exist_ok=True)
    TRACES.write_text(json.dumps(traces))


# ---- scores ----------------------------------------------------------------------------------------------------------


def throughput(scenario: Scenario, setting: str, fixed: int | None, seed: int) -> tuple[float, float]:
    """Tokens per second, and the policy's CPU seconds per step."""
    load = Load(scenario, fixed, seed)
    if setting == "start":
        load.until(1000)
        return load.tokens / load.seconds, load.policy_ns * 1e-9 / load.steps
    if setting == "steady":
        load.until(800 + 40 * scenario.rows)
        seconds, tokens, steps, spent = load.seconds, load.tokens, load.steps, load.policy_ns
        load.until(load.tokens + 800 + 60 * scenario.rows)
        return (load.tokens - tokens) / (load.seconds - seconds), (load.policy_ns - spent) * 1e-9 / (load.steps - steps)
    for turn, rows in enumerate(_ROWS_IN_TURN):
        load.resize(rows)
        load.is_spoiled = turn in (2, 5)
        until = load.steps + 30
        while load.steps < until:
            load.step()
    return load.tokens / load.seconds, load.policy_ns * 1e-9 / load.steps


@functools.cache
def best(name: str, setting: str) -> float:
    """Tokens per second of the best single choice: no drafts, or one fixed length. They are kept in a file."""
    known = json.loads(BEST.read_text()) if BEST.exists() else {}
    key = f"{name} {setting}"
    if key not in known:
        known[key] = _best(name, setting)
        BEST.write_text(json.dumps(known))
    return known[key]


def _best(name: str, setting: str) -> float:
    scenario = SCENARIOS[name]
    rates = [statistics.mean(throughput(scenario, setting, fixed, seed)[0] for seed in (0, 1)) for fixed in FIXED]
    idle = attrs.evolve(scenario, methods=())
    return max([*rates, throughput(idle, setting, 1, 0)[0]])


def scores(seeds: int, names: Sequence[str]) -> tuple[dict[tuple[str, str], float], float]:
    """(scenario, setting) → throughput over the best single choice, mean over seeds; and CPU seconds of a step."""
    found, spent = {}, []
    for name in names:
        scenario = SCENARIOS[name]
        for setting in scenario.settings:
            runs = [throughput(scenario, setting, None, seed) for seed in range(seeds)]
            found[name, setting] = statistics.mean(rate for rate, _ in runs) / best(name, setting)
            spent.append(statistics.median(seconds for _, seconds in runs))
    return found, statistics.mean(spent)


def means(found: Mapping[tuple[str, str], float]) -> list[float]:
    """Per setting, the mean over its scenarios."""
    own = {setting: [score for (_, s), score in found.items() if s == setting] for setting in SETTINGS}
    return [statistics.mean(own[setting]) if own[setting] else float("nan") for setting in SETTINGS]


# ---- switches --------------------------------------------------------------------------------------------------------


def _set(**values: Any) -> Callable[[], Iterator[None]]:
    """Replaces `module__name` or `module__Class__name` while it lasts."""

    @contextmanager
    def switch() -> Iterator[None]:
        with ExitStack() as stack:
            for path, value in values.items():
                module, *names = path.split("__")
                home: Any = sys.modules[f"specplug.speculation.adaptive.{module}"]
                for name in names[:-1]:
                    home = getattr(home, name)
                stack.enter_context(mock.patch.object(home, names[-1], value))
            yield

    return switch


def _settings(**values: Any) -> Callable[[], Iterator[None]]:
    """Other `AdaptiveSettings` while it lasts."""
    return _set(controller__AdaptiveSettings=functools.partial(AdaptiveSettings, **values))


def _keep_continuation_empty(self: Any, drafts: Any, refused: int, call: Any) -> None:
    if refused or self.fill < 1.0:
        self._observe_fill(len(drafts), refused)
    for draft in drafts:
        self.samples = self.samples or draft.probs is not None


def _forget_without_likeness(self: Any, share: float) -> None:
    likeness = self.likeness
    _FORGET(self, share)
    self.likeness = likeness


def _without_jump(settings: AdaptiveSettings) -> CostCurve:
    return CostCurve(settings, settings.verify_slope, least_slope=settings.least_slope)


_FORGET = RowAcceptance._forget
_NEVER = property(lambda self: False)
_ALWAYS = property(lambda self: True)
OFF: dict[str, Callable[[], Any]] = {
    "learned trust (24 drafts)": _settings(trusts=(24.0,), trust_handicaps=(1.0,)),
    "learned trust (6 drafts)": _settings(trusts=(6.0,), trust_handicaps=(1.0,)),
    "change detection": _settings(change_below=0.0),
    "likeness": _set(acceptance__RowAcceptance___forget=_forget_without_likeness),
    "change of all rows": _settings(all_change_below=0.0),
    "position ranges": _set(acceptance__AcceptanceModel__first_at=lambda self, position: self.first),
    "hopelessness": _set(acceptance__AcceptanceModel__is_hopeless=_NEVER),
    "continuation": _set(estimates__SpeculatorEstimate__observe_drafts=_keep_continuation_empty),
    "score calibration": _set(estimates__SpeculatorEstimate__calibration=property(lambda self: 1.0)),
    "stopping (joint rule)": _set(goodput__StepForecast__min_gains=lambda self, estimate, depths, rate: (0.0, 0.0)),
    "leeway": _settings(leeway=0),
    "fill rate": _set(estimates__SpeculatorEstimate___observe_fill=lambda self, given, refused: None),
    "catch-up cost": _set(estimates__SpeculatorEstimate___observe_catch_up=lambda self, tokens, seconds: None),
    "blind rows": _set(controller__has_lost_states=lambda estimate, candidate, seen: False),
    "cold/warm split": _set(
        estimates__SpeculatorEstimate__is_warm=_ALWAYS, estimates__SpeculatorEstimate__was_warm=lambda self, step: True
    ),
    "trying what nearly pays": _set(planner___try_out=lambda estimate, candidates, *rest: [0] * len(candidates)),
    "cost cells (line only)": _settings(fine=1e-9),
    "assumed slope of verification": _settings(verify_slope=0.0),
    "size 0 apart": _set(cost_model__target_curve=_without_jump, goodput__target_curve=_without_jump),
    "least slope": _settings(least_slope=0.0),
    "slope belief follows noise": _settings(steep=1e9),
    "row classes that borrow": _set(cost_model__CostCurve__borrow=CostCurve._new),
    "variation of depths": _set(controller__vary=lambda settings, depths, *rest: (depths, 1 << 20)),
    "ledger: shares": _settings(first_share=0.015, hopeless_share=0.015, useless_share=0.015),
    "ledger: overdraft": _set(
        exploration__ExplorationBudget__advance=lambda self, steps: 0.0,
        controller__AdaptiveSettings=functools.partial(AdaptiveSettings, advanced_steps=0.0),
    ),
    "ledger: all is affordable": _set(exploration__ExplorationBudget__affords=lambda self, cost, overdraft=0.0: True),
    "first look by golden ratio": _set(sleeping___first_look=lambda settings, candidate: 0),
    "probes together": _settings(probed_together=0),
    "reserve for blind rows": _settings(most_reserved=0.0),
    "longer pauses": _set(estimates__SpeculatorEstimate__pause=lambda self, misses: 8),
    "guesses that are compared": _set(estimates__SpeculatorEstimate__compares=_NEVER),
    "resting": _set(sleeping__Resting__holds=lambda self, requests, step: False),
    "held plans": _set(planner__HeldPlan__holds=lambda self, requests, step: False),
    "held depths": _set(planner___steps_to_hold=lambda estimate, candidates, depths: 1),
    "held depths follow evidence": _set(planner___steps_to_hold=lambda estimate, candidates, depths: 8),
    "batched feedback": _settings(learn_every=0),
    "pruning of scored nodes": _set(controller__keep_what_pays=lambda drafts, estimates, forecast: list(drafts)),
    "fallback preference": _set(planner___is_better_left=lambda *args: False),
    "might pay (close)": _set(goodput__StepForecast__might_pay=lambda self, estimate, gains: True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="this of so many parts of the list")
    parser.add_argument("--only", help="mechanisms whose name contains this")
    parser.add_argument("--together", nargs="+", default=[], help="and all of these at once, by parts of their names")
    parser.add_argument("--scenarios", default="", help="scenarios whose name contains this")
    parser.add_argument("--json", type=Path, help="one line per mechanism and scenario is added to this file")
    parser.add_argument("--each", action="store_true", help="print every scenario too")
    args = parser.parse_args()
    if args.record:
        record()
        return
    names = [name for name in SCENARIOS if args.scenarios in name]
    base, spent = scores(args.seeds, names)
    _keep(args.json, "nothing", base, spent)
    print(f"{'switched off':32} steady  start  change   worst scenario                        cpu us", flush=True)
    print(_line("nothing (of the best choice)", means(base), "", spent), flush=True)
    if args.each:
        for (name, setting), score in base.items():
            print(f"    {name:40} {setting:7} {score:.3f}", flush=True)
    chosen = {name: switch for name, switch in OFF.items() if args.only is None or args.only in name}
    chosen = dict(list(chosen.items())[args.part[0] :: args.part[1]])
    if args.together:
        parts = [switch for name, switch in OFF.items() if any(part in name for part in args.together)]

        @contextmanager
        def together() -> Iterator[None]:
            with ExitStack() as stack:
                for switch in parts:
                    stack.enter_context(switch())
                yield

        chosen = {"together": together}
    for name, switch in chosen.items():
        with switch():
            found, cost = scores(args.seeds, names)
        _keep(args.json, name, found, cost)
        change = {key: found[key] / base[key] - 1.0 for key in base}
        scenario, setting = min(change, key=change.__getitem__)
        worst = f"{100 * change[scenario, setting]:+5.1f} % {setting} {scenario}"
        changes = [100 * (own / other - 1.0) for own, other in zip(means(found), means(base), strict=True)]
        print(_line(name, changes, worst, cost, percent=True), flush=True)
        if args.each:
            for key in base:
                if abs(change[key]) > 0.01:
                    print(f"    {key[0]:40} {key[1]:7} {base[key]:.3f} {found[key]:.3f}", flush=True)


def _keep(path: Path | None, name: str, found: Mapping[tuple[str, str], float], spent: float) -> None:
    if path is not None:
        with path.open("a") as lines:
            for (scenario, setting), score in found.items():
                lines.write(json.dumps([name, scenario, setting, score, spent]) + "\n")


def _line(name: str, numbers: Sequence[float], worst: str, spent: float, *, percent: bool = False) -> str:
    own = " ".join(f"{number:+6.2f}" if percent else f"{number:6.3f}" for number in numbers)
    return f"{name:32} {own}   {worst:52} {1e6 * spent:5.0f}"


if __name__ == "__main__":
    main()
