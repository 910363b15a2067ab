"""A limit of the time that `propose` may take, for engines that must go on when it does not return."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import attrs
import torch

from specplug.errors import PluginError
from specplug.model.torch_state import own_torch_state


class NotReturnedError(PluginError):
    """`propose` did not return in time. Its thread cannot be ended, so the speculator is not called again."""


@attrs.define(eq=False)
class _Call:
    """One call, on its way to the thread and back."""

    arguments: dict[str, Any]
    stream: Any = None
    result: Any = None
    error: BaseException | None = None
    done: threading.Event = attrs.field(factory=threading.Event)


class Deadline:
    """Calls a function in a thread of its own, and waits for it no longer than a limit.

    All calls run in one thread, in order. A call that is late is left to itself: its result is thrown away. Python code can
    be left so, and native code that releases the GIL; native code that holds the GIL for ever stops the process, whatever
    thread it runs in.

    Args:
        function: what is called.
        seconds: the limit of one call.
        name: of the speculator, for messages.
    """

    def __init__(self, function: Callable[..., Any], seconds: float, name: str) -> None:
        self._function = function
        self._seconds = seconds
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late = False

    def __call__(self, **arguments: Any) -> Any:
        """Calls the function.

        Raises:
            NotReturnedError: it did not return in time, now or before.
            Exception: the function raised it.
        """
        if self._late:
            raise NotReturnedError(f"speculator '{self._name}' has not returned from an earlier call")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"specplug {self._name}", daemon=True)
            self._thread.start()
        call = _Call(arguments, torch.cuda.current_stream() if torch.cuda.is_initialized() else None)
        self._calls.put(call)
        if not call.done.wait(self._seconds):
            self._late = True
            self.close()
            raise NotReturnedError(f"propose did not return within {self._seconds:g} s")
        if call.error is not None:
            raise call.error
        return call.result

    def close(self) -> None:
        """Ends the thread once the function has returned."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                with ExitStack() as stack:
                    stack.enter_context(own_torch_state())
                    if call.stream is not None:
                        stack.enter_context(torch.cuda.stream(call.stream))
                    call.result = self._function(**call.arguments)
            except BaseException as error:
                call.error = error
            call.done.set()
            del call  # or its tensors would live until the next call
