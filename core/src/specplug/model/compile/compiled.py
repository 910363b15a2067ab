"""Steps as machine code, for every number of tokens: a model's forward, or a speculator's own step over paged KV.

The Python between two of a model's operations costs a small model several times its arithmetic, and a large one a few
percent. A compiled step is one call. It is compared with the step itself before it is used.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import time
from collections.abc import Callable, Sequence
from functools import cache as cached

import torch

from specplug import native
from specplug.model.batch import can_attend_natively
from specplug.model.checks.difference import TOLERANCE, relative_difference
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
from specplug.model.compile.cuda_graphs import MOST_CAPTURED, CudaGraphs
from specplug.model.compile.trace import (
    EXAMPLE_TOKENS,
    Step,
    StepGraph,
    TensorBatch,
    tensors_of,
    trace_step,
    weights_of,
)
from specplug.model.kv_cache import BlockTable, KVCache
from specplug.model.load.packing import PackedLinear
from specplug.model.paged import PagedBatch, forward_batch
from specplug.model.rows import ForwardRow

logger = logging.getLogger("specplug")
_MOST_CHANGE = 0.5  # a fault would look no different beyond this
_PLAIN = (torch.Tensor, torch.nn.Parameter)
RowsStep = Callable[[list[ForwardRow]], Sequence[torch.Tensor]]


class CompiledStep:
    """Callable in place of the step that it was made of.

    Attributes:
        graphs: the same step in CUDA graphs, for batches of few tokens.
    """

    def __init__(self, artifact: Artifact, fixed: Sequence[torch.Tensor]) -> None:
        self._artifact = artifact
        self._fixed = list(fixed)
        self.graphs: CudaGraphs | None = None

    def __call__(self, batch: PagedBatch | TensorBatch, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """See `Resources.compile`; what is returned outlives later calls."""
        if isinstance(batch, PagedBatch) and self.graphs is not None:
            outputs = self.graphs.replay(forward_batch(batch), inputs)
            if outputs is not None:
                return outputs
        dense = [tensor.contiguous() for tensor in inputs]
        return self.over_tensors(batch.positions, batch.plan, batch.write_slots, *dense)

    def over_tensors(self, *arguments: torch.Tensor) -> Sequence[torch.Tensor]:
        """The same over tensors alone: positions, plan, write slots and the step's own inputs, which are dense."""
        return self._artifact(*self._fixed, *arguments)


def compile_step(step: Step, module: torch.nn.Module, cache: KVCache, inputs: Sequence[torch.Tensor]) -> Step:
    """See `Resources.compile`; a step that cannot be compiled is returned as it is, with one line of warning."""
    device, dtype = cache.keys[0].device, cache.keys[0].dtype

    def over_rows(run: Step) -> RowsStep:
        return lambda rows: run(PagedBatch(rows, cache), *(_probe(tensor, len(rows[0].tokens)) for tensor in inputs))

    def check(compiled: CompiledStep) -> None:
        how = "compiled" if compiled.graphs is None else "captured"
        change = measure_change(over_rows(compiled), over_rows(step), cache.num_slots)
        check_change(f"{how}, it gives other results", change, dtype)

    examples = [tensor.new_zeros(EXAMPLE_TOKENS, *tensor.shape[1:], device=device) for tensor in inputs]
    try:
        compiled = build_step(step, module, cache, examples, check, _name(step).rsplit(".", 1)[-1])
    except CompileError as error:
        logger.warning("%s runs uncompiled: %s", _name(step), error)
        return step
    if device.type == "cuda":
        try:
            with as_compile_error():
                compiled.graphs = CudaGraphs(compiled.over_tensors, device, MOST_CAPTURED, inputs)
                check(compiled)
        except CompileError as error:
            compiled.graphs = None
            torch.cuda.synchronize(device)
            logger.warning("%s runs without CUDA graphs: %s", _name(step), error)
    return compiled


def build_step(
    step: Step,
    module: torch.nn.Module,
    cache: KVCache,
    inputs: Sequence[torch.Tensor],
    check: Callable[[CompiledStep], None],
    name: str,
    key: str | None = None,
    worst: Callable[[float], float] = float,
) -> CompiledStep:
    """Compiles a step, or takes it from disk.

    Args:
        step: see `trace_step`.
        module: has all its weights.
        cache: its KV cache; its first slots are overwritten by `check`.
        inputs: examples of its own inputs, see `trace_step`.
        check: raises `CompileError` if the compiled step does not compute what the step does.
        name: of the step.
        key: names the artifact by everything that it depends on. None: by the traced operations, which takes a trace.
        worst: see `ModelRunner.worst`.

    Raises:
        CompileError: it cannot be compiled here, or `check` raised it.
    """
    if not can_attend_natively(cache):
        raise CompileError("the native kernels are not there")
    if any(isinstance(part, PackedLinear) and not part.is_native for part in module.modules()):
        raise CompileError("its weights are packed for a library that compiled code cannot call")
    if any(type(w) not in _PLAIN or type(w.data) is not torch.Tensor for w in weights_of(module).values()):
        raise CompileError("its weights are quantised, and their own library computes with them")
    device, caches = cache.keys[0].device, tensors_of(cache)
    fixed = [*(weight.detach() for weight in weights_of(module).values()), *caches]

    @cached
    def trace() -> StepGraph:
        with as_compile_error(), quiet_tracing():
            return trace_step(step, module, caches, inputs)

    def make() -> Artifact:
        started = time.perf_counter()
        artifact = compile_graph(trace().module, trace().inputs)
        logger.debug("compiled %s in %.1f s", name, time.perf_counter() - started)
        return artifact

    key = key or _key(name, trace(), device)
    artifact = obtain_artifact(key, device, make, lambda artifact: check(CompiledStep(artifact, fixed)), worst)
    return CompiledStep(artifact, fixed)


@torch.inference_mode()
def measure_change(ours: RowsStep, theirs: RowsStep, longest: int, vocab_size: int = 1) -> float:
    """The largest relative root-mean-square difference between the outputs of two steps, for rows of 1, 2 and 7 tokens.

    The first slots of the KV cache are overwritten.

    Args:
        ours: what is measured.
        theirs: what it is compared with.
        longest: tokens that a row can have.
        vocab_size: of the rows' ids.
    """
    worst = 0.0
    for count in sorted({min(size, longest) for size in (1, 2, 7)}):
        rows = [first_row(count, vocab_size)]
        pairs = zip(ours(rows), theirs(rows), strict=True)
        worst = max(worst, *(relative_difference(*pair) for pair in pairs))
    return worst


@torch.inference_mode()
def measure_rounding(run: RowsStep, longest: int, vocab_size: int) -> float:
    """The relative root-mean-square difference of logits that rounding alone makes, for the same tokens in one step or several.

    The first slots of the KV cache are overwritten.
    """
    length = min(7, longest)
    ids, table = _ids(length, vocab_size), _first_slots(length)
    whole = run([ForwardRow(ids, 0, table)])[0].clone()
    single = [run([ForwardRow([token], start, table)])[0].clone() for start, token in enumerate(ids)]
    return relative_difference(torch.cat(single), whole)


def check_change(complaint: str, change: float, dtype: torch.dtype, measure: Callable[[], float] = lambda: 0.0) -> None:
    """Refuses a change of results that is more than rounding.

    A change above the usual tolerance may still be what rounding makes of this step (in bfloat16, a token may be routed to
    other experts): up to twice what `measure` returns for it is allowed.

    Raises:
        CompileError: it is; the message begins with `complaint`.
    """
    usual = TOLERANCE[dtype]
    if change <= usual:
        return
    limit = min(_MOST_CHANGE, max(usual, 2 * measure()))
    if not change <= limit:
        raise CompileError(f"{complaint} (relative difference {change:.2g})")


def first_row(count: int, vocab_size: int) -> ForwardRow:
    """A row of so many tokens in the first slots of the KV cache."""
    return ForwardRow(_ids(count, vocab_size), 0, _first_slots(count))


def _ids(count: int, vocab_size: int) -> list[int]:
    return [(13 * index + 1) % vocab_size for index in range(count)]


def _first_slots(count: int) -> BlockTable:
    table = BlockTable(count)
    table.extend([0])
    return table


def _probe(example: torch.Tensor, count: int) -> torch.Tensor:
    """An input for so many tokens: the example's own, over and over, since they are known to be allowed.

    Zeros of a floating dtype become random numbers, since equal results for zeros would prove little.
    """
    if example.is_floating_point() and not bool(example.any()):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, *example.shape[1:], generator=generator, dtype=torch.float32, device="cpu").to(
            example.device, example.dtype
        )
    if not len(example):
        return example.new_zeros(count, *example.shape[1:])
    return example[torch.arange(count, device=example.device, dtype=torch.long) % len(example)]


def _key(name: str, graph: StepGraph, device: torch.device) -> str:
    """What a compiled step depends on: the traced operations, the tensors among them, and what compiles them."""
    constants = [str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"]
    facts = {
        "operations": graph.module.code,
        "constants": [_digest(operator.attrgetter(constant)(graph.module)) for constant in constants],
        "shapes": [(str(tuple(fake.shape)), str(fake.dtype)) for fake in graph.inputs],
        "native": native.key(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }
    return cache_key(name, facts)


def _digest(constant: torch.Tensor) -> tuple[str, str, str]:
    content = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(constant.dtype), str(tuple(constant.shape)), hashlib.sha256(content).hexdigest()


def _name(step: Step) -> str:
    return getattr(step, "__qualname__", type(step).__name__)
