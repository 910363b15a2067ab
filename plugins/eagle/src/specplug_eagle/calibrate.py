"""Measures how a head's files are meant: `python -m specplug_eagle.calibrate --target … --head …`.

A checkpoint does not always say which target states it reads, whether the next step is fed the normed state, or which base its
rotary embedding was trained with. A wrong reading loads without complaint and drafts badly. Here every reading drafts along
texts that the target wrote, and the one whose most likely tokens agree best with the target's is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.table import Table

from specplug import ConfigurationError, SpecplugError
from specplug_eagle.checkpoint import EagleCheckpoint, ResolvedLayers, layer_id_candidates
from specplug_eagle.checkpoint.rope import DEFAULT_THETA
from specplug_eagle.train.batches import Batch, collate, fill
from specplug_eagle.train.data import Sample, read_prompts
from specplug_eagle.train.evaluate import evaluate
from specplug_eagle.train.folder import HeadFolder
from specplug_eagle.train.regenerate import Writing, continue_texts
from specplug_eagle.train.states import StateSource
from specplug_eagle.train.target import States, Target

STEPS = 3
_BATCH_TOKENS = 4096
_TABLE_WIDTH = 120
_PROMPTS = (
    "The quick way to sort a list of words in Python is",
    "def fibonacci(n):\n    ",
    "In the beginning of the twentieth century, physicists believed that",
    "1. Boil the water.\n2. ",
)


@attrs.frozen
class Reading:
    """One way to read a checkpoint.

    Attributes:
        layers: the target states, and the convention that gives them.
        norm_output: whether the next step is fed the normed state.
        norm_before_residual: whether the residual starts from the normed state.
        rope_theta: base of the rotary embedding.
    """

    layers: ResolvedLayers
    norm_output: bool
    norm_before_residual: bool
    rope_theta: float


@attrs.frozen
class Measured:
    """A reading and how well it drafts.

    Attributes:
        reading: the reading.
        agreement: for draft steps 0, 1 and 2: how often draft and target have the same most likely token.
        length: mean acceptance length of greedy chains of these steps, bonus token included.
    """

    reading: Reading
    agreement: tuple[float, ...]
    length: float


def readings(folder: HeadFolder, num_layers: int) -> list[Reading]:
    """All readings worth measuring; the first is what the checkpoint's own configuration amounts to."""
    spec = EagleCheckpoint.open(folder).spec
    thetas = dict.fromkeys((spec.rope.theta, DEFAULT_THETA))
    flags = [(spec.norm_output, spec.norm_before_residual)]
    if spec.family == "eagle3":
        flags = [
            (output ^ spec.norm_output, residual ^ spec.norm_before_residual)
            for residual in (False, True)
            for output in (False, True)
        ]
    return [
        Reading(layers, output, residual, theta)
        for layers in layer_id_candidates(spec, num_layers)
        for theta in thetas
        for output, residual in flags
    ]


def calibrate(target: Target, folder: HeadFolder, texts: Sequence[Sample]) -> list[Measured]:
    """Measures every reading on texts of the target, the best first; the checkpoint's own comes first among equals.

    Raises:
        CheckpointError: not an EAGLE head, or a damaged one.
        ConfigurationError: a head for another target, or texts too short to measure on.
    """
    indices = fill(range(len(texts)), [len(text) for text in texts], _BATCH_TOKENS)
    batches = [collate(texts, some, target.device) for some in indices]
    found = []
    for reading in readings(folder, target.num_layers):
        head = folder.head(
            target,
            norm_output=reading.norm_output,
            norm_before_residual=reading.norm_before_residual,
            rope_theta=reading.rope_theta,
        )
        source: StateSource = _FinalState(target) if head.spec.uses_final_state else _Live(target, reading.layers)
        acceptance = evaluate(head, target, source, batches, STEPS)
        if not acceptance.rows:
            raise ConfigurationError(
                f"the target's texts are too short to measure on; {STEPS + 1} tokens are the least"
            )
        found.append(Measured(reading, acceptance.agreement, acceptance.greedy_length))
    return sorted(found, key=lambda measured: -measured.length)


def settings(best: Measured, own: Reading) -> dict[str, Any]:
    """The keys of `speculative_config` that make the engine read a checkpoint so; those that change nothing are left out."""
    keys: dict[str, Any] = {}
    if best.reading.layers.boundaries != own.layers.boundaries:
        keys["layer_id_convention"] = best.reading.layers.convention
    for name in ("norm_output", "norm_before_residual", "rope_theta"):
        if getattr(best.reading, name) != getattr(own, name):
            keys[name] = getattr(best.reading, name)
    return keys


def write_texts(target: Target, prompts: Sequence[Sequence[int]], tokens: int) -> list[Sample]:
    """Lets the target continue prompts greedily until there are about `tokens` new ones; only those count."""
    each = max(STEPS + 2, -(-tokens // len(prompts)))
    texts = []
    for prompt, answer in zip(prompts, continue_texts(target, prompts, Writing(max_tokens=each)), strict=True):
        ids = torch.tensor([*prompt, *answer], dtype=torch.int32, device="cpu")
        texts.append(Sample(ids, torch.arange(len(ids), dtype=torch.int64, device="cpu") >= len(prompt)))
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        folder = HeadFolder(args.head)
        EagleCheckpoint.open(folder)  # a bad head is told before a large target is loaded
        target = Target.load(args.target, dtype=args.dtype, device=args.device)
        texts = write_texts(target, _prompts(args.prompts, target), args.tokens)
        found = calibrate(target, folder, texts)
        own = readings(folder, target.num_layers)[0]
    except SpecplugError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(_report(found, own), indent=2))
    else:
        _show(found, own)
    return 0


class _Live:
    """Target states at the boundaries of a reading."""

    def __init__(self, target: Target, layers: ResolvedLayers) -> None:
        self._target, self._boundaries = target, layers.boundaries

    def __call__(self, batch: Batch) -> States:
        return self._target.states(batch.ids, self._boundaries)


class _FinalState:
    """For heads that read the target's final state alone."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, batch: Batch) -> States:
        final = self._target.states(batch.ids, (0,)).final
        return States(final, final)


def _prompts(file: Path | None, target: Target) -> list[list[int]]:
    if file is not None:
        return read_prompts(file, target.tokenizer, 64)
    if target.tokenizer is None:
        raise ConfigurationError("the target has no tokenizer; give --prompts with input_ids")
    return [target.tokenizer(prompt).input_ids for prompt in _PROMPTS]


def _report(found: Sequence[Measured], own: Reading) -> dict[str, Any]:
    return {"readings": [_row(measured, own) for measured in found], "settings": settings(found[0], own)}


def _row(measured: Measured, own: Reading) -> dict[str, Any]:
    reading = measured.reading
    return {
        "boundaries": list(reading.layers.boundaries),
        "layer_id_convention": reading.layers.convention,
        "norm_output": reading.norm_output,
        "norm_before_residual": reading.norm_before_residual,
        "rope_theta": reading.rope_theta,
        "agreement": [round(value, 4) for value in measured.agreement],
        "acceptance_length": round(measured.length, 4),
        "as_configured": reading == own,
    }


def _show(found: Sequence[Measured], own: Reading) -> None:
    table = Table(box=None)
    for name in ("", "target states", "norm_output", "norm_before_residual", "rope_theta"):
        table.add_column(name, no_wrap=True)
    for name in (*(f"step {step}" for step in range(STEPS)), "length"):
        table.add_column(name, justify="right", no_wrap=True)
    for measured in found:
        reading = measured.reading
        states = ", ".join(map(str, reading.layers.boundaries)) or "final"
        values = (*(f"{value:.1%}" for value in measured.agreement), f"{measured.length:.2f}")
        flags = (str(reading.norm_output).lower(), str(reading.norm_before_residual).lower())
        table.add_row("as configured" if reading == own else "", states, *flags, f"{reading.rope_theta:g}", *values)
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    console.print(table)
    keys = settings(found[0], own)
    if keys:
        console.print(
            f"best: set in speculative_config {json.dumps(keys)}", markup=False, highlight=False, soft_wrap=True
        )
    else:
        console.print("best: as configured; nothing to set")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specplug_eagle.calibrate",
        description="Measures which reading of a draft head's files drafts best for a target.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="folder or hub name of a causal LM, or tiny")
    parser.add_argument("--head", required=True, help="folder or hub name of the draft head")
    parser.add_argument("--prompts", type=Path, help="JSON lines, as for training; a few built-in ones if not given")
    parser.add_argument("--tokens", type=int, default=200, help="about how many tokens the target writes")
    parser.add_argument("--device", help="a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="its own on a GPU, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


if __name__ == "__main__":
    sys.exit(main())
