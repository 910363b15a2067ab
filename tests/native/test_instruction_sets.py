"""Every build of the kernels that this machine can execute is run, not only the one for its best instructions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from specplug.native.build import BuildError, find_compiler

HERE = Path(__file__).parent
COMPARISONS = (
    "test_native_kernels.py",
    "test_fused_operations.py",
    "test_native_checks.py",
    "test_argmax.py",
    "test_recurrent_kernels.py",
    "test_low_rank.py",
    "test_int8.py::test_a_layer_multiplies_by_its_integers_and_scales",
    "test_int8.py::test_a_row_does_not_depend_on_the_rows_beside_it",
    "test_int8.py::test_joined_and_gated_linears",
)
LOWER = {  # an instruction that the processor has → flags of a build that does without it
    "amx_tile": ("-mno-amx-tile",),
    "avx512_bf16": ("-mno-amx-tile", "-mno-avx512bf16"),
    "avx512f": ("-mno-amx-tile", "-mno-avx512f"),
    "avx2": ("-mno-amx-tile", "-mno-avx512f", "-mno-avx2"),
}


def instructions() -> set[str]:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return set()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.slow
@pytest.mark.parametrize("instruction", [name for name in LOWER if name in instructions()])
def test_lower_instruction_sets_compute_the_same(instruction: str, tmp_path: Path) -> None:
    """The comparisons with PyTorch, on a library that is built without this instruction and all above it."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    settings = {**os.environ, "CXX": shlex.join([*compiler, *LOWER[instruction]]), "SPECPLUG_CACHE": str(tmp_path)}
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in COMPARISONS)],
        env=settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert list((tmp_path / "native").glob("*.so")), "the comparisons ran without the kernels"
