"""A step as CUDA graphs, one per number of tokens: one launch instead of hundreds.

A graph replays what was captured, over the memory it was captured with. Inputs therefore are in one buffer at a fixed address,
and the copy that fills it is the graph's first part. The batch is padded to the next captured number of tokens, and the
attention plan says how many are real: nothing attends to padding, and its KV is not stored. All graphs end with a copy to the
same outputs, so that what they compute with is one piece of memory. The next replay overwrites the outputs: copies are made for
callers that keep them longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from specplug.model.batch import ForwardBatch
from specplug.model.pending import PendingTokens
from specplug.model.staging import StagedInputs, staged_length

MOST_TOKENS = 1024
"""Tokens of the largest captured forward. H200, 6.9B: one of 316 tokens takes 32 ms if Python launches it, 19 as a graph."""
LONGEST_PLAN = 1 << 17
_LEAST_LOGITS = 8  # the comparison after the capture wants those of seven tokens
NO_WORK = [[0, 0, 1, 4, 0, 0, 0, 0]]
"""The plan of a batch without rows."""
TensorStep = Callable[..., Sequence[torch.Tensor]]


def token_buckets(limit: int) -> list[int]:
    """The numbers of tokens that are captured, up to a limit: 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, …

    From 256 on there are four to every doubling: padding costs time once matmuls are limited by arithmetic.
    """
    buckets, size = [1, 2], 4
    while size < limit:
        buckets += [size, size * 3 // 2] if size < 256 else [size * part // 4 for part in (4, 5, 6, 7)]
        size *= 2
    return [*(bucket for bucket in buckets if bucket < limit), limit]


MOST_CAPTURED = 64
"""Tokens of the largest captured batch of a speculator's own step."""
HELD_TOKENS = 2 * MOST_CAPTURED
"""Tokens whose outputs its graphs hold: where they are computed, and where they are copied."""


class CudaGraphs:
    """The captured runs of one step with native attention.

    Args:
        run: the step over tensors alone: positions, plan, write slots and its own inputs.
        device: the GPU.
        most_tokens: of a batch that is worth capturing.
        most_logits: of a batch; None for as many as tokens.
        inputs: examples of the step's own inputs, whose first dimension is the tokens. None for a model's forward: its inputs
            are ids and logits index of the batch.
        pending: what placeholders among the ids stand for.

    Raises:
        RuntimeError: the step does something that cannot be captured.
    """

    def __init__(
        self,
        run: TensorStep,
        device: torch.device,
        most_tokens: int,
        inputs: Sequence[torch.Tensor] | None = None,
        pending: PendingTokens | None = None,
        most_logits: int | None = None,
    ) -> None:
        self._pending = pending
        self._most_logits = None if most_logits is None else max(most_logits, _LEAST_LOGITS)
        self._buckets = token_buckets(min(most_tokens, MOST_TOKENS))
        widest = self._buckets[-1]
        self._staged = StagedInputs(widest, LONGEST_PLAN, device)
        self._inputs: list[torch.Tensor] | None = None
        if inputs is not None:
            self._inputs = [tensor.new_zeros(widest, *tensor.shape[1:], device=device) for tensor in inputs]
            for own, example in zip(self._inputs, inputs, strict=True):
                if len(example):
                    own.copy_(example[:1].expand_as(own))  # padding must be a valid value, an id of a table say
        self._outputs: list[torch.Tensor] = []
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        self._graphs = {bucket: self._capture(run, bucket, pool, stream) for bucket in reversed(self._buckets)}
        torch.cuda.synchronize(device)

    @property
    def most_tokens(self) -> int:
        """Of the largest captured batch."""
        return self._buckets[-1]

    @torch.inference_mode()
    def _capture(self, run: TensorStep, bucket: int, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """A graph of one run, which copies its staged inputs first; a batch without rows is staged meanwhile.

        The widest is captured first: its outputs have room for all.
        """
        ids, positions, slots, index, plan = self._staged.tensors(bucket)
        inputs = (
            [ids, index[: self._most_logits]] if self._inputs is None else [tensor[:bucket] for tensor in self._inputs]
        )
        self._staged.write([[], [], [], []], bucket, NO_WORK)
        self._staged.copy(bucket)
        torch.cuda.synchronize(stream.device)
        with torch.cuda.stream(stream):  # compiles kernels and fills libraries' workspaces, which a capture must not
            if self._pending is not None:
                self._pending.fill(ids)
            outputs = run(positions, plan, slots, *inputs)
        torch.cuda.synchronize(stream.device)
        self._outputs = self._outputs or [torch.empty_like(output) for output in outputs]
        del outputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._staged.copy(bucket)
            if self._pending is not None:
                self._pending.fill(ids)
            for own, output in zip(self._outputs, run(positions, plan, slots, *inputs), strict=True):
                own[: len(output)].copy_(output)
        return graph

    def replay(
        self, batch: ForwardBatch, inputs: Sequence[torch.Tensor] = (), *, lasting: bool = True
    ) -> list[torch.Tensor] | None:
        """The step's outputs for a batch; None if it is too large or wants too many logits.

        Args:
            batch: the batch; the first output is cut to its logits, the others to its tokens.
            inputs: the step's own inputs, as they were captured.
            lasting: whether the outputs must outlive the next replay.
        """
        tokens = batch.num_tokens
        if tokens > self._buckets[-1] or batch.num_logits > min(tokens, self._most_logits or tokens):
            return None
        bucket = next(size for size in self._buckets if size >= tokens)
        if not batch.stage(self._staged, bucket):
            return None
        for own, given in zip(self._inputs or (), inputs, strict=True):
            own[:tokens].copy_(given)
        self._graphs[bucket].replay()
        self._staged.mark_read()
        lengths = [batch.num_logits] + [tokens] * (len(self._outputs) - 1)
        outputs = [output[:length] for output, length in zip(self._outputs, lengths, strict=False)]
        return [output.clone() for output in outputs] if lasting else outputs

    @staticmethod
    def planned_bytes(
        most_tokens: int, most_logits: int, token_bytes: int, logits_bytes: int, state_bytes: int, scratch_bytes: int
    ) -> int:
        """Bytes of one forward's graphs; a pool serves all of its graphs, and no other's.

        Args:
            most_tokens: as above.
            most_logits: as above.
            token_bytes: what a token takes while the forward runs.
            logits_bytes: of a token.
            state_bytes: what it leaves besides: captured states.
            scratch_bytes: what the largest batch takes in addition.
        """
        tokens = min(most_tokens, MOST_TOKENS)
        inputs = staged_length(tokens, LONGEST_PLAN) * torch.int32.itemsize
        outputs = min(tokens, max(most_logits, _LEAST_LOGITS)) * logits_bytes + tokens * state_bytes
        computed = scratch_bytes + tokens * token_bytes + outputs
        return inputs + computed + outputs  # what is computed is copied to where all graphs leave it
