"""An engine of its own, in 40 lines, that runs specplug's speculators: python examples/toy_host.py

It decodes greedily, all rows in turn, and recomputes the whole context in every step: only the number of steps is of interest.
"""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specplug import resolve_model
from specplug.host import ArrayTokens, HostLimits, SpeculatorHost

LENGTH, NEW = 256, 64
folder = resolve_model("tiny")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
prompts = ["x = [0, 1, 0, 1, 0, 1,", "class Stack:\n    def __init__(self):\n"]
limits = HostLimits(vocab_size=model.config.vocab_size, max_model_len=LENGTH, max_num_seqs=len(prompts))
host = SpeculatorHost({"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}, limits, timeout=5.0)


def step(array, row):
    """One forward of a row with its draft; returns the tokens that are committed, draft tokens that are right first."""
    draft = [] if row.draft is None else row.draft.tokens
    ids = torch.tensor([[*array[: len(row.tokens)].tolist(), *draft]], dtype=torch.int64, device="cpu")
    with torch.no_grad():
        best = model(ids).logits[0, len(row.tokens) - 1 :].argmax(dim=-1).tolist()  # after the last token and each node
    accepted = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
    return [*draft[:accepted], best[accepted]]


arrays, rows = np.zeros((len(prompts), LENGTH), dtype=np.int32), []
for array, prompt in zip(arrays, prompts, strict=True):
    ids = tokenizer(prompt)["input_ids"]
    array[: len(ids)] = ids
    rows.append(host.add(ArrayTokens(array, len(ids))))  # a view: the array is not copied, now or later
running = dict(zip(rows, arrays, strict=True))
while running:
    host.propose(running)
    for row, array in list(running.items()):
        new, begin = step(array, row), len(row.tokens)
        array[begin : begin + len(new)] = new
        row.advance(begin + len(new), accepted=len(new) - 1)
        if row.num_output_tokens >= NEW:
            host.end(row)  # speculators are told at the next call
            del running[row]
for row in rows:
    print(f"{row.num_output_tokens} tokens in {row.stats.num_steps} steps: {tokenizer.decode(list(row.tokens))!r}")
host.close()
