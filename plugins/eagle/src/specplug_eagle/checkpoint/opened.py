"""A draft head checkpoint: its specification from headers, and later the head itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch

from specplug import CheckpointError
from specplug_eagle.checkpoint.config import DraftConfig
from specplug_eagle.checkpoint.detect import detect
from specplug_eagle.checkpoint.keys import canonical_names
from specplug_eagle.checkpoint.vocabulary import read_draft_to_target
from specplug_eagle.head.model import DraftHead, check_tensors
from specplug_eagle.head.spec import HeadSpec

_MAPS = ("d2t", "t2d")
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CheckpointHandle(Protocol):
    """The part of `specplug.WeightsHandle` that is used here."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def config(self) -> Mapping[str, Any]:
        """The JSON of config.json."""
        ...


@attrs.frozen
class EagleCheckpoint:
    """A draft head on disk.

    Attributes:
        spec: the head's specification.
        names: the file's names of all needed tensors, by canonical name. Pass them to the handle's `keep`, so that no other
            tensor is planned or loaded.
        warnings: warnings for the user.
    """

    spec: HeadSpec
    names: Mapping[str, str]
    warnings: tuple[str, ...]

    @classmethod
    def open(
        cls,
        handle: CheckpointHandle,
        *,
        norm_before_residual: bool | None = None,
        norm_output: bool | None = None,
        rope_theta: float | None = None,
    ) -> EagleCheckpoint:
        """Reads configuration and headers, no weights.

        Args:
            handle: the checkpoint, as `target.weights(source)` returns it.
            norm_before_residual: override of a flag that tensors do not show.
            norm_output: override, likewise.
            rope_theta: override of the RoPE base.

        Raises:
            CheckpointError: it is not an EAGLE head or an unsupported variant, tensors are missing, unknown or wrongly shaped,
                or the configuration contradicts the tensors.
        """
        try:
            names = canonical_names(handle.shapes)
            shapes = {name: tuple(handle.shapes[original]) for name, original in names.items()}
            for name, shape in shapes.items():
                if 0 in shape:
                    raise CheckpointError(f"'{name}' has the shape {list(shape)}: it is empty")
            spec, warnings = detect(
                DraftConfig.parse(handle.config),
                shapes,
                norm_before_residual=norm_before_residual,
                norm_output=norm_output,
                rope_theta=rope_theta,
            )
            check_tensors(spec, {name: shape for name, shape in shapes.items() if name not in _MAPS})
            for name, original in names.items():
                _check_dtype(name, handle.dtypes[original])
        except CheckpointError as error:
            raise CheckpointError(f"{handle.folder}: {error}") from error
        if spec.draft_vocab_size == spec.vocab_size:
            names = {name: original for name, original in names.items() if name != "t2d"}
        return cls(spec, names, warnings)

    def build(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[DraftHead, tuple[str, ...]]:
        """Makes the head from loaded tensors, without a copy.

        Args:
            tensors: the handle's tensors, by the file's names.
            embed: the target's embedding, for a head without its own.
            logits: the target's output layer, for a head without its own.

        Returns:
            The head, and warnings about the tensors' values.

        Raises:
            CheckpointError: a vocabulary map is invalid.
        """
        renamed = {name: tensors[original] for name, original in self.names.items()}
        d2t, t2d = (renamed.pop(name, None) for name in _MAPS)
        draft_to_target, warnings = read_draft_to_target(self.spec, d2t, t2d)
        head = DraftHead.from_tensors(self.spec, renamed, embed=embed, logits=logits, draft_to_target=draft_to_target)
        return head, warnings


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if name in _MAPS:
        if dtype.is_floating_point:
            raise CheckpointError(f"'{name}' is {dtype}; integers are expected".replace("torch.", ""))
    elif dtype not in _FLOATING:
        raise CheckpointError(
            f"'{name}' is {dtype}, but weights in float64, float32, float16 or bfloat16 are expected".replace(
                "torch.", ""
            )
        )
