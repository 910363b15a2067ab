"""A speculator's own module over paged KV as machine code, for every number of tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from specplug import native
from specplug.cache import default_cache_folder
from specplug.model.blocks import BlockTable
from specplug.model.compiled import CompileError, compile_graph, compiler_settings, load_artifact, quiet_tracing
from specplug.model.fake_inputs import FakeInputs
from specplug.model.forward import ForwardRow, can_attend_natively
from specplug.model.packing import PackedLinear
from specplug.model.paged import PagedBatch
from specplug.model.trace import join_products, weights_of
from specplug.version import __version__

if TYPE_CHECKING:
    from specplug.model.kv_cache import KVCache

logger = logging.getLogger("specplug")
Step = Callable[..., Sequence[torch.Tensor]]
_EXAMPLE_TOKENS, _EXAMPLE_PLAN = 7, 93
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08}


class _TracedBatch:
    """A `PagedBatch` whose contents are inputs of the graph."""

    def __init__(self, positions: torch.Tensor, plan: torch.Tensor, slots: torch.Tensor, caches: Sequence[Any]) -> None:
        self.positions = positions
        self._plan = plan
        self._slots = slots
        self._caches = caches

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None = None,
    ) -> torch.Tensor:
        keys, values = self._caches[2 * layer : 2 * layer + 2]
        return torch.ops.specplug.attend(
            query[None],
            key[None],
            value[None],
            keys,
            values,
            self._plan,
            self._slots,
            scaling,
            window or 0,
            0.0,
            None,
        )[0]


class CompiledStep:
    """Callable in place of the step it was made of."""

    def __init__(self, artifact: Any, fixed: Sequence[torch.Tensor]) -> None:
        self._artifact = artifact
        self._fixed = list(fixed)

    def __call__(self, batch: PagedBatch, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """See `Resources.compile`."""
        dense = [tensor.contiguous() for tensor in inputs]
        return self._artifact(*self._fixed, batch.positions, batch.plan, batch.write_slots, *dense)


def compile_step(step: Step, module: torch.nn.Module, cache: KVCache, inputs: Sequence[torch.Tensor]) -> Step:
    """See `Resources.compile`; where the step cannot be compiled, one line of warning says why, and it stays as it is."""
    try:
        if not can_attend_natively(cache) or cache.keys[0].device.type != "cpu":
            raise CompileError("the native kernels are not there")
        if any(isinstance(part, PackedLinear) and not part.is_native for part in module.modules()):
            raise CompileError("its weights are packed for a library that compiled code cannot call")
        caches = [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]
        try:
            with quiet_tracing():
                graph, fakes = _trace(step, module, caches, inputs)
        except Exception as error:
            raise CompileError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        folder = default_cache_folder() / "forwards"
        with compiler_settings(folder, cache.keys[0].device):
            artifact = load_artifact(folder / f"{_key(step, graph, fakes)}.bin", lambda: compile_graph(graph, fakes))
        compiled = CompiledStep(artifact, [*(w.detach() for w in weights_of(module).values()), *caches])
        change = _measure_change(step, compiled, cache, inputs)
        if not change <= _TOLERANCE[cache.keys[0].dtype]:
            raise CompileError(f"compiled, it gives other results (relative difference {change:.2g})")
    except CompileError as error:
        logger.warning("%s runs uncompiled: %s", _name(step), error)
        return step
    return compiled


def _trace(
    step: Step, module: torch.nn.Module, caches: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[fx.GraphModule, list[Any]]:
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = FakeInputs()
    weights = weights_of(module)
    device = caches[0].device
    fakes = [fake.fixed(tensor) for tensor in weights.values()]
    fakes += [fake.free(tensor, 1) for tensor in caches]
    fakes += [
        fake.free(torch.zeros(_EXAMPLE_TOKENS, dtype=torch.long, device=device), 0),
        fake.free(torch.zeros(_EXAMPLE_PLAN, dtype=torch.int32, device=device), 0),
        fake.free(torch.zeros(_EXAMPLE_TOKENS, dtype=torch.long, device=device), 0),
    ]
    fakes += [
        fake.free(tensor.new_zeros(_EXAMPLE_TOKENS, *tensor.shape[1:], device=device), 0).to(tensor.dtype)
        for tensor in inputs
    ]

    def run(*flat: Any) -> list[Any]:
        own_weights = dict(zip(weights, flat[: len(weights)], strict=True))
        rest = flat[len(weights) :]
        positions, plan, slots = rest[len(caches) : len(caches) + 3]
        batch = _TracedBatch(positions, plan, slots, rest[: len(caches)])
        with torch.nn.utils.stateless._reparametrize_module(module, own_weights):
            return list(step(batch, *rest[len(caches) + 3 :]))

    with torch.no_grad(), fake.mode, enable_python_dispatcher():
        graph = make_fx(run, tracing_mode="real")(*fakes)
    join_products(graph)
    return graph, fakes


@torch.inference_mode()
def _measure_change(step: Step, compiled: Step, cache: KVCache, inputs: Sequence[torch.Tensor]) -> float:
    """The largest relative root-mean-square difference for 1, 2 and 7 tokens; the first slots are overwritten."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 2, 7):
        table = BlockTable(max(count, 1))
        table.extend([0])
        values = [
            torch.randn(count, *tensor.shape[1:], generator=generator).to(tensor.device, tensor.dtype)
            for tensor in inputs
        ]
        results = [run(PagedBatch([ForwardRow([0] * count, 0, table)], cache), *values) for run in (step, compiled)]
        for theirs, ours in zip(*results, strict=True):
            scale = theirs.double().pow(2).mean().sqrt().clamp_min(1e-30)
            change = ((ours.double() - theirs.double()).pow(2).mean().sqrt() / scale).item()
            worst = max(worst, change if change == change else float("inf"))
    return worst


def _key(step: Step, graph: fx.GraphModule, fakes: Sequence[Any]) -> str:
    """What a compiled step depends on: the traced operations themselves, and what compiles them."""
    digest = hashlib.sha256(graph.code.encode())
    shapes = [(str(tuple(fake.shape)), str(fake.dtype)) for fake in fakes]
    digest.update(repr((shapes, native.key(), torch.get_num_threads(), torch.__version__, __version__)).encode())
    return f"{_name(step).rsplit('.', 1)[-1]}-{digest.hexdigest()[:32]}"


def _name(step: Step) -> str:
    return getattr(step, "__qualname__", type(step).__name__)
