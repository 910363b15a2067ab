"""The target as speculators see it in vLLM."""

from __future__ import annotations

from typing import Any

import torch

from specplug import PluginError
from specplug.host import TargetFacade


class VllmTarget(TargetFacade):
    """vLLM's target; see `specplug.TargetModel`."""

    _model: Any = None

    @classmethod
    def of(cls, vllm_config: Any) -> VllmTarget:
        """What vLLM's configuration says of the target."""
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        return cls(
            config=model.hf_text_config,
            source=model.model,
            revision=model.revision,
            dtype=model.dtype,
            device=torch.device(vllm_config.device_config.device or "cpu"),
            vocab_size=model.get_vocab_size(),
            hidden_size=model.get_hidden_size(),
            num_layers=model.get_total_num_hidden_layers(),
            weight_bytes=0,
            max_model_len=model.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            tokenizer=lambda: _tokenizer(model),
        )

    def attach_model(self, model: Any) -> None:
        """Makes `embed` and `logits` available, once vLLM has loaded the target."""
        self._model = model

    def _loaded(self) -> Any:
        if self._model is None:
            raise PluginError("the target is not loaded yet: call embed and logits from warmup on")
        return self._model

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `TargetModel.embed`."""
        embedded: torch.Tensor = self._loaded().embed_input_ids(token_ids.reshape(-1))
        return embedded.reshape(*token_ids.shape, embedded.shape[-1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `TargetModel.logits`."""
        logits: torch.Tensor = self._loaded().compute_logits(hidden)
        return logits


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    return None if model.skip_tokenizer_init else AutoTokenizer.from_pretrained(model.tokenizer)
