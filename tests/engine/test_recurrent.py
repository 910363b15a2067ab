"""Hybrid and recurrent targets: exact with every speculator, and what their states are made of."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from specplug import LLM, SamplingParams, UnsupportedModelError
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.model.checks.probe import MOST_HELD
from specplug.model.kv_cache import BlockTable
from specplug.model.recurrent.batch import StateRow
from specplug.model.recurrent.recurrence import Recurrence
from specplug.model.recurrent.store import StateStore
from specplug.model.rows import ForwardRow, TreeMask
from support.drafting import drafted_by
from support.engines import assert_idle, squeeze_blocks
from support.heads import save_eagle3
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.recurrent import RECURRENT, save_recurrent
from support.reference import decisive_prompts
from support.speculators import Oracle, TreeSpeculator, provide

NEW_TOKENS = 14
ROWS = 7
BLOCKS = 18
TIGHT = {"max_num_seqs": 5, "max_num_batched_tokens": 21, "block_size": 4, "max_model_len": 72, "memory": "64MiB"}
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
SPECULATORS = ("plain", "ngram", "draft_model", "eagle3", "tree")
CASES = [(kind, speculator) for kind in RECURRENT for speculator in SPECULATORS]
ONE_OF_EACH = ("lfm2", "qwen3_next", "kimi_linear", "bamba", "jamba")
"""A short convolution; the delta rule, by head and by channel; state-space scans of Mamba 2 and 1."""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recurrent")


@functools.cache
def _folder(root: Path, kind: str) -> Path:
    return save_recurrent(root / kind, kind)


@functools.cache
def _pairs(root: Path, kind: str) -> list[tuple[list[int], list[int]]]:
    return decisive_prompts(_folder(root, kind), ROWS, NEW_TOKENS, VOCABULARY)


def _options(root: Path, speculator: str, known: list[list[int]]) -> dict[str, Any]:
    if speculator == "plain":
        return {}
    if speculator == "ngram":
        numbers = {"num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        return {"speculative_config": {"method": "ngram", **numbers}}
    if speculator == "draft_model":
        folder = root / "draft"
        return drafted_by(folder if folder.exists() else save_model(folder, "llama", seed=1, num_hidden_layers=1))
    if speculator == "eagle3":
        folder = root / "eagle3"
        head = folder if folder.exists() else save_eagle3(folder)
        return {"speculative_config": {"method": "eagle3", "model": str(head), "num_speculative_tokens": 4}}
    oracle = Oracle(known, VOCABULARY)
    return provide(lambda config, target: TreeSpeculator(oracle, (0, 2, 3, "final"), 9, top_k=2))


@pytest.mark.parametrize(("kind", "speculator"), slow_except(CASES, *((kind, "tree") for kind in ONE_OF_EACH[:4])))
def test_equals_transformers_generate(root: Path, kind: str, speculator: str) -> None:
    pairs = _pairs(root, kind)
    options = _options(root, speculator, [prompt + output for prompt, output in pairs])
    with LLM(_folder(root, kind), skip_tokenizer_init=True, strict=True, **TIGHT, **options) as llm:
        squeeze_blocks(llm, BLOCKS)
        outputs = llm.generate([prompt for prompt, _ in pairs], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
        if kind in ONE_OF_EACH:
            assert llm.engine.scheduler.num_preemptions > 0
        assert_idle(llm)
        if speculator == "tree":
            assert llm.engine.stats.num_accepted_draft_tokens > 8


@pytest.mark.parametrize("kind", slow_except(ONE_OF_EACH, "qwen3_next"))
def test_forks_and_seeds_give_the_same_with_any_speculator(root: Path, kind: str) -> None:
    prompts = [prompt for prompt, _ in _pairs(root, kind)[:4]]
    params = SamplingParams(temperature=0.7, seed=5, n=3, max_tokens=10, ignore_eos=True)
    texts = []
    for speculator in ("plain", "ngram", "tree"):
        options = _options(root, speculator, [])
        with LLM(_folder(root, kind), skip_tokenizer_init=True, strict=True, **TIGHT, **options) as llm:
            texts.append([[each.token_ids for each in out.outputs] for out in llm.generate(prompts, params)])
            assert_idle(llm)
    assert texts[0] == texts[1] == texts[2]
    alone = SamplingParams(temperature=0, n=2, max_tokens=NEW_TOKENS)
    with LLM(_folder(root, kind), skip_tokenizer_init=True, memory="64MiB") as llm:
        for prompt, wanted in _pairs(root, kind)[:3]:
            assert [each.token_ids for each in llm.generate([prompt], alone)[0].outputs] == [wanted] * 2


@pytest.mark.parametrize("kind", slow_except(ONE_OF_EACH, "lfm2", "bamba"))
def test_states_after_random_rejections_are_those_of_a_prefill(root: Path, kind: str) -> None:
    rng = random.Random(0)
    options = {"max_num_seqs": 2, "block_size": 8, "max_model_len": 156, "memory": "64MiB"}
    speculator = provide(lambda config, target: TreeSpeculator(Oracle([], VOCABULARY), (), MOST_HELD - 1))
    with LLM(_folder(root, kind), skip_tokenizer_init=True, **options, **speculator) as llm, torch.inference_mode():
        runner = llm.engine.runner
        assert runner.states is not None
        tables = [BlockTable(8), BlockTable(8)]
        for number, table in enumerate(tables):
            table.extend(range(number * 19, number * 19 + 19))
        compared = 0
        for _ in range(8):
            tokens = [rng.randrange(3, VOCABULARY) for _ in range(5)]
            runner.forward([ForwardRow(tokens, 0, tables[0], slot=0, held=1)])
            tokens.append(7)
            for step in range(40):
                start = len(tokens) - 1
                count = rng.randrange(MOST_HELD - 1)
                nodes = [rng.randrange(3, VOCABULARY) for _ in range(count)]
                parents = [rng.randrange(-1, node) if step % 2 else node - 1 for node in range(count)]
                tree = TreeMask.from_parents(start, parents) if step % 2 and count else None
                row = ForwardRow([tokens[-1], *nodes], start, tables[0], tree, slot=0, held=1 + count)
                runner.forward([row])
                path, node = [], -1
                while rng.random() < 0.6:
                    children = [child for child in range(count) if parents[child] == node]
                    if not children:
                        break
                    node = rng.choice(children)
                    path.append(node)
                runner.keep(0, path)
                slots = tables[0].slots(start, start + 1 + count)
                runner.cache.move([slots[1 + node] for node in path], [slots[1 + depth] for depth in range(len(path))])
                tokens += [*(nodes[node] for node in path), rng.randrange(3, VOCABULARY)]
                if len(tokens) > 140:
                    break
            ours = runner.forward([ForwardRow(tokens[-1:], len(tokens) - 1, tables[0], slot=0, held=1)])
            fresh = runner.forward([ForwardRow(tokens, 0, tables[1], slot=1, held=1)], [len(tokens) - 1])
            torch.testing.assert_close(ours, fresh, atol=2e-3, rtol=2e-3)
            for memory in runner.states.memories:
                kept = memory.states if isinstance(memory, Recurrence) else memory.tensors[0][:, :2]
                torch.testing.assert_close(kept[0], kept[1], atol=2e-3, rtol=2e-3)
                compared += 1
        assert compared


def test_a_forward_that_begins_where_no_state_is_raises(root: Path) -> None:
    with LLM(_folder(root, "lfm2"), skip_tokenizer_init=True, memory="64MiB", block_size=8) as llm:
        runner, table = llm.engine.runner, BlockTable(8)
        table.extend(range(4))
        runner.forward([ForwardRow([5, 6, 7, 8], 0, table, slot=0, held=1)])
        for start in (2, 5):
            with pytest.raises(RuntimeError, match=f"is at 3, 1 tokens follow, and a forward begins at {start}"):
                runner.forward([ForwardRow([9], start, table, slot=0, held=1)])
        runner.forward([ForwardRow([9], 3, table, slot=0, held=1)])


@pytest.mark.parametrize("kind", slow_except(ONE_OF_EACH, "qwen3_next"))
def test_a_step_that_fails_in_the_middle_leaves_no_wrong_state(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = _pairs(root, kind)
    options = _options(root, "tree", [prompt + output for prompt, output in pairs])
    with LLM(_folder(root, kind), skip_tokenizer_init=True, strict=True, **TIGHT, **options) as llm:
        engine = llm.engine
        requests = [engine.add_request(str(i), prompt, GREEDY)[0] for i, (prompt, _) in enumerate(pairs)]
        assert engine.runner.states is not None
        memory = engine.runner.states.memories[1]
        usual, calls = memory.run, [0]

        def fails_now_and_then(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] % 6 == 0:
                raise OSError("the device is gone")
            return usual(*args, **kwargs)

        monkeypatch.setattr(memory, "run", fails_now_and_then)
        failures = 0
        while engine.has_unfinished_requests and failures < 6:
            try:
                engine.step()
            except OSError:
                failures += 1
        monkeypatch.undo()
        while engine.has_unfinished_requests:
            engine.step()
        assert failures > 2
        assert [request.output_ids for request in requests] == [output for _, output in pairs]
        assert_idle(llm)


@pytest.mark.parametrize("kind", slow_except(ONE_OF_EACH, "bamba"))
@pytest.mark.parametrize("fault", ["rejected nodes stay", "an accepted token is left out", "states begin as they were"])
def test_the_probe_sees_wrong_states(
    root: Path, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("specplug.model.load.parity.private_folder", lambda: tmp_path)
    if fault == "rejected nodes stay":
        monkeypatch.setattr(StateStore, "keep", lambda self, slot, entries: None)
    elif fault == "an accepted token is left out":
        usual = StateStore._row

        def forgets(self: StateStore, row: ForwardRow, first: int) -> StateRow:
            known = usual(self, row, first)
            return attrs.evolve(known, replayed=known.replayed[:-1])

        monkeypatch.setattr(StateStore, "_row", forgets)
    else:
        known_rows = StateStore._row

        def begins_with_what_is_there(self: StateStore, row: ForwardRow, first: int) -> StateRow:
            return attrs.evolve(known_rows(self, row, first), is_fresh=False)

        monkeypatch.setattr(StateStore, "_row", begins_with_what_is_there)
        monkeypatch.setattr(torch, "zeros", _ones_for_states)
    with pytest.raises(UnsupportedModelError, match="other logits packed and paged"):
        LLM(_folder(root, kind), skip_tokenizer_init=True, memory="64MiB").close()


_zeros = torch.zeros


def _ones_for_states(*sizes: Any, **options: Any) -> torch.Tensor:
    made = _zeros(*sizes, **options)
    return made.fill_(1) if made.is_floating_point() and made.dim() > 2 else made


def test_it_is_planned_and_shown(root: Path) -> None:
    planned = plan_engine(EngineConfig.create(str(_folder(root, "bamba")), memory="64MiB", max_num_seqs=3))
    assert not planned.caches_prefixes
    assert dict(planned.plan.parts)["recurrent state"] == planned.plan.recurrent_state > 0
    with LLM(_folder(root, "bamba"), skip_tokenizer_init=True, memory="64MiB", max_num_seqs=3) as llm:
        assert llm.engine.prefix_cache is None
        assert llm.engine.runner.states is not None
        assert llm.engine.runner.states.num_bytes == llm.engine.plan.recurrent_state == planned.plan.recurrent_state


DRAFT_CASES = [(target, draft) for target in ("llama", "qwen3_next") for draft in (*ONE_OF_EACH, "mamba2")]


@pytest.mark.parametrize(("target", "draft"), slow_except(DRAFT_CASES, ("llama", "lfm2"), ("qwen3_next", "bamba")))
def test_a_recurrent_draft_equals_generate(root: Path, target: str, draft: str) -> None:
    """Ragged rows, chunked prefill, preemptions and forks; a draft that is the target itself is accepted nearly always."""
    folder = _target(root, target)
    pairs = decisive_prompts(folder, ROWS, NEW_TOKENS, VOCABULARY)
    with LLM(folder, skip_tokenizer_init=True, strict=True, **TIGHT, **drafted_by(_folder(root, draft))) as llm:
        squeeze_blocks(llm, BLOCKS - 4)
        outputs = llm.generate([prompt for prompt, _ in pairs], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
        assert llm.engine.scheduler.num_preemptions > 0
        forked = llm.generate([pairs[0][0]], SamplingParams(temperature=0, n=3, max_tokens=NEW_TOKENS))[0]
        assert [each.token_ids for each in forked.outputs] == [pairs[0][1]] * 3
        assert_idle(llm)


@pytest.mark.parametrize("kind", slow_except(ONE_OF_EACH, "lfm2"))
def test_a_recurrent_draft_that_is_the_target_is_accepted(root: Path, kind: str) -> None:
    """So its states are those of the committed tokens, after accepted drafts and forks too."""
    folder = _folder(root, kind)
    pairs = _pairs(root, kind)
    with LLM(folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **drafted_by(folder)) as llm:
        for prompts, number in (([prompt for prompt, _ in pairs], 1), ([pairs[0][0]], 3)):
            llm.generate(prompts, SamplingParams(temperature=0, n=number, max_tokens=NEW_TOKENS, ignore_eos=True))
        stats = llm.engine.stats
        assert stats.num_accepted_draft_tokens > 0.95 * stats.num_draft_tokens > 50


def _target(root: Path, kind: str) -> Path:
    if kind in RECURRENT:
        return _folder(root, kind)
    folder = root / kind
    return folder if folder.exists() else save_model(folder, kind)
