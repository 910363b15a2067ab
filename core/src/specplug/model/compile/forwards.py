"""A model's forward as a step: its inputs are ids [T] and logits index [L], its outputs logits and captured states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from specplug import native
from specplug.errors import StartupError
from specplug.model.batch import ForwardBatch
from specplug.model.checks.difference import relative_difference
from specplug.model.compile.artifacts import CompileError, as_compile_error, cache_key, config_facts, device_name
from specplug.model.compile.compiled import (
    CompiledStep,
    RowsStep,
    build_step,
    check_change,
    first_row,
    measure_change,
    measure_rounding,
)
from specplug.model.compile.cuda_graphs import CudaGraphs, TensorStep
from specplug.model.compile.trace import (
    EXAMPLE_LOGITS,
    EXAMPLE_SEGMENTS,
    EXAMPLE_STATE_ROWS,
    EXAMPLE_TOKENS,
    Step,
    TensorBatch,
    weights_of,
)
from specplug.model.rows import ForwardRow
from specplug.model.runner import ModelRunner

if TYPE_CHECKING:
    from specplug.lora.layers import AdapterLayers

_LARGE = (16, 64, 256)  # tokens of larger captured forwards that are compared, besides the largest
_CONVENTION = 2  # the order of inputs and outputs, which an artifact depends on


def compile_forward(runner: ModelRunner) -> CompiledStep:
    """Compiles a runner's forward, or takes it from disk; the first slots of the KV cache are overwritten.

    Raises:
        CompileError: it cannot be compiled here, or does not compute what the model does.
    """

    def check(compiled: CompiledStep) -> None:
        _check(runner, "compiled", over_rows(runner, compiled.over_tensors))

    module, inputs, facts = runner.model, example_inputs(runner.device), {}
    if runner.states is not None:
        memories = runner.states.module
        module = torch.nn.ModuleDict({"model": module, "states": memories})
        inputs.append(torch.zeros(EXAMPLE_STATE_ROWS, dtype=torch.int32, device=runner.device))
        facts = {"states": {name: list(tensor.shape) for name, tensor in weights_of(memories).items()}}
    name = runner.architecture.name
    return build_step(
        forward_step(runner), module, runner.cache, inputs, check, name, _key(runner, facts), runner.worst
    )


def compile_adapted_forward(runner: ModelRunner, adapters: AdapterLayers) -> CompiledStep:
    """The same for batches with adapters, whose segments are one more input. The first slot of adapters is overwritten.

    Raises:
        CompileError: see `compile_forward`.
    """
    whole = torch.nn.ModuleDict({"model": runner.model, "adapters": adapters})
    plain = forward_step(runner)

    def step(
        batch: TensorBatch, ids: torch.Tensor, logits_index: torch.Tensor, segments: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        with adapters.applied(segments, to_all=True):
            return plain(batch, ids, logits_index)

    def over_adapted_rows(run: TensorStep) -> RowsStep:
        def run_rows(rows: list[ForwardRow]) -> Any:
            batch = ForwardBatch([attrs.evolve(row, adapter=0) for row in rows], runner.cache)
            segments = torch.tensor([[0, batch.num_tokens, 0]], dtype=torch.int32, device="cpu")
            return run(*batch.step_inputs, segments)

        return run_rows

    def own(positions: torch.Tensor, plan: torch.Tensor, slots: torch.Tensor, *inputs: torch.Tensor) -> Any:
        return step(TensorBatch(positions, plan, slots, runner.cache_tensors), *inputs)

    def check(compiled: CompiledStep) -> None:
        adapters.fill_randomly(0)
        try:
            ours, theirs = over_adapted_rows(compiled.over_tensors), over_adapted_rows(own)
            change = measure_change(ours, theirs, _longest(runner), runner.architecture.vocab_size)
            check_change("compiled with adapters, it gives other logits", change, runner.cache.keys[0].dtype)
        finally:
            adapters.fill(0, None)

    segments = torch.zeros(EXAMPLE_SEGMENTS, 3, dtype=torch.int32, device=runner.device)
    return build_step(
        step,
        whole,
        runner.cache,
        [*example_inputs(runner.device), segments],
        check,
        f"{runner.architecture.name} with adapters",
        _key(runner, {"adapters": {name: list(tensor.shape) for name, tensor in weights_of(adapters).items()}}),
    )


def capture_forward(runner: ModelRunner, most_tokens: int, most_logits: int) -> None:
    """Gives a runner CUDA graphs of its forward, compiled or not; without them if it raises.

    Args:
        runner: on a GPU, with native attention.
        most_tokens: of a batch that is worth capturing.
        most_logits: of a batch.

    Raises:
        CompileError: the forward cannot be captured, or gives other results.
        StartupError: the forward of a model that several processes share cannot be captured: they wait for each other inside.
    """
    try:
        with as_compile_error():
            runner.graphs = CudaGraphs(
                runner.run_tensors, runner.device, most_tokens, pending=runner.pending, most_logits=most_logits
            )
    except CompileError as error:
        if runner.num_ranks > 1:
            raise StartupError(
                f"the forward of rank {runner.rank} cannot be captured ({error}); set compile=False"
            ) from error
        torch.cuda.synchronize(runner.device)
        raise
    try:
        with as_compile_error():
            _check(runner, "captured", lambda rows: [runner.run(rows), *runner.captured_states])
            _check_large(runner)
    except BaseException:
        runner.graphs = None
        torch.cuda.synchronize(runner.device)
        raise


def forward_step(runner: ModelRunner) -> Step:
    """The runner's forward over the caches of a `TensorBatch`, as it is traced."""

    def step(
        batch: TensorBatch, ids: torch.Tensor, logits_index: torch.Tensor, *state_rows: torch.Tensor
    ) -> list[torch.Tensor]:
        own = [(site.keys, site.values) for site in runner.sites]
        try:
            for number, site in enumerate(runner.sites):
                site.keys, site.values = batch.caches[2 * number : 2 * number + 2]
            return runner.step(batch, ids, logits_index, *state_rows)
        finally:
            runner.taps.captured.clear()
            for site, (keys, values) in zip(runner.sites, own, strict=True):
                site.keys, site.values = keys, values

    return step


def example_inputs(device: torch.device) -> list[torch.Tensor]:
    """Ids and logits index for `trace_step`."""
    return [torch.zeros(count, dtype=torch.long, device=device) for count in (EXAMPLE_TOKENS, EXAMPLE_LOGITS)]


def over_rows(runner: ModelRunner, run: TensorStep) -> RowsStep:
    """A forward over tensors as one over rows of a runner."""

    def run_rows(rows: list[ForwardRow]) -> Any:
        if runner.states is None:
            return run(*ForwardBatch(rows, runner.cache).step_inputs)
        rows = [attrs.evolve(row, slot=0, held=1) for row in rows]
        with runner.states.running(rows) as states:
            return run(*ForwardBatch(rows, runner.cache).step_inputs, states.plan)

    return run_rows


def measure_forward_change(runner: ModelRunner, forward: RowsStep) -> float:
    """See `measure_change`: how much a forward differs from the runner's own over tensors."""
    own = over_rows(runner, runner.run_tensors)
    return measure_change(forward, own, _longest(runner), runner.architecture.vocab_size)


def _check(runner: ModelRunner, how: str, forward: RowsStep) -> None:
    change = runner.worst(measure_forward_change(runner, forward))
    check_change(f"{how}, it gives other logits", change, runner.cache.keys[0].dtype, lambda: _rounding(runner))


def _rounding(runner: ModelRunner) -> float:
    own = over_rows(runner, runner.run_tensors)
    return runner.worst(measure_rounding(own, _longest(runner), runner.architecture.vocab_size))


@torch.inference_mode()
def _check_large(runner: ModelRunner) -> None:
    """Compares larger captured forwards with what they hold, launched from Python: the last logits, and all captured states."""
    graphs = runner.graphs
    assert graphs is not None
    most = min(graphs.most_tokens, _longest(runner))
    worst = 0.0
    for count in sorted({min(size, most) for size in (*_LARGE, most)}):
        row, outputs = first_row(count, runner.architecture.vocab_size), []
        for used in (graphs, None):
            runner.graphs = used
            logits = runner.run([row], [count - 1])
            outputs.append([output.clone() for output in (logits, *runner.captured_states)])
        runner.graphs = graphs
        worst = max(worst, *map(relative_difference, *outputs))
    change, dtype = runner.worst(worst), runner.cache.keys[0].dtype
    check_change("a large batch is captured, and it gives other logits", change, dtype, lambda: _rounding(runner))


def _longest(runner: ModelRunner) -> int:
    return min(runner.architecture.context_length, runner.cache.num_slots)


def _key(runner: ModelRunner, others: dict[str, Any]) -> str:
    """What a compiled forward depends on, without a trace: that would take a start most of its time.

    The model's code is covered by the versions, and by the check before use.
    """
    model: Any = runner.model
    facts = {
        "convention": _CONVENTION,
        "config": config_facts(model.config),
        "weights": {name: (list(w.shape), str(w.dtype)) for name, w in weights_of(model).items()},
        "caches": [(tensor.shape[0], tensor.shape[2], str(tensor.dtype)) for tensor in runner.cache_tensors],
        "boundaries": list(runner.taps.boundaries),
        "windows": [site.window for site in runner.sites],
        "native": native.key(),
        "threads": torch.get_num_threads(),
        "device": device_name(runner.device),
        "rank": (runner.rank, runner.num_ranks),
        **others,
    }
    return cache_key(runner.architecture.name, facts)
