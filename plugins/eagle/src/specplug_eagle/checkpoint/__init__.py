"""Draft head checkpoints in all layouts: detecting, checking, reading, writing."""

from __future__ import annotations

from specplug_eagle.checkpoint.layer_ids import ResolvedLayers, layer_id_candidates, resolve_layer_ids
from specplug_eagle.checkpoint.opened import CheckpointHandle, EagleCheckpoint
from specplug_eagle.checkpoint.target import TargetFacts, validate
from specplug_eagle.checkpoint.write import write_speculators_checkpoint

__all__ = [
    "CheckpointHandle",
    "EagleCheckpoint",
    "ResolvedLayers",
    "TargetFacts",
    "layer_id_candidates",
    "resolve_layer_ids",
    "validate",
    "write_speculators_checkpoint",
]
