"""The state that an interrupted run continues from: one file, replaced only by a complete one."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import ConfigurationError

NAME = "state.pt"


@attrs.define
class Position:
    """The position of a run.

    Attributes:
        epoch: the current epoch.
        group: the next optimiser step within it.
        step: optimiser steps done in all.
        seconds: the time they took.
    """

    epoch: int = 0
    group: int = 0
    step: int = 0
    seconds: float = 0.0


def save_state(
    folder: Path,
    run: Mapping[str, str],
    position: Position,
    head: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
) -> None:
    """Saves the state of a run."""
    state = {
        "run": dict(run),
        "position": attrs.asdict(position),
        "head": head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{NAME}.part"
    torch.save(state, part)
    part.replace(folder / NAME)


def load_state(
    folder: Path, run: Mapping[str, str], head: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Position, list[dict[str, Any]]] | None:
    """Restores a run.

    Args:
        folder: where it was saved.
        run: fingerprints, by name, of everything that must be unchanged.
        head: receives the parameters.
        optimizer: receives its state.

    Returns:
        The position and the history; None if nothing was saved.

    Raises:
        ConfigurationError: the file is damaged, or belongs to another run; the message names the difference.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved = state["run"]
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigurationError(f"{file} is damaged; delete it to start anew") from error
    other = [name for name, value in run.items() if saved.get(name) != value]
    if other:
        raise ConfigurationError(
            f"{file} was saved by a run with other settings ({', '.join(other)}); give the same ones, or another --out"
        )
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Position(**state["position"]), state["history"]
