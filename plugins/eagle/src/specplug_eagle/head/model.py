"""The draft head: one module for drafting and training, independent of caches, trees and sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from specplug import CheckpointError
from specplug_eagle.head.layers import Attend, DraftLayer, RMSNorm
from specplug_eagle.head.rope import RotaryEmbedding
from specplug_eagle.head.spec import HeadSpec

Borrowed = Callable[[torch.Tensor], torch.Tensor]


@attrs.frozen(eq=False)
class HeadOutput:
    """The result of a draft step.

    Attributes:
        output: [T, hidden], the input of `DraftHead.logits`.
        feedback: [T, hidden], the hidden state of the next draft step.
    """

    output: torch.Tensor
    feedback: torch.Tensor


class DraftHead(nn.Module):
    """EAGLE's draft head.

    One draft step takes the embedding of a token and the hidden state of the position before it:

        g = head.fuse(target_states)                        # step 0; later steps: g = result.feedback
        result = head(head.embed(tokens), g, positions, attend)
        logits = head.logits(result.output)                 # over the draft vocabulary

    Parameters have the names of the speculators format (`fc`, `layers.0.self_attn.q_proj`, `norm`, …). Every operation is
    differentiable. The number of tokens may vary; no state is kept between calls.

    Args:
        spec: the head's specification.
        embed: ids int64 [T] → [T, hidden]: the target's embedding, for a head without one; it is not copied.
        logits: [T, hidden] → [T, vocabulary]: the target's output layer, for a head without one.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        draft_to_target: int64 [draft vocabulary], each draft id's target id; None if they are the same.

    `reset_parameters` initialises the parameters; `from_tensors` makes a head from a checkpoint's tensors.
    """

    draft_to_target: torch.Tensor | None

    def __init__(
        self,
        spec: HeadSpec,
        *,
        embed: Borrowed | None = None,
        logits: Borrowed | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        draft_to_target: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.embed_tokens: nn.Embedding | None = None
        self.lm_head: nn.Linear | None = None
        self.fc: nn.Linear | None = None
        self.input_norm: RMSNorm | None = None
        self.fc_norm: nn.ModuleList | None = None
        self.norm: RMSNorm | None = None
        if spec.has_own_embedding:
            self.embed_tokens = nn.Embedding(spec.vocab_size, hidden, **factory)
        if not spec.single_state:
            width = 2 * hidden if spec.family == "eagle1" else spec.feature_size
            self.fc = nn.Linear(width, hidden, bias=spec.fc_bias, **factory)
        if spec.norm_before_fc:
            self.input_norm = RMSNorm(spec.feature_size, eps, **factory)
        if spec.fc_norm:
            norms = [RMSNorm(spec.target_hidden_size, eps, **factory) for _ in range(spec.num_aux_states)]
            self.fc_norm = nn.ModuleList(norms)
        self.layers = nn.ModuleList([DraftLayer(spec, index, device, dtype) for index in range(spec.num_layers)])
        if spec.family == "eagle3" or spec.normed_layers:
            self.norm = RMSNorm(hidden, eps, **factory)
        if spec.has_own_lm_head:
            self.lm_head = nn.Linear(hidden, spec.draft_vocab_size, bias=False, **factory)
        self.register_buffer("draft_to_target", draft_to_target, persistent=False)
        self.rope = RotaryEmbedding(spec.rope, spec.head_dim)
        self._borrowed = {"embed": embed, "logits": logits}  # in a dict, so that a borrowed module is not a submodule
        self.reset_parameters()

    @classmethod
    def from_tensors(
        cls,
        spec: HeadSpec,
        tensors: Mapping[str, torch.Tensor],
        *,
        embed: Borrowed | None = None,
        logits: Borrowed | None = None,
        draft_to_target: torch.Tensor | None = None,
    ) -> DraftHead:
        """Makes a head from tensors by canonical name. They are not copied, and need no gradient.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape than the spec says.
        """
        check_tensors(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        head = cls(spec, embed=embed, logits=logits, device=torch.device("meta"), draft_to_target=draft_to_target)
        head.requires_grad_(False)
        head.load_state_dict(dict(tensors), strict=True, assign=True)
        return head.eval()

    def reset_parameters(self, deviation: float = 0.02) -> None:
        """Starts over: linear and embedding weights normal with the given standard deviation, biases 0, norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Target token ids, int64 [T] → embeddings [T, hidden], from the head's own or the borrowed embedding."""
        if self.embed_tokens is not None:
            return self.embed_tokens(token_ids)
        return self._borrow("embed", "embed_tokens")(token_ids)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Target states [T, n · target hidden], ascending by depth → the hidden state of draft step 0, [T, hidden].

        EAGLE-1 and single-state heads use the target's final normed state unchanged.
        """
        if self.spec.uses_final_state or self.fc is None:
            return features
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.split(self.spec.target_hidden_size, dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        return self.fc(features)

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> HeadOutput:
        """Runs one draft step over any number of tokens.

        Args:
            embeddings: [T, hidden] of the tokens, each one position after its hidden state.
            hidden: [T, hidden]: `fuse` of target states, or the feedback of the previous step.
            positions: int64 [T], positions of the hidden states' tokens.
            attend: attention over these tokens and earlier ones.

        Returns:
            The input of `logits`, and the hidden state of the next step.
        """
        if self.spec.family == "eagle1" and self.fc is not None:
            hidden = self.fc(torch.cat((embeddings, hidden), dim=-1))
        rotation = self.rope(positions, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, embeddings, rotation, attend)
        if self.norm is None:
            return HeadOutput(hidden, hidden)
        normed = self.norm(hidden)
        return HeadOutput(normed, normed if self.spec.norm_output or self.spec.normed_layers else hidden)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, draft vocabulary], through the head's own output layer or the borrowed one."""
        if self.lm_head is not None:
            return self.lm_head(output)
        return self._borrow("logits", "lm_head")(output)

    def _borrow(self, use: str, name: str) -> Borrowed:
        borrowed = self._borrowed[use]
        if borrowed is None:
            raise CheckpointError(f"the draft head has no {name}, and the target's was not given")
        return borrowed


def check_tensors(spec: HeadSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares tensors with what a head needs.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has the wrong shape; the message names it and both shapes.
    """
    expected = spec.tensor_shapes()
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise CheckpointError(f"the draft head lacks {_some(missing)}; the checkpoint is incomplete")
    unknown = sorted(shapes.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"the draft head does not use {_some(unknown)}; this is an unknown variant")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(f"'{name}' has the shape {list(shapes[name])} where {list(shape)} is expected")


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
