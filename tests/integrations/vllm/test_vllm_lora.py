"""Requests with a LoRA adapter: the plugin drafts from tokens, and output is vLLM's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: see CONTRIBUTING.md")

from safetensors.torch import save_file

from specplug import resolve_model
from support.vllm_engine import PROMPTS, start

pytestmark = pytest.mark.slow
RANK = 8


def save_adapter(folder: Path) -> Path:
    """A random adapter of the embedded model's query and value projections, large enough to change its output."""
    config = json.loads((Path(resolve_model("tiny")) / "config.json").read_text(encoding="utf-8"))
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    widths = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) / hidden**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) / RANK**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*widths], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_an_adapter(tmp_path: Path) -> None:
    """All requests have it: with and without one in a batch, vLLM 0.32 mixes them up on a CPU, also without speculation."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("random", 1, str(save_adapter(tmp_path / "adapter")))
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
    with start(None, **options) as engine:
        expected, without = engine.greedy(PROMPTS, adapters=[adapter] * len(PROMPTS)), engine.greedy(PROMPTS)
    assert all(a != b for a, b in zip(expected, without, strict=True))
    with start({"method": "suffix"}, **options) as engine:
        assert engine.greedy(PROMPTS, adapters=[adapter] * len(PROMPTS)) == expected
        assert engine.greedy(PROMPTS) == without
        assert engine.proposer.host.faults == {"suffix": 0}
        assert engine.proposer.host.stats.num_accepted_draft_tokens > 0
