"""Which adapter a request uses: a name, a number and a folder, as in vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs

from specplug.errors import ConfigurationError, RequestError
from specplug.values import as_tuple, expect, integer, shown

_TEXT = expect(lambda value: isinstance(value, str) and bool(value.strip()), "a text that is not empty", RequestError)
_FORMS = "a mapping of names to folders, or a list of LoRARequest or {'name': ..., 'path': ...}"


def _as_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@attrs.frozen
class LoRARequest:
    """An adapter for a request. The first request that names it loads it, unless it is loaded already.

    Attributes:
        lora_name: its name; no two loaded adapters share one.
        lora_int_id: its number, from 1; no two loaded adapters share one.
        lora_path: its folder or hub name, in PEFT's format.
    """

    lora_name: str = attrs.field(validator=_TEXT)
    lora_int_id: int = attrs.field(**integer(1, RequestError))
    lora_path: str = attrs.field(converter=_as_path, validator=_TEXT)

    @property
    def name(self) -> str:
        """The same as `lora_name`."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The same as `lora_int_id`."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """The same as `lora_path`."""
        return self.lora_path


def parse_lora_modules(given: Any) -> Any:
    """The option `lora_modules` → LoRARequests with numbers from 1.

    Raises:
        ConfigurationError: it is neither a mapping of names to folders nor a list of adapters.
    """
    if given is None:
        return ()
    items = list(given.items()) if isinstance(given, Mapping) else as_tuple(given)
    if not isinstance(items, (list, tuple)):
        raise ConfigurationError(f"lora_modules={shown(given)}: expected {_FORMS}")
    modules: list[LoRARequest] = []
    for item in items:
        if isinstance(item, Mapping) and {"name", "path"} <= set(item) <= {"name", "path", "base_model_name"}:
            item = (item["name"], item["path"])
        if isinstance(item, LoRARequest):
            modules.append(item)
        elif isinstance(item, tuple) and len(item) == 2:
            taken = {module.lora_int_id for module in (*modules, *items) if isinstance(module, LoRARequest)}
            try:
                modules.append(
                    LoRARequest(item[0], next(n for n in range(1, len(items) + 2) if n not in taken), item[1])
                )
            except RequestError as error:
                raise ConfigurationError(f"lora_modules: {error}") from error
        else:
            raise ConfigurationError(f"lora_modules: {shown(item)}: expected {_FORMS}")
    for field in ("lora_name", "lora_int_id"):
        values = [getattr(module, field) for module in modules]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ConfigurationError(f"lora_modules: two adapters have the {field} {twice!r}; each needs its own")
    return tuple(modules)
