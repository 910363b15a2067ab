"""The hook implementations of a plugin: finding and checking them."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from specplug.contract.hooks import PROJECT, SpeculatorHooks
from specplug.errors import PluginError, did_you_mean
from specplug.version import __version__

HOOKS = ("load_speculator", "plan_memory", "warmup", "propose", "verify")


def check_hooks(plugin: Any, name: str) -> None:
    """Refuses implementations that pluggy would accept and never call as meant, or refuse with a vaguer message.

    Raises:
        PluginError: a class instead of an object, an unhashable object, an old-style wrapper, a hook or argument that is
            not in the specifications, or an argument that pluggy would never pass.
    """
    if inspect.isclass(plugin):
        raise PluginError(f"plugin '{name}' is the class {plugin.__name__}; register an instance of it")
    try:
        hash(plugin)
    except TypeError as error:
        raise PluginError(f"plugin '{name}' is not hashable; define its class with eq=False") from error
    for attribute, function, options in hook_functions(plugin):
        where = f"plugin '{name}', hook '{attribute}'"
        if options.get("hookwrapper"):
            raise PluginError(
                f"{where}: old-style hookwrapper=True is not supported; use wrapper=True and return (yield)"
            )
        hook = options.get("specname") or attribute
        if not hasattr(SpeculatorHooks, hook):
            if options.get("optionalhook"):
                continue  # a hook of another version of core
            raise PluginError(f"{where}: there is no such hook{did_you_mean(hook, HOOKS)} (hooks: {', '.join(HOOKS)})")
        known = list(inspect.signature(getattr(SpeculatorHooks, hook)).parameters)[1:]
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in known:
                raise PluginError(
                    f"{where}: there is no argument '{parameter.name}' in specplug {__version__}"
                    f"{did_you_mean(parameter.name, known)} (arguments: {', '.join(known)})"
                )
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise PluginError(
                    f"{where}: keyword-only argument '{parameter.name}' is never passed; make it positional"
                )
            if parameter.default is not parameter.empty:
                raise PluginError(
                    f"{where}: argument '{parameter.name}' has a default, so it is never passed; remove it"
                )


def hook_functions(plugin: Any) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, function, options) of every hook implementation of a module or object."""
    found = []
    names = vars(plugin) if isinstance(plugin, ModuleType) else dir(type(plugin))
    for attribute in names:
        if attribute.startswith("__"):
            continue
        static = inspect.getattr_static(plugin, attribute, None)
        if isinstance(static, property):
            continue
        options = getattr(getattr(plugin, attribute, None), f"{PROJECT}_impl", None)
        if isinstance(options, dict):
            found.append((attribute, getattr(plugin, attribute), options))
    return found


def touches_hook(plugin: Any, hook: str) -> bool:
    """Whether the plugin implements or wraps a hook."""
    return any((options.get("specname") or name) == hook for name, _, options in hook_functions(plugin))


def implements_hook(plugin: Any, hook: str) -> bool:
    """Whether the plugin implements a hook itself; a wrapper does not count."""
    return any(
        (options.get("specname") or name) == hook and not options.get("wrapper")
        for name, _, options in hook_functions(plugin)
    )


def check_module(plugin: Any, name: str) -> None:
    """Refuses a module, or an object in its place, with hooks that core would never call.

    Raises:
        PluginError: it implements a hook that belongs to the object that `load_speculator` returns, or no hook at all.
    """
    check_hooks(plugin, name)
    found = hook_functions(plugin)
    for attribute, _, options in found:
        hook = options.get("specname") or attribute
        if hook in HOOKS and hook != "load_speculator" and not options.get("wrapper"):
            raise PluginError(
                f"plugin '{name}' implements '{hook}' in its module; make it a method of the object that "
                f"load_speculator returns, or a wrapper (wrapper=True) to observe"
            )
    if not any((options.get("specname") or attribute) in HOOKS for attribute, _, options in found):
        raise PluginError(f"plugin '{name}' implements no hook (load_speculator is needed)")


def own_verifiers(plugin: Any) -> tuple[str, ...]:
    """The classes that implement `verify` in the imported modules of a plugin's package, without making a speculator.

    What `load_speculator` will return is unknown without a configuration and a target. An engine marks results by what it
    loaded.
    """
    name = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__
    module = sys.modules.get(name)
    package = getattr(module, "__package__", None) or name
    if package == PROJECT:  # core's own package, which contains core's verifier
        package = name
    found = set()
    for each, part in list(sys.modules.items()):
        if part is not None and (each == package or each.startswith(f"{package}.")):
            for value in list(vars(part).values()):
                if inspect.isclass(value) and value.__module__ == each and _implements_verify(value):
                    found.add(f"{each}.{value.__qualname__}")
    return tuple(sorted(found))


def _implements_verify(cls: type) -> bool:
    for name in dir(cls):
        options = getattr(inspect.getattr_static(cls, name, None), f"{PROJECT}_impl", None)
        if isinstance(options, dict) and (options.get("specname") or name) == "verify" and not options.get("wrapper"):
            return True
    return False
