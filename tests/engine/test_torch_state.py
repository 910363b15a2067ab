"""Whatever a caller has set in PyTorch, before the start or after it: nothing of it reaches an engine."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from specplug import LLM, SamplingParams, hookimpl
from specplug.model.torch_state import own_torch_state
from specplug.testing.models import save_words
from support.heads import TREES, save_eagle3
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12], [7]]
PARAMS = [
    attrs.evolve(GREEDY, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=10, n=2, seed=1, top_k=9, top_p=0.9, min_p=0.01, temperature=0.8),
    attrs.evolve(GREEDY, logit_bias={3: 1.5}, bad_words=["w5."], min_tokens=3, stop_token_ids=[9]),
    attrs.evolve(GREEDY, repetition_penalty=1.5, frequency_penalty=0.1, allowed_token_ids=list(range(3, 40))),
    SamplingParams(max_tokens=10, ignore_eos=True),
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def all_at_once() -> Iterator[None]:
    with default_dtype(torch.float64), default_device(), torch.autocast("cpu", torch.bfloat16), deterministic():
        yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "all": all_at_once,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_eagle3(tmp_path_factory.mktemp("head"), draft_vocab=40)


KINDS = ("plain", "chain", "tree", "model", "ngram", "eagle chain", "eagle tree", "eagle static tree")


def start(kind: str, folder: Path, head: Path, **more: Any) -> LLM:
    oracle = Oracle([], VOCABULARY, 0.8)
    eagle = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 4}
    options: dict[str, Any] = {
        "plain": {},
        "chain": provide(lambda c, t: TokenSpeculator(oracle)),
        "tree": provide(lambda c, t: TreeSpeculator(oracle, (1,), 6, top_k=3)),
        "model": provide(lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens)),
        "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}},
        "eagle chain": {"speculative_config": eagle},
        "eagle tree": {"speculative_config": {**eagle, **TREES["dynamic"]}},
        "eagle static tree": {"speculative_config": {**eagle, **TREES["odd"]}},
    }[kind]
    return LLM(folder, memory="32MiB", strict=True, seed=3, **{"compile": False, **options, **more})


def run(llm: LLM) -> list[Any]:
    drafted = llm.engine.stats.num_draft_tokens
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert not llm.engine.chain.speculators or llm.engine.stats.num_draft_tokens > drafted
    return [(each.token_ids, each.text) for output in outputs[:-1] for each in output.outputs] + [
        len(outputs[-1].outputs[0].token_ids)
    ]


@pytest.mark.parametrize("kind", slow_except(KINDS, "plain", "tree", "model", "eagle tree"))
def test_what_the_caller_has_set_does_not_reach_in(kind: str, folder: Path, head: Path) -> None:
    with start(kind, folder, head) as llm:
        expected = run(llm)
        for name, state in STATES.items():
            with state():
                assert run(llm) == expected, name
        assert not any(llm.engine.chain.faults.values())


@pytest.mark.parametrize("kind", ["plain", "eagle tree", "model"])
def test_what_was_set_at_the_start_does_not_stay(kind: str, folder: Path, head: Path) -> None:
    with start(kind, folder, head) as llm:
        expected = run(llm)
    for name in ("all", "bfloat16", "inference mode"):
        with STATES[name]():
            llm = start(kind, folder, head)
        with llm:
            for state in (nullcontext, STATES[name]):
                with state():
                    assert run(llm) == expected, name


class Seeing:
    """Notes what PyTorch is set to in hooks."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    @hookimpl
    def warmup(self, resources: Any) -> None:
        self.look()

    @hookimpl
    def propose(self, batch: Any) -> None:
        self.look()

    def look(self) -> None:
        self.seen.add(
            (
                torch.empty(0, dtype=torch.float32).device.type,
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )


def test_hooks_see_the_engines_settings_and_callers_get_theirs_back(folder: Path, head: Path) -> None:
    seeing = Seeing()
    for state in (*STATES.values(), nullcontext):
        with state():
            before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device()
            with start("plain", folder, head, **provide(lambda c, t: seeing)) as llm:
                llm.generate(PROMPTS[:1], GREEDY)
            assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device())
    assert seeing.seen == {("cpu", False, False, False)}


def test_it_costs_next_to_nothing() -> None:
    def enter() -> None:
        with own_torch_state():
            pass

    assert min(timeit.repeat(enter, number=200, repeat=50)) / 200 < 10e-6
