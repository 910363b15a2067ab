"""Our linear kernel versus packed oneDNN, PyTorch's `brgemm` and `F.linear`, in bfloat16, by number of rows.

    python benchmarks/linear_kernels.py
    CXX="c++ -mno-amx-tile" python benchmarks/linear_kernels.py     # our kernel for a lower instruction set

Every contestant multiplies the same rows with the same weights, one weight after the other, so that weights come from memory:
that is what a decoding step does. Contestants take turns. Medians in ms for all weights, and bytes of weights per second.
`brgemm` is `at::native::cpublas::brgemm` over the same packed panels, which needs AVX-512; n/a where it is not supported.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from specplug import native
from specplug.bench.report import describe_machine
from specplug.model.load.packing import packed_shape
from specplug.native.build import compile_command, find_compiler

ROWS = (1, 4, 8, 16, 64, 256, 1024)
BRGEMM = r"""
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>
#include <algorithm>
#include <vector>

// states [M, K], packed [N / 32, K * 32] in VNNI layout -> out [M, N]
void run(const at::Tensor& states, const at::Tensor& packed, const at::Tensor& out) {
  const int64_t M = states.size(0), K = states.size(1), N = out.size(1), block = 64;
  const auto* x = states.const_data_ptr<c10::BFloat16>();
  const auto* w = packed.const_data_ptr<c10::BFloat16>();
  auto* y = out.mutable_data_ptr<c10::BFloat16>();
  at::parallel_for(0, N / 32, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> sums(block * 32);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t m = 0; m < M; m += block) {
        const int64_t rows = std::min(block, M - m);
        at::native::cpublas::brgemm(rows, 32, K, K, 32, 32, false, x + m * K, w + panel * K * 32, sums.data());
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t n = 0; n < 32; ++n) y[(m + row) * N + panel * 32 + n] = sums[row * 32 + n];
      }
    at::native::cpublas::brgemm_release();
  });
}
bool supported() { return at::native::cpublas::could_pack(at::kBFloat16); }

TORCH_LIBRARY(brgemm_contestant, library) {
  library.def("run(Tensor states, Tensor packed, Tensor(a!) out) -> ()");
  library.def("supported() -> bool", &supported);
}
TORCH_LIBRARY_IMPL(brgemm_contestant, CPU, library) { library.impl("run", &run); }
"""


def load_brgemm() -> bool:
    """Compiles the `brgemm` contestant; whether this machine supports it."""
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "contestant.cpp", folder / "contestant.so"
    source.write_text(BRGEMM, encoding="utf-8")
    command = [part for part in compile_command(find_compiler(), ()) if not part.endswith("kernels.cpp")]
    libraries = Path(torch.__file__).parent / "lib"
    command += ["-shared", str(source), "-o", str(library), f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"brgemm: cannot be compiled: {done.stderr.strip().splitlines()[:1]}", file=sys.stderr)
        return False
    torch.ops.load_library(str(library))
    return bool(torch.ops.brgemm_contestant.supported())


def contestants(weights: list[torch.Tensor], states: torch.Tensor, brgemm: bool) -> dict[str, Callable[[], object]]:
    """Name → a function that multiplies the rows with every weight."""
    out_features = weights[0].shape[0]
    found: dict[str, Callable[[], object]] = {}
    packed = []
    if native.packs_bfloat16():
        for weight in weights:
            room = weight.new_empty(packed_shape(*weight.shape))
            torch.ops.specplug.pack_weight(weight, room)
            packed.append(room)
        found["ours"] = lambda: [torch.ops.specplug.linear(states, each, None, out_features) for each in packed]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reordered = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
        pointwise = torch.ops.mkldnn._linear_pointwise
        found["oneDNN packed"] = lambda: [pointwise(states, each, None, "none", [], "") for each in reordered]
    if brgemm and packed:
        out = states.new_empty(states.shape[0], out_features)
        run = torch.ops.brgemm_contestant.run
        found["brgemm"] = lambda: [run(states, each, out) for each in packed]
    found["F.linear"] = lambda: [torch.nn.functional.linear(states, weight) for weight in weights]
    return found


def main() -> None:
    """Prints one line per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-features", type=int, default=1024)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--weights", type=int, default=24, help="so many, of different memory")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="PyTorch's setting if left out")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    native.load()
    brgemm = load_brgemm()
    torch.manual_seed(0)
    shape = (args.out_features, args.in_features)
    weights = [torch.randn(shape, dtype=torch.bfloat16) / args.in_features**0.5 for _ in range(args.weights)]
    size = sum(weight.nbytes for weight in weights)
    compiler = shlex.join(find_compiler())
    print(describe_machine(torch.device("cpu")), compiler, f"AMX {native.has_amx()}, {size / 1e6:.0f} MB of weights")
    results = []
    for rows in args.rows:
        states = torch.randn(rows, args.in_features, dtype=torch.bfloat16)
        runs = contestants(weights, states, brgemm)
        times: dict[str, list[float]] = {name: [] for name in runs}
        with torch.inference_mode():
            for repeat in range(args.repeats + 1):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run()
                    if repeat:
                        times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(own) for name, own in times.items()}
        results.append({"rows": rows, **{name: round(1e3 * seconds, 3) for name, seconds in medians.items()}})
        cells = [
            f"{name} {1e3 * seconds:9.2f} ms {size / seconds / 1e9:6.1f} GB/s" for name, seconds in medians.items()
        ]
        print(f"{rows:5}  " + "   ".join(cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
