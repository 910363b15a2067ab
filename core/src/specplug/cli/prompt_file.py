"""Prompts from a file of JSON lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import attrs

from specplug.cli.json_text import parse_json
from specplug.errors import ConfigurationError, did_you_mean
from specplug.values import text_fault

_OPTION = "--prompts"
_KEYS = ("prompt", "prompt_token_ids", "sampling_params")


@attrs.frozen
class PromptLine:
    """One prompt.

    Attributes:
        where: file and line, for messages.
        prompt: text, or token ids.
        options: the line's own sampling parameters.
    """

    where: str
    prompt: str | list[int]
    options: dict[str, Any] = attrs.field(factory=dict)


def read_prompts(name: str) -> list[PromptLine]:
    """Reads prompts: on each line a JSON string, or an object with `prompt` or `prompt_token_ids`; blank lines are skipped.

    Args:
        name: the file; `-` is standard input.

    Raises:
        ConfigurationError: the file or a line cannot be read; the message names the line.
    """
    data = sys.stdin.buffer.read() if name == "-" else _read(name)
    shown = "standard input" if name == "-" else name
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    prompts = [_parse(line, f"{shown}, line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigurationError(
            f'{_OPTION}: {shown} holds no prompt; write one JSON string such as "Hello" on each line'
        )
    return prompts


def checked_text(prompt: str, where: str) -> str:
    """A prompt as it is, if it is valid text.

    Raises:
        ConfigurationError: it is not; the message begins with `where`.
    """
    if fault := text_fault(prompt):
        raise ConfigurationError(f"{where} holds {fault}, and so is no valid text; remove or replace that character")
    return prompt


def _read(name: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"{_OPTION} {name!r} cannot be read: {reason}") from error


def _parse(line: bytes, where: str) -> PromptLine:
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
        if key not in _KEYS:
            raise ConfigurationError(
                f"{where}: unknown key '{key}'{did_you_mean(key, _KEYS)} (known: {', '.join(_KEYS)})"
            )
    options = value.get("sampling_params", {})
    if not isinstance(options, dict):
        raise ConfigurationError(f"{where}: 'sampling_params' is not an object, but {options!r}")
    return PromptLine(where, _prompt(value, where), options)


def _prompt(value: dict[str, Any], where: str) -> str | list[int]:
    if ("prompt" in value) == ("prompt_token_ids" in value):
        raise ConfigurationError(f"{where}: needs 'prompt' or 'prompt_token_ids', one of the two")
    if "prompt" in value:
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            raise ConfigurationError(f"{where}: 'prompt' is not a text, but {prompt!r}")
        return checked_text(prompt, f"{where}: 'prompt'")
    ids = value["prompt_token_ids"]
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ConfigurationError(f"{where}: 'prompt_token_ids' is not a list of at least one token id")
    return ids
