"""GPU memory that a step takes while it runs, in addition to what is allocated once. On a CPU it is not planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from specplug.model.compile.cuda_graphs import CudaGraphs
from specplug.native.gpu.cuda import misfit
from specplug.native.gpu.sizes import scratch_bytes
from specplug.sampling.distributions import MOST_AT_ONCE

if TYPE_CHECKING:
    from specplug.contract.resources import KVLayer

_STREAMS = 4  # residual, normed, queries and attended, each as wide as the residual stream
_MLP = 3  # gate, up and their elementwise product
_PROCESSED = (
    2  # float32 copies of the logits that verification reads: after a request's rules, and what drafts were drawn from
)
_COPIES = 10  # of the logits that are processed together: sorting them for top-p takes most


@attrs.frozen
class StepModel:
    """A model that runs in a step.

    Attributes:
        config: its configuration.
        kv_layers: its KV cache.
        vocab_size: width of its logits.
        dtype: of its activations.
        num_states: boundaries of the residual stream that are captured.
    """

    config: Any
    kv_layers: Sequence[KVLayer]
    vocab_size: int
    dtype: torch.dtype
    num_states: int = 0

    @property
    def _text(self) -> Any:
        return self.config.get_text_config()

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's activations in one layer."""
        inner = getattr(self._text, "intermediate_size", None) or 4 * self._text.hidden_size
        return int((_STREAMS * self._text.hidden_size + _MLP * inner) * self.dtype.itemsize)

    @property
    def state_bytes(self) -> int:
        """Bytes of a token's captured states."""
        return int(self.num_states * self._text.hidden_size * self.dtype.itemsize)

    @property
    def logits_bytes(self) -> int:
        """Bytes of a token's logits."""
        return self.vocab_size * self.dtype.itemsize

    def scratch_bytes(self, tokens: int, device: torch.device) -> int:
        """Bytes of the partial results that attention merges."""
        heads = self._text.num_attention_heads
        return max(
            scratch_bytes(
                tokens,
                max(1, heads // layer.num_heads),
                layer.num_heads,
                layer.key_dim,
                layer.value_dim,
                self.dtype,
                device,
            )
            if not misfit(layer.num_heads, max(layer.key_dim, layer.value_dim), self.dtype)
            else 0
            for layer in self.kv_layers
        )


def step_bytes(
    target: StepModel,
    drafts: Sequence[StepModel],
    device: torch.device,
    *,
    tokens: int,
    entries: int,
    captured: int,
    is_captured: bool,
) -> int:
    """Bytes that activations, logits and CUDA graphs take.

    Args:
        target: the target.
        drafts: the speculators' models on the same device.
        device: the GPU.
        tokens: of the largest batch; a step may need logits for all of them.
        entries: distributions that verification needs, and logits of a captured forward, at most.
        captured: tokens of the largest batch that is captured.
        is_captured: whether any is.
    """
    models = [target, *drafts]
    running = max(
        tokens * (model.token_bytes + model.state_bytes + model.logits_bytes) + model.scratch_bytes(tokens, device)
        for model in models
    )
    verified = entries * target.vocab_size
    processed = (_PROCESSED * verified + _COPIES * min(verified, MOST_AT_ONCE)) * torch.float32.itemsize
    graphs = sum(
        CudaGraphs.planned_bytes(
            captured,
            entries,
            model.token_bytes,
            model.logits_bytes,
            model.state_bytes,
            model.scratch_bytes(captured, device),
        )
        for model in models
    )
    return running + processed + (graphs if is_captured else 0)
