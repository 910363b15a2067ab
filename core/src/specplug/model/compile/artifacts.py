"""Machine code for traced graphs: compiled once, kept on disk, and checked before it is used."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from specplug.cache_folder import CacheError, check_private, new_file, private_folder
from specplug.version import __version__

logger = logging.getLogger("specplug")
Artifact = Callable[..., Any]


class CompileError(Exception):
    """Something cannot be compiled here; the message says why."""


@contextmanager
def as_compile_error() -> Iterator[None]:
    """Any error of tracing, compiling or checking becomes a `CompileError` of one line."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def obtain_artifact(
    name: str,
    device: torch.device,
    make: Callable[[], Artifact],
    check: Callable[[Artifact], None],
    worst: Callable[[float], float] = float,
) -> Artifact:
    """The artifact that is kept under a name; without one, or if it does not work, one that is made now.

    Args:
        name: depends on everything that the artifact depends on.
        device: where it runs.
        make: compiles it.
        check: calls it, and raises `CompileError` if its results are wrong.
        worst: see `ModelRunner.worst`; an artifact is called where all processes have one, and in all of them.

    Raises:
        CompileError: it cannot be compiled here, or does not pass the check.
    """
    try:
        folder = private_folder("forwards")
        own = private_folder("forwards/inductor") / name
    except CacheError as error:
        raise CompileError(str(error)) from error
    path = folder / f"{name}.bin"
    with as_compile_error(), _compiler_settings(own, device):
        kept = _load(path, own)
        if not worst(kept is None):
            try:
                assert kept is not None
                check(kept)
                return kept
            except Exception as error:
                logger.debug("the compiled %s cannot be used: %s", path, error)
                _forget(path, own)
        made, failure = None, None
        try:
            made = make()
        except Exception as error:
            failure = error
        if worst(made is None):
            raise failure or CompileError("another rank could not compile its part")
        assert made is not None
        check(made)
        _save(made, path)
        return made


def compile_graph(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Artifact:
    """Machine code for a traced graph, for `obtain_artifact`."""
    from torch._inductor import standalone_compile

    # Kernels are tuned when they first run, on the real tensors: tuning now would take a second copy of the largest weight.
    options = {"config_patches": {"triton.autotune_at_compile_time": False}}
    return standalone_compile(module, list(inputs), dynamic_shapes="from_graph", options=options)


def _load(path: Path, own: Path) -> Artifact | None:
    """The artifact on disk; None if there is none. One that cannot be loaded is removed."""
    from torch._inductor import CompiledArtifact

    if not path.is_file():
        return None
    try:
        check_private(path)
        artifact: Artifact = CompiledArtifact.load(path=str(path), format="binary")
        return artifact
    except Exception as error:
        logger.debug("the compiled %s cannot be loaded: %s", path, error)
        _forget(path, own)
        return None


def _forget(path: Path, own: Path) -> None:
    """Removes an artifact, and what the compiler kept of it: the fault may be there."""
    path.unlink(missing_ok=True)
    shutil.rmtree(own, ignore_errors=True)


def _save(artifact: Any, path: Path) -> None:
    """Writes machine code to disk; where the cache folder cannot be written, the next start compiles again."""
    try:
        with new_file(path) as temporary:
            artifact.save(path=str(temporary), format="binary")
    except (OSError, RuntimeError) as error:
        logger.debug("the compiled %s is not kept: %s", path, error)


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
def _compiler_settings(own: Path, device: torch.device) -> Iterator[None]:
    """One call into machine code instead of one per kernel (a GPU's come from a graph).

    The compiler writes to a folder of this artifact's own, and loads libraries from there: not from a predictable one below
    /tmp. Precompiled headers (150 MB each) would pay only after many compilations.
    """
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    with (
        temporary_cache_dir(str(own)),
        warnings.catch_warnings(),
        config.patch(
            cpp_wrapper=device.type == "cpu",
            cpp_cache_precompile_headers=False,
            size_asserts=False,  # hundreds of checks a step that our own operators' shapes are those of the trace
            scalar_asserts=False,
        ),
    ):
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # float32 is chosen to be exact
        yield


_NAMES_ONLY = ("_name_or_path", "transformers_version")  # say where a configuration came from, not what it is


def cache_key(name: str, facts: dict[str, Any]) -> str:
    """A name with a digest of some facts, and of the versions of specplug, PyTorch and Transformers."""
    import transformers

    versions = [__version__, torch.__version__, transformers.__version__]
    text = json.dumps({**facts, "versions": versions}, sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def config_facts(config: Any) -> Any:
    """A model's configuration, as far as it changes what is computed."""
    return _without_names(config.to_dict())


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_names(inner) for key, inner in value.items() if key not in _NAMES_ONLY}
    return value


def device_name(device: torch.device) -> str:
    """The kind of device; for a GPU also its name and compute capability."""
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
