"""vLLM as a contestant: an engine in a process of its own, stopped while anybody else is measured."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specplug.bench.contestants import OnStep
from specplug.bench.measurement import Advance, Measurement
from specplug.bench.workload import Cell, Workload
from specplug.stats import SpeculationStats

SERVER = Path(__file__).with_name("vllm_server.py")
MODES = ("in-process", "workers")
_PATIENCE = 20.0


class VllmContestant:
    """One vLLM engine.

    Args:
        label: its name.
        python: the interpreter of vLLM's environment.
        config: vLLM's speculative configuration; None decodes plainly.
        options: keywords of `vllm.LLM`.
        threads: that compute.
        mode: `in-process` runs engine and model in one process; `workers` as vLLM does by itself, with the model's process
            on the first `threads` cores.
        log: where vLLM's own output goes.
    """

    kind = "peer"
    learns = False
    is_taught = False

    def __init__(
        self,
        label: str,
        python: Path,
        config: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        *,
        threads: int,
        mode: str,
        log: Path,
    ) -> None:
        self.label = label
        self.config = config
        self.version = ""
        self._python = python
        self._options = dict(options) | ({} if config is None else {"speculative_config": dict(config)})
        self._environment = os.environ | environment(python, threads, mode)
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._missing: str | None = None

    def open(self, on_step: OnStep) -> None:
        """Starts the engine, and stops its processes. One that does not start has nothing to show."""
        del on_step
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [self._python, SERVER, json.dumps(self._options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env=self._environment,
                start_new_session=True,
            )
        ready = self._answer()
        if ready is None:
            self._missing = f"does not start, see {self._log}"
            self.close()
            return
        self.version = ready["version"]
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the engine's processes."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        self._signal(signal.SIGCONT, process)
        process.stdin.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL, process)
            process.wait()

    def cannot(self, cell: Cell) -> str | None:
        """Why it is not running."""
        del cell
        return self._missing

    def run(self, workload: Workload, cell: Cell, advance: Advance) -> Measurement:
        """Generates the workload once; vLLM's processes run only meanwhile."""
        assert self._process is not None
        assert self._process.stdin is not None
        prompts = [prompt.ids for prompt in workload.requests(cell.batch)]
        order = {"prompts": prompts, "max_tokens": workload.max_tokens, "temperature": cell.temperature}
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(order | {"batch": cell.batch}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            raise RuntimeError(f"{self.label} ended; see {self._log}")
        self._signal(signal.SIGSTOP)
        tokens = sum(len(output) for output in answer["outputs"])
        if tokens != len(prompts) * workload.max_tokens:
            raise RuntimeError(
                f"{self.label} generated {tokens} tokens instead of {len(prompts) * workload.max_tokens}"
            )
        advance(tokens)
        return Measurement(
            tokens=tokens,
            seconds=answer["seconds"],
            first_token_seconds=answer["first_token_seconds"],
            token_seconds=answer["token_seconds"],
            outputs=answer["outputs"],
            stats=self._stats(answer["arrivals"]),
        )

    def _stats(self, arrivals: list[int]) -> SpeculationStats | None:
        """Acceptance, from how many tokens came at a time: of methods that draft in every step of decoding."""
        if self.config is None or self.config["method"] == "ngram":
            return None
        longest = max(count for count, steps in enumerate(arrivals) if steps)
        histogram = arrivals[1 : longest + 1]
        accepted = sum(count * steps for count, steps in enumerate(histogram))
        steps = sum(histogram)
        drafted = steps * self.config["num_speculative_tokens"]
        return SpeculationStats(steps, steps, drafted, accepted, histogram)

    def _answer(self) -> dict[str, Any] | None:
        """The next line that it writes; None if it ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _signal(self, number: signal.Signals, process: subprocess.Popen[str] | None = None) -> None:
        """Sends a signal to all of its processes."""
        process = process or self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def environment(python: Path, threads: int, mode: str) -> dict[str, str]:
    """How vLLM is to run: its threads and where, the libraries it asks for where they are, and no network.

    On a machine whose cores are all for the model, vLLM by itself would keep one back for its scheduler.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    listed = ",".join(map(str, cores))
    openmp = python.parent.parent / "lib/libiomp5.so"
    preload = [str(openmp) if openmp.is_file() else None, ctypes.util.find_library("tcmalloc_minimal")]
    shared = {
        "LD_PRELOAD": ":".join(library for library in preload if library),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if mode == "workers":
        return shared | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": listed}
    binding = {
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{listed}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }
    return shared | binding | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
