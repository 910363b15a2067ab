"""The short causal convolution: a row keeps the inputs of its last few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from specplug.model.recurrent.memory import Function, StateMemory, TracedRows, kernel_plan

if TYPE_CHECKING:
    from specplug.model.recurrent.batch import StateBatch

_SILU = ("silu", "swish")


class ShortConvolution(StateMemory):
    """`causal_conv1d_fn`: of each channel, a weighted sum of a token's input and those of the few tokens before it.

    State and entries are one buffer [slots, width - 1 + held, channels]: inputs of tokens, the oldest first.
    """

    sequences = ("hidden_states",)
    axis = 2
    has_kernel = True
    _buffer: torch.Tensor

    def __init__(self, sizes: tuple[int, ...], slots: int, held: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(sizes, slots, held, dtype, device)
        channels, width = sizes
        self._width = width
        buffer = torch.zeros(slots, width - 1 + held, channels, dtype=dtype, device=device)
        self.register_buffer("_buffer", buffer, persistent=False)

    @staticmethod
    def trace(given: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
        """See `StateMemory.trace`: channels, width of the filter."""
        hidden_states = given["hidden_states"]
        return (hidden_states.shape[1], given["weight"].shape[-1]), torch.empty_like(hidden_states)

    def run(
        self,
        batch: StateBatch | TracedRows,
        original: Function,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `StateMemory.run`.

        Args:
            batch: the rows.
            original: unused: gathering the inputs by index serves prompts and trees alike.
            hidden_states: [1, channels, T].
            weight: [channels, width].
            bias: [channels].
            activation: its name.
            kwargs: unused.

        Returns:
            [1, channels, T].
        """
        from transformers.activations import ACT2FN

        if (plan := kernel_plan(batch)) is not None:
            inputs = hidden_states[0].T.to(self._buffer.dtype)
            is_fused = activation in _SILU
            out = torch.ops.specplug.short_convolution(inputs, weight, bias, self._buffer, plan, is_fused)
            activated = out if activation is None or is_fused else ACT2FN[activation](out)
            return activated.to(hidden_states.dtype).T[None]
        assert not isinstance(batch, TracedRows)
        taps, following = batch.taps(self._width)
        if batch.fresh is not None:
            self._buffer.index_fill_(0, batch.fresh, 0)
        stored = batch.slots.read(self._buffer)
        source = torch.cat([stored.flatten(0, 1), hidden_states[0].T.to(stored.dtype)])
        filters = weight.T.to(torch.float32)
        total = source.index_select(0, taps[-1]) * filters[-1]
        for tap, factor in zip(taps[:-1], filters[:-1], strict=True):
            total.addcmul_(source.index_select(0, tap).to(total.dtype), factor)
        if bias is not None:
            total += bias
        result = total if activation is None else ACT2FN[activation](total)
        batch.slots.write(self._buffer, source[following])
        return result.to(hidden_states.dtype).T[None]
