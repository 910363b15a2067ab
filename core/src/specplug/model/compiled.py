"""A model's packed forward as machine code: traced once, compiled once for all batch sizes, kept on disk.

What Python there is between two of a model's operations costs a small model several times its arithmetic, and a large one a
few percent. The compiled forward is one call. It is checked against the model's own forward before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from specplug import native
from specplug.cache import default_cache_folder
from specplug.model.blocks import BlockTable
from specplug.model.forward import ForwardRow
from specplug.model.packing import PackedLinear
from specplug.model.trace import trace_forward, weights_of
from specplug.version import __version__

if TYPE_CHECKING:
    from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")


class CompileError(Exception):
    """A forward cannot be compiled here; the message says why."""


class CompiledForward:
    """Callable in place of a model over a `ForwardBatch`."""

    def __init__(self, artifact: Any, fixed: Sequence[torch.Tensor], captured: Sequence[int | str]) -> None:
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
    ) -> tuple[torch.Tensor, dict[int | str, torch.Tensor]]:
        """Logits [L, vocabulary], and the captured states [T, hidden] by boundary."""
        logits, *states = self._artifact(*self._fixed, input_ids, position_ids, plan, write_slots, logits_index)
        return logits[0], dict(zip(self._captured, states, strict=True))


def compile_forward(runner: ModelRunner) -> CompiledForward:
    """Compiles a runner's forward, or takes it from disk.

    Raises:
        CompileError: it cannot be compiled here.
    """
    if not runner.attends_natively:
        raise CompileError("the native kernels are not there")
    if any(isinstance(module, PackedLinear) and not module.is_native for module in runner.model.modules()):
        raise CompileError("its weights are packed for a library that compiled code cannot call")
    folder = default_cache_folder() / "forwards"
    path = folder / f"{_key(runner)}.bin"
    fixed = [*(w.detach() for w in weights_of(runner.model).values()), *runner.cache_tensors]
    with compiler_settings(folder, runner.device):
        artifact = load_artifact(path, lambda: _compile(runner))
    return CompiledForward(artifact, fixed, list(runner.taps.boundaries))


@torch.inference_mode()
def measure_change(runner: ModelRunner, block_size: int, part: Literal["compiled", "graphs"] = "compiled") -> float:
    """The largest relative root-mean-square difference of logits and captured states that compiling or capturing made.

    Measured for forwards of one, two and seven tokens; the first blocks of the KV cache are overwritten.
    """
    faster, worst = getattr(runner, part), 0.0
    length = min(7, runner.architecture.context_length, runner.cache.num_slots)
    ids = torch.arange(length).mul(13).add(1).remainder(runner.architecture.vocab_size).tolist()
    for count in sorted({1, min(2, length), length}):
        table = BlockTable(block_size)
        table.extend(range(-(-count // block_size)))
        outputs = []
        for with_or_without in (faster, None):
            setattr(runner, part, with_or_without)
            logits = runner.forward([ForwardRow(ids[:count], 0, table)])
            outputs.append([logits, *(runner.taps.captured[boundary] for boundary in runner.taps.boundaries)])
        for ours, theirs in zip(*outputs, strict=True):
            scale = theirs.double().pow(2).mean().sqrt().clamp_min(1e-30)
            change = ((ours.double() - theirs.double()).pow(2).mean().sqrt() / scale).item()
            worst = max(worst, change if change == change else float("inf"))
    setattr(runner, part, faster)
    return worst


def _compile(runner: ModelRunner) -> Any:
    started = time.perf_counter()
    try:
        with quiet_tracing():
            graph = trace_forward(runner.model, runner.sites, runner.taps)
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    artifact = compile_graph(graph.module, graph.inputs)
    logger.debug("compiled %s in %.1f s", runner.architecture.name, time.perf_counter() - started)
    return artifact


def compile_graph(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Machine code for a traced graph.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    from torch._inductor import standalone_compile

    try:
        return standalone_compile(module, list(inputs), dynamic_shapes="from_graph", options={})
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def load_artifact(path: Path, make: Callable[[], Any]) -> Any:
    """What is kept under a path; if nothing that can be read is, it is made, and kept."""
    artifact = _load(path)
    if artifact is None:
        artifact = make()
        _save(artifact, path)
    return artifact


def _load(path: Path) -> Any:
    """What lies on disk; None if nothing does, or nothing that can be read."""
    from torch._inductor import CompiledArtifact

    if not path.is_file():
        return None
    try:
        return CompiledArtifact.load(path=str(path), format="binary")
    except Exception as error:
        logger.debug("the compiled forward %s cannot be used: %s", path, error)
        return None


def _save(artifact: Any, path: Path) -> None:
    """Keeps a compiled forward; where the cache folder cannot be written, it is compiled again next time."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        artifact.save(path=str(temporary), format="binary")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        logger.debug("the compiled forward is not kept: %s", error)
        temporary.unlink(missing_ok=True)


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """PyTorch logs a traceback for an operation without a shapes-only form, before it raises the error that is reported."""
    torch_logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        torch_logger.setLevel(level)


@contextmanager
def compiler_settings(folder: Path, device: torch.device) -> Iterator[None]:
    """One call into machine code instead of one per kernel (a GPU's come from a graph); the compiler's own cache beside
    ours, where it survives.
    """
    from torch._inductor import config

    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    os.environ.setdefault(variable, str(folder / "inductor"))
    try:
        with config.patch(cpp_wrapper=device.type == "cpu"):
            yield
    finally:
        if before is None:
            del os.environ[variable]


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


def _key(runner: ModelRunner) -> str:
    """What a compiled forward depends on. The model's code is covered by the versions, and by the check before use."""
    import transformers

    model: Any = runner.model
    weights = {name: (list(w.shape), str(w.dtype)) for name, w in weights_of(model).items()}
    facts = {
        "config": model.config.to_dict(),
        "weights": weights,
        "caches": [(tensor.shape[0], tensor.shape[2], str(tensor.dtype)) for tensor in runner.cache_tensors],
        "boundaries": list(runner.taps.boundaries),
        "native": native.key(),
        "threads": torch.get_num_threads(),
        "device": _device_name(runner.device),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return f"{runner.architecture.name}-{digest}"
