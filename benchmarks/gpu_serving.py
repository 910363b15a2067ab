"""Tokens per second of every method on one GPU, by workload and rows, and where a step's time goes.

    python benchmarks/gpu_serving.py                                   # everything; the models are made first, in build/
    python benchmarks/gpu_serving.py --methods plain eagle3 --cells continuing:64 --json build/gpu.json
    python benchmarks/gpu_serving.py --device cpu --size 33M --memory 1GiB --tokens 16 --requests 1   # a rehearsal

The target is `tiny` grown to 6.9 billion parameters (see `grow.py`), with the embedded draft model and the grown head. Each
method runs in a process of its own. A cell is as many rows as its name says, kept busy by several requests per row; prompts
have 256 tokens, their time is included, and the faster of two runs counts. `busy` is the share of a decoding step in which the
GPU computes, by PyTorch's profiler; the rest of the step it waits for the host. The first tokens of every output are
compared with the first method's (later ones may differ: in bfloat16 a near tie is decided by the number of tokens verified).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

LARGE = {
    "hidden_size": 4096,
    "num_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
CELLS = ("editing:1", "continuing:1", "continuing:16", "continuing:64")
METHODS = ("plain", "ngram", "draft_model", "eagle3", "draft_model-auto", "eagle3-auto")
PROMPT_TOKENS = 256
PROFILED_STEPS = 20
COMPARED = 8


def make_models(folder: Path, size: str, device: str) -> None:
    """Writes the grown target and its head, once."""
    import grow
    import grow_head

    from specplug.bench.peers import method_model

    if (folder / "head" / "config.json").is_file():
        return
    sizes = LARGE if size == "large" else vars(grow.PRESETS[size])
    grow.grow("tiny", folder / "target", **sizes, dtype="bfloat16", device=device)
    grow_head.grow_head(Path(method_model("eagle3", "tiny")), folder / "target", folder / "head")


def configuration(method: str, folder: Path) -> dict[str, Any] | None:
    """The speculative configuration of a method's name; `-auto` or a number after it is its draft length."""
    from specplug.bench.peers import method_model

    name, _, length = method.partition("-")
    if name == "plain":
        return None
    default = 5 if name == "ngram" else 3
    config: dict[str, Any] = {"method": name, "num_speculative_tokens": default}
    if length:
        config["num_speculative_tokens"] = "auto" if length == "auto" else int(length)
    if name == "ngram":
        config |= {"prompt_lookup_max": 4, "prompt_lookup_min": 1}
    if name == "draft_model":
        config["model"] = method_model("draft_model", "tiny")
    if name == "eagle3":
        config["model"] = str(folder / "head")
    return config


class Runner:
    """An engine, kept busy with a fixed number of rows."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.engine

    def generate(self, prompts: list[list[int]], rows: int, tokens: int) -> list[list[int]]:
        """Outputs of all prompts, never more than `rows` at once."""
        from specplug import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        waiting = list(enumerate(prompts))[::-1]
        live, done = 0, {}
        while waiting or live:
            while waiting and live < rows:
                number, ids = waiting.pop()
                self.engine.add_request(str(number), ids, params)
                live += 1
            for output in self.engine.step():
                request = output.request
                if request.is_finished:
                    done[int(request.id)] = request.tokens[request.num_prompt_tokens :]
                    live -= 1
        return [done[number] for number in range(len(prompts))]

    def step_times(self, prompts: list[list[int]], profiled: bool) -> dict[str, float]:
        """Milliseconds of a decoding step, and with a profiler how long of it the GPU computes."""
        from torch.profiler import ProfilerActivity, profile

        from specplug import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=8 * PROFILED_STEPS, ignore_eos=True)
        for number, ids in enumerate(prompts):
            self.engine.add_request(f"step-{number}", ids, params)
        while len(self.engine.step()) < len(prompts):
            pass
        for _ in range(5):
            self.engine.step()
        before = sum(self.engine.chain.seconds.values())
        times = []
        for _ in range(PROFILED_STEPS):
            began = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - began)
        proposing = (sum(self.engine.chain.seconds.values()) - before) / PROFILED_STEPS
        found = {"step ms": statistics.median(times) * 1e3, "propose ms": proposing * 1e3}
        if profiled:
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                for _ in range(PROFILED_STEPS):
                    self.engine.step()
                torch.cuda.synchronize()
            busy = busy_microseconds(record) / PROFILED_STEPS / 1e3
            found |= {"GPU ms": busy, "busy": busy / found["step ms"]}
        for number in range(len(prompts)):
            self.engine.abort(f"step-{number}")
        return {name: round(value, 3) for name, value in found.items()}


def busy_microseconds(record: Any) -> float:
    """The time in which at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in record.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def measure(args: argparse.Namespace, method: str) -> None:
    """Prints one line of JSON per cell."""
    import transformers
    import workloads

    from specplug import LLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / "target")
    steps: dict[str, float] = {}
    began = time.perf_counter()
    most = max(int(cell.partition(":")[2]) for cell in args.cells)
    with LLM(
        str(args.folder / "target"),
        dtype="bfloat16",
        device=args.device,
        memory=args.memory,
        max_model_len=1024,
        max_num_seqs=most,
        enable_prefix_caching=False,
        tensor_parallel_size=args.tensor_parallel_size,
        speculative_config=configuration(method, args.folder),
        on_step=lambda report: steps.__setitem__(report.name, round(report.seconds or 0.0, 1)),
    ) as llm:
        print(
            json.dumps({"method": method, "start s": round(time.perf_counter() - began, 1), "steps": steps}), flush=True
        )
        runner = Runner(llm)
        for cell in args.cells:
            workload, _, count = cell.partition(":")
            rows = int(count)
            make = workloads.CODE[workload]
            requests = rows * max(args.requests, 2 if rows > 1 else 6)
            prompts = make(tokenizer, 128) if workload == "editing" else make(tokenizer, 128, PROMPT_TOKENS)
            prompts = (prompts * 4)[:requests]
            runner.generate(prompts[:rows], rows, min(16, args.tokens))
            stats = llm.engine.stats
            before = llm.engine.num_steps, stats.num_draft_tokens, stats.num_accepted_draft_tokens
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                outputs = runner.generate(prompts, rows, args.tokens)
                seconds.append(time.perf_counter() - began)
            after = llm.engine.num_steps, stats.num_draft_tokens, stats.num_accepted_draft_tokens
            line = {
                "method": method,
                "cell": cell,
                "tokens/s": round(requests * args.tokens / min(seconds), 1),
                **dict(
                    zip(
                        ("steps", "drafted", "accepted"),
                        (b - a for a, b in zip(before, after, strict=True)),
                        strict=True,
                    )
                ),
                **runner.step_times(prompts[:rows], args.device == "cuda"),
                "output": hashlib.sha256(json.dumps([output[:COMPARED] for output in outputs]).encode()).hexdigest()[
                    :12
                ],
            }
            print(json.dumps(line), flush=True)


def table(lines: list[dict[str, Any]]) -> str:
    """The cells as text."""
    text = [
        f"{'method':<18}{'cell':<15}{'tokens/s':>9}{'step ms':>9}{'propose':>9}{'GPU ms':>8}{'busy':>6}  same start"
    ]
    first: dict[str, str] = {}
    for line in lines:
        same = first.setdefault(line["cell"], line["output"]) == line["output"]
        numbers = f"{line['tokens/s']:>9.0f}{line['step ms']:>9.2f}{line['propose ms']:>9.2f}"
        numbers += f"{line.get('GPU ms', 0):>8.2f}{line.get('busy', 0):>6.2f}"
        text.append(f"{line['method']:<18}{line['cell']:<15}{numbers}  {'yes' if same else 'NO'}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="workload:rows")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/gpu-serving"), help="the models; made if they are missing"
    )
    parser.add_argument("--size", choices=["large", "256M", "33M"], default="large")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--memory", default="60GiB")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs, or on a CPU processes")
    parser.add_argument("--tokens", type=int, default=128, help="of every output")
    parser.add_argument("--requests", type=int, default=2, help="per row; with one row at least 6")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args, args.one)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --device cpu --size 33M rehearses it")
    make_models(args.folder, args.size, args.device)
    lines: list[dict[str, Any]] = []
    for method in args.methods:
        command = [sys.executable, *sys.argv, "--one", method]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(process.stdout, end="", flush=True)
        if process.returncode:
            sys.exit(f"{method} failed with exit status {process.returncode}")
        found = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        lines += [line for line in found if "cell" in line]
        if args.json:
            args.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
