"""The difference of two computations of the same tensor, and how much of it may be rounding."""

from __future__ import annotations

import torch

# Relative root-mean-square differences that rounding alone explains, for a whole forward.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The root-mean-square of ours - theirs, relative to that of theirs; infinite where it is NaN."""
    scale = theirs.double().pow(2).mean().sqrt().clamp_min(1e-30)
    change = ((ours.double() - theirs.double()).pow(2).mean().sqrt() / scale).item()
    return change if change == change else float("inf")
