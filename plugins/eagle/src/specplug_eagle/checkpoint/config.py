"""A draft head's config.json in any of its layouts, read as raw JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from specplug import CheckpointError
from specplug_eagle.head.spec import Layout

_ABSENT: Mapping[str, Any] = {}


@attrs.frozen
class DraftConfig:
    """A parsed configuration.

    Attributes:
        layout: `speculators` (`transformer_layer_config` next to flags), `wrapped` (vLLM's `{"model": {…}}`),
            `eagle_config` (NVIDIA ModelOpt's nested block, which SpecForge and SGLang also write), or `flat`.
        layer: the fields of the draft layers.
        flags: all other fields; the same mapping as `layer` in a flat layout.
        nested: the `eagle_config` block, empty if there is none.
    """

    layout: Layout
    layer: Mapping[str, Any]
    flags: Mapping[str, Any]
    nested: Mapping[str, Any]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> DraftConfig:
        """Parses the JSON of a config.json.

        Raises:
            CheckpointError: a nested block is not a JSON object.
        """
        nested = _block(raw, "eagle_config")
        if "transformer_layer_config" in raw or "speculators_model_type" in raw:
            return cls("speculators", _block(raw, "transformer_layer_config"), raw, nested)
        if isinstance(raw.get("model"), Mapping):
            inner = raw["model"]
            return cls("wrapped", inner, raw, nested or _block(inner, "eagle_config"))
        return cls("eagle_config" if nested else "flat", raw, raw, nested)

    def flag(self, name: str, default: Any = None) -> Any:
        """A flag, from the top level, `eagle_config`, or the wrapped model."""
        for place in (self.flags, self.nested, self.layer):
            if place.get(name) is not None:
                return place[name]
        return default

    def switch(self, name: str) -> bool | None:
        """A boolean flag, or None if it is not given.

        Raises:
            CheckpointError: it is not a boolean.
        """
        value = self.flag(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"config.json: '{name}' is {value!r}; it should be true or false")
        return value

    def size(self, name: str) -> int | None:
        """A size of the draft layers, or None if it is missing or null.

        Raises:
            CheckpointError: it is not a positive integer.
        """
        value = self.layer.get(name)
        if value is None:
            value = self.flag(name)
        return None if value is None else check_size(name, value)

    def number(self, name: str, default: float) -> float:
        """A positive number among the layer's fields.

        Raises:
            CheckpointError: it is not a positive number.
        """
        value = self.layer.get(name)
        return default if value is None else check_number(name, value)

    @property
    def layer_ids(self) -> tuple[int, ...] | None:
        """The target layer ids of the configuration, or None.

        Raises:
            CheckpointError: they are not a list of integers of at least 0.
        """
        ids = self.flag("eagle_aux_hidden_state_layer_ids")
        if ids is None or ids == []:
            return None
        if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise CheckpointError(
                f"config.json: 'eagle_aux_hidden_state_layer_ids' is {ids!r}; it should be a list of layer numbers"
            )
        return tuple(ids)


def check_size(name: str, value: Any) -> int:
    """Returns a positive integer of a configuration, or raises `CheckpointError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: '{name}' is {value!r}; it should be a positive integer")
    return value


def check_number(name: str, value: Any) -> float:
    """Returns a positive number of a configuration, or raises `CheckpointError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"config.json: '{name}' is {value!r}; it should be a positive number")
    return float(value)


def _block(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return _ABSENT
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: '{name}' is {value!r}; it should be an object with fields")
    return value
