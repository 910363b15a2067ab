"""The target as speculators see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from specplug.errors import PluginError
from specplug.model.device import choose_device
from specplug.model.head import Head
from specplug.plugins.lazy_model import LazyModel
from specplug.plugins.lazy_weights import LazyWeights


class TargetFacade:
    """See `specplug.TargetModel`."""

    def __init__(
        self,
        *,
        config: Any,
        source: str,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        weight_bytes: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        tokenizer: Callable[[], Any],
    ) -> None:
        self.config = config
        self.source = source
        self.revision = revision
        self.dtype = dtype
        self.device = device
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.weight_bytes = weight_bytes
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.handles: list[LazyWeights | LazyModel] = []
        self._tokenizer = tokenizer
        self._head: Head | None = None

    @classmethod
    def of_limits(
        cls,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_layers: int = 0,
        hidden_size: int = 0,
        source: str = "",
        revision: str | None = None,
        config: Any = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        weight_bytes: int = 0,
        tokenizer: Callable[[], Any] = lambda: None,
    ) -> TargetFacade:
        """A target of which no more may be known than its sizes; for the arguments see `TargetModel`."""
        return cls(
            config=config,
            source=source,
            revision=revision,
            dtype=dtype,
            device=torch.device("cpu") if device is None else device,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            weight_bytes=weight_bytes,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            tokenizer=tokenizer,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """See `TargetModel.tokenizer`."""
        return self._tokenizer()

    def attach(self, model: torch.nn.Module) -> None:
        """Makes `embed` and `logits` available, once the target is loaded."""
        self._head = Head(model)

    def _loaded_head(self) -> Head:
        if self._head is None:
            raise PluginError("the target is not loaded yet: call embed and logits from warmup on")
        return self._head

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `TargetModel.embed`."""
        return self._loaded_head().embed(token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `TargetModel.logits`."""
        return self._loaded_head().logits(hidden)

    def weights(self, source: str, revision: str | None = None) -> LazyWeights:
        """See `TargetModel.weights`."""
        handle = LazyWeights(source, revision, self.dtype, self.device)
        self.handles.append(handle)
        return handle

    def model(
        self, source: str, *, revision: str | None = None, dtype: str | None = None, device: str | None = None
    ) -> LazyModel:
        """See `TargetModel.model`."""
        model_device = self.device if device is None else choose_device(device)
        handle = LazyModel(
            source,
            revision,
            dtype,
            self.dtype,
            model_device,
            f"model {len(self.handles)}",
            max_num_seqs=self.max_num_seqs,
            has_own_device=model_device != self.device,
        )
        self.handles.append(handle)
        return handle

    def close(self) -> None:
        """Closes all handles."""
        for handle in self.handles:
            handle.close()
        self._head = None
