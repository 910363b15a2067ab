"""What a step of a hybrid target costs on this machine, against reading its weights and states, and against Transformers.

    python benchmarks/hybrids.py
    python benchmarks/hybrids.py --kinds granite4 --dtypes bfloat16 --profile

Random models of about 256M parameters: LFM2 (short convolutions), Qwen3.5 (gated delta nets) and Granite 4 hybrid (Mamba 2).
Per model: one token of one row, six tokens of which three are accepted, a prompt's chunk of 512, and the bandwidth of reading
memory, measured in turns. With one thread it is processor time, since other processes would count otherwise. Then
plain decoding of one row against Transformers' `generate`, also in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_costs import Machine, Steps, median_seconds

from specplug import LLM, SamplingParams
from specplug.bench.report import describe_machine
from specplug.model.rows import ForwardRow

_CONTEXT = 128
_ACCEPTED = 3
_ATTENTION_EACH = 4
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "lfm2",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 16,
            "intermediate_size": 3840,
            "block_auto_adjust_ff_dim": False,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "layer_types": ["conv", "conv", "full_attention", "conv"] * 4,
        },
    ),
    "qwen3.5": (
        "qwen3_5_text",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 12,
            "intermediate_size": 3584,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
    "granite4": (
        "granitemoehybrid",
        {
            "hidden_size": 768,
            "num_hidden_layers": 28,
            "intermediate_size": 2048,
            "shared_intermediate_size": 2048,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": (["linear_attention"] * 6 + ["full_attention"]) * 4,
            "mamba_n_heads": 48,
            "mamba_d_head": 32,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
        },
    ),
}


def save(folder: Path, kind: str) -> Path:
    """A random model, its end of sequence out of reach."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    name, sizes = KINDS[kind]
    common = {"vocab_size": 8192, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    config = CONFIG_MAPPING[name](**common, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


class HybridSteps(Steps):
    """Steps of one row whose states go on from step to step."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm, 1024)
        states = self.runner.states
        self.state_bytes = 0 if states is None else sum(memory.tensors[0][0].nbytes for memory in states.memories)
        self._start = 0

    def begin(self) -> None:
        self.runner.forward([ForwardRow(self._ids[:_CONTEXT], 0, self.tables[0], slot=0, held=1)], [_CONTEXT - 1])
        self._start = _CONTEXT

    def verify(self, tokens: int, accepted: int) -> None:
        """So many tokens, of which the first ones are accepted."""
        row = ForwardRow(self._ids[:tokens], self._start, self.tables[0], slot=0, held=tokens)
        self.runner.forward([row])
        self.runner.keep(0, range(accepted - 1))
        self._start += accepted

    def prompt(self, tokens: int) -> None:
        row = ForwardRow(self._ids[:tokens], 0, self.tables[1], slot=1, held=1)
        self.runner.forward([row], [tokens - 1])


def start(folder: Path, dtype: str, memory: str, *, compile_forward: bool) -> LLM:
    options: dict[str, Any] = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5}}
    return LLM(
        folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        memory=memory,
        max_num_seqs=2,
        max_model_len=2048,
        max_num_batched_tokens=512,
        check_parity=False,
        compile=compile_forward,
        **options,
    )


def _clock() -> Callable[[], float]:
    """Time that one thread computes, or with several the time that passes."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def measure_steps(llm: LLM, machine: Machine, repeats: int) -> str:
    """Milliseconds of one token, six and a chunk; ratios to reading and to one token."""
    steps = HybridSteps(llm)
    measure = partial(median_seconds, clock=_clock())
    one, six, chunk, reading, share = [], [], [], [], []
    with torch.inference_mode():
        for _ in range(repeats):
            steps.begin()
            one.append(measure(lambda: steps.verify(1, 1), 7))
            six.append(measure(lambda: steps.verify(6, _ACCEPTED), 7))
            chunk.append(measure(lambda: steps.prompt(512), 1))
            reading.append(machine.read_bandwidth(measure))
            read = steps.weight_bytes + steps.state_bytes + _CONTEXT * steps.kv_bytes
            share.append(one[-1] * reading[-1] / read)
    ratios = [each / first for each, first in zip(six, one, strict=True)]
    return (
        f"{steps.weight_bytes / 1e6:.0f} MB of weights, {steps.state_bytes / 1e6:.1f} MB of states, "
        f"{statistics.median(reading) / 1e9:.1f} GB/s; 1 token {_ms(one)} ms, {_ratio(share)} times reading; "
        f"6 tokens {_ms(six)} ms, {_ratio(ratios)} of one; chunk of 512 {_ms(chunk)} ms"
    )


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f}"


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def profile(llm: LLM, tokens: int, *, many: bool = False) -> str:
    """Where the time goes, by PyTorch's operators."""
    steps = HybridSteps(llm)
    run: Callable[[], None] = (
        (lambda: steps.prompt(tokens)) if many else (lambda: steps.verify(tokens, min(tokens, _ACCEPTED)))
    )
    with torch.inference_mode():
        steps.begin()
        for _ in range(3):
            run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            for _ in range(5):
                run()
    return profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)


def against_transformers(folder: Path, llm: LLM, dtype: str, rounds: int, tokens: int) -> str:
    """Plain decoding of one row in turns, prompt of 64 tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    prompt = [7 + 13 * place % 8000 for place in range(64)]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    clock = _clock()
    ours, theirs = [], []
    for number in range(rounds + 1):
        started = clock()
        llm.generate([prompt], sampling)
        middle = clock()
        model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        if number:  # the first round warms up
            ours.append(tokens / (middle - started))
            theirs.append(tokens / (clock() - middle))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return (
        f"{statistics.median(ours):.1f} tokens/s, Transformers {statistics.median(theirs):.1f}; ratio {_ratio(ratios)}"
    )


def main() -> None:
    """Prints a line per model and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--models", type=Path, help="where the models are kept; by default a temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of the comparison with Transformers; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="3GiB", help="of the engine")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print PyTorch's operators and their times instead")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(describe_machine(torch.device("cpu")), f"{given.threads} threads")
    machine = Machine(1 << 29)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in given.kinds:
            folder = (given.models or Path(temporary)) / kind
            if not (folder / "config.json").exists():
                save(folder, kind)
            for dtype in given.dtypes:
                llm = start(folder, dtype, given.memory, compile_forward=not given.no_compile)
                if given.profile:
                    for tokens, many in ((1, False), (6, False), (512, True)):
                        print(f"{kind} {dtype}: {tokens} tokens\n{profile(llm, tokens, many=many)}")
                else:
                    print(f"{kind} {dtype}: {measure_steps(llm, machine, given.repeats)}", flush=True)
                    if given.tokens:
                        rates = against_transformers(folder, llm, dtype, given.repeats, given.tokens)
                        print(f"{kind} {dtype}: {rates}", flush=True)
                llm.close()


if __name__ == "__main__":
    main()
