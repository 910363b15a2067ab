"""From a configuration to the speculator of the `draft_model` method."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from specplug import ConfigurationError, hookimpl
from specplug_draft_model.settings import DraftModelSettings
from specplug_draft_model.speculator import DraftModelSpeculator
from specplug_draft_model.vocabulary import match_vocabularies

if TYPE_CHECKING:
    from specplug import SpeculativeConfig, TargetModel

logger = logging.getLogger("specplug.draft_model")
EMBEDDED = "tiny"


@hookimpl
def load_speculator(config: SpeculativeConfig, target: TargetModel) -> DraftModelSpeculator:
    """Reads the draft's configuration, headers and tokenizer; see `DraftModelSettings` for the keys.

    Raises:
        ConfigurationError: an unknown key or a wrong value, no draft model, or vocabularies with too few shared tokens.
        CheckpointError: the checkpoint is missing or damaged.
    """
    settings = config.settings(DraftModelSettings)
    model = target.model(
        _source(settings, target), revision=settings.revision, dtype=settings.dtype, device=settings.device
    )
    vocabulary = match_vocabularies(target.tokenizer, model.tokenizer, target.vocab_size, model.vocab_size)
    if model.weight_bytes >= target.weight_bytes:
        logger.warning(
            "the draft model has %s bytes of weights, its target %s: drafting can hardly save time; use a smaller draft model",
            f"{model.weight_bytes:,}",
            f"{target.weight_bytes:,}",
        )
    return DraftModelSpeculator(
        method=config.method,
        model=model,
        vocabulary=vocabulary,
        settings=settings,
        num_speculative_tokens=config.num_speculative_tokens,
        may_stop=config.is_auto,
        max_model_len=min(model.max_model_len, settings.max_model_len or model.max_model_len),
        max_num_batched_tokens=target.max_num_batched_tokens,
        device=target.device,
    )


def _source(settings: DraftModelSettings, target: TargetModel) -> str:
    model = target.source if settings.model is None and target.source == EMBEDDED else settings.model
    if model is None:
        raise ConfigurationError(
            "speculative_config of method 'draft_model' needs the key 'model': a folder or hub name of a smaller model"
        )
    return _folder(model)


def _folder(model: str) -> str:
    """Returns the folder of the embedded draft for its name, and other names unchanged."""
    return str(Path(__file__).parent / EMBEDDED) if model == EMBEDDED and not Path(model).is_dir() else model


def transformers_options(config: SpeculativeConfig) -> dict[str, str | int]:
    """Returns the arguments of Transformers' `generate` for assisted generation, with which `specplug bench` compares."""
    settings = config.settings(DraftModelSettings)
    return {
        "assistant_model": _folder(settings.model or EMBEDDED),
        "num_assistant_tokens": config.num_speculative_tokens,
    }
