"""What a GPU's memory holds while a step runs, beyond what is allocated once: on a CPU it comes and goes unplanned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from specplug.model.cuda_graphs import CudaGraphs

if TYPE_CHECKING:
    from specplug.model.architecture import Architecture

_STREAMS = 4  # residual, normed, queries and attended, each as wide as the residual stream
_PRODUCTS = 3  # gate, up and their product


def step_bytes(
    architecture: Architecture, config: Any, dtype: torch.dtype, *, tokens: int, entries: int, captured: int
) -> int:
    """Bytes that activations, logits and CUDA graphs take.

    Args:
        architecture: the target.
        config: its configuration.
        dtype: of its activations.
        tokens: of the largest batch.
        entries: for how many of them logits are computed, and processed in float32.
        captured: of the largest batch that is captured.
    """
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * architecture.hidden_size
    token_bytes = (_STREAMS * architecture.hidden_size + _PRODUCTS * inner) * dtype.itemsize
    logits_bytes = architecture.vocab_size * dtype.itemsize
    processed = entries * architecture.vocab_size * (dtype.itemsize + torch.float32.itemsize)
    return tokens * token_bytes + processed + CudaGraphs.planned_bytes(captured, token_bytes, logits_bytes)
