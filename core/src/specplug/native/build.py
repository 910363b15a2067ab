"""Compiles the kernels: once per machine, compiler and PyTorch; the library is kept in specplug's cache folder.

python -m specplug.native.build compiles them too, at low priority.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from specplug.cache_folder import CacheError, check_private, new_file, private_folder

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DAT_PARALLEL_OPENMP=1",
)
_FILES = {"kernels.cpp": (), "registration.cpp": ("-O1",)}  # optimisation gains nothing in the second
_LONGEST_SECONDS = 300


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


class _CompilerError(Exception):
    """The compiler's own error."""


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
        raise BuildError(f"CXX names {named!r}, which was not found")
    return command


OnWait = Callable[[float], None]


def build_library(on_wait: OnWait = lambda seconds: None) -> Path:
    """Compiles the kernels unless that has been done; returns the shared library.

    If another process is compiling them, waits for its library.

    Args:
        on_wait: called every second with the seconds that the compiler has run.

    Raises:
        BuildError: there is no compiler, it fails, the cache folder cannot be used, or the library could not be loaded before.
    """
    compiler, library = _find()
    if not library.is_file():
        try:
            with _alone(library):
                if not library.is_file():
                    _check_unloadable(library)
                    with new_file(library) as temporary:
                        _compile(compiler, temporary, on_wait)
        except OSError as error:
            raise BuildError(f"the cache folder {library.parent} cannot be written: {error}") from error
    return library


def is_pending() -> bool:
    """Whether the kernels have not been compiled, and nothing is known that would prevent it."""
    try:
        _, library = _find()
        _check_unloadable(library)
    except BuildError:
        return False
    return not library.is_file()


def build_in_background() -> None:
    """Starts a process that compiles the kernels and outlives this one."""
    command = [sys.executable, "-m", "specplug.native.build"]
    nothing = subprocess.DEVNULL
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def _find() -> tuple[list[str], Path]:
    """The compiler, and the path of its library."""
    if platform.system() != "Linux":
        raise BuildError(f"native kernels are built on Linux only, not on {platform.system()}")
    compiler = find_compiler()
    try:
        library = private_folder("native") / f"kernels-{_key(compiler)}.so"
        if library.is_file():
            check_private(library)
    except CacheError as error:
        raise BuildError(str(error)) from error
    return compiler, library


@contextmanager
def _alone(library: Path) -> Iterator[None]:
    """One process at a time: others wait. The lock ends with the process that holds it."""
    import fcntl

    lock = library.with_suffix(".lock")
    with lock.open("w") as file:
        with suppress(OSError):  # a file system without locks: two processes may compile, and the last library stays
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def mark_unloadable(library: Path, reason: str) -> None:
    """Records that a library that was just built could not be loaded: the next start does not build it again."""
    library.unlink(missing_ok=True)
    _mark(library, f"the library could not be loaded when it was built: {reason}")


def _mark(library: Path, reason: str) -> None:
    with suppress(OSError):
        _marker(library).write_text(reason, encoding="utf-8")


def _check_unloadable(library: Path) -> None:
    marker = _marker(library)
    try:
        reason = marker.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    raise BuildError(f"{reason} (delete {marker} to try again)")


def _marker(library: Path) -> Path:
    return library.with_suffix(".unloadable")


def compile_command(compiler: list[str], more: Sequence[str], file: str = "kernels.cpp") -> list[str]:
    """The command that compiles a file of the kernels, with more flags after the usual ones."""
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    own = [f"-I{_SOURCES}", *(f"-isystem{path}" for path in includes)]  # warnings are for our own sources
    return [*compiler, *_FLAGS, abi, *own, *more, str(_SOURCES / file)]


def _compile(compiler: list[str], output: Path, on_wait: OnWait) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        folder = Path(name)
        objects = [str(folder / f"{file}.o") for file in _FILES]
        pairs = zip(_FILES.items(), objects, strict=True)
        commands = [compile_command(compiler, (*more, "-c", "-o", made), file) for (file, more), made in pairs]
        link = [*compiler, "-shared", "-fopenmp", *objects, "-o", str(output), *_cpp_runtime()]
        started = time.monotonic()
        for together in (commands, [[*link, f"-L{libraries}", "-ltorch_cpu", "-lc10"]]):
            try:
                _run(together, folder, lambda: on_wait(time.monotonic() - started))
            except (_CompilerError, OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{shlex.join(compiler)} failed: {error}") from error


def _run(commands: Sequence[list[str]], folder: Path, on_wait: Callable[[], None]) -> None:
    """Runs commands of the compiler at the same time.

    Raises:
        _CompilerError: one fails; the message is the compiler's.
        OSError: it cannot be run.
        subprocess.TimeoutExpired: one takes too long.
    """
    nothing = subprocess.DEVNULL
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    ends = time.monotonic() + _LONGEST_SECONDS
    try:
        for number, command in enumerate(commands):
            errors = folder / f"errors-{number}"
            with errors.open("wb") as file:
                running.append((subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=file), errors))
        for process, errors in running:
            while not _ends_soon(process):
                if time.monotonic() > ends:
                    raise subprocess.TimeoutExpired(process.args, _LONGEST_SECONDS)
                on_wait()
            if process.returncode:
                lines = errors.read_text(encoding="utf-8", errors="replace").splitlines()
                line = next((line for line in lines if "error" in line), lines[0] if lines else "")
                raise _CompilerError(line.strip()[:300])
    finally:
        for process, _ in running:
            process.kill()
            process.wait()


def _ends_soon(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process ends within a second."""
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def _cpp_runtime() -> list[str]:
    """The C++ runtime that PyTorch has loaded, to be linked before any other.

    Some compilers link their own copy into the library. PyTorch cannot catch exceptions that come from it: the process would
    end instead.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    names = (line.split(maxsplit=5)[-1] for line in lines)
    return sorted({name for name in names if "/libstdc++.so" in name})[:1]


def _key(compiler: list[str]) -> str:
    """A digest of what a compiled library depends on: sources, flags, compiler, PyTorch and this processor's instructions."""
    digest = hashlib.sha256()
    for source in sorted(path for path in _SOURCES.rglob("*") if path.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    programs = [Path(found).resolve().stat() for found in map(shutil.which, compiler) if found]  # `ccache g++`: both
    changes = [(status.st_size, status.st_mtime_ns) for status in programs]
    digest.update(
        repr((_FLAGS, _FILES, _cpp_runtime(), torch.__version__, compiler, changes, _instructions())).encode()
    )
    return digest.hexdigest()[:24]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def main() -> None:
    """Compiles the kernels at low priority; a failure is recorded for the next start to report."""
    os.nice(10)
    try:
        build_library()
    except BuildError as error:
        with suppress(BuildError):
            _mark(_find()[1], str(error))


if __name__ == "__main__":
    main()
