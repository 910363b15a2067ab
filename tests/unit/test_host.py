"""`specplug.host`: rows of another engine, views of its arrays, faults, limits; no model anywhere."""

from __future__ import annotations

import ast
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specplug.host
from specplug import (
    InsufficientMemoryError,
    KVLayer,
    MemoryRegion,
    PluginError,
    Proposal,
    SamplingParams,
    SpeculatorTraits,
    TokenView,
    Verdict,
    hookimpl,
)
from specplug.host import ArrayTokens, Draft, HostLimits, NotReturnedError, SpeculatorHost

LIMITS = HostLimits(vocab_size=50, max_model_len=64, max_num_seqs=2)


class Recorder:
    """Repeats the last token, and keeps what it is shown."""

    def __init__(self, **traits: Any) -> None:
        self.traits = SpeculatorTraits(**traits)
        self.rows: list[Any] = []
        self.ended: list[tuple[int, str]] = []
        self.answer: Any = None

    @hookimpl
    def propose(self, batch: Any) -> Any:
        self.ended += batch.ended
        self.rows += batch.rows
        if callable(self.answer):
            return self.answer(batch)
        return Proposal([[row.tokens[-1]] * row.budget.max_nodes for row in batch.rows])


def host_of(speculator: Any, limits: HostLimits = LIMITS, **options: Any) -> SpeculatorHost:
    config = {"method": "mine", "num_speculative_tokens": 3, **options.pop("config", {})}
    return SpeculatorHost(config, limits, plugins={"mine": lambda config, target: speculator}, **options)


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda ids: array("i", ids)], ids=["numpy", "torch", "array"])
def test_a_view_of_an_array_is_the_list(make: Any) -> None:
    ids = [5, 3, 8, 8, 1, 0]
    view, expected = ArrayTokens(make([*ids, 7, 7]), len(ids)), TokenView(ids)
    indices = [
        slice(None),
        slice(2, None),
        slice(-3, -1),
        slice(4, 2),
        slice(None, None, -1),
        slice(0, 99, 2),
        slice(99, 200),
    ]
    for index in [0, 5, -1, -6, *indices]:
        assert view[index] == expected[index]
        assert type(view[index]) is type(expected[index])
    assert list(view) == ids
    assert (len(view), 8 in view, 7 in view, view.index(8)) == (6, True, False, 2)
    for index in (6, -7):
        with pytest.raises(IndexError):
            view[index]
    assert all(type(token) is int for token in view)


def test_a_row_from_its_beginning_to_its_end() -> None:
    ids = np.zeros(64, dtype=np.int32)
    ids[:4] = [1, 2, 3, 9]
    speculator = Recorder()
    host = host_of(speculator)
    row = host.add(ArrayTokens(ids, 4), sampling=SamplingParams(temperature=0.5))
    [draft] = host.propose([row])
    assert draft is not None
    assert (draft.tokens, draft.method) == ([9, 9, 9], "mine")
    seen = speculator.rows[-1]
    assert (seen.is_new, seen.new_positions, list(seen.tokens), seen.num_prompt_tokens) == (
        True,
        range(3),
        [1, 2, 3, 9],
        4,
    )
    assert (seen.sampling.temperature, seen.outcome, seen.table) == (0.5, None, None)
    ids[4:7] = [9, 9, 4]
    row.advance(7, accepted=2)
    host.propose([row])
    seen = speculator.rows[-1]
    assert (seen.is_new, seen.new_positions, len(seen.tokens)) == (False, range(3, 6), 7)
    assert (seen.outcome.accepted, seen.outcome.num_nodes, seen.outcome.tokens) == ((0, 1), 3, (9, 9, 9))
    assert row.stats.mean_acceptance_length == 3.0
    host.end(row, "aborted")
    other = host.add(TokenView([5]))
    host.propose([other])
    assert speculator.ended == [(seen.row_id, "aborted")]
    assert speculator.rows[-1].is_new


def test_a_row_that_is_computed_in_chunks_is_shown_without_a_budget() -> None:
    speculator = Recorder()
    host = host_of(speculator)
    row = host.add(TokenView([1, 2, 3, 4, 5]), num_computed=2)
    assert host.propose([row]) == [None]
    assert (speculator.rows[-1].budget.max_nodes, speculator.rows[-1].new_positions) == (0, range(2))


def test_budgets_end_with_the_context_and_with_max_tokens() -> None:
    host = host_of(Recorder())
    ids = np.ones(64, dtype=np.int32)
    row = host.add(ArrayTokens(ids, 62), num_prompt_tokens=2)
    assert [len(draft) for draft in host.propose([row]) if draft] == [1]
    short = host.add(ArrayTokens(ids, 5), num_prompt_tokens=2, sampling=SamplingParams(temperature=0, max_tokens=6))
    assert [len(draft) for draft in host.propose([short]) if draft] == [2]


def test_more_rows_than_there_are() -> None:
    host = host_of(Recorder())
    first = host.add(TokenView([1]))
    host.add(TokenView([2]))
    with pytest.raises(PluginError, match="max_num_seqs=2"):
        host.add(TokenView([3]))
    host.end(first)
    assert host.add(TokenView([3])).slot == first.slot


TREE = Proposal([[1, 2, 3, 4]], parents=[[-1, -1, 1, 2]], scores=[[-0.1, -2.5, -2.6, -2.7]])


def test_trees_are_cut_to_their_best_chain_unless_the_engine_verifies_them() -> None:
    speculator = Recorder(max_nodes=4, max_depth=3)
    speculator.answer = lambda batch: TREE
    [draft] = host_of(speculator).propose([host_of(speculator).add(TokenView([7]))])
    assert draft is not None
    assert (draft.tokens, draft.parents, draft.scores) == ([1], None, [-0.1])
    trees = host_of(speculator, HostLimits(vocab_size=50, max_model_len=64, trees=True))
    row = trees.add(TokenView([7]))
    [draft] = trees.propose([row])
    assert draft is not None
    assert draft.parents == [-1, -1, 1, 2]
    row.advance(3, accepted=[1, 2])
    assert row.outcome is not None
    assert row.outcome.accepted == (1, 2)


def test_the_best_chain() -> None:
    assert Draft("m", [1, 2]).best_chain().tokens == [1, 2]
    assert Draft("m", [1, 2, 3, 4], [-1, -1, 1, 2]).best_chain().tokens == [2, 3, 4]
    deep_is_likely = Draft("m", [1, 2, 3], [-1, -1, 1], [-0.7, -0.8, -0.9])
    assert deep_is_likely.best_chain().tokens == [2, 3]
    probs = specplug.DraftDistributions(torch.eye(4), index=[0, 0, 1, 2])
    sampled = Draft("m", [1, 2, 3, 0], [-1, -1, 1, 0], None, probs).best_chain()
    assert (sampled.tokens, sampled.probs.index if sampled.probs else None) == ([1, 0], [0, 2])


def raising(batch: Any) -> Any:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    "answer",
    [
        raising,
        lambda batch: 7,
        lambda batch: Proposal([[99]]),
        lambda batch: Proposal([[1] * 9]),
        lambda batch: Proposal([]),
    ],
)
def test_a_fault_costs_drafts_and_three_switch_it_off(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    speculator = Recorder(token_only=True)
    speculator.answer = answer
    host = host_of(speculator)
    row = host.add(TokenView([7]))
    for count in (1, 2, 3):
        assert host.propose([row]) == [None]
        assert (host.faults, host.enabled) == ({"mine": count}, {"mine": count < 3})
    speculator.answer = None
    assert host.propose([row]) == [None]
    assert "switched off" in caplog.text
    strict = host_of(speculator, strict=True)
    speculator.answer = answer
    with pytest.raises(PluginError, match="speculator 'mine'"):
        strict.propose([strict.add(TokenView([7]))])


def test_a_speculator_that_does_not_return_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    slow, other = Recorder(), Recorder()
    slow.answer = lambda batch: time.sleep(0.6)
    plugins = {"slow": lambda config, target: slow, "other": lambda config, target: other}
    config = {
        "method": "slow",
        "num_speculative_tokens": 3,
        "fallback": {"method": "other", "num_speculative_tokens": 2},
    }
    host = SpeculatorHost(config, LIMITS, plugins=plugins, timeout=0.2)
    row = host.add(TokenView([7]))
    started = time.perf_counter()
    drafts = [host.propose([row])[0] for _ in range(3)]
    assert time.perf_counter() - started < 0.5
    assert [draft.method for draft in drafts if draft] == ["other"] * 3
    assert (host.faults, host.enabled) == ({"slow": 1, "other": 0}, {"slow": False, "other": True})
    assert len(slow.rows) == 1
    assert "did not return" in caplog.text
    host.close()
    strict = SpeculatorHost({"method": "slow"}, LIMITS, plugins=plugins, timeout=0.1, strict=True)
    with pytest.raises(PluginError, match="did not return within") as raised:
        strict.propose([strict.add(TokenView([7]))])
    assert isinstance(raised.value.__cause__, NotReturnedError)


def test_with_a_timeout_calls_are_made_without_autograd_and_errors_arrive() -> None:
    speculator = Recorder()
    speculator.answer = lambda batch: Proposal([[int(torch.is_grad_enabled() or torch.is_inference_mode_enabled())]])
    host = host_of(speculator, timeout=5.0)
    row = host.add(TokenView([7]))
    with torch.inference_mode():
        [draft] = host.propose([row])
    assert draft is not None
    assert draft.tokens == [0]
    speculator.answer = raising
    assert host.propose([row]) == [None]
    assert host.faults == {"mine": 1}
    host.close()


class Verifier(Recorder):
    @hookimpl
    def verify(self, batch: Any, proposal: Any, target: Any) -> Verdict | None:
        return None


class Cached(Recorder):
    def __init__(self, tables: Any) -> None:
        super().__init__()
        self.region = MemoryRegion(
            "kv", "kv_cache", layers=(KVLayer(2, 4, 4),), dtype=torch.float32, tables=tables, scratch_tokens_per_row=8
        )

    @hookimpl
    def plan_memory(self, budget: Any) -> list[MemoryRegion]:
        return [self.region]

    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.resources = resources


def test_what_a_host_cannot_give_is_refused_by_name() -> None:
    with pytest.raises(PluginError, match="speculator 'mine' has a verify of its own"):
        host_of(Verifier())
    with pytest.raises(PluginError, match="speculator 'mine' reads target states"):
        host_of(Recorder(hidden_states=["final"]))
    with pytest.raises(PluginError, match="'kv' with tables='shared'"):
        host_of(Cached("shared"))
    small = HostLimits(vocab_size=50, max_model_len=64, max_num_seqs=2, memory_bytes=1000)
    with pytest.raises(InsufficientMemoryError, match="plan 9,216 bytes"):
        host_of(Cached("own"), small)


def test_a_cache_of_its_own_holds_all_rows_at_their_longest() -> None:
    speculator = Cached("own")
    host = host_of(speculator)
    host.warm_up()
    cache = speculator.resources.kv_caches["kv"]
    assert speculator.resources.num_blocks == 2 * 5  # 64 + 8 tokens are 5 blocks of 16
    assert cache.keys[0].numel() == 2 * 5 * 16 * 2 * 4
    assert host.planned_bytes == 2 * (64 + 8) * 2 * (4 + 4) * 4


def test_states_are_delivered() -> None:
    speculator = Recorder(hidden_states=[1, "final"])
    shown: list[torch.Tensor] = []

    def answer(batch: Any) -> None:
        shown.append(torch.cat([batch.hidden_states[1], batch.hidden_states["final"]], dim=1).clone())

    speculator.answer = answer
    target = specplug.host.TargetFacade.of_limits(
        vocab_size=50, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, num_layers=2, hidden_size=1
    )
    limits = HostLimits(vocab_size=50, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, num_layers=2)
    host = host_of(speculator, limits, target=target)
    row = host.add(TokenView([4, 5, 6, 7]))
    states = torch.arange(6.0)[:, None]
    host.record({1: states, "final": -states}, {row: (range(1, 3), [4, 5])})  # the first position was in a prefix cache
    host.propose([row])
    assert speculator.rows[-1].new_positions == range(1, 3)
    assert shown[-1].tolist() == [[4.0, -4.0], [5.0, -5.0]]


def test_observers_see_the_calls_of_a_host() -> None:
    seen: list[int] = []

    class Watch:
        @hookimpl(wrapper=True)
        def propose(self, batch: Any) -> Any:
            result = yield
            seen.append(len(result.tokens))
            return result

    speculator = Recorder()
    plugins = {"mine": lambda config, target: speculator, "watch": Watch()}
    host = SpeculatorHost({"method": "mine"}, LIMITS, plugins=plugins)
    host.propose([host.add(TokenView([1]))])
    assert seen == [1]


def test_the_exported_names_are_those_for_type_checkers() -> None:
    tree = ast.parse(Path(specplug.host.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specplug.")
        for alias in node.names
    }
    assert typed == set(specplug.host.__all__)
    assert all(getattr(specplug.host, name) for name in specplug.host.__all__)
    assert not hasattr(specplug.host, "missing")
