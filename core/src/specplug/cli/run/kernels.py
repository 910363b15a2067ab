"""The first words do not wait for a compiler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specplug.cli.terminal import Terminal

_WITHOUT_KERNELS = (
    "The native kernels are being compiled in the background, once. This run uses PyTorch's; later ones are faster."
)


def start_without_kernels(engine: Mapping[str, Any], err: Terminal, *, quiet: bool) -> None:
    """Where the native kernels must be compiled first, has this process begin with those of PyTorch.

    Args:
        engine: keywords of the engine; with `compile` the kernels are waited for.
        err: receives a line that says so.
        quiet: say nothing.
    """
    from specplug import native
    from specplug.model.device import choose_device

    if engine.get("compile") or choose_device(engine.get("device", "auto")).type != "cpu":
        return
    if native.go_without() and not quiet:
        err.paragraph(_WITHOUT_KERNELS, style="dim")
