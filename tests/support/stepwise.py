"""Sampling parameters by Transformers alone: one token at a time, no cache, its own logits processors where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specplug import SamplingParams
from specplug.testing.models import word
from support.reference import load_reference


def ruled_scores(
    scores: torch.Tensor, ids: torch.Tensor, num_prompt: int, params: SamplingParams, stop_ids: set[int]
) -> torch.Tensor:
    """What the parameters before temperature make of the logits [N, V] after [N, L] sequences, in the documented order."""
    if params.allowed_token_ids:
        forbidden = torch.ones(scores.shape[-1], dtype=torch.bool)
        forbidden[list(params.allowed_token_ids)] = False
        scores = scores.masked_fill(forbidden, float("-inf"))
    allowed = scores
    if params.bad_words or params.bad_words_ids:
        words = [[int(part[1:-1]) for part in each.split()] for each in params.bad_words]
        words += [list(each) for each in params.bad_words_ids]
        banned = [each for each in words if max(each) < scores.shape[-1]]
        scores = NoBadWordsLogitsProcessor(banned)(ids, scores)
    if params.min_tokens and stop_ids:
        scores = MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, sorted(stop_ids))(ids, scores)
    if params.logit_bias:
        scores = SequenceBiasLogitsProcessor({(k,): float(v) for k, v in params.logit_bias.items()})(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(ids, scores)
    scores = scores.clone()
    for row, output in enumerate(ids[:, num_prompt:].tolist()):
        for token in set(output):
            scores[row, token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return torch.where(scores.isneginf().all(dim=-1, keepdim=True), allowed, scores)


def distributions(scores: torch.Tensor, ids: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What must be sampled from, given `ruled_scores`."""
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores.double().softmax(dim=-1)


@attrs.frozen
class Expected:
    """What the reference gives, and the smallest gap between its two best scores on the way."""

    tokens: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None
    margin: float


@attrs.frozen
class Stepwise:
    """The slow reference of one model.

    Attributes:
        folder: the model's.
        eos: the ids that end a sequence.
    """

    folder: Path
    eos: frozenset[int] = frozenset()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own logits after each of [N, L] sequences."""
        with torch.no_grad():
            return load_reference(self.folder)(ids, use_cache=False).logits[:, -1].float()

    def _stop_ids(self, params: SamplingParams) -> set[int]:
        return set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos)

    def scores(self, ids: torch.Tensor, num_prompt: int, params: SamplingParams) -> torch.Tensor:
        """`ruled_scores` of the model's logits."""
        return ruled_scores(self.logits(ids), ids, num_prompt, params, self._stop_ids(params))

    def generate(self, prompt: Sequence[int], params: SamplingParams, *, max_model_len: int = 160) -> Expected:
        """The output of parameters that leave no choice (greedy, `top_k=1`, …) on `save_words` text."""
        limit = min(params.max_tokens or max_model_len, max_model_len - len(prompt))
        output: list[int] = []
        text, margin = "", float("inf")
        while True:
            scores = self.scores(torch.tensor([[*prompt, *output]]), len(prompt), params)
            best = scores[0].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            token = int(best.indices[0])
            output.append(token)
            enough = len(output) >= params.min_tokens
            if enough and token in self._stop_ids(params):
                if params.include_stop_str_in_output:
                    text = "".join(f" {word(each)}" for each in output)
                return Expected(output, text, "stop", token if token in params.stop_token_ids else None, margin)
            before, text = len(text), "".join(f" {word(each)}" for each in output)
            ends = [(text.find(s, max(0, before - len(s) + 1)), -len(s), s) for s in params.stop]
            if enough and (hits := sorted(hit for hit in ends if hit[0] >= 0)):
                place, _, stop = hits[0]
                return Expected(
                    output, text[: place + len(stop) * params.include_stop_str_in_output], "stop", stop, margin
                )
            if len(output) >= limit:
                return Expected(output, text, "length", None, margin)

    def joint_of_three(self, prompt: Sequence[int], params: SamplingParams) -> np.ndarray:
        """Exact [V, V, V] probabilities of the first three tokens; a sequence that ended goes on with its last token."""
        vocabulary = self.logits(torch.tensor([list(prompt)])).shape[-1]
        stops = torch.zeros(vocabulary, dtype=torch.bool)
        stops[sorted(self._stop_ids(params))] = True
        prefixes = torch.tensor([list(prompt)])
        joint = torch.ones(1, dtype=torch.float64)
        ended = torch.zeros(1, dtype=torch.bool)
        for length in range(3):
            probs = distributions(self.scores(prefixes, len(prompt), params), prefixes, params)
            stay = torch.nn.functional.one_hot(prefixes[:, -1], vocabulary).double()
            probs = torch.where(ended[:, None], stay, probs)
            joint = (joint[:, None] * probs).flatten()
            tokens = torch.arange(vocabulary).repeat(len(prefixes))
            enough = length + 1 >= params.min_tokens
            ended = ended.repeat_interleave(vocabulary) | (stops[tokens] & enough)
            prefixes = torch.cat([prefixes.repeat_interleave(vocabulary, dim=0), tokens[:, None]], dim=1)
        return joint.view(vocabulary, vocabulary, vocabulary).numpy()
