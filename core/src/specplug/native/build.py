"""Compiling the kernels: once per machine, compiler and PyTorch; afterwards they lie in specplug's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from specplug.cache import CacheError, check_private, new_file, private_folder

_SOURCES = Path(__file__).parent / "cpu"
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
)
_LONGEST_SECONDS = 300


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def find_compiler() -> list[str]:
    """The command that compiles C++: `$CXX`, with its arguments; else the first of c++, g++ and clang++ on the path.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if found is None:
            raise BuildError("no C++ compiler was found (install g++, or name one in CXX)")
        return [found]
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise BuildError(f"CXX cannot be read as a command ({error}): {named}") from error
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"CXX names {named!r}, which is not there")
    return command


def build_library() -> Path:
    """Compiles the kernels unless that has been done; returns the shared library.

    Raises:
        BuildError: there is no compiler, it fails, the cache folder cannot be used, or the library could not be loaded before.
    """
    if platform.system() != "Linux":
        raise BuildError(f"native kernels are built on Linux only, not on {platform.system()}")
    compiler = find_compiler()
    try:
        library = private_folder("native") / f"kernels-{_key(compiler)}.so"
        if library.is_file():
            check_private(library)
            return library
    except CacheError as error:
        raise BuildError(str(error)) from error
    _check_unloadable(library)
    try:
        with new_file(library) as temporary:
            _compile(compiler, temporary)
    except OSError as error:
        raise BuildError(f"the cache folder {library.parent} cannot be written: {error}") from error
    return library


def mark_unloadable(library: Path, reason: str) -> None:
    """Remembers that a library that was just built could not be loaded: the next start does not build it again."""
    library.unlink(missing_ok=True)
    with suppress(OSError):
        _marker(library).write_text(reason, encoding="utf-8")


def _check_unloadable(library: Path) -> None:
    marker = _marker(library)
    try:
        reason = marker.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    raise BuildError(f"the library could not be loaded when it was built (delete {marker} to try again): {reason}")


def _marker(library: Path) -> Path:
    return library.with_suffix(".unloadable")


def compile_command(compiler: list[str], more: Sequence[str]) -> list[str]:
    """What compiles the kernels, with more flags behind those that are always given."""
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    own = [f"-I{_SOURCES}", *(f"-isystem{path}" for path in includes)]  # warnings are for our own sources
    return [*compiler, *_FLAGS, abi, *own, *more, str(_SOURCES / "kernels.cpp")]


def _compile(compiler: list[str], output: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    command = [*compile_command(compiler, ()), "-o", str(output), *_cpp_runtime()]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(compiler)} failed: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise BuildError(f"{shlex.join(compiler)} failed: {lines[0].strip()[:300]}")


def _cpp_runtime() -> list[str]:
    """The C++ runtime that PyTorch has loaded, to be linked with before any other.

    Some compilers link a copy of their own into the library. What that one throws PyTorch cannot catch: instead of an error
    the process would end.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    names = (line.split(maxsplit=5)[-1] for line in lines)
    return sorted({name for name in names if "/libstdc++.so" in name})[:1]


def _key(compiler: list[str]) -> str:
    """What a compiled library depends on: sources, flags, compiler, PyTorch and this processor's instructions."""
    digest = hashlib.sha256()
    for source in sorted(path for path in _SOURCES.rglob("*") if path.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    programs = [Path(found).resolve().stat() for found in map(shutil.which, compiler) if found]  # `ccache g++`: both
    changes = [(status.st_size, status.st_mtime_ns) for status in programs]
    digest.update(repr((_FLAGS, _cpp_runtime(), torch.__version__, compiler, changes, _instructions())).encode())
    return digest.hexdigest()[:24]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
