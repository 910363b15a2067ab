"""What Transformers itself generates: the reference for exactness."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

MARGIN = 2e-4


@functools.cache
def load_reference(folder: Path) -> torch.nn.Module:
    """The model by Transformers alone, float32."""
    is_known = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    kind = AutoModelForCausalLM if is_known else AutoModelForMultimodalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def generate(folder: Path, prompt: list[int], max_new_tokens: int) -> tuple[list[int], float]:
    """Greedy output of `generate`, and the smallest gap between the two best logits on the way."""
    model = load_reference(folder)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    margin = min((top[0] - top[1]).item() for top in (step[0].topk(2).values for step in out.logits))
    return out.sequences[0, len(prompt) :].tolist(), margin


def decisive_prompts(
    folder: Path, count: int, max_new_tokens: int, vocabulary: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) pairs of ragged lengths on which the reference is never nearly undecided.

    Rounding differs between batch shapes; where the two best logits are closer than that, two correct programs may differ.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[list[int], list[int]]] = []
    for attempt in range(20 * count):
        length = 3 + 7 * (attempt % 5) + attempt % 3
        prompt = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        output, margin = generate(folder, prompt, max_new_tokens)
        if margin > MARGIN:
            found.append((prompt, output))
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} of {count} decisive prompts for {folder}")
