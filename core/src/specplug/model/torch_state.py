"""PyTorch's settings of the calling thread during an engine's calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode


@contextmanager
def own_torch_state() -> Iterator[None]:
    """No autograd, no autocast, no inference mode and no function modes (a default device, say).

    All of these belong to the thread. The default dtype and deterministic algorithms belong to the process and stay: every
    factory call names its dtype. Costs one or two microseconds where the caller has set nothing.
    """
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        if torch.is_inference_mode_enabled() or torch._C._is_any_autocast_enabled():
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                for kind in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(kind):
                        stack.enter_context(torch.autocast(kind, enabled=False))
                with torch.no_grad():
                    yield
        elif torch.is_grad_enabled():
            torch._C._set_grad_enabled(False)
            try:
                yield
            finally:
                torch._C._set_grad_enabled(True)
        else:
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
