"""The plugins of one engine: every module is imported and checked on its own, and a failure stops only those who ask."""

from __future__ import annotations

import importlib
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import pluggy

from specplug.contract.hookspecs import PROJECT, SpeculatorHooks, hookimpl
from specplug.contract.settings import SpeculativeConfig
from specplug.contract.traits import SpeculatorTraits
from specplug.errors import PluginError, SpecplugError, did_you_mean
from specplug.plugins.finder import PluginRecord, find_plugins
from specplug.plugins.hooks import HOOKS, check_hooks, has_hook, is_wrapper

logger = logging.getLogger("specplug")
_SHIPPED = {
    "draft_model": "specplug-draft-model",
    "eagle": "specplug-eagle",
    "eagle3": "specplug-eagle",
    "ngram": "specplug-ngram",
}
"""The packages of the methods that come with core's releases."""


@attrs.define(eq=False)
class RegisteredSpeculator:
    """A speculator in an engine's registry, with a caller for each hook that reaches it and no other speculator.

    Attributes:
        method: the name it was configured under.
        config: its part of the speculative configuration.
        instance: the plugin's object.
        traits: what it declared.
        plan_memory: caller of the hook; so are `warmup`, `propose` and `verify`.
        overrides_verify: whether it implements `verify`.
        scratch_tokens_per_row: the most scratch KV entries it planned for a row.
    """

    method: str
    config: SpeculativeConfig
    instance: Any
    traits: SpeculatorTraits
    plan_memory: Callable[..., Any]
    warmup: Callable[..., Any]
    propose: Callable[..., Any]
    verify: Callable[..., Any]
    overrides_verify: bool
    scratch_tokens_per_row: int = 0


class _Loader:
    """Makes a plugin of a plain function of (config, target)."""

    def __init__(self, load: Callable[..., Any]) -> None:
        if not callable(load):
            raise PluginError(f"a provided plugin is neither a plugin nor a function of (config, target): {load!r}")
        self._load = load

    @hookimpl
    def load_speculator(self, config: SpeculativeConfig, target: Any) -> Any:
        return self._load(config, target)


class PluginRegistry:
    """One PluginManager, never shared between engines."""

    def __init__(
        self,
        allowed: Iterable[str] | None = None,
        denied: Iterable[str] = (),
        provided: Mapping[str, Any] | None = None,
    ) -> None:
        """Finds and loads plugins.

        Args:
            allowed: see `find_plugins`.
            denied: see `find_plugins`.
            provided: method → plugin that is not installed: an object that implements `load_speculator`, a plain function
                of (config, target), or an object with wrappers alone. It takes precedence over an installed one of the
                same name.
        """
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(SpeculatorHooks)
        self.records = find_plugins(allowed, denied)
        self.failures: dict[str, str] = {}
        self._modules: dict[str, Any] = {}
        self._speculators: list[Any] = []
        self.verifier: Any = None
        for record in self.records:
            if record.status == "ok":
                self._load(record)
        for method, plugin in (provided or {}).items():
            is_plugin = any(has_hook(plugin, hook) for hook in HOOKS)
            self._modules[method] = plugin if is_plugin else _Loader(plugin)
            self.register(self._modules[method], f"provided {method}")

    def _load(self, record: PluginRecord) -> None:
        try:
            path, _, attribute = record.module.partition(":")
            module: Any = importlib.import_module(path)
            for name in filter(None, attribute.split(".")):
                module = getattr(module, name)
            if not any(module is known for known in self._modules.values()):
                self.register(module, record.distribution)
            self._modules[record.method] = module
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, and what extension modules and test libraries derive from it
            self.failures[record.method] = traceback.format_exc()
            logger.info(  # whoever asks for it gets the error
                "plugin '%s' of package %s cannot be loaded: %s: %s",
                record.method,
                record.distribution,
                type(error).__name__,
                error,
            )

    def plugin(self, method: str) -> Any | None:
        """The plugin behind a method, as it was registered: a module, or what its entry point names; None if not loaded."""
        return self._modules.get(method)

    def register(self, plugin: Any, name: str) -> None:
        """Registers a module or object after checking its hooks; nothing stays behind when a check fails.

        Raises:
            PluginError: a hook has a wrong name or signature.
        """
        check_hooks(plugin, name)
        unique = name
        while self.manager.has_plugin(unique):
            unique += "'"
        try:
            self.manager.register(plugin, unique)
            self.manager.check_pending()
        except Exception as error:
            self.manager.unregister(name=unique)
            raise PluginError(f"plugin '{name}': {error}") from error

    def register_verifier(self, verifier: Any) -> None:
        """Registers core's verifier, which answers when nobody else does."""
        self.register(verifier, "core verifier")
        self.verifier = verifier

    def load_speculator(self, config: SpeculativeConfig, target: Any) -> RegisteredSpeculator:
        """Asks the plugin of a method for its speculator and registers it.

        Raises:
            PluginError: the method is not installed or cannot be loaded, or its plugin breaks the contract.
            ConfigurationError: the plugin does not accept its settings.
        """
        module = self._module(config.method)
        others = [
            plugin
            for plugin in dict.fromkeys(self._modules.values())
            if plugin is not module and not is_wrapper(plugin, "load_speculator")
        ]
        caller = self.manager.subset_hook_caller("load_speculator", others)
        if not has_hook(module, "load_speculator"):
            raise PluginError(f"plugin '{config.method}' has no @hookimpl function 'load_speculator'")
        try:
            instance = caller(config=config, target=target)
        except SpecplugError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin '{config.method}' failed in load_speculator: {type(error).__name__}: {error}"
            ) from error
        if instance is None:
            raise PluginError(f"plugin '{config.method}' returned no speculator from load_speculator")
        config.check_unknown_options()
        return self.add_speculator(config, instance)

    def add_speculator(self, config: SpeculativeConfig, instance: Any) -> RegisteredSpeculator:
        """Registers a speculator object."""
        name = f"speculator {config.method}"
        check_hooks(instance, config.method)
        if not has_hook(instance, "propose"):
            raise PluginError(f"plugin '{config.method}': its speculator has no @hookimpl method 'propose'")
        traits = getattr(instance, "traits", None) or SpeculatorTraits()
        if not isinstance(traits, SpeculatorTraits):
            raise PluginError(f"plugin '{config.method}': its speculator's traits are no SpeculatorTraits: {traits!r}")
        self.register(instance, name)
        self._speculators.append(instance)

        def caller(hook: str) -> Callable[..., Any]:
            def call(**kwargs: Any) -> Any:
                rest = [other for other in self._speculators if other is not instance]
                return self.manager.subset_hook_caller(hook, rest)(**kwargs)

            return call

        return RegisteredSpeculator(
            method=config.method,
            config=config,
            instance=instance,
            traits=traits,
            plan_memory=caller("plan_memory"),
            warmup=caller("warmup"),
            propose=caller("propose"),
            verify=caller("verify"),
            overrides_verify=has_hook(instance, "verify"),
        )

    def core_verify(self) -> Callable[..., Any]:
        """A caller of `verify` that reaches core's verifier and observers, and no speculator."""
        return self.manager.subset_hook_caller("verify", list(self._speculators))

    def observes(self, hook: str) -> bool:
        """Whether any module wraps a hook."""
        return any(implementation.wrapper for implementation in getattr(self.manager.hook, hook).get_hookimpls())

    def _module(self, method: str) -> Any:
        if method in self._modules:
            return self._modules[method]
        rivals = [record for record in self.records if record.method == method]
        record = next((record for record in rivals if record.status == "ok"), rivals[0] if rivals else None)
        if record is None:
            names = sorted({*self._modules, *(record.method for record in self.records if record.status == "ok")})
            installed = f"installed: {', '.join(names)}" if names else "no speculator is installed"
            package = _SHIPPED.get(method, f"specplug-{method.replace('_', '-')}")
            near = "" if method in _SHIPPED else did_you_mean(method, names)
            hint = near or f"; if a package provides it: pip install {package}"
            raise PluginError(f"no speculator named '{method}'{hint} ({installed})")
        if method in self.failures:
            last = self.failures[method].strip().splitlines()[-1]
            raise PluginError(
                f"speculator '{method}' of package {record.distribution} cannot be loaded: {last} (details: specplug list -v "
                "--check)"
            )
        status = "is unusable" if record.status == "failed" else f"is {record.status}"
        raise PluginError(f"speculator '{method}' of package {record.distribution} {status}: {record.reason}")
