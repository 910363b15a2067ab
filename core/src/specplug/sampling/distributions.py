"""The target's distributions after a request's sampling parameters, at the root and after every draft node."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplug.sampling.params import SamplingParams


def truncate(logits: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> torch.Tensor:
    """Sets logits outside the top k, then outside the top-p nucleus, to -inf.

    Args:
        logits: float32 [N, V], already divided by the temperature.
        top_k: N limits; 0 or less keeps all.
        top_p: N limits; 1 keeps all.

    Returns:
        float32 [N, V]. At least the most likely token of every row stays.
    """
    vocabulary = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True)
    if any(0 < k < vocabulary for k in top_k):
        last = [min(k, vocabulary) - 1 if k > 0 else vocabulary - 1 for k in top_k]
        threshold = ordered.gather(-1, torch.tensor(last, device=logits.device)[:, None])
        ordered = ordered.masked_fill(ordered < threshold, float("-inf"))
    if any(p < 1 for p in top_p):
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        limit = torch.tensor([p if p < 1 else 2.0 for p in top_p], device=logits.device)[:, None]
        outside = before >= limit
        outside[:, 0] = False
        ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, ordered)


def process(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Turns logits into the distributions that are sampled from.

    Args:
        logits: [N, V], any floating dtype.
        params: the sampling parameters of each entry; none greedy.

    Returns:
        float32 [N, V], rows sum to one.
    """
    temperatures = [param.temperature for param in params]
    scaled = logits.float()
    if any(temperature != 1.0 for temperature in temperatures):
        scaled = scaled / torch.tensor(temperatures, device=logits.device)[:, None]
    if any(param.truncates for param in params):
        scaled = truncate(scaled, [param.top_k for param in params], [param.top_p for param in params])
    return scaled.softmax(dim=-1)


class StepDistributions:
    """The `TargetDistributions` of one step: processed on demand, so that a greedy row never pays for a softmax."""

    def __init__(self, logits: torch.Tensor, offsets: Sequence[int], params: Sequence[SamplingParams]) -> None:
        self.logits = logits
        self.offsets = offsets
        self._params = params
        self._row_of_entry = [row for row in range(len(params)) for _ in range(offsets[row + 1] - offsets[row])]

    def _select(self, entries: Sequence[int]) -> torch.Tensor:
        if len(entries) == len(self.logits):
            return self.logits
        return self.logits[torch.tensor(list(entries), device=self.logits.device)]

    def argmax(self, entries: Sequence[int]) -> list[int]:
        """The most likely token at each entry (the first of equals)."""
        return self._select(entries).argmax(dim=-1).tolist()

    def probs(self, entries: Sequence[int]) -> torch.Tensor:
        """float32 [len(entries), V]: the distributions after each row's sampling parameters."""
        return process(self._select(entries), [self._params[self._row_of_entry[entry]] for entry in entries])
