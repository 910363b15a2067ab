"""Compiling the kernels: once per machine, compiler and PyTorch; afterwards they lie in specplug's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from specplug.cache import default_cache_folder

_SOURCES = Path(__file__).parent / "kernels"
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DAT_PARALLEL_OPENMP=1",
    "-w",
)
_LONGEST_SECONDS = 300


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, else the first of c++, g++ and clang++ on the path."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        found = shutil.which(shlex.split(name)[0]) if name else None
        if found:
            return found
    return None


def build_library() -> Path:
    """Compiles the kernels unless that has been done; returns the shared library.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be written.
    """
    if platform.system() != "Linux":
        raise BuildError(f"native kernels are built on Linux only, not on {platform.system()}")
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found (install g++, or name one in CXX)")
    folder = default_cache_folder() / "native"
    library = folder / f"kernels-{_key(compiler)}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be written: {error}") from error
    try:
        _compile(compiler, temporary)
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _compile(compiler: str, output: str) -> None:
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, *_FLAGS, abi, *(f"-I{path}" for path in includes), str(_SOURCES / "kernels.cpp")]
    command += ["-o", output, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} failed: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise BuildError(f"{compiler} failed: {lines[0].strip()[:300]}")


def _key(compiler: str) -> str:
    """What a compiled library depends on: sources, flags, compiler, PyTorch and this processor's instructions."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    status = Path(compiler).resolve().stat()
    facts = (_FLAGS, torch.__version__, compiler, status.st_size, status.st_mtime_ns, _instructions())
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:24]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
