"""What of vLLM's `additional_config` is for specplug."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import attrs

from specplug import ConfigurationError
from specplug.host import parse_speculative_config

KEY, HOST_KEY = "specplug", "specplug_host"
CLASS = "specplug_vllm.SpecplugProposer"
WORKER = "specplug_vllm.Worker"
TIMEOUT = 5.0


@attrs.frozen
class HostSettings:
    """The keys of `additional_config["specplug_host"]`.

    Attributes:
        timeout: the most seconds of one `propose`; a speculator that has not returned by then is switched off.
        plugins: methods that are not installed → "module:name" of a function of (config, target), or of a module.
        allowed: methods or packages that may be loaded; None allows all.
        denied: methods or packages that may not.
        strict: whether a speculator's fault ends the engine; for tests.
        memory_bytes: what speculators may use: weights, KV caches and buffers.
    """

    timeout: float = TIMEOUT
    plugins: Mapping[str, str] = attrs.field(factory=dict)
    allowed: list[str] | None = None
    denied: list[str] = attrs.field(factory=list)
    strict: bool = False
    memory_bytes: int | None = None

    @classmethod
    def parse(cls, given: Any) -> HostSettings:
        """Reads the mapping.

        Raises:
            ConfigurationError: it has an unknown key, or a value of the wrong type.
        """
        names = [field.name for field in attrs.fields(cls)]
        if not isinstance(given, Mapping):
            raise ConfigurationError(f"additional_config: {HOST_KEY}={given!r}: expected a mapping")
        if unknown := [key for key in given if key not in names]:
            raise ConfigurationError(
                f"additional_config: unknown key {HOST_KEY}.{unknown[0]} (known: {', '.join(names)})"
            )
        settings = cls(**given)
        if (
            not isinstance(settings.timeout, (int, float))
            or isinstance(settings.timeout, bool)
            or settings.timeout <= 0
        ):
            raise ConfigurationError(
                f"additional_config: {HOST_KEY}.timeout={settings.timeout!r}: expected seconds above 0"
            )
        if not isinstance(settings.plugins, Mapping):
            raise ConfigurationError(
                f'additional_config: {HOST_KEY}.plugins={settings.plugins!r}: expected {{"method": "module:name"}}'
            )
        return settings

    def imported_plugins(self) -> dict[str, Any]:
        """Imports the plugins that are given by name.

        Raises:
            ConfigurationError: a name cannot be imported.
        """
        found = {}
        for method, path in self.plugins.items():
            module, _, name = path.partition(":")
            try:
                found[method] = importlib.import_module(module)
                for part in filter(None, name.split(".")):
                    found[method] = getattr(found[method], part)
            except Exception as error:
                raise ConfigurationError(
                    f"additional_config: {HOST_KEY}.plugins: {method}={path!r} cannot be imported: {error}"
                ) from error
        return found


def speculative_config(additional: Any, most: int) -> dict[str, Any]:
    """The speculative configuration in vLLM's `additional_config`, with draft lengths of at most vLLM's own.

    Args:
        additional: `additional_config`.
        most: vLLM's `num_speculative_tokens`.

    Raises:
        ConfigurationError: it is missing or invalid, or asks for longer drafts than vLLM reserves.
    """
    given = additional.get(KEY) if isinstance(additional, Mapping) else None
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f'additional_config needs the key "{KEY}" with the speculative configuration, for example '
            f'{{"{KEY}": {{"method": "ngram"}}}}; specplug vllm-config prints it'
        )
    parse_speculative_config(given)
    return _bounded(given, most)


def _bounded(given: Mapping[str, Any], most: int) -> dict[str, Any]:
    config = dict(given)
    wanted = config.pop("num_speculative_tokens", "auto")
    bound = config.pop("max_num_speculative_tokens", None)
    asked = wanted if isinstance(wanted, int) else bound
    if asked is not None and asked > most:
        raise ConfigurationError(
            f"additional_config: {KEY}: {asked} draft tokens are asked for, and vLLM's speculative_config reserves "
            f"num_speculative_tokens={most}; make these equal"
        )
    config["num_speculative_tokens"] = most if asked is None else asked
    if "fallback" in config:
        config["fallback"] = _bounded(config["fallback"], most)
    return config
