"""The sampling parameters a model recommends for itself."""

from __future__ import annotations

import json
from typing import Any

from specplug.errors import CheckpointError, RequestError
from specplug.model.checkpoint import resolve_checkpoint
from specplug.sampling.params import SamplingParams

_TAKEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def default_sampling_params(source: str, revision: str | None = None) -> SamplingParams:
    """Reads generation_config.json, as vLLM does: what it names overrides the defaults, `max_new_tokens` included.

    Raises:
        CheckpointError: the file is no JSON, or names a value that its parameter cannot have.
    """
    options = recommended_options(source, revision)
    try:
        return SamplingParams(**options)
    except RequestError as error:
        raise CheckpointError(f"{resolve_checkpoint(source, revision) / 'generation_config.json'}: {error}") from error


def recommended_options(source: str, revision: str | None = None) -> dict[str, Any]:
    """The sampling parameters that generation_config.json names, and no others.

    `do_sample: false` with no temperature means greedy there as in Transformers; `true` means a temperature of 1.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    file = resolve_checkpoint(source, revision) / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object")
    options: dict[str, Any] = {name: config[name] for name in _TAKEN if config.get(name) is not None}
    if isinstance(config.get("do_sample"), bool):
        options.setdefault("temperature", float(config["do_sample"]))
    if config.get("max_new_tokens"):
        options["max_tokens"] = config["max_new_tokens"]
    return options
