"""Tiny random models and a tokenizer of one word per id, made without a network."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from specplug.model.load.library_output import quiet_transformers


def word(token: int) -> str:
    """The text of a token."""
    return f"w{token}."


def save_words(folder: Path, vocabulary: int) -> Path:
    """Gives a model's folder the tokenizer: `w3. w7.` is [3, 7], and back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word(token): token for token in range(vocabulary)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


CONTEXT = 400
WINDOW = 6
_BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
}
"""What sets each architecture apart: plain, normed heads, windows and soft-caps, parallel layers, recurrent state, experts."""


def save_tiny_model(folder: Path, architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random float32 model of three layers and 32 dimensions.

    Args:
        folder: where to.
        architecture: its `model_type`; any that Transformers knows, sizes as far as they are named alike.
        seed: of its weights.
        changes: other values of its configuration; `vocab_size=16`, for example.

    Returns:
        The folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**_BASE, **ARCHITECTURES.get(architecture, {}), **changes}
    config = AutoConfig.for_model(architecture, **{k: v for k, v in options.items() if v is not None})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, options[name])
    with _own_randomness(seed), quiet_transformers():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        with torch.no_grad():  # layers whose initialiser ignores initializer_range would leave flat logits
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.std() < 0.1:
                    parameter.normal_(0, 0.4)
        model.save_pretrained(folder)
    return folder


def tiny_draft(target_folder: Path, *, seed: int = 1) -> Path:
    """A random draft model of one layer with the vocabulary of a target, stored in the target's folder.

    For the tests of speculators that run a model of their own: it drafts what the target rarely says.
    """
    folder = Path(target_folder) / f"draft-{seed}"
    if not (folder / "model.safetensors").is_file():
        config = json.loads((Path(target_folder) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        save_tiny_model(folder, seed=seed, vocab_size=config["vocab_size"], num_hidden_layers=1, initializer_range=0.25)
    return folder


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
