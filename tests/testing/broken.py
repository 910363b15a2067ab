"""Speculators that break one promise each, and the checks that must notice."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
from good import Learner, Lookup, Reader, Sampler, StateLearner, Table
from safetensors.torch import load_file

from specplug import MemoryRegion, Proposal, SpeculatorTraits, Verdict, hookimpl
from specplug.sampling.randomness import Stream
from specplug.speculation.verification.verifier import LosslessVerifier
from specplug.testing import Flags
from support.speculators import ModelSpeculator

HELD: list[Any] = []


class RaisesSometimes(Lookup):
    calls = 0

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        self.calls += 1
        if self.calls % 40 == 17:
            raise ValueError("a bug in the plugin")
        return super().propose(batch)


class UnknownToken(Lookup):
    def draft(self, tokens: Any, count: int) -> list[int]:
        return [1 << 20] * count if len(tokens) == 41 else super().draft(tokens, count)


class NotANumber(Sampler):
    def draft(self, row: Any) -> tuple[list[int], Any]:
        tokens, probs = super().draft(row)
        if probs is not None and len(row.tokens) % 6 == 3:
            probs.values[0, 0] = float("nan")
        return tokens, probs


class OverBudget(Lookup):
    def draft(self, tokens: Any, count: int) -> list[int]:
        return super().draft(tokens, count and 4)


class DraftsWithoutBudget(Reader):
    def draft(self, row: Any, batch: Any) -> list[int]:
        return super().draft(row, batch) or [1]


class BiasedProbabilities(Sampler):
    def report(self, distribution: torch.Tensor) -> torch.Tensor:
        return distribution.pow(0.6) / distribution.pow(0.6).sum()


class ProbabilitiesOfArgmax(Sampler):
    def draw(self, row: Any, distribution: torch.Tensor) -> int:
        return int(distribution.argmax())


class DrawsFromTheVerifier(Sampler):
    """Its wrapper sees the verifier's generators."""

    def draw(self, row: Any, distribution: torch.Tensor) -> int:
        if row.sampling.greedy or HELD[-1] is None:
            return super().draw(row, distribution)
        return int(torch.multinomial(distribution, 1, generator=self.stream()))

    def stream(self) -> torch.Generator:
        return HELD[-1].generator(Stream.ACCEPTANCE)


class PeeksAtTheVerifier(DrawsFromTheVerifier):
    """Draws the very number that decides the acceptance, and leaves the stream as it was."""

    def stream(self) -> torch.Generator:
        peek = torch.Generator()
        peek.set_state(HELD[-1].generator(Stream.ACCEPTANCE).get_state())
        return peek


class GlobalRandomness(Lookup):
    def draft(self, tokens: Any, count: int) -> list[int]:
        return torch.randint(3, 16, (count,)).tolist()


class StaleKV(ModelSpeculator):
    """Takes its last draft token for stored, though it was drafted and never run."""

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        ran = vars(self).setdefault("ran", {})
        for row in batch.rows:
            if not row.is_new:
                self.seen[row.row_id] = min(self.seen[row.row_id] + ran.get(row.row_id, 0), len(row.tokens) - 1)
        proposal = super().propose(batch)
        for row, tokens in zip(batch.rows, proposal.tokens, strict=True):
            ran[row.row_id] = len(tokens)
        return proposal


class LazyEntries(ModelSpeculator):
    """Stores nothing until a row may draft, and takes for stored what it was shown of earlier rows."""

    def begin(self, row: Any) -> int:
        return row.num_cached_tokens

    def stop_without_draft(self, row: Any, start: int) -> int:
        return start


class OffByOne(Reader):
    def newest_state(self, row: Any, batch: Any) -> torch.Tensor:
        return batch.hidden_states["final"][max(row.new_states.stop - 2, 0)]


class KeepsOldRows(Reader):
    """Neither hears of ended rows, nor begins anew."""

    def forget(self, row_id: int) -> None:
        pass

    def begin(self, row: Any) -> None:
        if row.row_id not in self.memories:
            super().begin(row)


class LeakingRows(Lookup):
    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}

    def draft(self, tokens: Any, count: int) -> list[int]:
        self.rows[hash(tuple(tokens[:8]))] = list(tokens)
        return super().draft(tokens, count)


class Underplanned(Table):
    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.table = torch.zeros(2 * self.size, dtype=torch.uint8)


class GrowsInTheRun(Reader):
    """Keeps all states of its live rows, which it did not plan."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.kept: dict[int, list[torch.Tensor]] = {}

    def forget(self, row_id: int) -> None:
        super().forget(row_id)
        self.kept.pop(row_id, None)

    def draft(self, row: Any, batch: Any) -> list[int]:
        self.kept.setdefault(row.row_id, []).append(torch.zeros(1000))
        return super().draft(row, batch)


class Overplanned(Table):
    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [MemoryRegion("table", "buffers", fixed_bytes=21 << 20)]


class OutlivesTheEngine(Table):
    @hookimpl
    def warmup(self, resources: Any) -> None:
        super().warmup(resources)
        HELD.append(self.table)


class ReadsWeightsAtLoad(Lookup):
    def __init__(self, target: Any) -> None:
        load_file(Path(target.source) / "model.safetensors")


class ThinksLong(Lookup):
    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        if len(batch.rows) == 4:
            time.sleep(0.2 * 4)
        return super().propose(batch)


class StatesLearnedOffByOne(StateLearner):
    def place(self, start: int, index: int) -> int:
        return max(start + index - 1, 0)


class NumpyUnplanned(Lookup):
    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.table = np.zeros(200 << 20, dtype=np.uint8)


class ListsOnTheClass(Lookup):
    seen: ClassVar[list[Any]] = []

    def draft(self, tokens: Any, count: int) -> list[int]:
        self.seen.append(np.array(tokens[-8:]))
        return super().draft(tokens, count)


class StringsInAModule(Lookup):
    def draft(self, tokens: Any, count: int) -> list[int]:
        HELD.append(" ".join(map(str, tokens[:])))
        return super().draft(tokens, count)


class KeepsBatches(Reader):
    """Keeps the tensors of every call, which all are views of one buffer."""

    def draft(self, row: Any, batch: Any) -> list[int]:
        vars(self).setdefault("batches", []).append(batch.hidden_states["final"])
        return super().draft(row, batch)


class Dawdles(Lookup):
    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        time.sleep(1.2)
        return super().propose(batch)


class RaisesAlways(Lookup):
    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        raise ValueError("a bug in every call")


class RaisesInWarmup(Lookup):
    @hookimpl
    def warmup(self, resources: Any) -> None:
        raise RuntimeError("a bug in warmup\n" * 50)


class WrongHook(Lookup):
    @hookimpl
    def warm_up(self, resources: Any) -> None:
        pass


class ReachesIntoAView(Lookup):
    """Takes every row's tokens for a list of specplug's own."""

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        return Proposal([self.draft(row.tokens._tokens, row.budget.max_nodes) for row in batch.rows])


class LearnsFromViews(Learner):
    """Keeps views, and reads them after their rows have ended: another row's tokens are there by then."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[int, Any] = {}
        self.ended: list[Any] = []

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        self.ended += [self.views.pop(row_id) for row_id, _ in batch.ended]
        for view in self.ended if batch.rows else []:
            tokens = list(view)
            self.followed |= dict(zip(pairwise(tokens), tokens[2:], strict=False))
        self.ended = [] if batch.rows else self.ended
        self.views |= {row.row_id: row.tokens for row in batch.rows}
        return Proposal([self.draft(row.tokens[-2:], row.budget.max_nodes) for row in batch.rows])


class TouchesTokens(Lookup):
    """Puts a token among the committed ones, and forgets to take it out again."""

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        for row in batch.rows:
            if len(row.tokens) == 20:
                row.tokens._tokens.append(5)
        return super().propose(batch)


class Verifying(Lookup):
    """Core's verdict, changed."""

    @hookimpl
    def verify(self, batch: Any, proposal: Any, target: Any) -> Any:
        verdict = LosslessVerifier(batch.rows[0].randomness.engine).verify(batch, proposal, target)
        for index, row in enumerate(batch.rows):
            self.change(index, row, verdict, proposal, target)
        return verdict

    def change(self, index: int, row: Any, verdict: Verdict, proposal: Any, target: Any) -> None:
        raise TypeError("a subclass says how")

    @staticmethod
    def emit(index: int, verdict: Verdict, token: int) -> None:
        verdict.accepted[index] = []  # type: ignore[index]
        verdict.next_tokens[index] = token  # type: ignore[index]


class AcceptsTheSecondBest(Verifying):
    def change(self, index: int, row: Any, verdict: Verdict, proposal: Any, target: Any) -> None:
        best = target.logits[target.offsets[index]].topk(2).indices.tolist()
        plain = row.sampling.greedy and not row.sampling.changes_logits and not row.sampling.stop_token_ids
        if plain and proposal.tokens[index][:1] == best[1:] and len(row.tokens) % 7 == 3:
            self.emit(index, verdict, best[1])


class SharpensSamples(Verifying):
    def change(self, index: int, row: Any, verdict: Verdict, proposal: Any, target: Any) -> None:
        if not row.sampling.greedy and row.sampling.seed is None and row.sampling.top_k != 1:
            probs = target.probs([target.offsets[index]])[0].pow(1.3)
            self.emit(index, verdict, int(torch.multinomial(probs, 1)))


class IgnoresSeeds(Verifying):
    def change(self, index: int, row: Any, verdict: Verdict, proposal: Any, target: Any) -> None:
        if row.sampling.seed is not None:
            self.emit(index, verdict, int(torch.multinomial(target.probs([target.offsets[index]])[0], 1)))


class IgnoresPenalties(Verifying):
    def change(self, index: int, row: Any, verdict: Verdict, proposal: Any, target: Any) -> None:
        if row.sampling.penalizes and row.sampling.greedy:
            self.emit(index, verdict, int(target.logits[target.offsets[index]].argmax()))


class RunsOverTheEnd(Verifying):
    def change(self, index: int, row: Any, verdict: Verdict, proposal: Any, target: Any) -> None:
        stops = row.sampling.stop_token_ids
        if len(stops) == 1 and verdict.next_tokens[index] in stops:
            verdict.next_tokens[index] = stops[0] - 1  # type: ignore[index]


class WithWrapper:
    """A plugin that is a speculator and a wrapper at once; `propose` is the wrapper's."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        self.make = make

    @hookimpl
    def load_speculator(self, config: Any, target: Any) -> Any:
        return self.make(config, target)


class LearnsInSecret(Learner):
    traits = SpeculatorTraits()


class Trims(WithWrapper):
    @hookimpl(wrapper=True)
    def propose(self, batch: Any) -> Any:
        proposal = yield
        return Proposal([list(tokens)[:1] for tokens in proposal.tokens])


class SeesTheVerifier(WithWrapper):
    @hookimpl(wrapper=True)
    def verify(self, batch: Any) -> Any:
        HELD.append(batch.rows[0].randomness.engine)
        return (yield)


@attrs.frozen(eq=False)
class Case:
    """A speculator that breaks a promise.

    Attributes:
        plugin: a function of (config, target), or a plugin.
        caught_by: the checks that fail, and no others do.
        flags: what its author says.
        perfect: whether its author says that it must be right.
    """

    plugin: Any
    caught_by: set[str]
    flags: Flags = attrs.field(factory=Flags)
    perfect: bool = False


def _of_target(cls: type) -> Callable[[Any, Any], Any]:
    return lambda config, target: cls(target)


def _plain(cls: type) -> Callable[[Any, Any], Any]:
    return lambda config, target: cls()


def _model(cls: type) -> Callable[[Any, Any], Any]:
    return lambda config, target: cls(target, Path(config.get("draft")), config.num_speculative_tokens)


GOOD: dict[str, Case] = {
    "lookup": Case(_plain(Lookup), set(), Flags(deterministic=True, samples=False, drafts=True)),
    "sampler": Case(_of_target(Sampler), set(), Flags(samples=True, drafts=True)),
    "learner": Case(_plain(Learner), set(), Flags(samples=False, drafts=True)),
    "learner of states": Case(_of_target(StateLearner), set(), Flags(reads_states=True, owns_kv=False)),
    "reader": Case(_of_target(Reader), set(), Flags(reads_states=True, deterministic=True, owns_kv=False)),
}
BROKEN: dict[str, Case] = {
    "a hook with a wrong name": Case(_plain(WrongHook), {"startup"}),
    "weights read at load": Case(_of_target(ReadsWeightsAtLoad), {"loading"}),
    "raising sometimes": Case(_plain(RaisesSometimes), {"validity"}),
    "ids outside the vocabulary": Case(_plain(UnknownToken), {"validity"}),
    "learning without saying so": Case(_plain(LearnsInSecret), {"rollback", "rows", "prefixes", "leftovers"}),
    "NaN": Case(_of_target(NotANumber), {"validity"}),
    "ignoring budgets": Case(_plain(OverBudget), {"budgets"}),
    "drafting without a budget": Case(_of_target(DraftsWithoutBudget), {"budgets"}),
    "promising samples": Case(_plain(Lookup), {"promises"}, Flags(samples=True)),
    "a lossy greedy verify": Case(_plain(AcceptsTheSecondBest), {"greedy"}),
    "a lossy sampling verify": Case(_plain(SharpensSamples), {"sampling"}),
    "biased probabilities": Case(_of_target(BiasedProbabilities), {"distributions", "sampling"}),
    "probabilities of argmax drafts": Case(_of_target(ProbabilitiesOfArgmax), {"distributions", "sampling"}),
    "drawing from the verifier": Case(SeesTheVerifier(_of_target(DrawsFromTheVerifier)), {"streams"}),
    "shared randomness": Case(
        SeesTheVerifier(_of_target(PeeksAtTheVerifier)), {"streams", "sampling", "distributions"}
    ),
    "ignoring seeds": Case(_plain(IgnoresSeeds), {"seeds", "parameters"}),
    "ignoring penalties": Case(_plain(IgnoresPenalties), {"parameters"}),
    "running over the end": Case(_plain(RunsOverTheEnd), {"endings"}),
    "reaching into a view of tokens": Case(_plain(ReachesIntoAView), {"hosts"}),
    "views kept after their rows": Case(_plain(LearnsFromViews), {"hosts"}),
    "touching committed tokens": Case(_plain(TouchesTokens), {"counters", "greedy", "seeds", "parameters", "endings"}),
    "global randomness in a token-only speculator": Case(_plain(GlobalRandomness), {"tokens"}),
    "stale KV after a rollback": Case(_model(StaleKV), {"rollback", "rows"}),
    "KV that is not written when it is due": Case(_model(LazyEntries), {"prefixes"}),
    "hidden states off by one": Case(_of_target(OffByOne), {"rollback", "rows"}),
    "rows kept after their end": Case(_of_target(KeepsOldRows), {"rows"}),
    "leaking rows": Case(_plain(LeakingRows), {"leftovers"}),
    "tensors that outlive the engine": Case(_plain(OutlivesTheEngine), {"leftovers"}),
    "under-planned memory": Case(_plain(Underplanned), {"memory"}),
    "memory that grows in a run": Case(_of_target(GrowsInTheRun), {"memory"}),
    "over-planned memory": Case(_plain(Overplanned), {"memory"}),
    "a learner whose states are off by one": Case(_of_target(StatesLearnedOffByOne), {"learning"}),
    "numpy arrays that nobody planned": Case(_plain(NumpyUnplanned), {"memory"}),
    "arrays in a list of the class": Case(_plain(ListsOnTheClass), {"leftovers"}),
    "strings in a list of a module": Case(_plain(StringsInAModule), {"leftovers"}),
    "tensors of every batch": Case(_of_target(KeepsBatches), {"leftovers"}),
    "thinking for a second in every call": Case(_plain(Dawdles), {"startup"}),
    "raising in every call": Case(_plain(RaisesAlways), {"startup"}),
    "raising in warmup": Case(_plain(RaisesInWarmup), {"startup"}),
    "thinking too long": Case(_plain(ThinksLong), {"progress"}),
    "perfect, and wrong": Case(_plain(Lookup), {"perfect"}, perfect=True),
    "a wrapper that changes a proposal": Case(Trims(_plain(Lookup)), {"wrappers"}),
}
