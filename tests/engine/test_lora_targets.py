"""LoRA adapters of targets of many kinds: other linear layers, recurrent state, quantised weights."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from specplug import LLM, CheckpointError, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from support.adapters import ALL_LINEARS, merge_adapter, save_adapter
from support.drafting import drafted_by
from support.engines import assert_idle, squeeze_blocks
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.quantised import DTYPES, KINDS, decided_pairs, save_quantised
from support.recurrent import save_recurrent
from support.reference import MARGIN, decisive_prompts, generate
from support.speculators import Oracle, TreeSpeculator, provide

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
COMMON: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True, "check_parity": False, "memory": "64MiB"}
TIGHT = {"max_num_seqs": 5, "max_num_batched_tokens": 21, "block_size": 4, "max_model_len": 72}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ARCHITECTURES = {
    "qwen3": ALL_LINEARS,
    "gemma3_text": ALL_LINEARS,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "gpt_oss": ATTENTION,
}
RECURRENT = {
    "lfm2": ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"),
    "qwen3_next": ("in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate", *ATTENTION),
    "kimi_linear": ("b_proj", "g_a_proj", "g_b_proj", "kv_b_proj", *ATTENTION),
    "bamba": ("in_proj", "out_proj", *ALL_LINEARS),
    "jamba": ("in_proj", "x_proj", "out_proj", *ATTENTION),
}
CASES = [("lfm2", "plain"), *((kind, speculator) for kind in RECURRENT for speculator in ("draft_model", "tree"))]


@pytest.mark.parametrize("architecture", slow_except(ARCHITECTURES, "gpt2", "deepseek_v3"))
def test_architectures(tmp_path: Path, architecture: str) -> None:
    target = save_model(tmp_path / "target", architecture, eos_token_id=None)
    is_gpt2 = architecture == "gpt2"
    adapter = save_adapter(
        tmp_path / "adapter", target, modules=ARCHITECTURES[architecture], size=0.2, transposed=is_gpt2
    )
    merged = merge_adapter(tmp_path / "merged", target, adapter)
    prompts = [[5, 9, 11, 40, 3, 7], [33, 4], [8] * 9]
    with LLM(target, lora_modules={"a": adapter}, **COMMON) as llm:
        ours = llm.generate([*prompts, *prompts], GREEDY, use_tqdm=False, lora_request=["a"] * 3 + [None] * 3)
    for output, folder in zip(ours, [merged] * 3 + [target] * 3, strict=True):
        reference, margin = generate(folder, output.prompt_token_ids, NEW_TOKENS)
        assert margin < MARGIN or output.outputs[0].token_ids == reference


def _drafting(speculator: str, root: Path, known: list[list[int]]) -> dict[str, Any]:
    if speculator == "draft_model":
        return drafted_by(save_model(root / "draft", "llama", seed=1, num_hidden_layers=1))
    if speculator == "tree":
        return provide(lambda config, target: TreeSpeculator(Oracle(known, VOCABULARY), (0, 2, "final"), 9, top_k=2))
    return {}


@attrs.frozen
class Adapted:
    """A target with recurrent state, its adapters, and (prompt, adapter, output) that Transformers gives for them merged."""

    target: Path
    adapters: dict[str, Path]
    todo: list[tuple[list[int], str | None, list[int]]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    """One of a kind, made once for all speculators: most of the time goes into what it is compared with."""

    @functools.cache
    def make(kind: str) -> Adapted:
        root, layers = tmp_path_factory.mktemp(kind), RECURRENT[kind]
        target = save_recurrent(root / "target", kind)
        adapters = {
            "all": save_adapter(root / "all", target, seed=1, modules=layers, size=0.2),
            "some": save_adapter(root / "some", target, seed=2, rank=3, modules=layers[:3], size=0.3),
        }
        merged = {name: merge_adapter(root / f"merged {name}", target, folder) for name, folder in adapters.items()}
        todo = [
            (prompt, name, output)
            for name, folder in ((None, target), *merged.items())
            for prompt, output in decisive_prompts(folder, 4, NEW_TOKENS, VOCABULARY)
        ]
        random.Random(0).shuffle(todo)
        plain = generate(target, todo[0][0], NEW_TOKENS)[0]
        assert all(generate(folder, todo[0][0], NEW_TOKENS)[0] != plain for folder in merged.values())
        return Adapted(target, adapters, todo)

    return make


@pytest.mark.parametrize(("kind", "speculator"), slow_except(CASES, ("lfm2", "tree"), ("qwen3_next", "tree")))
def test_targets_with_recurrent_state(
    tmp_path: Path, adapted: Callable[[str], Adapted], kind: str, speculator: str
) -> None:
    """Mixed batches in a tight engine, with chunks and preemption; then forks, whose states begin as their parent's."""
    target, adapters, todo = attrs.astuple(adapted(kind), recurse=False)
    prompts, names, expected = ([each[index] for each in todo] for index in range(3))
    options = _drafting(speculator, tmp_path, [prompt + output for prompt, _, output in todo])
    seeded = [SamplingParams(temperature=0.9, seed=number, n=2, max_tokens=6) for number in range(len(todo))]
    with LLM(target, lora_modules=adapters, **COMMON, **TIGHT, **options) as llm:
        squeeze_blocks(llm, 18)
        for turn in (1, -1):
            outputs = llm.generate(prompts[::turn], GREEDY, use_tqdm=False, lora_request=names[::turn])
            assert [output.outputs[0].token_ids for output in outputs] == expected[::turn]
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.stats.num_accepted_draft_tokens >= {"tree": 30}.get(speculator, 0)
        together = llm.generate(prompts, seeded, use_tqdm=False, lora_request=names)
        for prompt, params, name, output in zip(prompts, seeded, names, together, strict=True):
            alone = llm.generate([prompt], params, use_tqdm=False, lora_request=name)[0]
            assert [each.token_ids for each in output.outputs] == [each.token_ids for each in alone.outputs]
        assert_idle(llm)


def test_a_layer_whose_bare_weight_is_used_is_refused_by_name(tmp_path: Path) -> None:
    target = save_recurrent(tmp_path / "target", "mamba")
    adapter = save_adapter(tmp_path / "adapter", target, modules=("dt_proj",))
    config = EngineConfig.create(target, lora_modules={"a": adapter}, **COMMON)
    with pytest.raises(
        CheckpointError, match=r"adapts 'backbone\.layers\.0\.mixer\.dt_proj', which is not among .*bare weight"
    ):
        plan_engine(config)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_targets(tmp_path: Path, kind: str) -> None:
    """The low-rank part is added to what the quantised layer gives, as PEFT does it."""
    target = save_quantised(tmp_path, kind, DTYPES.get(kind, "float32"))
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "plain", size=0.2)
    todo = [
        *((prompt, "a", output) for prompt, output in decided_pairs(target, kind, 3, NEW_TOKENS, adapter)),
        *((prompt, None, output) for prompt, output in decided_pairs(target, kind, 3, NEW_TOKENS)),
    ]
    prompts, names, expected = ([each[index] for each in todo] for index in range(3))
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(target, lora_modules={"a": adapter}, speculative_config=ngram, **COMMON) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=names)
        ids = [output.outputs[0].token_ids for output in outputs]
        assert [each[: len(own)] for each, own in zip(ids, expected, strict=True)] == expected
        assert_idle(llm)
