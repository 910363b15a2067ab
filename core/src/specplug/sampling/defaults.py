"""The sampling parameters and end tokens that a model recommends in its generation_config.json."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from specplug.errors import CheckpointError, RequestError
from specplug.model.load.checkpoint import resolve_checkpoint
from specplug.sampling.params import SamplingParams

logger = logging.getLogger("specplug")
_FILE = "generation_config.json"
# Transformers' name → ours.
_SUPPORTED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
    "bad_words_ids": "bad_words_ids",
}
# Other keys that change the output of `generate`, and the values with which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


def default_sampling_params(source: str, revision: str | None = None) -> SamplingParams:
    """Reads generation_config.json, as vLLM does: its values override the defaults, `max_new_tokens` included.

    Raises:
        CheckpointError: the file is not JSON, or a value is invalid.
    """
    options = recommended_options(source, revision)
    if "min_tokens" in options:
        options.setdefault("max_tokens", max(options["min_tokens"], SamplingParams().max_tokens or 0))
    return SamplingParams(**options)


def recommended_options(
    source: str, revision: str | None = None, *, overridden: Collection[str] = ()
) -> dict[str, Any]:
    """The sampling parameters in generation_config.json, and no others.

    Without a temperature, `do_sample: false` means greedy and `true` a temperature of 1, as in Transformers.
    `suppress_tokens` are banned as words of one token. One warning names the keys that are not supported.

    Args:
        source: the model.
        revision: its revision on the hub.
        overridden: parameters that the caller sets anyway; their recommendations are neither read nor checked.

    Raises:
        CheckpointError: the file is not a JSON object, or a value is invalid.
    """
    file = resolve_checkpoint(source, revision) / _FILE
    config = read_generation_config(file.parent)
    options: dict[str, Any] = {}
    for name, own in _SUPPORTED.items():
        if config.get(name) is not None and own not in overridden:
            options[own] = _checked(file, name, own, config[name])
    if config.get("suppress_tokens") is not None:
        suppressed = _checked(file, "suppress_tokens", "allowed_token_ids", config["suppress_tokens"])
        options["bad_words_ids"] = (*options.get("bad_words_ids", ()), *((token,) for token in suppressed))
    samples = config.get("do_sample")
    if samples is not None:
        if not isinstance(samples, bool):
            raise CheckpointError(f"{file}: do_sample={samples!r}: expected true or false")
        options.setdefault("temperature", float(samples))
    if "max_tokens" in options and "min_tokens" in options:
        options["min_tokens"] = min(options["min_tokens"], options["max_tokens"])
    not_done = [name for name, neutral in _UNSUPPORTED.items() if config.get(name) not in (None, *neutral)]
    if not_done:
        _warn(str(file), tuple(not_done))
    return options


def _checked(file: Path, name: str, own: str, value: Any) -> Any:
    """The value, converted and checked by our parameter."""
    if own == "max_tokens" and value == 0 and not isinstance(value, bool):  # older files: not set
        return SamplingParams().max_tokens
    try:
        return getattr(SamplingParams(**{own: value, **({"max_tokens": None} if own == "min_tokens" else {})}), own)
    except RequestError as error:
        what = str(error).removeprefix(f"sampling parameter {own}=")
        raise CheckpointError(f"{file}: {name}={what}") from error


@functools.cache
def _warn(file: str, names: tuple[str, ...]) -> None:
    """Warns once for each file."""
    logger.warning("%s has %s, which specplug does not support; ignored", file, ", ".join(names))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The contents of generation_config.json; empty if there is none.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    file = folder / _FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return config


def eos_ids(folder: Path, model_config: Any, vocab_size: int) -> frozenset[int]:
    """The ids that end a sequence: from generation_config.json if it has any, else from config.json.

    Ids outside the vocabulary are ignored with a warning.

    Raises:
        CheckpointError: the value is neither an id nor a list of ids.
    """
    file, value = folder / _FILE, read_generation_config(folder).get("eos_token_id")
    if value is None:
        file = folder if folder.is_file() else folder / "config.json"
        value = getattr(model_config.get_text_config(), "eos_token_id", None)
    if value is None:
        return frozenset()
    ids = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise CheckpointError(f"{file}: eos_token_id={value!r}: expected a token id, or a list of them")
    outside = sorted(token for token in ids if not 0 <= token < vocab_size)
    if outside:
        logger.warning(
            "%s: eos_token_id has %s, outside the vocabulary of %s; ignored",
            file,
            ", ".join(map(str, outside)),
            f"{vocab_size:,}",
        )
    return frozenset(ids) - frozenset(outside)
