"""What vLLM's model runner hands to the proposer after a step, and what the proposer hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from specplug import PluginError
from specplug.host import Draft
from specplug_vllm.settings import WORKER

TOP_IDS, TOP_PROBS = "top_ids", "top_probs"
_LOGITS_AT_ONCE = 256
"""Positions whose logits exist at the same time."""


@attrs.frozen(eq=False)
class TargetStep:
    """One step of the target.

    Attributes:
        num_scheduled: how many tokens of each request were computed, by its name; they are packed in the batch's order.
        num_drafted: how many of these were draft tokens.
        final: [T, hidden], after the final norm.
        layers: [T, hidden] for each boundary that was asked for.
    """

    num_scheduled: Mapping[str, int]
    num_drafted: Mapping[str, int]
    final: torch.Tensor
    layers: Mapping[int, torch.Tensor]

    def spans(self, names: Sequence[str], sampled: Sequence[Sequence[int]], starts: Sequence[int]) -> list[RowSpan]:
        """Where the states of each request are.

        Args:
            names: the requests, in the order of the batch.
            sampled: what the step added to each; nothing while its prompt is computed.
            starts: how many tokens of each were computed before the step.
        """
        spans, begin = [], 0
        for name, new, start in zip(names, sampled, starts, strict=True):
            count, drafted = self.num_scheduled[name], self.num_drafted.get(name, 0)
            final = count - drafted + max(0, len(new) - 1)
            nodes = range(begin + count - drafted, begin + count)
            spans.append(RowSpan(range(start, start + final), range(begin, begin + final), nodes))
            begin += count
        return spans

    def captured(self, boundaries: Sequence[Any], top_k: int, logits: Callable[[Any], Any]) -> dict[Any, torch.Tensor]:
        """The states as `SpeculatorHost.record` takes them.

        Args:
            boundaries: those that speculators declared.
            top_k: how many of the most likely tokens they want.
            logits: final states → logits.
        """
        found: dict[Any, torch.Tensor] = {
            boundary: self.final if boundary == "final" else self.layers[boundary] for boundary in boundaries
        }
        if top_k:
            count = sum(self.num_scheduled.values())
            tops = [
                logits(part).float().softmax(dim=-1).topk(top_k, dim=-1)
                for part in self.final[:count].split(_LOGITS_AT_ONCE)
            ]
            found[TOP_IDS] = torch.cat([top.indices for top in tops])
            found[TOP_PROBS] = torch.cat([top.values for top in tops])
        return found


@attrs.frozen
class RowSpan:
    """The part of a step that belongs to one request.

    Attributes:
        positions: of the tokens whose states became final: the request's own tokens, and drafted ones that were accepted.
        index: where they are in the packed batch.
        nodes: where its draft is.
    """

    positions: range
    index: range
    nodes: range


def check_states(vllm_config: Any, speculators: Sequence[Any]) -> None:
    """Refuses speculators that read target states where vLLM does not deliver them.

    Raises:
        PluginError: names the speculator.
    """
    reading = [each for each in speculators if each.traits.needs_states]
    if not reading:
        return
    where, parallel = (
        f"speculator '{reading[0].method}' reads target states (hidden_states or top_k)",
        vllm_config.parallel_config,
    )
    if parallel.worker_cls != WORKER:
        raise PluginError(f"{where}, which vLLM's own worker does not deliver: start vLLM with --worker-cls {WORKER}")
    if parallel.pipeline_parallel_size > 1:
        raise PluginError(
            f"{where}, which are on several machines with pipeline_parallel_size above 1; use tensor parallelism"
        )
    if vllm_config.lora_config is not None and any(each.traits.top_k for each in reading):
        raise PluginError(f"{where}: top_k cannot be combined with enable_lora")


def check_target(model: Any, layers: Sequence[int]) -> None:
    """Refuses a target that has no states of inner layers to give.

    Raises:
        PluginError: names the class.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3

    if layers and not supports_eagle3(model):
        raise PluginError(
            f"speculators read target states at the boundaries {', '.join(map(str, layers))}, and vLLM's "
            f"{type(model).__name__} delivers none (it is not SupportsEagle3): only 'final' and top_k can be had of it"
        )


def dense_probs(drafts: Sequence[Draft | None], vocab_size: int, device: torch.device | str) -> torch.Tensor | None:
    """The distributions from which drafts were sampled, [requests, longest draft, vocabulary]; None if none was.

    A token that was not sampled has all the probability: vLLM then verifies it as without distributions.
    """
    if not any(draft is not None and draft.probs is not None for draft in drafts):
        return None
    longest = max(len(draft) for draft in drafts if draft is not None)
    dense = torch.zeros(len(drafts), longest, vocab_size, dtype=torch.float32, device=device)
    for row, draft in zip(dense, drafts, strict=True):
        if draft is None:
            continue
        if draft.probs is None:
            row[range(len(draft)), draft.tokens] = 1.0
            continue
        values = torch.as_tensor(draft.probs.values, dtype=torch.float32, device=device)
        if draft.probs.index is not None:
            values = values[list(draft.probs.index)]
        values = values[: len(draft)]
        if draft.probs.token_ids is None:
            row[: len(draft), : values.shape[1]] = values
        else:
            ids = torch.as_tensor(draft.probs.token_ids, dtype=torch.int64, device=device)
            row[: len(draft)].index_copy_(1, ids, values)
    return dense
