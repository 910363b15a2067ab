"""Cached, batched drafting of chains and trees is that of every path alone from a fresh prefill, whatever happened before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fresh_drafts import FreshDraft, dynamic_tree, static_tree
from recorded_drafts import Drafted, RandomWalk, random_walk

from specplug import LLM, SamplingParams
from specplug.model.kv_cache import BlockAllocator
from specplug.speculation.draft_length import FixedDraftLength
from specplug.speculation.target_states.ring_buffer import WINDOW
from specplug_eagle.drafting.chain import Chain
from specplug_eagle.drafting.static_tree import StaticTree
from support.heads import TREES, save_eagle1, save_eagle3
from support.marks import slow_except
from support.models import VOCABULARY, save_model

SCORES_ATOL = 2e-3
DECISIVE = 5e-4
BLOCKS = 70
COMPARED = 120


class SleepyPolicy(FixedDraftLength):
    """Lets rows sleep now and then, some longer than states are kept; a budget of zero only keeps the head up to date."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asleep: dict[int, int] = {}
        self.asked: dict[int, int] = {}

    def length_of(self, request: Any, speculator: Any) -> int | None:
        number = request.number
        self.asked[number] = self.asked.get(number, 0) + 1
        if number % 4 == 1 and self.asked[number] == 4:
            self.asleep[number] = WINDOW + 5
        if number % 4 == 2 and self.asked[number] == 1:
            self.asleep[number] = 2  # while its prompt is computed
        left = self.asleep.get(number, 0)
        if left:
            self.asleep[number] = left - 1
            return None
        if self.random.random() < 0.04:
            self.asleep[number] = self.random.choice([1, 2, 9])
        return self.random.choice([0, 4, 4, 4, 4])


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), "qwen3", max_position_embeddings=400, eos_token_id=None)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    return {
        "EAGLE-1": save_eagle1(root / "one", deviation=0.15),
        "EAGLE-3": save_eagle3(root / "three", norm_before_residual=True),
        "reduced": save_eagle3(root / "reduced", draft_vocab=40, boundaries=(0, 1, 3), norm_output=True),
        "layers": save_eagle3(root / "layers", num_layers=2, windows=(7, None), fc_norm=True),
    }


def walk(target: Path, head: Path, seed: int, **keys: Any) -> RandomWalk:
    """Hundreds of steps of rows that are chunked, preempted, forked, aborted and put to sleep."""
    chooser = random.Random(seed)
    options, made = random_walk(VOCABULARY, seed, model=str(head), num_speculative_tokens=4, **keys)
    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 110, "block_size": 4, "memory": "64MiB"}
    with LLM(target, skip_tokenizer_init=True, strict=True, check_parity=False, **sizes, **options) as llm:
        engine, walker = llm.engine, made[0]
        walker.watch(llm)
        engine.chain.policy = SleepyPolicy(seed)
        engine.scheduler.allocator = BlockAllocator(BLOCKS)
        for number in range(15):
            prompt = [chooser.randrange(VOCABULARY) for _ in range((30, 3, 90, 1, 125)[number % 5])]
            ends = (60, 120, 1, 90)[number % 4]
            params = SamplingParams(temperature=number % 2, max_tokens=ends, n=(3, 1, 1)[number % 3], ignore_eos=True)
            engine.add_request(str(number), prompt, params)
        steps = 0
        while engine.has_unfinished_requests:
            engine.step()
            steps += 1
            if chooser.random() < 0.01 and (alive := list(engine.scheduler.requests())):
                engine.abort(chooser.choice(alive).id)
        assert steps > 100
        assert engine.scheduler.num_preemptions > 0
        assert engine.scheduler.allocator.num_free == BLOCKS
    return walker


def compare(walker: RandomWalk, target: Path, head: Path) -> None:
    """Every draft against the fresh one: the same nodes, and the same scores."""
    drafts: dict[tuple[int, int], FreshDraft] = {}
    tree, decisive, cut = walker.inner.tree, 0, 0
    drawn = random.Random(0).sample(walker.drafts, min(COMPARED, len(walker.drafts)))
    for drafted in drawn:
        key = (drafted.request, drafted.begin)
        if key not in drafts:
            drafts[key] = FreshDraft(head, target, walker.tokens[drafted.request], drafted.begin)
        fresh = drafts[key].tree(drafted.length)
        check_limits(drafted)
        for path, score in zip(drafted.paths, drafted.scores, strict=True):
            assert score == pytest.approx(fresh.score(path), abs=SCORES_ATOL), (drafted, path)
        limits = (drafted.budget.max_nodes, drafted.budget.max_depth)
        if isinstance(tree, Chain):
            expected, gap = static_tree(fresh, [(0,) * depth for depth in range(1, tree.max_depth + 1)], *limits)
        elif isinstance(tree, StaticTree):
            expected, gap = static_tree(fresh, tree.paths, *limits)
        else:
            expected, gap = dynamic_tree(fresh, tree.depth, tree.top_k, tree.total_tokens, *limits)
        cut += len(expected) < tree.max_nodes
        if gap > DECISIVE:
            decisive += 1
            assert set(drafted.paths) == expected, drafted
        assert len(drafted.paths) == len(expected)
    assert decisive > 0.5 * len(drawn) > 50
    assert cut > 20


def check_limits(drafted: Drafted) -> None:
    assert 0 < len(drafted.paths) <= drafted.budget.max_nodes
    assert len(set(drafted.paths)) == len(drafted.paths)
    assert max(map(len, drafted.paths)) <= drafted.budget.max_depth
    assert len(drafted.scores) == len(drafted.paths)


@pytest.mark.parametrize(
    ("head", "tree"),
    slow_except(
        [
            ("reduced", "chain"),
            ("reduced", "loop"),
            ("EAGLE-1", "loop"),
            ("EAGLE-1", "chain"),
            ("EAGLE-1", "authors"),
            ("layers", "odd"),
            ("reduced", "dynamic"),
            ("layers", "dynamic"),
            ("EAGLE-1", "dynamic"),
            ("EAGLE-3", "authors"),
        ],
        ("reduced", "dynamic"),
        ("EAGLE-1", "authors"),
    ),
)
def test_every_path_is_that_of_a_fresh_prefill(target: Path, heads: dict[str, Path], head: str, tree: str) -> None:
    keys: dict[str, Any] = {"loops": True} if tree == "loop" else TREES[tree]
    walker = walk(target, heads[head], seed=len(head) + len(tree), **keys)
    assert walker.gaps >= 2, "no row slept longer than states are kept: the test lost its point"
    assert walker.forks > 1
    assert sum(depth >= 2 for depth in walker.depths) > 40
    compare(walker, target, heads[head])


class Schedule(FixedDraftLength):
    """Lets each row sleep at the calls it is told to, counted per row."""

    def __init__(self, asleep: dict[int, range]) -> None:
        self.asleep = asleep
        self.asked: dict[int, int] = {}

    def length_of(self, request: Any, speculator: Any) -> int | None:
        asked = self.asked.get(request.number, 0)
        self.asked[request.number] = asked + 1
        return None if asked in self.asleep.get(request.number, ()) else 4


def test_a_fork_never_takes_the_row_that_came_after_its_parent_for_it(target: Path, heads: dict[str, Path]) -> None:
    """A parent that slept through most of its prompt ends, and another row takes its slot, before its fork is drafted for."""
    head = heads["EAGLE-3"]
    options, made = random_walk(VOCABULARY, 0, model=str(head), num_speculative_tokens=3)
    chooser = random.Random(8)
    prompts = [[chooser.randrange(VOCABULARY) for _ in range(length)] for length in (125, 20)]
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 41, "block_size": 4, "memory": "64MiB"}
    with LLM(target, skip_tokenizer_init=True, strict=True, check_parity=False, **sizes, **options) as llm:
        engine, walker = llm.engine, made[0]
        walker.watch(llm)
        engine.chain.policy = Schedule({0: range(3), 1: range(12)})
        parent, fork = engine.add_request("fork", prompts[0], SamplingParams(max_tokens=40, n=2, ignore_eos=True))
        while fork.slot < 0:
            engine.step()
        slot = parent.slot
        parent.end("stop")
        engine.scheduler.finish(parent, "aborted")
        (other,) = engine.add_request("other", prompts[1], SamplingParams(max_tokens=40, ignore_eos=True))
        engine.step()
        assert other.slot == slot
        while engine.has_unfinished_requests:
            engine.step()
    assert any(drafted.request == other.number and drafted.begin == 0 for drafted in walker.drafts)
    assert any(drafted.request == fork.number for drafted in walker.drafts)
    for drafted in walker.drafts:
        tokens = walker.tokens[drafted.request]
        fresh = FreshDraft(head, target, tokens, drafted.begin).tree(drafted.length)
        for path, score in zip(drafted.paths, drafted.scores, strict=True):
            assert score == pytest.approx(fresh.score(path), abs=SCORES_ATOL), drafted
