"""The option `--speculative-config`: JSON, or the name of a file that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specplug.cli.json_text import parse_json
from specplug.errors import ConfigurationError

OPTION = "--speculative-config"


def read_speculative_config(value: str | None) -> dict[str, Any] | None:
    """Reads the option.

    Raises:
        ConfigurationError: neither a JSON object nor a readable file with one; the message gives the position.
    """
    if value is None:
        return None
    if not value.strip() or value.lstrip().startswith(("{", "[")):
        return _parse(value, OPTION)
    return _parse(_read(value), f"{OPTION} {value}")


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigurationError(
            f'{OPTION} {name!r} is neither a JSON object nor a file; write it like \'{{"method": "ngram"}}\''
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{OPTION} {name}: not a text file (it is not UTF-8)") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"{OPTION} {name!r} cannot be read: {reason}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    parsed = parse_json(text, where)
    if not isinstance(parsed, dict):
        raise ConfigurationError(
            f'{where}: expected a JSON object such as {{"method": "ngram"}}, got {text.strip()[:40]}'
        )
    return parsed


def hint_at_keys(error: ConfigurationError, *, has_target: bool) -> None:
    """Adds to an error of `specplug check` how a method is given the keys that it needs."""
    hint = "give its keys with --speculative-config"
    if not has_target:
        hint += ", and with --target the model that they are for (without, the kit makes small random ones)"
    error.add_note(hint)
