"""A broken plugin costs its drafts, never a token of output; one test per kind of fault."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, DraftDistributions, Proposal, SamplingParams, SpeculatorTraits, Verdict, hookimpl
from specplug.errors import PluginError, SpecplugError
from support.models import VOCABULARY, save_model
from support.speculators import Oracle, TokenSpeculator, provide

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB") as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]


def uniform(rows: int) -> torch.Tensor:
    return torch.full((rows, VOCABULARY), 1 / VOCABULARY)


def raising(batch: Any) -> Any:
    raise ValueError("a bug in the plugin")


def exiting_loop(batch: Any) -> Any:
    raise RecursionError("too deep")


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "raises": (raising, "a bug in the plugin"),
    "recursion": (exiting_loop, "too deep"),
    "no proposal": (lambda batch: [[1]], "expected a Proposal"),
    "too few rows": (lambda batch: Proposal([]), "0 rows"),
    "parents of another batch": (lambda b: Proposal([[1]] * len(b.rows), parents=[]), "proposal.parents has 0 rows"),
    "over budget": (lambda batch: Proposal([[1] * 9 for _ in batch.rows]), "the budget is"),
    "token too large": (lambda batch: Proposal([[VOCABULARY] for _ in batch.rows]), "not an id"),
    "token negative": (lambda batch: Proposal([[-1] for _ in batch.rows]), "not an id"),
    "token no integer": (lambda batch: Proposal([[1.5] for _ in batch.rows]), "not an id"),
    "float tensor": (lambda batch: Proposal(torch.zeros(len(batch.rows), 1)), "expected integers"),
    "parent behind child": (
        lambda b: Proposal([[1, 2]] * len(b.rows), parents=[[1, -1]] * len(b.rows)),
        "parents come",
    ),
    "too many parents": (
        lambda b: Proposal([[1, 2]] * len(b.rows), parents=[[-1] * 3] * len(b.rows)),
        "3 parents for 2",
    ),
    "score NaN": (lambda b: Proposal([[1]] * len(b.rows), scores=[[float("nan")]] * len(b.rows)), "score nan"),
    "score rises": (
        lambda b: Proposal([[1, 2]] * len(b.rows), scores=[[0.1, 0.2]] * len(b.rows)),
        "higher than its parent",
    ),
    "probs not normalised": (
        lambda b: Proposal([[1]] * len(b.rows), probs=[DraftDistributions(uniform(1) * 2)] * len(b.rows)),
        "not probability distributions",
    ),
    "probs NaN": (
        lambda b: Proposal([[1]] * len(b.rows), probs=[DraftDistributions(uniform(1) * float("nan"))] * len(b.rows)),
        "not probability distributions",
    ),
    "probs of another width": (
        lambda b: Proposal([[1]] * len(b.rows), probs=[DraftDistributions(torch.ones(1, 1))] * len(b.rows)),
        "width 1",
    ),
    "probs zero at the token": (
        lambda b: Proposal([[1]] * len(b.rows), probs=[DraftDistributions(torch.eye(VOCABULARY)[:1])] * len(b.rows)),
        "probability 0",
    ),
    "repeated sibling": (
        lambda b: Proposal(
            [[1, 1]] * len(b.rows),
            parents=[[-1, -1]] * len(b.rows),
            probs=[DraftDistributions(uniform(1), index=[0, 0])] * len(b.rows),
        ),
        "repeats a sibling",
    ),
}


class Faulty:
    """Misbehaves from its third call on."""

    def __init__(self, fault: Callable[[Any], Any]) -> None:
        self.fault = fault
        self.calls = 0

    @hookimpl
    def propose(self, batch: Any) -> Any:
        self.calls += 1
        return self.fault(batch) if self.calls >= 3 else Proposal([[1] for _ in batch.rows])


@pytest.mark.parametrize("kind", list(FAULTS))
def test_fault_costs_drafts_only(
    folder: Path, expected: list[list[int]], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault, text = FAULTS[kind]
    with (
        caplog.at_level(logging.WARNING, "specplug"),
        LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: Faulty(fault))) as llm,
    ):
        outputs = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]
        assert outputs == expected
        assert llm.engine.chain.faults["throwaway"] >= 1
    warnings = [record.getMessage() for record in caplog.records if "throwaway" in record.getMessage()]
    assert text in warnings[0]
    assert sum("output is not affected" in message for message in warnings) == 1
    with (
        LLM(
            folder, skip_tokenizer_init=True, memory="64MiB", strict=True, **provide(lambda c, t: Faulty(fault))
        ) as llm,
        pytest.raises(PluginError, match="throwaway"),
    ):
        llm.generate(PROMPTS, GREEDY)


def test_rows_do_not_return_after_a_fault_unless_token_only(folder: Path) -> None:
    class Once:
        def __init__(self, traits: SpeculatorTraits) -> None:
            self.traits = traits
            self.seen: list[int] = []

        @hookimpl
        def propose(self, batch: Any) -> Any:
            self.seen.append(len(batch.rows))
            if len(self.seen) == 2:
                raise ValueError("once")
            return Proposal([[1] for _ in batch.rows])

    for token_only in (False, True):
        speculator = Once(SpeculatorTraits(token_only=token_only))
        with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t, s=speculator: s)) as llm:
            llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
            after_fault = sum(speculator.seen[2:])
            assert (after_fault > 0) == token_only
            llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
            assert sum(speculator.seen[2:]) > after_fault, "new rows are offered again"


def test_three_faults_in_a_row_switch_it_off(
    folder: Path, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    class Always(Faulty):
        traits = SpeculatorTraits(token_only=True)

    speculator = Always(raising)
    speculator.calls = 10
    with (
        caplog.at_level(logging.WARNING, "specplug"),
        LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: speculator)) as llm,
    ):
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)] == expected
        assert speculator.calls == 13
        assert not llm.engine.chain.enabled["throwaway"]
    assert any("switched off" in record.getMessage() for record in caplog.records)


class Dawdler:
    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        time.sleep(0.6)
        return Proposal([[3] * row.budget.max_nodes for row in batch.rows])


def test_slow_proposals_are_reported_once_with_both_times(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "specplug"),
        LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: Dawdler(), gamma=2)) as llm,
    ):
        llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    told = [record.getMessage() for record in caplog.records if "for one proposal" in record.getMessage()]
    assert len(told) == 1
    seconds = r"speculator 'throwaway' took 0\.[6-9]\d* s for one proposal, the target's step before it [\d.e-]+ s;"
    assert re.match(seconds, told[0])


def test_a_fault_in_the_first_leaves_the_fallback(folder: Path, expected: list[list[int]]) -> None:
    oracle = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], VOCABULARY, hit_rate=1.0)
    options = {
        "plugins": {"bad": lambda c, t: Faulty(raising), "good": lambda c, t: TokenSpeculator(oracle)},
        "speculative_config": {
            "method": "bad",
            "num_speculative_tokens": 3,
            "fallback": {"method": "good", "num_speculative_tokens": 5},
        },
    }
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **options) as llm:
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)] == expected
        assert llm.engine.stats.num_accepted_draft_tokens > 10


@pytest.mark.parametrize(
    "verdict",
    [
        lambda batch, proposal: 1 / 0,
        lambda batch, proposal: Verdict([], []),
        lambda batch, proposal: Verdict([[7]] * len(batch.rows), [1] * len(batch.rows)),
        lambda batch, proposal: Verdict([[]] * len(batch.rows), [-5] * len(batch.rows)),
    ],
)
def test_a_broken_verify_falls_back_to_core(folder: Path, expected: list[list[int]], verdict: Any) -> None:
    class BadVerifier:
        @hookimpl
        def propose(self, batch: Any) -> Any:
            return Proposal([[1] for _ in batch.rows])

        @hookimpl
        def verify(self, batch: Any, proposal: Any) -> Any:
            return verdict(batch, proposal)

    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: BadVerifier())) as llm:
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)] == expected
        assert llm.engine.chain.speculators[0].overrides_verify


def test_a_verify_of_the_plugins_own_is_used_for_its_rows(folder: Path) -> None:
    class AcceptAll:
        @hookimpl
        def propose(self, batch: Any) -> Any:
            return Proposal([[9, 9][: row.budget.max_depth] for row in batch.rows])

        @hookimpl
        def verify(self, batch: Any, proposal: Any) -> Any:
            return Verdict([list(range(len(row))) for row in proposal.tokens], [8] * len(batch.rows))

    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(lambda c, t: AcceptAll())) as llm:
        tokens = llm.generate(PROMPTS, GREEDY)[0].outputs[0].token_ids
    assert tokens[1:7] == [9, 9, 8, 9, 9, 8]


def test_an_observer_sees_and_does_not_disturb(folder: Path, expected: list[list[int]]) -> None:
    class Observer:
        def __init__(self) -> None:
            self.proposals: list[int] = []
            self.verdicts = 0

        @hookimpl
        def load_speculator(self, config: Any, target: Any) -> Any:
            return Faulty(lambda batch: Proposal([[1] for _ in batch.rows]))

        @hookimpl(wrapper=True)
        def propose(self, batch: Any) -> Any:
            proposal = yield
            self.proposals.append(len(proposal.tokens))
            return proposal

        @hookimpl(wrapper=True)
        def verify(self, batch: Any, proposal: Any) -> Any:
            verdict = yield
            self.verdicts += len(verdict.next_tokens)
            return verdict

    observer = Observer()
    with LLM(
        folder, skip_tokenizer_init=True, memory="64MiB", **{**provide(observer), "plugins": {"throwaway": observer}}
    ) as llm:
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)] == expected
    assert observer.proposals
    assert observer.verdicts == sum(len(tokens) for tokens in expected) - llm.engine.stats.num_accepted_draft_tokens


class NoPropose:
    pass


class BadName:
    @hookimpl
    def propose(self, batch: Any) -> Any: ...

    @hookimpl
    def proposee(self, batch: Any) -> Any: ...


class BadArgument:
    @hookimpl
    def propose(self, batches: Any) -> Any: ...


class DefaultArgument:
    @hookimpl
    def propose(self, batch: Any = None) -> Any: ...


class KeywordArgument:
    @hookimpl
    def propose(self, *, batch: Any) -> Any: ...


class BadTraits(Faulty):
    traits = ("hidden_states", 0)


class BadBoundary(Faulty):
    traits = SpeculatorTraits(hidden_states=(99,))


class BadPlan(Faulty):
    @hookimpl
    def plan_memory(self, budget: Any) -> Any:
        return ["4 GB"]


class BadWarmup(Faulty):
    @hookimpl
    def warmup(self, resources: Any) -> Any:
        raise ValueError("no such shape")


class Unhashable(Faulty):
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda c, t: NoPropose(), PluginError, "no @hookimpl method 'propose'"),
        (lambda c, t: BadName(), PluginError, "proposee"),
        (lambda c, t: BadArgument(), PluginError, "batches"),
        (lambda c, t: DefaultArgument(), PluginError, "has a default"),
        (lambda c, t: KeywordArgument(), PluginError, "keyword-only"),
        (lambda c, t: BadTraits(raising), PluginError, "must be a SpeculatorTraits"),
        (lambda c, t: BadBoundary(raising), PluginError, "boundary 99"),
        (lambda c, t: BadPlan(raising), PluginError, "expected a list of MemoryRegions"),
        (lambda c, t: BadWarmup(raising), PluginError, "'throwaway' failed in warmup: ValueError: no such shape"),
        (lambda c, t: Unhashable(raising), PluginError, "eq=False"),
        (lambda c, t: Faulty, PluginError, "register an instance"),
        (lambda c, t: None, PluginError, "returned no speculator"),
        (lambda c, t: c.no_such_attribute, PluginError, "no_such_attribute"),
        (lambda c, t: 1 / 0, PluginError, "'throwaway' failed in load_speculator: ZeroDivisionError"),
        (lambda c, t: t.embed(torch.tensor([1])), PluginError, "is not loaded yet"),
        (lambda c, t: t.model("/no/such/folder"), SpecplugError, "not a folder"),
    ],
)
def test_a_speculator_that_breaks_the_contract_at_load_is_refused(
    folder: Path, make: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(make))


def test_unknown_keys_name_the_nearest_known_one(folder: Path) -> None:
    def make(config: Any, target: Any) -> Any:
        config.get("window_size", 3)
        return Faulty(raising)

    with pytest.raises(SpecplugError, match=r"unknown key 'windowsize'.*did you mean 'window_size'"):
        LLM(folder, skip_tokenizer_init=True, memory="64MiB", **provide(make, windowsize=4))
