"""Loading the compiled kernels into the process."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

import torch

from specplug.native.build import BuildError, OnWait, build_in_background, build_library, is_pending, mark_unloadable

logger = logging.getLogger("specplug")
_lock = threading.Lock()


class _State:
    """What this process has loaded; `loaded` is None until `load` was called."""

    loaded: bool | None = None
    packs_bf16 = False
    has_amx = False
    key = ""


def load(on_wait: OnWait = lambda seconds: None) -> bool:
    """Compiles the kernels if necessary, and loads them; returns whether they can be used.

    If that is not possible, one line of warning says why, once. `SPECPLUG_NATIVE=0` switches them off.

    Args:
        on_wait: called every second with the seconds that the compiler has run.
    """
    with _lock:
        if _State.loaded is None:
            _State.loaded = False
            if os.environ.get("SPECPLUG_NATIVE", "1") != "0":
                _State.loaded = _try_to_load(on_wait)
        return _State.loaded


def must_be_compiled() -> bool:
    """Whether `load` will compile the kernels first, which takes half a minute or more."""
    return _State.loaded is None and os.environ.get("SPECPLUG_NATIVE", "1") != "0" and is_pending()


def go_without() -> bool:
    """If the kernels must be compiled first, starts that for the next process; this one uses PyTorch's until it ends.

    It does not switch later, since an engine's results depend on its kernels to the last bit.

    Returns:
        Whether this process goes without them.
    """
    with _lock:
        if not must_be_compiled():
            return False
        build_in_background()
        _State.loaded = False
        return True


def _try_to_load(on_wait: OnWait = lambda seconds: None) -> bool:
    import specplug.native.operators  # noqa: F401 - the schemas that the library implements

    try:
        path = _load_library(on_wait)
        _State.key = path.stem
        library = ctypes.CDLL(str(path))
        _State.packs_bf16 = bool(library.kernels_pack_bf16())
        _State.has_amx = bool(library.kernels_have_amx())
    except (BuildError, OSError) as error:
        logger.warning("native kernels are not used, PyTorch's are: %s", error)
        return False
    return True


def _load_library(on_wait: OnWait) -> Path:
    """Loads the library; if that fails, builds it once more: the file may have been truncated by a full disk."""
    path = build_library(on_wait)
    try:
        torch.ops.load_library(str(path))
        return path
    except OSError:
        path.unlink(missing_ok=True)
    path = build_library(on_wait)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # a folder from which nothing may be executed, say
        mark_unloadable(path, str(error))
        raise
    return path


def available() -> bool:
    """Whether the kernels are loaded."""
    return bool(_State.loaded)


def packs_bfloat16() -> bool:
    """Whether they include linears with packed bfloat16 weights, which need AVX2 or more."""
    return available() and _State.packs_bf16


def has_amx() -> bool:
    """Whether bfloat16 matmuls and attention run on AMX, where sizes are multiples of 32."""
    return available() and _State.has_amx


def key() -> str:
    """A key of the loaded kernels that changes with sources, compiler, processor and PyTorch version."""
    return _State.key
