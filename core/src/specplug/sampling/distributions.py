"""The target's distributions after a request's sampling parameters, at the root and after every draft node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import attrs
import torch

from specplug.errors import ModelOutputError
from specplug.model.device import to_device
from specplug.native.gpu import cuda
from specplug.sampling.argmax import argmax_with_prob, is_fast
from specplug.sampling.params import LOWEST_DIVISOR, SamplingParams
from specplug.sampling.rules import LogitsRules
from specplug.sampling.workspace import Workspace

MOST_AT_ONCE = 1 << 22  # the most logits that are processed together


def truncate(
    logits: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float] | None = None
) -> torch.Tensor:
    """Sets logits outside min-p, then the top k, then the top-p nucleus, to -inf.

    Args:
        logits: float32 [N, V], already divided by the temperature.
        top_k: N limits; 0 or less keeps all.
        top_p: N limits; 1 keeps all.
        min_p: N limits relative to the most likely token; 0 keeps all.

    Returns:
        float32 [N, V]. At least the most likely token of every row stays.
    """
    vocabulary, device = logits.shape[-1], logits.device
    if min_p is not None and any(p > 0 for p in min_p):
        margin = to_device([math.log(max(p, 1e-300)) for p in min_p], device, torch.float32)
        least = logits.amax(dim=-1, keepdim=True) + margin[:, None]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if all(k <= 0 for k in top_k) and all(p >= 1 for p in top_p):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    if any(0 < k < vocabulary for k in top_k):
        last = [min(k, vocabulary) - 1 if k > 0 else vocabulary - 1 for k in top_k]
        threshold = ordered.gather(-1, to_device(last, device)[:, None])
        ordered.masked_fill_(ordered < threshold, float("-inf"))
    if any(p < 1 for p in top_p):
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1).sub_(probs)
        outside = before >= to_device([p if p < 1 else 2.0 for p in top_p], device, torch.float32)[:, None]
        outside[:, 0] = False
        ordered.masked_fill_(outside, float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, ordered)


def process(logits: torch.Tensor, params: Sequence[SamplingParams], out: torch.Tensor | None = None) -> torch.Tensor:
    """Applies temperature and truncation, and returns the distributions.

    Args:
        logits: [N, V], any floating dtype.
        params: the sampling parameters of each entry; none greedy.
        out: where to write, float32 [N, V].

    Returns:
        float32 [N, V], rows sum to one.
    """
    step = rows_at_once(logits.shape[-1])
    if len(logits) <= step:
        return torch.softmax(_scaled(logits, params), dim=-1, out=out)
    if out is None:
        out = torch.empty(logits.shape, device=logits.device, dtype=torch.float32)
    for begin in range(0, len(logits), step):
        part = slice(begin, begin + step)
        torch.softmax(_scaled(logits[part], params[part]), dim=-1, out=out[part])
    return out


def _scaled(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    scaled = logits.float()
    if any(param.temperature != 1 for param in params):
        divisors = [max(float(param.temperature), LOWEST_DIVISOR) for param in params]
        scaled = scaled / to_device(divisors, logits.device, torch.float32)[:, None]
    if any(param.truncates for param in params):
        scaled = truncate(
            scaled,
            [param.top_k for param in params],
            [param.top_p for param in params],
            [param.min_p for param in params],
        )
    return scaled


def rows_at_once(vocabulary: int) -> int:
    """The number of rows of logits that are processed together. It bounds the temporary memory of a step."""
    return max(1, MOST_AT_ONCE // vocabulary)


def top_probs(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens of each row of [N, V]: ids int64 and probabilities float32, both [N, count]."""
    pieces = [part.float().softmax(dim=-1).topk(count, dim=-1) for part in logits.split(rows_at_once(logits.shape[-1]))]
    return torch.cat([piece.indices for piece in pieces]), torch.cat([piece.values for piece in pieces])


def argmax(logits: torch.Tensor) -> tuple[list[int], int | None]:
    """The most likely token of each row of [N, V] (the first of equals), and the first row with NaN, if there is one."""
    if logits.is_cuda and cuda.works_on(logits.device):
        from specplug.native.gpu.argmax import argmax as gpu_argmax

        tokens, broken = gpu_argmax(logits)
        return tokens, next((row for row, is_broken in enumerate(broken) if is_broken), None)
    if is_fast(logits):
        ids, probs = argmax_with_prob(logits)
        if not bool(probs.isnan().any()):  # else NaN or infinity, told apart below
            return ids.tolist(), None
    values, indices = logits.max(dim=-1)
    if logits.device.type == "cpu":
        highest, tokens = values.tolist(), indices.tolist()
    else:  # one copy from the device; float64 holds every index
        highest, tokens = torch.stack([values.double(), indices.double()]).tolist()
        tokens = [int(token) for token in tokens]
    return tokens, next((row for row, value in enumerate(highest) if value != value), None)


def argmax_there(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row of [N, V] as int64 [N] on the device, -1 for a row with NaN; nobody waits for it."""
    if logits.is_cuda and cuda.works_on(logits.device):
        from specplug.native.gpu.argmax import argmax_there as gpu_argmax_there

        return gpu_argmax_there(logits)
    values, indices = logits.max(dim=-1)
    return torch.where(values.isnan(), -1, indices)


def nan_message(request: str, num_tokens: int) -> str:
    """The error message for NaN logits."""
    return (
        f"the model returned NaN logits for request '{request}' after {num_tokens} tokens; its weights are damaged, "
        "or its dtype overflows (try dtype float32 or bfloat16)"
    )


@attrs.frozen(eq=False)
class DistributionRow:
    """The parameters and tokens that determine the distributions of one row.

    Attributes:
        params: its sampling parameters.
        rules: rules that change its logits before temperature; None if there are none.
        tokens: its committed ids.
        num_prompt_tokens: how many of them are the prompt.
        draft_tokens: the ids of its draft's nodes.
        parents: each node's parent, -1 for the root; None for a chain.
        name: the request's, for messages.
    """

    params: SamplingParams
    rules: LogitsRules | None = None
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    draft_tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    name: str = "?"

    def paths(self) -> list[list[int]]:
        """For the root and each node, the draft tokens on the path to it, its own included."""
        paths: list[list[int]] = [[]]
        for node, token in enumerate(self.draft_tokens):
            parent = node - 1 if self.parents is None else self.parents[node]
            paths.append([*paths[parent + 1], token])
        return paths


class StepDistributions:
    """The `TargetDistributions` of one step: computed on demand, so that greedy rows need no softmax.

    Raises:
        ModelOutputError: from `argmax` and `probs`, if the model returned NaN.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        offsets: Sequence[int],
        rows: Sequence[DistributionRow],
        workspace: Workspace | None = None,
    ) -> None:
        self.offsets = offsets
        self.logits = logits
        self._rows = rows
        self._workspace = workspace
        self._row_of_entry = [row for row in range(len(rows)) for _ in range(offsets[row + 1] - offsets[row])]
        self._ruled = self._apply_rules()

    def _apply_rules(self) -> torch.Tensor:
        if all(row.rules is None for row in self._rows):
            return self.logits
        ruled = self.logits.to(torch.float32, copy=True)
        for index, row in enumerate(self._rows):
            if row.rules is not None:
                span = slice(self.offsets[index], self.offsets[index + 1])
                ruled[span] = row.rules.apply(ruled[span], row.tokens, row.num_prompt_tokens, row.paths())
        return ruled

    def _select(self, entries: Sequence[int]) -> torch.Tensor:
        if len(entries) == len(self._ruled) and list(entries) == list(range(len(entries))):
            return self._ruled
        return self._ruled[to_device(list(entries), self._ruled.device)]

    def _refuse(self, entry: int) -> NoReturn:
        row = self._rows[self._row_of_entry[entry]]
        raise ModelOutputError(nan_message(row.name, len(row.tokens)))

    def argmax(self, entries: Sequence[int]) -> list[int]:
        """The most likely token at each entry (the first of equals)."""
        tokens, bad = argmax(self._select(entries))
        if bad is not None:
            self._refuse(entries[bad])
        return tokens

    def probs(self, entries: Sequence[int]) -> torch.Tensor:
        """float32 [len(entries), V]: the distributions after each row's sampling parameters."""
        params = [self._rows[self._row_of_entry[entry]].params for entry in entries]
        out = None if self._workspace is None else self._workspace.probs(len(entries))
        probs = process(self._select(entries), params, out)
        bad = probs[:, 0].isnan()
        if bool(bad.any()):
            self._refuse(entries[int(bad.int().argmax())])
        return probs
