"""One forward of a model on the meta device, and what it records: no weights, no config formulas.

The traced call of every attention layer says what the KV cache must store (multi-head latent attention, for example,
shows its expanded keys and values here) and whether the model can run as a packed batch.
"""

from __future__ import annotations

import re
from typing import Any

import attrs
import torch
from torch.overrides import TorchFunctionMode

from specplug.contract.resources import KVLayer
from specplug.errors import UnsupportedModelError
from specplug.model.architecture import masks
from specplug.model.architecture.architecture import AttentionCall
from specplug.model.architecture.refusal import forward_failure, reads_values
from specplug.model.attention.interface import SITE
from specplug.model.recurrent.layers import StateCall
from specplug.model.recurrent.tracing import record_states

TRACE_TOKENS = 6
_LAYER_NAME = re.compile(r"^(.*?\.\d+)\.")


class _Recorder:
    """Takes the place of an attention site during the trace."""

    def __init__(self, name: str, module: torch.nn.Module, trace: Trace) -> None:
        self._name = name
        self._module = module
        self._trace = trace

    def record(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        layer = KVLayer(key.shape[1], key.shape[3], value.shape[3])
        self._trace.calls.append(AttentionCall(self._name, layer, masks.read_mask(attention_mask), query.shape[1]))
        self._trace.modules.append(self._module)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def recording_interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a traced model."""
    return module.__dict__[SITE].record(query, key, value, attention_mask), None


class _Use(TorchFunctionMode):
    """Records the `id` of the tensors that something is computed from, and that of the modules that run."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.used: set[int] = set()
        self._hooks = [module.register_forward_pre_hook(self._ran) for module in model.modules()]

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        for hook in self._hooks:
            hook.remove()

    def _ran(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.used.add(id(module))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading an attribute, such as a dtype
            self.used.update(id(each) for each in (*args, *(kwargs or {}).values()) if isinstance(each, torch.Tensor))
        if func is torch.all and args[0].is_meta:  # asked of the attention mask, which is one of ones
            return torch.tensor(True, dtype=torch.bool, device="cpu")
        if func is torch.nn.functional.linear and not args[0].is_meta:  # of zeros, see `_give_values`
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **(kwargs or {}))


@attrs.define
class Trace:
    """What one forward on the meta device recorded.

    Attributes:
        calls: of the attention interface.
        modules: the modules that made them.
        states: calls of functions that carry recurrent state.
        vocab_size: the width of the logits.
        used: `id` of the modules that ran and the tensors that something was computed from.
        uses_positions: whether `position_ids` are among these.
        reads_values: whether it could not be run on shapes alone: which modules run may depend on the tokens.
    """

    calls: list[AttentionCall] = attrs.field(factory=list)
    modules: list[torch.nn.Module] = attrs.field(factory=list)
    states: list[StateCall] = attrs.field(factory=list)
    vocab_size: int = 0
    used: set[int] = attrs.field(factory=set)
    uses_positions: bool = False
    reads_values: bool = False

    @property
    def busy_layers(self) -> tuple[str, ...]:
        """The decoder layers that attend or carry state."""
        modules = (*(call.module for call in self.calls), *(call.module for call in self.states))
        return tuple(dict.fromkeys(match.group(1) for name in modules if (match := _LAYER_NAME.match(name))))


class Streams:
    """Output shapes of numbered modules, among them the decoder layers, during the trace."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, module in model.named_modules():
            if _LAYER_NAME.fullmatch(f"{name}."):
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = output if isinstance(output, torch.Tensor) else output[0]
            self._shapes[name] = tuple(given.shape) if isinstance(given, torch.Tensor) else ()

        return hook

    def are_plain(self, layers: tuple[str, ...], hidden_size: int) -> bool:
        """Whether these layers give one state per token."""
        return all(self._shapes.get(layer) == (1, TRACE_TOKENS, hidden_size) for layer in layers)


def run_trace(model: torch.nn.Module, model_type: str, dtype: torch.dtype, device: str = "meta") -> Trace:
    """Runs a model on the meta device once; one that branches on the values of tensors runs on zeros instead.

    Raises:
        UnsupportedModelError: it fails, or has no use for `logits_to_keep`.
    """
    trace = Trace(reads_values=device != "meta")
    for name, module in model.named_modules():
        module.__dict__[SITE] = _Recorder(name, module, trace)
    record_states(model, trace.states)
    disable_padding_checks(model)
    # Without a mask, the model's mask code would look for packed rows.
    attention_mask = torch.ones(1, TRACE_TOKENS, dtype=torch.long, device=device)
    ids = torch.zeros(1, TRACE_TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(TRACE_TOKENS, device=device, dtype=torch.long)[None]
    keep = torch.tensor([1, TRACE_TOKENS - 1], device=device, dtype=torch.long)
    use = _Use(model)
    model.eval()
    try:
        with torch.no_grad(), use:
            logits = model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=keep,
            ).logits
    except Exception as error:
        # Grouped expert kernels have a meta implementation for bfloat16 alone.
        if device == "meta" and dtype != torch.bfloat16:
            return run_trace(model.to(torch.bfloat16), model_type, torch.bfloat16)
        if device == "meta" and reads_values(error):
            _give_values(model)
            return run_trace(model, model_type, dtype, "cpu")
        raise forward_failure(model_type, error) from error
    if logits.shape[1] != 2:
        raise UnsupportedModelError(
            f"model type '{model_type}' ignores logits_to_keep, which a packed batch needs; give a decoder-only model that "
            "takes it"
        )
    trace.vocab_size, trace.used, trace.uses_positions = logits.shape[-1], use.used, id(positions) in use.used
    return trace


def _give_values(model: torch.nn.Module) -> None:
    """Replaces the tensors of a model on the meta device by zeros: one number each, expanded, which takes no memory."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    zeros = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
                    own = torch.nn.Parameter(zeros, requires_grad=False) if kind is module._parameters else zeros
                    kind[name] = made.setdefault(id(tensor), (tensor, own))[1]  # type: ignore[assignment]


def disable_padding_checks(model: Any) -> None:
    """Some models look for padding in their inputs: a host synchronisation that a packed batch does not need."""
    vars(model.config)["pad_token_id"] = None  # an assignment would be validated, and refused for some types
