"""The speculative configuration as a plugin sees it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

import attrs

from specplug.errors import ConfigurationError, did_you_mean
from specplug.values import as_integer, shown

Settings = TypeVar("Settings")


@attrs.define(eq=False)
class SpeculativeConfig:
    """One method of the user's `speculative_config`, with vLLM's key names where vLLM has them.

    Attributes:
        method: the name of the plugin's entry point.
        num_speculative_tokens: the most draft tokens of a row in one step (γ).
        options: the plugin's own keys. Read them with `get` or `settings`: core refuses keys that nobody read.
        fallback: the method that drafts for the rows that this one leaves without a draft.
        is_auto: whether core chooses the budgets from measurements, up to `num_speculative_tokens`.
        is_bounded: whether the user gave that upper bound. If not, it is the attribute `max_num_speculative_tokens` of the
            plugin's module, or core's default.
    """

    method: str
    num_speculative_tokens: int
    options: Mapping[str, Any] = attrs.field(factory=dict)
    fallback: SpeculativeConfig | None = None
    is_auto: bool = False
    is_bounded: bool = True
    known_options: set[str] = attrs.field(factory=set, init=False, repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns an option or the default, and marks the key as known: a key that was never read is an error."""
        self.known_options.add(key)
        return self.options.get(key, default)

    def settings(self, cls: type[Settings]) -> Settings:
        """Reads all options into an attrs class of the plugin; unknown keys and wrong types are errors.

        Raises:
            ConfigurationError: an option is missing or unknown, or has the wrong type.
        """
        import cattrs

        attrs.resolve_types(cls)  # type: ignore[type-var]
        fields = {field.alias or field.name: field for field in attrs.fields(cls) if field.init}  # type: ignore[arg-type]
        self.known_options.update(fields)
        self.check_unknown_options()
        converter = cattrs.Converter(forbid_extra_keys=True)
        for scalar in (int, float, bool, str):
            converter.register_structure_hook(scalar, _strict_scalar)
        values = {}
        for name, field in fields.items():
            if name not in self.options:
                if field.default is attrs.NOTHING:
                    raise ConfigurationError(f"speculative_config of method '{self.method}' needs the key '{name}'")
                continue
            try:
                values[name] = converter.structure(self.options[name], field.type or Any)
            except Exception as error:
                expected = getattr(field.type, "__name__", None) or str(field.type)
                raise ConfigurationError(
                    f"speculative_config: {self.method}.{name}={shown(self.options[name])}: expected {expected}"
                ) from error
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"speculative_config of method '{self.method}': {error}") from error

    def check_unknown_options(self) -> None:
        """Raises `ConfigurationError` for the first option that was never read."""
        known = self.known_options | {"method", "num_speculative_tokens", "max_num_speculative_tokens", "fallback"}
        for key in self.options:
            if key not in known:
                raise ConfigurationError(
                    f"speculative_config: unknown key '{key}' for method '{self.method}'{did_you_mean(key, known)} "
                    f"(known keys: {', '.join(sorted(known))})"
                )


def _strict_scalar(value: Any, kind: type) -> Any:
    """Structures a scalar without conversion: '5' is not an integer, and neither is True."""
    if kind is int:
        value = as_integer(value)
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
