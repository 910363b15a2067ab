"""The target states that an EAGLE-3 head reads: the two conventions for layer ids, and how to distinguish them.

A *boundary* b is the input of target layer b, which is the output of layer b − 1; boundary L is the last layer's output. Some
tools write boundaries (the authors, vLLM, speculators), others the layer whose *output* is read (SpecForge, ModelOpt): there
boundary = id + 1. With a wrong guess drafting works, with about half the acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs

from specplug import ConfigurationError
from specplug_eagle.head.spec import HeadSpec

Convention = Literal["boundary", "output"]


@attrs.frozen
class ResolvedLayers:
    """The target states to capture.

    Attributes:
        boundaries: ascending, one for each state that `fc` reads.
        convention: the convention of the ids.
        ambiguous: whether the other convention is as likely; measure acceptance with both.
        reason: why this convention was chosen.
    """

    boundaries: tuple[int, ...]
    convention: Convention
    ambiguous: bool
    reason: str


def default_boundaries(num_layers: int) -> tuple[int, ...]:
    """The authors' choice: a low, a middle and a high state."""
    return tuple(sorted((2, num_layers // 2, num_layers - 3)))


def resolve_layer_ids(
    spec: HeadSpec,
    num_layers: int,
    *,
    override: Sequence[int] | None = None,
    convention: Convention | None = None,
) -> ResolvedLayers:
    """Determines the boundaries that a head was trained on.

    Args:
        spec: the head.
        num_layers: layers of the target.
        override: the user's ids instead of the checkpoint's; boundaries unless `convention` is given.
        convention: the user's choice of the convention.

    Returns:
        The boundaries; none for a head that reads only the final state.

    Raises:
        ConfigurationError: ids are beyond the target's layers, repeated, or not as many as `fc` reads.
    """
    if spec.uses_final_state:
        if override is not None:
            raise ConfigurationError("this head reads the target's final state; it takes no layer ids")
        return ResolvedLayers((), "boundary", False, "the head reads the target's final state")
    ids = spec.layer_ids if override is None else tuple(override)
    if ids is None:
        chosen, ambiguous, reason = "boundary", False, "the checkpoint names no layer ids: the authors' default"
        ids = default_boundaries(num_layers)
        if ids[0] < 0 or len(set(ids)) < len(ids):
            raise ConfigurationError(
                f"the target's {num_layers} layers are too few for the default layer ids ({', '.join(map(str, ids))}); "
                "give eagle_aux_hidden_state_layer_ids"
            )
    elif convention is not None:
        chosen, ambiguous, reason = convention, False, "the convention was given"
    elif override is not None:
        chosen, ambiguous, reason = "boundary", False, "the layer ids were given"
    else:
        chosen, ambiguous, reason = _guess(spec, sorted(ids), num_layers)
    shift = 1 if chosen == "output" else 0
    boundaries = tuple(sorted(i + shift for i in ids))
    _check(boundaries, ids, shift, spec, num_layers)
    return ResolvedLayers(boundaries, "output" if shift else "boundary", ambiguous, reason)


def layer_id_candidates(spec: HeadSpec, num_layers: int) -> list[ResolvedLayers]:
    """All interpretations of a checkpoint's layer ids that the target allows, the most likely first; for calibration."""
    first = resolve_layer_ids(spec, num_layers)
    candidates = [first]
    if spec.layer_ids is not None and not spec.uses_final_state:
        for convention in ("boundary", "output"):
            if convention == first.convention:
                continue
            try:
                candidates.append(resolve_layer_ids(spec, num_layers, convention=convention))
            except ConfigurationError:  # it would be beyond the last layer
                continue
    return candidates


def _guess(spec: HeadSpec, ids: list[int], num_layers: int) -> tuple[Convention, bool, str]:
    if spec.layout == "speculators":
        return "boundary", False, "the speculators format states boundaries"
    if ids[-1] >= num_layers:
        return "boundary", False, f"id {ids[-1]} can only be the boundary after the last layer"
    if ids == list(default_boundaries(num_layers)):
        return "boundary", False, "the ids are the authors' default boundaries"
    if ids == sorted((1, num_layers // 2 - 1, num_layers - 4)):
        return "output", False, "the ids are the usual layer outputs of SpecForge and ModelOpt"
    if ids[0] == 1:
        return "output", False, "ids that begin with 1 are layer outputs"
    return "boundary", True, "the ids may be boundaries or layer outputs"


def _check(boundaries: Sequence[int], ids: Sequence[int], shift: int, spec: HeadSpec, num_layers: int) -> None:
    listed = ", ".join(map(str, ids))
    if len(ids) != spec.num_aux_states:
        raise ConfigurationError(
            f"{len(ids)} target layer ids ({listed}) were given, but the head's fc takes {spec.num_aux_states} states"
        )
    if boundaries[-1] > num_layers or boundaries[0] < 0:
        wrong = max(ids) if boundaries[-1] > num_layers else min(ids)
        kind = "outputs of layers" if shift else "boundaries"
        raise ConfigurationError(
            f"target layer id {wrong} does not exist: the target has {num_layers} layers, and the ids ({listed}) are "
            f"{kind}, 0 to {num_layers - shift}; is this head for another target?"
        )
    if len(set(boundaries)) < len(boundaries):
        raise ConfigurationError(
            f"the target layer ids ({listed}) name a state twice, for a target of {num_layers} layers; give "
            "eagle_aux_hidden_state_layer_ids"
        )
