"""Small EAGLE heads for the tiny random targets of `support.models`, and LLM options that draft with them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from specplug import LLM
from specplug.plugins.lazy_weights import LazyWeights
from specplug_eagle import EagleSpeculator
from specplug_eagle.checkpoint import EagleCheckpoint, write_speculators_checkpoint
from specplug_eagle.head import DraftHead, HeadSpec
from support.models import VOCABULARY
from support.reference import load_reference

HIDDEN = 32
BOUNDARIES = (0, 2, 3)
ODD_TREE = [(0,), (1,), (2,), (1, 0), (2, 0), (2, 1), (1, 0, 0), (1, 0, 1), (1, 0, 1, 0), (2, 1, 0), (0, 0)]
TREES: dict[str, dict[str, Any]] = {
    "chain": {},
    "authors": {"speculative_token_tree": "eagle"},
    "odd": {"speculative_token_tree": ODD_TREE},
    "dynamic": {"tree_depth": 3, "tree_top_k": 4, "tree_total_tokens": 14},
}


def save_eagle3(
    folder: Path,
    *,
    vocabulary: int = VOCABULARY,
    draft_vocab: int | None = None,
    boundaries: tuple[int, ...] = BOUNDARIES,
    seed: int = 0,
    deviation: float = 0.3,
    **changes: Any,
) -> Path:
    """Writes a random EAGLE-3 head in the speculators format; returns its folder."""
    torch.manual_seed(seed)
    draft_vocab = vocabulary if draft_vocab is None else draft_vocab
    options: dict[str, Any] = {
        "family": "eagle3",
        "hidden_size": HIDDEN,
        "target_hidden_size": HIDDEN,
        "vocab_size": vocabulary,
        "draft_vocab_size": draft_vocab,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_aux_states": len(boundaries),
        **changes,
    }
    ids = None
    if draft_vocab < vocabulary:
        ids = torch.randperm(vocabulary)[:draft_vocab].sort().values
    head = DraftHead(HeadSpec(**options), draft_to_target=ids)
    head.reset_parameters(deviation)
    return write_speculators_checkpoint(folder, head, verifier=None, boundaries=boundaries)


def save_eagle1(
    folder: Path, *, seed: int = 0, vocabulary: int = VOCABULARY, hidden: int = HIDDEN, deviation: float = 0.3
) -> Path:
    """Writes a random EAGLE-1 head in the authors' layout; returns its folder."""
    torch.manual_seed(seed)
    spec = HeadSpec(
        family="eagle1",
        hidden_size=hidden,
        target_hidden_size=hidden,
        vocab_size=vocabulary,
        draft_vocab_size=vocabulary,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden // 4,
        intermediate_size=48,
        num_aux_states=1,
        has_own_lm_head=False,
        fc_bias=True,
    )
    head = DraftHead(spec)
    head.reset_parameters(deviation)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drafted_by_head(head: Path, gamma: int = 4, method: str = "eagle3", **keys: Any) -> dict[str, Any]:
    """LLM options of a head."""
    return {
        "speculative_config": {
            "method": method,
            "model": str(head),
            "num_speculative_tokens": gamma,
            "draft_sample_method": "greedy",
            **keys,
        },
    }


def head_speculator_of(llm: LLM) -> EagleSpeculator:
    """The engine's EAGLE speculator."""
    (found,) = (s.instance for s in llm.engine.chain.speculators if isinstance(s.instance, EagleSpeculator))
    return found


@functools.cache
def load_head(folder: Path, target: Path) -> tuple[DraftHead, tuple[int, ...] | None]:
    """The head alone over Transformers' own embedding and output layer, and the boundaries it was written with."""
    handle = LazyWeights(str(folder), None, torch.float32, torch.device("cpu"))
    checkpoint = EagleCheckpoint.open(handle)
    handle.keep(checkpoint.names.values())
    handle.materialize(lambda done: None)
    model: Any = load_reference(target)
    head, _ = checkpoint.build(handle.tensors, embed=model.get_input_embeddings(), logits=model.get_output_embeddings())
    return head, checkpoint.spec.layer_ids
