"""A model's packed forward as machine code, for all batch sizes.

What Python there is between two of a model's operations costs a small model several times its arithmetic, and a large one a
few percent. The compiled forward is one call. It is compared with the model's own forward before it is used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from specplug import native
from specplug.model.batch import ForwardBatch
from specplug.model.compile.artifacts import (
    Artifact,
    CompileError,
    as_compile_error,
    cache_key,
    compile_graph,
    config_facts,
    device_name,
    obtain_artifact,
    quiet_tracing,
)
from specplug.model.compile.trace import trace_forward, weights_of
from specplug.model.difference import TOLERANCE, relative_difference
from specplug.model.kv_cache import BlockTable
from specplug.model.load.packing import PackedLinear
from specplug.model.rows import ForwardRow

if TYPE_CHECKING:
    from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")
_MOST_CHANGE = 0.5  # beyond, a fault would look no different
Outputs = tuple[torch.Tensor, dict[int | str, torch.Tensor]]
TensorForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Outputs]
RowsForward = Callable[[list[ForwardRow]], Outputs]


class CompiledForward:
    """Callable in place of a model over a `ForwardBatch`."""

    def __init__(self, artifact: Artifact, fixed: Sequence[torch.Tensor], captured: Sequence[int | str]) -> None:
        self._artifact = artifact
        self._fixed = list(fixed)
        self._captured = list(captured)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: torch.Tensor,
        write_slots: torch.Tensor,
        logits_index: torch.Tensor,
    ) -> Outputs:
        """Logits [L, vocabulary], and the captured states [T, hidden] by boundary."""
        logits, *states = self._artifact(*self._fixed, input_ids, position_ids, plan, write_slots, logits_index)
        return logits[0], dict(zip(self._captured, states, strict=True))


def compile_forward(runner: ModelRunner, block_size: int) -> CompiledForward:
    """Compiles a runner's forward, or takes it from disk; the first blocks of the KV cache are overwritten.

    Raises:
        CompileError: it cannot be compiled here, or does not compute what the model does.
    """
    if not runner.attends_natively:
        raise CompileError("the native kernels are not there")
    if any(isinstance(module, PackedLinear) and not module.is_native for module in runner.model.modules()):
        raise CompileError("its weights are packed for a library that compiled code cannot call")
    fixed = [*(w.detach() for w in weights_of(runner.model).values()), *runner.cache_tensors]

    def bind(artifact: Artifact) -> CompiledForward:
        return CompiledForward(artifact, fixed, list(runner.taps.boundaries))

    def check(artifact: Artifact) -> None:
        ours, theirs = over_rows(runner, bind(artifact)), over_rows(runner, runner.run_tensors)
        check_change(runner, "compiled", measure_change(runner, block_size, ours, theirs), block_size)

    return bind(obtain_artifact(_key(runner), runner.device, lambda: _compile(runner), check))


def over_rows(runner: ModelRunner, forward: TensorForward) -> RowsForward:
    """A forward over a batch's tensors as one over rows of a runner."""

    def run(rows: list[ForwardRow]) -> Outputs:
        batch = ForwardBatch(rows, runner.cache)
        return forward(batch.input_ids, batch.position_ids, batch.plan, batch.write_slots, batch.logits_index)

    return run


@torch.inference_mode()
def measure_change(runner: ModelRunner, block_size: int, ours: RowsForward, theirs: RowsForward) -> float:
    """The largest relative root-mean-square difference of logits and captured states between two forwards of a runner.

    Measured for one, two and seven tokens; the first blocks of the KV cache are overwritten.
    """
    worst = 0.0
    length = min(7, runner.architecture.context_length, runner.cache.num_slots)
    ids = (
        torch.arange(length, dtype=torch.long, device="cpu")
        .mul(13)
        .add(1)
        .remainder(runner.architecture.vocab_size)
        .tolist()
    )
    for count in sorted({1, min(2, length), length}):
        table = BlockTable(block_size)
        table.extend(range(-(-count // block_size)))
        rows = [ForwardRow(ids[:count], 0, table)]
        (logits, states), (own_logits, own_states) = ours(rows), theirs(rows)
        pairs = [
            (logits, own_logits),
            *((states[boundary], own_states[boundary]) for boundary in runner.taps.boundaries),
        ]
        worst = max(worst, *(relative_difference(*pair) for pair in pairs))
    return worst


@torch.inference_mode()
def measure_rounding(runner: ModelRunner, block_size: int) -> float:
    """The relative root-mean-square difference of logits that rounding alone makes, for the same tokens in one step or several.

    The first blocks of the KV cache are overwritten.
    """
    length = min(7, runner.architecture.context_length, runner.cache.num_slots)
    ids = torch.arange(length).mul(13).add(1).remainder(runner.architecture.vocab_size).tolist()
    table = BlockTable(block_size)
    table.extend(range(-(-length // block_size)))
    run = over_rows(runner, runner.run_tensors)
    whole = run([ForwardRow(ids, 0, table)])[0].clone()
    single = [run([ForwardRow([token], start, table)])[0].clone() for start, token in enumerate(ids)]
    return relative_difference(torch.cat(single), whole)


def check_change(runner: ModelRunner, how: str, change: float, block_size: int) -> None:
    """Refuses a change of results that is more than rounding.

    Where it is more than rounding makes of most models, it may still be what rounding makes of this one (in bfloat16, a token
    may be routed to other experts): then as much is allowed as its own forward changes by the way tokens are cut into steps.

    Raises:
        CompileError: it is.
    """
    usual = TOLERANCE[runner.cache.keys[0].dtype]
    if change <= usual:
        return
    limit = min(_MOST_CHANGE, max(usual, 2 * measure_rounding(runner, block_size)))
    if not change <= limit:
        raise CompileError(f"{how}, it gives other logits (relative difference {change:.2g})")


def _compile(runner: ModelRunner) -> Artifact:
    started = time.perf_counter()
    with as_compile_error(), quiet_tracing():
        graph = trace_forward(runner.model, runner.sites, runner.taps)
    artifact = compile_graph(graph.module, graph.inputs)
    logger.debug("compiled %s in %.1f s", runner.architecture.name, time.perf_counter() - started)
    return artifact


def _key(runner: ModelRunner) -> str:
    """What a compiled forward depends on. The model's code is covered by the versions, and by the check before use."""
    model: Any = runner.model
    facts = {
        "config": config_facts(model.config),
        "weights": {name: (list(w.shape), str(w.dtype)) for name, w in weights_of(model).items()},
        "caches": [(tensor.shape[0], tensor.shape[2], str(tensor.dtype)) for tensor in runner.cache_tensors],
        "boundaries": list(runner.taps.boundaries),
        "windows": [site.window for site in runner.sites],
        "native": native.key(),
        "threads": torch.get_num_threads(),
        "device": device_name(runner.device),
    }
    return cache_key(runner.architecture.name, facts)
