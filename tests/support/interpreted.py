"""A stand-in for the compiler, for tests of what is kept and checked: a traced graph runs as it is, and compiles in no time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch

from specplug.model.compile import compiled

_KNOWN: list[torch.fx.GraphModule] = []


@attrs.frozen
class Interpreted:
    """A graph in place of its machine code; its file names it."""

    graph: torch.fx.GraphModule

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return self.graph(*tensors)

    def save(self, path: str, format: str) -> None:  # noqa: A002
        _KNOWN.append(self.graph)
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(len(_KNOWN) - 1))

    @classmethod
    def load(cls, path: str, format: str) -> Interpreted:  # noqa: A002
        with open(path, encoding="utf-8") as file:
            return cls(_KNOWN[int(file.read())])


def interpret(patch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the compiler; returns the list of graphs that it is given from now on."""
    from torch._inductor import CompiledArtifact

    made: list[Any] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Interpreted:
        made.append(graph)
        return Interpreted(graph)

    patch.setattr(compiled, "compile_graph", compile_graph)
    patch.setattr(CompiledArtifact, "load", Interpreted.load)
    return made
