"""The causal or sliding-window mask of each attention layer, read from the masks that the model itself builds.

A model's own attention applies the mask that it receives and ignores other arguments: `sliding_window`, for example, is read
by flash attention alone, and some models never pass it. So the trace of `inspect_architecture` runs with an attention
implementation that has a mask function: Transformers calls that with the mask as a function of two positions. It is
evaluated at positions up to the model's context length, which costs little, and the layer that receives the mask gets its
window. The implementation that runs has no mask function, so a forward builds no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch

from specplug.model.architecture.max_length import chunk_size

RECORDING = "specplug-recording"
_FACT = "recorded_mask"
_FARTHEST = 1 << 20
MaskFunction = Callable[..., Any]


@attrs.frozen
class Mask:
    """A query attends to keys at most `window - 1` positions back; to all before it where `window` is None.

    Attributes:
        window: positions, the query's own included.
        misfit: why the mask is not such a window; then `window` is unused.
    """

    window: int | None = None
    misfit: str | None = None


def read_mask(attention_mask: Any) -> Mask:
    """The mask that an attention layer received during the trace.

    Args:
        attention_mask: as it was passed to the attention function. None: the model builds no mask; its attention is causal.
    """
    if attention_mask is None:
        return Mask()
    known = getattr(attention_mask, _FACT, None)
    if known is not None:
        return known
    return Mask(misfit="adds a mask or a bias of its own to the attention scores")


def learn_mask(mask_function: MaskFunction, context_length: int, local_size: int | None = None) -> Mask:
    """Evaluates a mask at some queries far apart, over all keys up to a few after each.

    Args:
        mask_function: of (batch, head, query, key) indices, as Transformers' masks are made of.
        context_length: queries go up to here.
        local_size: the window that the model names for it; used where the mask also reads tensors of the batch (the kind
            of each token, for example): the parity probe then checks it for text.
    """
    last = min(context_length, _FARTHEST) - 1
    queries = sorted({min(query, last) for query in (0, 1, 2, 5, 31, 64, 999, 4_100, 70_001, last // 2, last)})
    window: int | None = None
    for query in queries:
        keys = torch.arange(query + 3, dtype=torch.long, device="cpu")
        try:
            index = torch.zeros(1, 1, 1, 1, dtype=torch.long, device="cpu")
            allowed = mask_function(index, index, torch.full_like(index, query), keys[None, None, None])
            visible = torch.as_tensor(allowed, dtype=torch.bool).expand(1, 1, 1, len(keys)).flatten()
        except Exception:  # it reads tensors of the batch, which have no values in the trace
            return Mask(local_size)
        count = int(visible.sum())
        if not bool((visible == ((keys > query - count) & (keys <= query))).all()):
            return Mask(misfit="has a mask that is neither causal nor a sliding window")
        if window is None and count <= query:
            window = count
        if count != min(query + 1, window or query + 1):
            return Mask(misfit="has a mask that is neither causal nor a sliding window (chunks, for example)")
    return Mask(window)


def windows_of_cache(config: Any, num_layers: int) -> list[int | None]:
    """How many positions `generate` keeps of each layer in its own cache; None where it keeps all."""
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    layers: list[Any] = DynamicCache(config=config).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        layers = [layer for layer in layers if isinstance(layer, CacheLayerMixin)]  # those that keep keys and values
    layers = layers[:num_layers]
    kept = [layer.sliding_window if layer.is_sliding else None for layer in layers]
    return kept + [None] * (num_layers - len(kept))


def register(recording: Callable[..., Any]) -> None:
    """Makes the implementation of the trace known to Transformers.

    Args:
        recording: its attention function.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(RECORDING, recording)
    AttentionMaskInterface.register(RECORDING, _record)


def _record(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    config: Any,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """A placeholder for a mask during the trace: a tensor of its shape that carries the `Mask`."""
    mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    length = getattr(config, "max_position_embeddings", None) or _FARTHEST
    length = min(length, chunk_size(config) or length)
    setattr(mask, _FACT, learn_mask(mask_function, length, local_size))
    return mask
