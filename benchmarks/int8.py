"""`quantization="int8"` versus bfloat16: perplexity and tokens per second of plain decoding, in interleaved rounds.

    python benchmarks/int8.py                                  # tiny, and a random model of 102M parameters
    python benchmarks/int8.py --target FOLDER --text FILE

Perplexity is that of a text by prompt log probabilities, float32 versus int8 in float32 and bfloat16 likewise. Both engines are
started once, without compiling, and take turns; a round is one request of `--tokens` tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from specplug import LLM, SamplingParams
from specplug.bench.report import describe_machine


def perplexity(target: str, text: str, **options: object) -> float:
    """Of the text under the target; the first token has no probability."""
    with LLM(target, device="cpu", max_num_seqs=1, max_num_batched_tokens=64, compile=False, **options) as llm:
        limit = llm.engine.plan.max_model_len - 1
        ids = llm.get_tokenizer()(text)["input_ids"]
        total = count = 0.0
        for begin in range(0, len(ids), limit):
            piece = ids[begin : begin + limit]
            if len(piece) < 2:
                continue
            output = llm.generate([piece], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
            for token, entry in zip(piece[1:], output.prompt_logprobs[1:], strict=True):
                total += entry[token].logprob
                count += 1
    return math.exp(-total / count)


def speeds(target: str, rounds: int, tokens: int, num_seqs: int) -> dict[str, list[float]]:
    """Tokens per second by precision, round for round."""
    options = {"device": "cpu", "dtype": "bfloat16", "skip_tokenizer_init": True, "max_num_seqs": num_seqs}
    options |= {"compile": False, "check_parity": False, "memory": "1GiB"}
    engines = {
        "bfloat16": LLM(target, max_model_len=512, **options),
        "int8": LLM(target, max_model_len=512, quantization="int8", **options),
    }
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    found: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, llm in engines.items():
            started = time.perf_counter()
            llm.generate([[7 + row, 8, 9, 10] for row in range(num_seqs)], sampling)
            if number:  # the first round warms up
                found[name].append(num_seqs * tokens / (time.perf_counter() - started))
    for llm in engines.values():
        llm.close()
    return found


def random_model(folder: Path) -> str:
    """A Llama of SmolLM2-360M's width, with eight layers and random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=8,
        num_attention_heads=15,
        num_key_value_heads=5,
        vocab_size=32000,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Prints perplexities and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="a file; Python code by default")
    parser.add_argument("--characters", type=int, default=20000)
    parser.add_argument("--no-perplexity", action="store_true", help="speeds alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    print(describe_machine(torch.device("cpu")))
    text = given.text.read_text(encoding="utf-8")[: given.characters]
    for dtype in () if given.no_perplexity else ("float32", "bfloat16"):
        pair = [perplexity(given.target or "tiny", text, dtype=dtype, quantization=q) for q in (None, "int8")]
        print(f"perplexity, {dtype}: {pair[0]:.4f}; int8: {pair[1]:.4f} ({100 * (pair[1] / pair[0] - 1):+.2f} %)")
    with tempfile.TemporaryDirectory() as folder:
        target = given.target or random_model(Path(folder))
        for num_seqs in (1, 6):
            found = speeds(target, given.rounds, given.tokens, num_seqs)
            ratios = [a / b for a, b in zip(found["int8"], found["bfloat16"], strict=True)]
            means = ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in found.items())
            print(
                f"{num_seqs} sequences, tokens/s: {means}; int8 / bfloat16 {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
