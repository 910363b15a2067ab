"""`specplug.host` with a real model: greedy output is the model's own, and drafts are accepted as in specplug's engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specplug_suffix
from specplug import LLM, SamplingParams, resolve_model
from specplug.host import ArrayTokens, HostLimits, SpeculatorHost, TargetFacade

NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 4}
DRAFT_MODEL = {"method": "draft_model", "model": "tiny", "num_speculative_tokens": 4}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 4}
PROMPTS = ["x = [0, 1, 0, 1, 0, 1,", "class Stack:\n    def __init__(self):\n", "x = [0, 0, 0,"]
PLUGINS = {"suffix": specplug_suffix}
NEW, LENGTH, PLACES = 24, 128, 2


class Engine:
    """Decodes greedily, two rows at a time, in places of one array that are used again."""

    def __init__(self, config: dict[str, Any]) -> None:
        folder = resolve_model("tiny")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        limits = HostLimits(vocab_size=self.model.config.vocab_size, max_model_len=LENGTH, max_num_seqs=PLACES)
        target = TargetFacade.of_limits(
            vocab_size=limits.vocab_size,
            max_model_len=LENGTH,
            max_num_seqs=PLACES,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            tokenizer=lambda: self.tokenizer,
        )
        self.host = SpeculatorHost(config, limits, target=target, plugins=PLUGINS, strict=True)
        self.array = np.zeros((PLACES, LENGTH), dtype=np.int32)

    def generate(self, prompts: list[str]) -> list[list[int]]:
        waiting = list(enumerate(prompts))
        outputs: list[list[int]] = [[] for _ in prompts]
        running: dict[int, tuple[int, Any]] = {}
        while waiting or running:
            for place in range(PLACES):
                if place not in running and waiting:
                    number, prompt = waiting.pop(0)
                    running[place] = (number, self.begin(place, self.tokenizer(prompt)["input_ids"]))
            self.host.propose([row for _, row in running.values()])
            for place, (number, row) in list(running.items()):
                begin = len(row.tokens)
                new = self.step(row)[: NEW - row.num_output_tokens]
                self.array[place, begin : begin + len(new)] = new
                row.advance(begin + len(new), accepted=min(len(new), self.accepted))
                if row.num_output_tokens == NEW:
                    outputs[number] = row.tokens[row.num_prompt_tokens :]
                    self.host.end(row)
                    del running[place]
            if len(running) < PLACES:
                self.host.propose([])  # before the place is used again
        return outputs

    def begin(self, place: int, prompt: list[int]) -> Any:
        """Computes the prompt, as specplug does before it asks for the first draft."""
        ids = [*prompt, *self.best(prompt, [])]
        self.array[place, : len(ids)] = ids
        params = SamplingParams(temperature=0, max_tokens=NEW)
        return self.host.add(ArrayTokens(self.array[place], len(ids)), num_prompt_tokens=len(prompt), sampling=params)

    def best(self, tokens: list[int], draft: list[int]) -> list[int]:
        """The most likely tokens after the last one and after each of the draft."""
        with torch.no_grad():
            logits = self.model(torch.tensor([[*tokens, *draft]])).logits
        found: list[int] = logits[0, len(tokens) - 1 :].argmax(dim=-1).tolist()
        return found

    def step(self, row: Any) -> list[int]:
        draft = [] if row.draft is None else row.draft.tokens
        best = self.best(row.tokens[:], draft)
        self.accepted = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        return [*draft[: self.accepted], best[self.accepted]]


@pytest.mark.parametrize(
    "config",
    [NGRAM, {**SUFFIX, "fallback": NGRAM}, DRAFT_MODEL],
    ids=["ngram", "suffix, then ngram", "a draft model with tables of its own"],
)
def test_output_and_acceptance_are_those_of_specplugs_own_engine(config: dict[str, Any]) -> None:
    engine = Engine(config)
    outputs = engine.generate(PROMPTS)
    stats = engine.host.stats
    engine.host.close()
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": PLACES, "max_model_len": LENGTH, "memory": "128MiB"}
    options |= {"compile": False, "enable_prefix_caching": False, "speculative_config": config, "plugins": PLUGINS}
    with LLM("tiny", **options) as llm:
        assert [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params)] == outputs
        own = llm.engine.stats
    assert stats.num_accepted_draft_tokens > 15
    if "fallback" not in config:  # suffix learns from requests as they end, and the order of ends and calls differs
        assert stats.by_method == own.by_method
    assert stats.mean_acceptance_length == pytest.approx(own.mean_acceptance_length, rel=0.2)
