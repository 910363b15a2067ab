"""A speculator's own module over paged KV as machine code, for every number of tokens; on a GPU in graphs too."""

from __future__ import annotations

import hashlib
import logging
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from specplug import native
from specplug.model.batch import can_attend_natively
from specplug.model.compile.artifacts import (
    Artifact,
    CompileError,
    as_compile_error,
    cache_key,
    compile_graph,
    device_name,
    obtain_artifact,
    quiet_tracing,
)
from specplug.model.compile.captured_step import CapturedStep
from specplug.model.compile.passes import fuse
from specplug.model.compile.trace import EXAMPLE_PLAN, EXAMPLE_TOKENS, FakeInputs, weights_of
from specplug.model.difference import TOLERANCE, relative_difference
from specplug.model.kv_cache import BlockTable
from specplug.model.load.packing import PackedLinear
from specplug.model.paged import PagedBatch
from specplug.model.rows import ForwardRow

if TYPE_CHECKING:
    from specplug.model.kv_cache import KVCache

logger = logging.getLogger("specplug")
Step = Callable[..., Sequence[torch.Tensor]]


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

    def __init__(self, artifact: Artifact, fixed: Sequence[torch.Tensor]) -> None:
        self._artifact = artifact
        self._fixed = list(fixed)

    def __call__(self, batch: PagedBatch, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """See `Resources.compile`."""
        dense = [tensor.contiguous() for tensor in inputs]
        return self.over_tensors(batch.positions, batch.plan, batch.write_slots, *dense)

    def over_tensors(self, *arguments: torch.Tensor) -> Sequence[torch.Tensor]:
        """The same over tensors alone: positions, plan, write slots and the dense inputs."""
        return self._artifact(*self._fixed, *arguments)


def compile_step(step: Step, module: torch.nn.Module, cache: KVCache, inputs: Sequence[torch.Tensor]) -> Step:
    """See `Resources.compile`; where the step cannot be compiled, one line of warning says why, and it stays as it is."""
    try:
        compiled = _compile(step, module, cache, inputs)
    except CompileError as error:
        logger.warning("%s runs uncompiled: %s", _name(step), error)
        return step
    if cache.keys[0].device.type != "cuda":
        return compiled
    try:
        with as_compile_error():
            captured = CapturedStep(compiled, compiled.over_tensors, inputs, cache.keys[0].device)
            _check(captured, step, cache, inputs)
            return captured
    except CompileError as error:
        torch.cuda.synchronize(cache.keys[0].device)
        logger.warning("%s runs without CUDA graphs: %s", _name(step), error)
        return compiled


def _compile(step: Step, module: torch.nn.Module, cache: KVCache, inputs: Sequence[torch.Tensor]) -> CompiledStep:
    device = cache.keys[0].device
    if not can_attend_natively(cache):
        raise CompileError("the native kernels are not there")
    if any(isinstance(part, PackedLinear) and not part.is_native for part in module.modules()):
        raise CompileError("its weights are packed for a library that compiled code cannot call")
    caches = [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]
    fixed = [*(weight.detach() for weight in weights_of(module).values()), *caches]
    with as_compile_error(), quiet_tracing():
        graph, fakes = _trace(step, module, caches, inputs)

    def check(artifact: Artifact) -> None:
        _check(CompiledStep(artifact, fixed), step, cache, inputs)

    key = _key(step, graph, fakes, device)
    return CompiledStep(obtain_artifact(key, device, lambda: compile_graph(graph, fakes), check), fixed)


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
        fake.free(torch.zeros(EXAMPLE_TOKENS, dtype=torch.long, device=device), 0),
        fake.free(torch.zeros(EXAMPLE_PLAN, dtype=torch.int32, device=device), 0),
        fake.free(torch.zeros(EXAMPLE_TOKENS, dtype=torch.long, device=device), 0),
    ]
    fakes += [fake.free(tensor.new_zeros(EXAMPLE_TOKENS, *tensor.shape[1:], device=device), 0) for tensor in inputs]

    def run(*flat: Any) -> list[Any]:
        own_weights = dict(zip(weights, flat[: len(weights)], strict=True))
        rest = flat[len(weights) :]
        positions, plan, slots = rest[len(caches) : len(caches) + 3]
        batch = _TracedBatch(positions, plan, slots, rest[: len(caches)])
        with torch.nn.utils.stateless._reparametrize_module(module, own_weights):
            return list(step(batch, *rest[len(caches) + 3 :]))

    with torch.no_grad(), fake.mode, enable_python_dispatcher():
        graph = make_fx(run, tracing_mode="real")(*fakes)
    fuse(graph, device)
    return graph, fakes


def _check(compiled: Step, step: Step, cache: KVCache, inputs: Sequence[torch.Tensor]) -> None:
    """Refuses a change of results that is more than rounding."""
    change = _measure_change(step, compiled, cache, inputs)
    if not change <= TOLERANCE[cache.keys[0].dtype]:
        raise CompileError(f"compiled, it gives other results (relative difference {change:.2g})")


@torch.inference_mode()
def _measure_change(step: Step, compiled: Step, cache: KVCache, inputs: Sequence[torch.Tensor]) -> float:
    """The largest relative root-mean-square difference for 1, 2 and 7 tokens; the first slots are overwritten."""
    worst = 0.0
    for count in sorted({min(size, cache.num_slots) for size in (1, 2, 7)}):
        table = BlockTable(count)
        table.extend([0])
        values = [_probe(tensor, count) for tensor in inputs]
        results = [run(PagedBatch([ForwardRow([0] * count, 0, table)], cache), *values) for run in (compiled, step)]
        worst = max(worst, *(relative_difference(ours, theirs) for ours, theirs in zip(*results, strict=True)))
    return worst


def _probe(example: torch.Tensor, count: int) -> torch.Tensor:
    """An input for so many tokens: the example's own, over and over, since they are known to be allowed.

    Zeros of a floating dtype, which stand for any numbers and would prove little, become random.
    """
    if example.is_floating_point() and not bool(example.any()):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, *example.shape[1:], generator=generator, dtype=torch.float32, device="cpu").to(
            example.device, example.dtype
        )
    if not len(example):
        return example.new_zeros(count, *example.shape[1:])
    return example[torch.arange(count, device=example.device, dtype=torch.long) % len(example)]


def _key(step: Step, graph: fx.GraphModule, fakes: Sequence[Any], device: torch.device) -> str:
    """What a compiled step depends on: the traced operations, the tensors among them, and what compiles them."""
    constants = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    facts = {
        "operations": graph.code,
        "constants": [_digest(operator.attrgetter(name)(graph)) for name in constants],
        "shapes": [(str(tuple(fake.shape)), str(fake.dtype)) for fake in fakes],
        "native": native.key(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
    return cache_key(_name(step).rsplit(".", 1)[-1], facts)


def _digest(constant: torch.Tensor) -> tuple[str, str, str]:
    content = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(constant.dtype), str(tuple(constant.shape)), hashlib.sha256(content).hexdigest()


def _name(step: Step) -> str:
    return getattr(step, "__qualname__", type(step).__name__)
