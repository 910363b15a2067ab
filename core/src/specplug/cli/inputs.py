"""What the user writes: JSON, files of prompts, and speculative configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attrs

from specplug.errors import ConfigurationError, did_you_mean
from specplug.values import text_fault

_PROMPTS = "--prompts"
_SPECULATIVE_CONFIG = "--speculative-config"
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "sampling_params", "lora")


@attrs.frozen
class PromptLine:
    """One prompt.

    Attributes:
        where: file and line, for messages.
        prompt: text, or token ids.
        options: the line's own sampling parameters.
        lora: the name of its adapter.
    """

    where: str
    prompt: str | list[int]
    options: dict[str, Any] = attrs.field(factory=dict)
    lora: str | None = None


def read_prompts(name: str) -> list[PromptLine]:
    """Reads prompts: on each line a JSON string, or an object with `prompt` or `prompt_token_ids`; blank lines are skipped.

    Args:
        name: the file; `-` is standard input.

    Raises:
        ConfigurationError: the file or a line cannot be read; the message names the line.
    """
    data = sys.stdin.buffer.read() if name == "-" else _read(name, _PROMPTS)
    shown = "standard input" if name == "-" else name
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    prompts = [_parse_prompt(line, f"{shown}, line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigurationError(
            f'{_PROMPTS}: {shown} contains no prompt; write one JSON string such as "Hello" on each line'
        )
    return prompts


def checked_text(prompt: str, where: str) -> str:
    """Returns a prompt unchanged if it is valid text.

    Raises:
        ConfigurationError: it is not; the message begins with `where`.
    """
    if fault := text_fault(prompt):
        raise ConfigurationError(f"{where} contains {fault}, so it is not valid text; remove or replace that character")
    return prompt


def _parse_prompt(line: bytes, where: str) -> PromptLine:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{where}: not UTF-8 at byte {error.start + 1}") from error
    value = parse_json(text, where, one_line=True)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{where}: expected a JSON string, or an object with 'prompt' or 'prompt_token_ids', got {text.strip()[:40]}"
        )
    for key in value:
        if key not in _PROMPT_KEYS:
            raise ConfigurationError(
                f"{where}: unknown key '{key}'{did_you_mean(key, _PROMPT_KEYS)} (known: {', '.join(_PROMPT_KEYS)})"
            )
    options = value.get("sampling_params", {})
    if not isinstance(options, dict):
        raise ConfigurationError(f"{where}: 'sampling_params': expected an object, got {options!r}")
    lora = value.get("lora")
    if not (lora is None or (isinstance(lora, str) and lora)):
        raise ConfigurationError(f"{where}: 'lora': expected the name of an adapter, got {lora!r}")
    return PromptLine(where, _text_or_ids(value, where), options, lora)


def _text_or_ids(value: dict[str, Any], where: str) -> str | list[int]:
    if ("prompt" in value) == ("prompt_token_ids" in value):
        raise ConfigurationError(f"{where}: give exactly one of 'prompt' and 'prompt_token_ids'")
    if "prompt" in value:
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            raise ConfigurationError(f"{where}: 'prompt': expected a string, got {prompt!r}")
        return checked_text(prompt, f"{where}: 'prompt'")
    ids = value["prompt_token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ConfigurationError(f"{where}: 'prompt_token_ids': expected a list of at least one token id")
    return ids


def read_speculative_config(value: str | None) -> dict[str, Any] | None:
    """Reads `--speculative-config`: JSON, or the name of a file that contains it.

    Raises:
        ConfigurationError: neither a JSON object nor a readable file with one; the message gives the position.
    """
    if value is None:
        return None
    text, where = value, _SPECULATIVE_CONFIG
    if value.strip() and not value.lstrip().startswith(("{", "[")):
        where = f"{_SPECULATIVE_CONFIG} {value}"
        try:
            text = _read(value, _SPECULATIVE_CONFIG).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{where}: not a text file (it is not UTF-8)") from error
    parsed = parse_json(text, where)
    if not isinstance(parsed, dict):
        raise ConfigurationError(
            f'{where}: expected a JSON object such as {{"method": "ngram"}}, got {text.strip()[:40]}'
        )
    return parsed


def _read(name: str, option: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        if option == _SPECULATIVE_CONFIG and isinstance(error, FileNotFoundError):
            raise ConfigurationError(
                f'{option} {name!r} is neither a JSON object nor a file; write it like \'{{"method": "ngram"}}\''
            ) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"{option} {name!r} cannot be read: {reason}") from error


def parse_json(text: str, where: str, *, one_line: bool = False) -> Any:
    """Parses one JSON value.

    Args:
        text: the JSON.
        where: what it was given in, for messages.
        one_line: `where` already names the line.

    Raises:
        ConfigurationError: it is not valid JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = "" if one_line else f"line {error.lineno}, "
        raise ConfigurationError(f"{where}: not valid JSON at {line}column {error.colno}: {error.msg}") from error
    except (_RepeatedKeyError, RecursionError, ValueError) as error:  # ValueError: an integer with too many digits
        raise ConfigurationError(f"{where}: {error}") from error


class _RepeatedKeyError(Exception):
    """An object has a key twice; a JSON parser would silently keep the last value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise _RepeatedKeyError(f"the key '{key}' is given twice")
        members[key] = value
    return members


def read_template(name: str) -> str:
    """The text of a file with a chat template.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"--chat-template {name!r} cannot be read: {reason}") from error
