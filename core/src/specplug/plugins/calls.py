"""Calls a hook of one plugin, with the observers around it. Observers cannot change the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import attrs
import pluggy

from specplug.errors import PluginError

logger = logging.getLogger("specplug")


class Observers:
    """The hook wrappers of one engine. A wrapper that fails is switched off, and a warning names it.

    Unlike in pluggy, a wrapper cannot change the result: the engine uses what the hook returned, whatever a wrapper returns
    or raises.

    Args:
        manager: the engine's plugin manager.
        strict: whether a failure raises instead.
    """

    def __init__(self, manager: pluggy.PluginManager, *, strict: bool) -> None:
        self._manager = manager
        self._strict = strict
        self._off: list[Any] = []

    def around(self, hook: str) -> list[pluggy.HookImpl]:
        """The wrappers of a hook. The outermost, registered last, is first."""
        implementations: list[pluggy.HookImpl] = getattr(self._manager.hook, hook).get_hookimpls()
        return [each for each in reversed(implementations) if each.wrapper and each.plugin not in self._off]

    def fault(self, wrapper: pluggy.HookImpl, hook: str, what: str, error: BaseException | None = None) -> None:
        """Switches a wrapper's plugin off.

        Raises:
            PluginError: the engine is strict.
        """
        name = self._manager.get_name(wrapper.plugin) or wrapper.plugin_name
        text = f"observer '{name}' {what} in its wrapper of {hook}"
        if self._strict:
            raise PluginError(text) from error
        self._off.append(wrapper.plugin)
        logger.warning("%s; it is switched off (drafts and output are not affected)", text, exc_info=error)


@attrs.frozen(eq=False)
class HookCall:
    """A caller of one hook of one plugin.

    Attributes:
        name: the hook's name.
        plugin: the plugin's name, for messages.
        own: returns the implementations to call in turn until one returns a result: the plugin's, and for `verify` core's.
        observers: the wrappers to run around the call.
        freeze: makes a result immutable before observers see it; None if that is not needed.
    """

    name: str
    plugin: str
    own: Callable[[], Sequence[pluggy.HookImpl]]
    observers: Observers
    freeze: Callable[[Any], Any] | None = None

    def __call__(self, **arguments: Any) -> Any:
        """Calls the hook.

        Raises:
            PluginError: the plugin's function raised a BaseException that is not an Exception, such as SystemExit.
            Exception: the plugin's function raised it.
        """
        wrappers = self.observers.around(self.name)
        if not wrappers:
            return self._call_own(arguments)
        entered = [(each, self._enter(each, arguments)) for each in wrappers]
        running = [(each, generator) for each, generator in entered if generator is not None]
        try:
            result = self._call_own(arguments)
        except Exception as error:
            for wrapper, generator in reversed(running):
                self._leave(wrapper, partial(generator.throw, error), None, raised=error)
            raise
        if self.freeze is not None:
            result = self.freeze(result)
        for wrapper, generator in reversed(running):
            self._leave(wrapper, partial(generator.send, result), result)
        return result

    def _call_own(self, arguments: dict[str, Any]) -> Any:
        try:
            for own in self.own():
                result = own.function(*(arguments[name] for name in own.argnames))
                if result is not None:
                    return result
            return None
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            what = f"{type(error).__name__}: {error}"
            raise PluginError(f"plugin '{self.plugin}' tried to end the process in {self.name} ({what})") from error

    def _enter(self, wrapper: pluggy.HookImpl, arguments: dict[str, Any]) -> Generator[Any, Any, Any] | None:
        """Runs a wrapper up to its `yield`. Returns None if it does not reach it."""
        try:
            generator: Any = wrapper.function(*(arguments[name] for name in wrapper.argnames))
            next(generator)
        except KeyboardInterrupt:
            raise
        except StopIteration:
            self.observers.fault(wrapper, self.name, "did not yield")
        except BaseException as error:
            self.observers.fault(wrapper, self.name, f"raised {type(error).__name__}: {error}", error)
        else:
            return generator
        return None

    def _leave(
        self, wrapper: pluggy.HookImpl, resume: Callable[[], Any], result: Any, raised: Exception | None = None
    ) -> None:
        """Runs a wrapper from its `yield` to its end."""
        try:
            resume()
        except KeyboardInterrupt:
            raise
        except StopIteration as stop:
            if raised is None and stop.value is not result:
                kind = type(stop.value).__name__
                self.observers.fault(wrapper, self.name, f"returned a different object ({kind}) than `yield` gave")
        except BaseException as error:
            if error is not raised:
                self.observers.fault(wrapper, self.name, f"raised {type(error).__name__}: {error}", error)
        else:
            self.observers.fault(wrapper, self.name, "yielded twice")
