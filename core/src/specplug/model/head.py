"""The target's own embedding and logits as functions, for speculators that build on them."""

from __future__ import annotations

import copy
from typing import Any

import torch


class _StatesOnly(list[Any]):
    """A base model's output that holds states; any other attribute that a forward reads is None."""

    @property
    def last_hidden_state(self) -> Any:
        """The states."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Passthrough(torch.nn.Module):
    """Takes the place of the base model and returns given states as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None

    @property
    def decoder(self) -> _Passthrough:
        """Some models call their base model's decoder directly."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _StatesOnly([self.states])


class Head:
    """`embed` and `logits` of a model, run through the model's own forward, so that scales and soft-caps hold."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._base = _Passthrough()
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)
        self._head._modules[self._base_name(model)] = self._base

    def _base_name(self, model: torch.nn.Module) -> str:
        """The child that holds the decoder; Llama 4 names another one as its `base_model_prefix`."""
        prefix = str(model.base_model_prefix)
        if prefix in model._modules:
            return prefix
        return next(name for name, child in model.named_children() if self._embedding in child.modules())

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape → [..., hidden]."""
        return self._embedding(token_ids)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States after the final norm [N, hidden] → logits [N, vocabulary]."""
        self._base.states = hidden[None]
        try:
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
            return self._head(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._base.states = None
