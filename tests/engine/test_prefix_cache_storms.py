"""Random traffic in an engine with few blocks: no output depends on the prefix cache, no salt shares, no block is lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specplug import LLM, SamplingParams
from specplug.engine.prefix_cache import PrefixCache
from specplug.request import Request
from support.drafting import drafted_by
from support.engines import assert_idle, squeeze_blocks
from support.heads import save_eagle3
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.speculators import Oracle, TreeSpeculator, provide

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
KINDS = ("plain", "draft_model", "eagle3", "tree", "ngram")
TRUNKS = ([5, 6, 7, 8] * 6, [5, 6, 7, 8] * 3 + [9, 10, 11, 12, 13] * 3, [40] * 20)
FEWEST = 26  # blocks of 2 tokens: one row of the longest prompt and output, and its drafts
Key = tuple[tuple[int, ...], SamplingParams]


@attrs.frozen
class Sent:
    """A request, when it is sent, and when it is aborted (in steps after that), if it is."""

    prompt: list[int]
    params: SamplingParams
    salt: str | None
    pause: int
    abort_after: int | None


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    trunk = draw(st.sampled_from(TRUNKS))
    tail = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=6))
    temperature = draw(st.sampled_from([0.0, 0.9]))
    return Sent(
        prompt=[*trunk[: draw(st.integers(0, len(trunk)))], *tail],
        params=SamplingParams(
            temperature=temperature,
            seed=draw(st.integers(0, 2)),
            n=draw(st.sampled_from([1, 1, 2, 3])),
            max_tokens=draw(st.integers(1, 10)),
            ignore_eos=True,
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
            num_speculative_tokens=draw(st.sampled_from([None, None, 0])),
        ),
        salt=draw(st.sampled_from([None, None, "a", "b"])),
        pause=draw(st.integers(0, 4)),
        abort_after=draw(st.sampled_from([None, None, None, 0, 1, 3])),
    )


STORMS = st.tuples(
    st.lists(requests(), min_size=1, max_size=14),
    st.integers(FEWEST, 60),
    st.sampled_from([6, 11, 64]),
    st.sampled_from([None, None, 3, 9]),
)


class Engines:
    """An engine that keeps its cache from storm to storm, and one without a cache that serves every request alone."""

    def __init__(self, root: Path, kind: str) -> None:
        target = save_model(root / "target", "llama", eos_token_id=None)
        options: dict[str, Any] = {}
        if kind == "draft_model":
            options = drafted_by(save_model(root / "draft", "llama", seed=1), gamma=3)
        elif kind == "eagle3":
            head = str(save_eagle3(root / "head"))
            options = {"speculative_config": {"method": "eagle3", "model": head, "num_speculative_tokens": 3}}
        elif kind == "tree":
            options = provide(lambda c, t: TreeSpeculator(Oracle([], VOCABULARY), (1, "final"), 5, top_k=2), gamma=3)
        elif kind == "ngram":
            options = {"speculative_config": NGRAM}
        common: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "check_parity": False,
            "memory": "64MiB",
            "max_num_seqs": 4,
            "max_model_len": 48,
        }
        self.llm = LLM(target, strict=True, block_size=2, **common, **options)
        self.alone = LLM(target, enable_prefix_caching=False, **common)
        self.known: dict[Key, list[list[int]]] = {}

    def expected(self, sent: Sent) -> list[list[int]]:
        params = attrs.evolve(sent.params, prompt_logprobs=None, num_speculative_tokens=None)
        key = (*sent.prompt, -1, params.seed or 0, params.n, params.max_tokens or 0, int(params.temperature * 10))
        if key not in self.known:
            (out,) = self.alone.generate([sent.prompt], params, use_tqdm=False)
            self.known[key] = [completion.token_ids for completion in out.outputs]
        return self.known[key]

    def close(self) -> None:
        self.llm.close()
        self.alone.close()


@pytest.fixture(scope="module", params=slow_except(KINDS, "plain", "draft_model", "eagle3"))
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("storm"), request.param)
    yield made
    made.close()


def check_blocks(llm: LLM) -> None:
    """Cached blocks hold what their digest says, and rows share blocks only with rows of the same tokens and salt."""
    allocator, size = llm.engine.scheduler.allocator, llm.engine.plan.block_size
    holders: dict[int, list[Request]] = {}
    for row in llm.engine.scheduler.running:
        assert row.table is not None
        assert len(set(row.table.blocks)) == len(row.table.blocks)
        digests = PrefixCache(size)._digests(attrs.evolve(row, block_digests=[]), len(row.tokens) // size)
        for place, block in enumerate(row.table.blocks):
            holders.setdefault(block, []).append(row)
            content = allocator.cached.get(block)
            if content is not None:
                assert place < row.num_computed // size or row.num_computed == 0
                assert content.digest == digests[place]
    for block in range(allocator.num_blocks):
        assert allocator._references[block] == len(holders.get(block, ()))
        assert len({row.cache_salt for row in holders.get(block, ())}) <= 1
    assert allocator.num_free == allocator.num_blocks - len(holders)
    assert allocator._free.sum() + allocator.cached.num_idle == allocator.num_free


def storm(engines: Engines, case: tuple[list[Sent], int, int, int | None]) -> None:
    sent, blocks, budget, preempt_every = case
    llm, numbers = engines.llm, itertools.count()
    engine = llm.engine
    if engine.scheduler.allocator.num_blocks != blocks:
        squeeze_blocks(llm, blocks)
    engine.scheduler.max_num_batched_tokens = budget
    families: list[tuple[Sent, list[Request]]] = []
    aborts: dict[int, str] = {}
    step = 0

    def advance() -> None:
        nonlocal step
        if engine.has_unfinished_requests:
            engine.step()
            check_blocks(llm)
        step += 1
        if due := aborts.pop(step, None):
            engine.abort(due)
        if preempt_every and step % preempt_every == 0 and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])

    for each in sent:
        for _ in range(each.pause):
            advance()
        name = f"{next(numbers)}"
        families.append((each, engine.add_request(name, each.prompt, each.params, cache_salt=each.salt)))
        if each.abort_after is not None:
            aborts[step + 1 + each.abort_after] = name
    for _ in range(2000):
        if not engine.has_unfinished_requests:
            break
        advance()
    assert_idle(llm)
    for each, family in families:
        for request, expected in zip(family, engines.expected(each), strict=True):
            assert request.error is None
            output = request.output_ids
            assert output == (expected if request.finish_reason != "abort" else expected[: len(output)])
            if each.params.prompt_logprobs is not None and request is family[0] and request.finish_reason != "abort":
                assert len(request.prompt_logprobs) == len(each.prompt) - 1


_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=4, **_SETTINGS)
@given(STORMS)
def test_storms(engines: Engines, case: tuple[list[Sent], int, int, int | None]) -> None:
    storm(engines, case)


@pytest.mark.slow
@settings(max_examples=150, **_SETTINGS)
@given(STORMS)
def test_more_storms(engines: Engines, case: tuple[list[Sent], int, int, int | None]) -> None:
    storm(engines, case)


def test_storms_hit_evict_and_preempt(engines: Engines) -> None:
    """What the storms are for has happened in them."""
    cache, scheduler = engines.llm.engine.prefix_cache, engines.llm.engine.scheduler
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    sent = [Sent([*TRUNKS[i % 2], 3 + i], params, None, i % 2, None) for i in range(12)]
    before = scheduler.num_preemptions
    assert cache is not None
    hits = cache.num_hit_tokens
    storm(engines, (sent, FEWEST + 6, 64, None))
    assert scheduler.num_preemptions > before
    assert cache.num_hit_tokens > hits + 60
    assert len(scheduler.allocator.cached) <= scheduler.allocator.num_blocks
