"""The plugins of one engine. Each is imported when it is needed, and a failure affects no other plugin."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import pluggy

from specplug import threads
from specplug.contract.hooks import PROJECT, SpeculatorHooks, hookimpl
from specplug.contract.settings import SpeculativeConfig
from specplug.contract.types import SpeculatorTraits
from specplug.contract.verification import Verdict
from specplug.errors import PluginError, SpecplugError, did_you_mean
from specplug.plugins.calls import HookCall, Observers
from specplug.plugins.finder import PluginRecord, find_plugins
from specplug.plugins.implementations import HOOKS, check_hooks, check_module, implements_hook, touches_hook
from specplug.values import shown

logger = logging.getLogger("specplug")


@attrs.define(eq=False)
class RegisteredSpeculator:
    """A speculator of an engine, with a caller for each of its hooks.

    Attributes:
        method: the configured method.
        config: its part of the speculative configuration.
        instance: the plugin's object.
        traits: the traits that it declared.
        plan_memory: the caller of the hook; likewise `warmup`, `propose` and `verify`.
        overrides_verify: whether it implements `verify`; a wrapper does not count.
        scratch_tokens_per_row: the most scratch KV entries that it planned for a row.
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
    """Adapts a plain function of (config, target) to a plugin."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load = load

    @hookimpl
    def load_speculator(self, config: SpeculativeConfig, target: Any) -> Any:
        return self._load(config, target)


def _provided(method: str, plugin: Any) -> Any:
    """An entry of `plugins=` as a plugin.

    Raises:
        PluginError: it is neither a plugin nor a function, or it is a speculator instead of a function that returns one.
    """
    if any(touches_hook(plugin, hook) for hook in HOOKS):
        if implements_hook(plugin, "propose") and not implements_hook(plugin, "load_speculator"):
            raise PluginError(
                f"plugins['{method}'] is a speculator; give a function that returns it: lambda config, target: ..."
            )
        return plugin
    if not callable(plugin):
        raise PluginError(
            f"plugins['{method}']={shown(plugin)}: expected a function of (config, target) that returns a speculator, a "
            "module or object with @hookimpl load_speculator, or an object with wrappers alone"
        )
    return _Loader(plugin)


class PluginRegistry:
    """The plugins of one engine, in a plugin manager of its own."""

    def __init__(
        self,
        allowed: Iterable[str] | None = None,
        denied: Iterable[str] = (),
        provided: Mapping[str, Any] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Finds plugins, and loads observers.

        Args:
            allowed: see `find_plugins`.
            denied: see `find_plugins`.
            provided: method → plugin that is not installed: an object that implements `load_speculator`, a plain function
                of (config, target), or an object with wrappers alone. It takes precedence over an installed plugin of that
                name.
            strict: whether a failing observer raises; else it is switched off.
        """
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(SpeculatorHooks)
        self.records = find_plugins(allowed, denied)
        self.failures: dict[str, BaseException] = {}
        self.observers = Observers(self.manager, strict=strict)
        self._modules: dict[str, Any] = {}
        self.verifier: Any = None
        for record in self.records:
            if record.status == "ok" and record.kind == "observer":
                self.load(record)
        for method, plugin in (provided or {}).items():
            self._modules[method] = _provided(method, plugin)
            self._register_module(self._modules[method], f"provided {method}")

    def load(self, record: PluginRecord) -> Any | None:
        """Imports and registers the object of an entry point; None if that fails (see `failures`)."""
        try:
            path, _, attribute = record.module.partition(":")
            with threads.importing():
                module: Any = importlib.import_module(path)
            for name in filter(None, attribute.split(".")):
                module = getattr(module, name)
            if not self.manager.is_registered(module):
                self._register_module(module, record.distribution)
            return module
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too, and what extension modules derive from BaseException
            self.failures[record.method] = error
            log = logger.warning if record.kind == "observer" else logger.info  # using the speculator raises the error
            log(
                "%s '%s' of package %s cannot be loaded: %s",
                "observer" if record.kind == "observer" else "plugin",
                record.method,
                record.distribution,
                first_line(error),
            )
            return None

    def plugin(self, method: str) -> Any | None:
        """The registered plugin of a method: a module, or the object that its entry point names; None if it is not loaded."""
        if method not in self._modules and method not in self.failures:
            usable = (r for r in self.records if (r.method, r.status, r.kind) == (method, "ok", "speculator"))
            record = next(usable, None)
            module = None if record is None else self.load(record)
            if module is not None:
                self._modules[method] = module
        return self._modules.get(method)

    def _register_module(self, plugin: Any, name: str) -> None:
        check_module(plugin, name)
        self.register(plugin, name)

    def register(self, plugin: Any, name: str) -> None:
        """Checks the hooks of a module or object and registers it; nothing stays registered if a check fails.

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

    def check(self, config: SpeculativeConfig | None) -> None:
        """Refuses errors in a configuration and its fallbacks that are known without a target.

        Raises:
            PluginError: a method is not installed or cannot be loaded.
            ConfigurationError: the plugin has an attribute `settings_class`, and the settings do not fit that class.
        """
        while config is not None:
            settings = getattr(self._module(config.method), "settings_class", None)
            if isinstance(settings, type) and attrs.has(settings):
                attrs.evolve(config).settings(settings)
            config = config.fallback

    def register_verifier(self, verifier: Any) -> None:
        """Registers core's verifier, the last implementation of `verify`."""
        self.register(verifier, "core verifier")
        self.verifier = verifier

    def load_speculator(self, config: SpeculativeConfig, target: Any) -> RegisteredSpeculator:
        """Makes the speculator of a method and registers it.

        Raises:
            PluginError: the method is not installed or cannot be loaded, or its plugin violates the contract.
            ConfigurationError: the plugin does not accept its settings.
        """
        module = self._module(config.method)
        if not implements_hook(module, "load_speculator"):
            raise PluginError(f"plugin '{config.method}' has no @hookimpl function 'load_speculator'")
        try:
            instance = self._call("load_speculator", config.method, module)(config=config, target=target)
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
        if not implements_hook(instance, "propose"):
            raise PluginError(f"plugin '{config.method}': its speculator has no @hookimpl method 'propose'")
        traits = _traits_of(instance, config.method)
        self.register(instance, name)
        return RegisteredSpeculator(
            method=config.method,
            config=config,
            instance=instance,
            traits=traits,
            plan_memory=self._call("plan_memory", config.method, instance),
            warmup=self._call("warmup", config.method, instance),
            propose=self._call("propose", config.method, instance),
            verify=self._call("verify", config.method, instance),
            overrides_verify=implements_hook(instance, "verify"),
        )

    def core_verify(self) -> Callable[..., Any]:
        """A caller of `verify` for core's verifier and observers, without any speculator."""
        return self._call("verify", "core verifier", self.verifier)

    def observes(self, hook: str) -> bool:
        """Whether an observer wraps a hook."""
        return bool(self.observers.around(hook))

    def _call(self, hook: str, name: str, plugin: Any) -> HookCall:
        own = self._implementations(hook, plugin)
        if hook != "verify":
            return HookCall(hook, name, lambda: own, self.observers)

        def with_core() -> Sequence[pluggy.HookImpl]:  # a function: core's verifier is registered last
            return own if plugin is self.verifier else [*own, *self._implementations(hook, self.verifier)]

        return HookCall(hook, name, with_core, self.observers, freeze=_frozen)

    def _implementations(self, hook: str, plugin: Any) -> Sequence[pluggy.HookImpl]:
        found = getattr(self.manager.hook, hook).get_hookimpls()
        return [each for each in found if each.plugin is plugin and not each.wrapper]

    def _module(self, method: str) -> Any:
        if self.plugin(method) is not None:
            return self._modules[method]
        rivals = [record for record in self.records if (record.method, record.kind) == (method, "speculator")]
        record = next((record for record in rivals if record.status == "ok"), rivals[0] if rivals else None)
        if record is None:
            usable = (r.method for r in self.records if (r.status, r.kind) == ("ok", "speculator"))
            names = sorted({*self._modules, *usable})
            installed = f"installed: {', '.join(names)}" if names else "no speculator is installed"
            hint = did_you_mean(method, names) or f"; if a package provides it: pip install {_usual_package(method)}"
            raise PluginError(f"no speculator named '{method}'{hint} ({installed})")
        if method in self.failures:
            raise PluginError(
                f"speculator '{method}' of package {record.distribution} cannot be loaded: "
                f"{first_line(self.failures[method])} (details: specplug list -v --check)"
            )
        status = "is unusable" if record.status == "failed" else f"is {record.status}"
        raise PluginError(f"speculator '{method}' of package {record.distribution} {status}: {record.reason}")


def _usual_package(method: str) -> str:
    """Returns the name that the package of a method has by convention; versions of a method share a package."""
    return f"specplug-{method.rstrip('0123456789').rstrip('_') or method}".replace("_", "-")


def _traits_of(instance: Any, method: str) -> SpeculatorTraits:
    """The traits of a speculator.

    Raises:
        PluginError: its attribute `traits` is not a `SpeculatorTraits`, or raises.
    """
    try:
        traits = getattr(instance, "traits", None)
    except Exception as error:
        raise PluginError(
            f"plugin '{method}' failed in its attribute `traits`: {type(error).__name__}: {error}"
        ) from error
    if traits is None:
        return SpeculatorTraits()
    if not isinstance(traits, SpeculatorTraits):
        raise PluginError(
            f"plugin '{method}': its speculator's `traits` must be a SpeculatorTraits, not {shown(traits)}"
        )
    return traits


def _frozen(verdict: Any) -> Any:
    """An immutable copy of a verdict."""
    if not isinstance(verdict, Verdict):
        return verdict
    return Verdict(tuple(tuple(path) for path in verdict.accepted), tuple(verdict.next_tokens))


def first_line(error: BaseException) -> str:
    """An exception in one line: its type, unless it is specplug's own, and the first line of its message."""
    try:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
    except Exception:  # str() of an exception can raise
        lines = []
    text = "".join(letter for letter in lines[0].strip() if letter.isprintable()) if lines else ""
    if isinstance(error, SpecplugError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
