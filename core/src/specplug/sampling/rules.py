"""Bans, biases and penalties: all rules that change logits before temperature and truncation.

The rules of a row use its committed tokens. For a draft node, the draft's tokens on the path to it count as committed. So the
rules hold at every draft position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.model.device import to_device
from specplug.sampling.params import SamplingParams


class LogitsRules:
    """The rules of one request.

    Args:
        params: the request's sampling parameters.
        vocab_size: the width of the logits.
        stop_ids: the ids that end the output, banned before `min_tokens`.
        bad_word_ids: the token sequences that must not be completed.
        device: of the logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        stop_ids: frozenset[int],
        bad_word_ids: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._device = device
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        # A tokenizer may have more ids than the model.
        self._bad_words = [list(word) for word in bad_word_ids if max(word) < vocab_size]
        self._longest_word = max((len(word) for word in self._bad_words), default=0)
        self._forbidden: torch.Tensor | None = None
        if params.allowed_token_ids:
            self._forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self._forbidden[torch.tensor(params.allowed_token_ids, device=device, dtype=torch.long)] = False
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
        self._bias = torch.tensor([float(b) for b in params.logit_bias.values()], device=device, dtype=torch.float32)
        self._num_counted = 0
        self._in_prompt: torch.Tensor | None = None
        self._output_counts: torch.Tensor | None = None

    def apply(
        self, logits: torch.Tensor, tokens: Sequence[int], num_prompt_tokens: int, paths: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Returns the logits after all rules.

        Args:
            logits: float32 [N, V], this row's entries.
            tokens: the row's committed ids.
            num_prompt_tokens: how many of them are the prompt.
            paths: for each entry the draft tokens between the last committed one and it.
        """
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, float("-inf"))
        ruled = logits.clone()
        num_output = len(tokens) - num_prompt_tokens
        for entry, path in enumerate(paths):
            if num_output + len(path) < self._params.min_tokens:
                ruled[entry, self._stop_ids] = float("-inf")
            if banned := self._completing(tokens, path):
                ruled[entry, to_device(banned, self._device)] = float("-inf")
        if len(self._bias_ids):
            ruled[:, self._bias_ids] += self._bias
        if self._params.penalizes:
            ruled = self._penalize(ruled, tokens, num_prompt_tokens, paths)
        empty = (ruled == float("-inf")).all(dim=-1, keepdim=True)
        return torch.where(empty, logits, ruled)

    def _completing(self, tokens: Sequence[int], path: Sequence[int]) -> list[int]:
        """The tokens that would complete a bad word."""
        if not self._bad_words:
            return []
        context = [*tokens[max(0, len(tokens) - self._longest_word) :], *path]
        return [word[-1] for word in self._bad_words if len(word) == 1 or context[-len(word) + 1 :] == word[:-1]]

    def _penalize(
        self, logits: torch.Tensor, tokens: Sequence[int], num_prompt_tokens: int, paths: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        base = self._count(tokens, num_prompt_tokens)
        counts = base.expand(len(paths), -1).clone()
        for entry, path in enumerate(paths):
            for token in path:
                counts[entry, token] += 1
        generated = counts > 0
        params = self._params
        if params.repetition_penalty != 1:
            assert self._in_prompt is not None
            factor = params.repetition_penalty
            repeated = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(generated | self._in_prompt, repeated, logits)
        return logits - params.frequency_penalty * counts - params.presence_penalty * generated

    def _count(self, tokens: Sequence[int], num_prompt_tokens: int) -> torch.Tensor:
        """float32 [V]: the number of occurrences of each token in the output, updated with the new tokens."""
        if self._in_prompt is None or self._output_counts is None:
            self._in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            self._in_prompt[to_device(list(tokens[:num_prompt_tokens]), self._device)] = True
            self._output_counts = torch.zeros(self._vocab_size, device=self._device, dtype=torch.float32)
            self._num_counted = num_prompt_tokens
        new = list(tokens[self._num_counted :])
        if new:
            index = to_device(new, self._device)
            self._output_counts.index_add_(0, index, torch.ones(len(new), device=self._device, dtype=torch.float32))
            self._num_counted = len(tokens)
        return self._output_counts
