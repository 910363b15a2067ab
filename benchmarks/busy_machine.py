"""What competing processes and a quota cost: tokens per second of specplug, Transformers and vLLM, batch 1, in one run.

    python benchmarks/busy_machine.py tiny --json build/busy-machine.json
    python benchmarks/busy_machine.py tiny --spins 0 1000 300000        # beside specplug's own: other GOMP_SPINCOUNTs

Everything runs on the same few cores (`--cores`). A competitor is a process with a busy loop. Each contestant is a process of
its own, as a user would start it, and is stopped while another is measured. Every repetition measures all contestants, one
after the other, under every condition, so that what else the machine does meets all alike. The quota is a control group's (1.5
cores); where none can be made, it is n/a. vLLM takes part where its environment is there (benchmarks/peers/setup_vllm.sh).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

PROMPT = [5 + i % 50 for i in range(64)]
QUOTA = 1.5
OWN, PEERS = "specplug", ("transformers", "vllm")
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PERIOD = 100_000


# ---- a contestant's process ------------------------------------------------------------------------------------------


def work(name: str, target: str, dtype: str, tokens: int, group: Path | None) -> None:
    """Generates once for every line of standard input, and answers with the seconds that took."""
    if group is not None:  # before anything looks how many cores there are
        (group / "cgroup.procs").write_text(str(os.getpid()))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate = {"specplug": _specplug, "transformers": _transformers, "vllm": _vllm}[name](target, dtype, tokens)
    generate()
    answers.write("0\n")
    answers.flush()
    for _ in sys.stdin:
        started = time.perf_counter()
        generate()
        answers.write(f"{time.perf_counter() - started}\n")
        answers.flush()


def _specplug(target: str, dtype: str, tokens: int) -> Any:
    from specplug import LLM, SamplingParams

    llm = LLM(target, dtype=dtype, device="cpu", max_num_seqs=1, skip_tokenizer_init=True, memory="3GiB")
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return lambda: llm.generate([PROMPT], params, use_tqdm=False)


def _transformers(target: str, dtype: str, tokens: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from specplug import resolve_model

    model = AutoModelForCausalLM.from_pretrained(resolve_model(target), dtype=getattr(torch, dtype)).eval()
    model.generation_config = type(model.generation_config)(pad_token_id=0, eos_token_id=None)
    ids = torch.tensor([PROMPT])
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)


def _vllm(target: str, dtype: str, tokens: int) -> Any:
    from vllm import LLM, SamplingParams

    llm = LLM(model=target, dtype=dtype, max_num_seqs=1, max_model_len=1024, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return lambda: llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)


# ---- the machine -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many busy loops."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2 if loops else 0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextlib.contextmanager
def control_group(cores: float) -> Iterator[Path | None]:
    """A control group that grants so many cores; None where none can be made. Whoever is in it must end before the block."""
    from specplug.threads import control_groups

    made: Path | None = None
    for parent in control_groups(Path("/proc/self")):
        folder = parent / f"specplug-busy-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / "cpu.cfs_quota_us").exists():
                (folder / "cpu.cfs_period_us").write_text(str(_PERIOD))
                (folder / "cpu.cfs_quota_us").write_text(str(int(cores * _PERIOD)))
            else:
                (folder / "cpu.max").write_text(f"{int(cores * _PERIOD)} {_PERIOD}")
            made = folder
            break
        except OSError:
            folder.rmdir()
    try:
        yield made
    finally:
        if made is not None:
            made.rmdir()


@attrs.define(eq=False)
class Contestant:
    """One process that generates, stopped while it is not asked to.

    Attributes:
        label: its name.
        process: where it runs; None if it did not start.
    """

    label: str
    process: subprocess.Popen[str] | None

    @classmethod
    def start(cls, label: str, python: Path, variables: dict[str, str], args: Any, group: Path | None) -> Contestant:
        """Starts one; `label` begins with who it is."""
        name = label.split()[0]
        kept = {key: value for key, value in os.environ.items() if key not in _SETTINGS}
        options = [name, args.target if name != "vllm" else args.folder, args.dtype, str(args.tokens)]
        process = subprocess.Popen(
            [str(python), __file__, "--work", *options, *(["--group", str(group)] if group is not None else [])],
            env=kept | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        contestant = cls(label, process)
        if contestant.answer() is None:
            contestant.close()
        else:
            contestant.signal(signal.SIGSTOP)
        return contestant

    def run(self) -> float | None:
        """Seconds of one generation; None if it ended."""
        if self.process is None or self.process.stdin is None:
            return None
        self.signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = self.answer()
        self.signal(signal.SIGSTOP)
        return seconds

    def answer(self) -> float | None:
        """What it says next."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return float(line) if line else None

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


# ---- measurement -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Tokens per second: condition → contestant → one number for each repetition."""
    speeds: dict[str, dict[str, list[float]]] = {}
    starts = [(OWN, Path(sys.executable), {})]
    starts += [(f"{OWN} spin {spin}", Path(sys.executable), {"GOMP_SPINCOUNT": str(spin)}) for spin in args.spins]
    if "transformers" in args.peers:
        starts.append(("transformers", Path(sys.executable), {}))
    if "vllm" in args.peers and args.python.is_file():
        sys.path.insert(0, str(Path(__file__).parent))
        from peers.vllm_contestant import environment

        starts.append(("vllm", args.python, environment(args.python, args.cores, "in-process")))
    for quota in (False, True):
        with control_group(QUOTA) if quota else contextlib.nullcontext(None) as group:
            if quota and group is None:
                print("a control group cannot be made here: the quota is n/a", file=sys.stderr)
                continue
            contestants = [Contestant.start(*start, args, group) for start in starts]
            loads = [(f"quota of {QUOTA} cores", 0)] if quota else [(f"{n} busy", n) for n in args.competitors]
            try:
                for _ in range(args.repetitions):
                    for condition, count in loads:
                        for contestant in contestants:
                            with competitors(count):
                                seconds = contestant.run()
                            if seconds is not None:
                                found = speeds.setdefault(condition, {}).setdefault(contestant.label, [])
                                found.append(args.tokens / seconds)
                                print(f"{condition:<20} {contestant.label:<24} {found[-1]:8.1f}", file=sys.stderr)
            finally:
                for contestant in contestants:
                    contestant.close()
    return speeds


def show(speeds: dict[str, dict[str, list[float]]]) -> None:
    """A line for each condition and contestant: its speed, its share of its own without load, and specplug's lead."""
    quiet = {label: statistics.median(found) for label, found in speeds.get("0 busy", {}).items()}
    for condition, by_label in speeds.items():
        print(f"\n{condition}")
        for label, found in by_label.items():
            speed = statistics.median(found)
            share = f"{speed / quiet[label]:6.0%} of quiet" if label in quiet else ""
            ratio = statistics.median(own / other for own, other in zip(by_label[OWN], found, strict=False))
            lead = "" if label == OWN else f"   {OWN} / it: {ratio:.2f}"
            print(f"  {label:<24} {speed:8.1f} tokens/s  {min(found):.1f} to {max(found):.1f}  {share}{lead}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="tiny", help="a checkpoint's folder, or tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64, help="of one generation")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--competitors", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, default=2, help="for everything together")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="specplug also with these GOMP_SPINCOUNTs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--python", type=Path, default=Path("build/vllm-env/bin/python"), help="vLLM's interpreter")
    parser.add_argument("--verbose", action="store_true", help="show what the contestants write")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        name, target, dtype, tokens = args.work
        work(name, target, dtype, int(tokens), args.group)
        return
    from specplug import resolve_model

    args.folder = resolve_model(args.target)
    args.python = args.python.absolute()
    before = os.sched_getaffinity(0)
    cores = sorted(before)[: args.cores]
    os.sched_setaffinity(0, cores)
    try:
        speeds = measure(args)
    finally:
        os.sched_setaffinity(0, before)
    show(speeds)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"cores": len(cores), "tokens": args.tokens, "speeds": speeds}, indent=2))


if __name__ == "__main__":
    main()
