"""The sampling parameters a model recommends for itself."""

from __future__ import annotations

import json
from typing import Any

from specplug.errors import CheckpointError
from specplug.model.checkpoint import resolve_checkpoint
from specplug.sampling.params import SamplingParams

_TAKEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def default_sampling_params(source: str, revision: str | None = None) -> SamplingParams:
    """Reads generation_config.json, as vLLM does: what it names overrides the defaults, `max_new_tokens` included.

    `do_sample: false` with no temperature means greedy there as in Transformers.

    Raises:
        CheckpointError: the file is no JSON.
    """
    file = resolve_checkpoint(source, revision) / "generation_config.json"
    if not file.is_file():
        return SamplingParams()
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    options = {name: config[name] for name in _TAKEN if config.get(name) is not None}
    if config.get("do_sample") is False and "temperature" not in options:
        options["temperature"] = 0.0
    if config.get("max_new_tokens"):
        options["max_tokens"] = int(config["max_new_tokens"])
    return SamplingParams(**options)
