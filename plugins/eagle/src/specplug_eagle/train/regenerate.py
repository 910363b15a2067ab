"""Lets the target write the texts: a head learns what its target says, not what others wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import ConfigurationError
from specplug_eagle.train.target import Target, quiet_transformers


@attrs.frozen
class Writing:
    """How the target writes.

    Attributes:
        max_tokens: the most new tokens of a text.
        temperature: 0 for greedy.
        batch: texts at once.
        seed: of sampled tokens.
    """

    max_tokens: int = 1024
    temperature: float = 0.0
    batch: int = 16
    seed: int = 0


def regenerate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    file: Path,
    writing: Writing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `{"input_ids", "loss_from"}` lines; an interrupted file of the same target, prompts and settings is completed.

    Args:
        target: the writer.
        prompts: token ids.
        file: JSON lines; beside it, a file of the same name with `.made_for` remembers what it was made of.
        writing: settings.
        progress: told how many of all texts are written.

    Raises:
        ConfigurationError: the file was made of something else.
    """
    made_for = _fingerprint(target, prompts, writing)
    note = file.with_name(f"{file.name}.made_for")
    done = 0
    if file.is_file():
        if not note.is_file() or note.read_text(encoding="utf-8") != made_for:
            raise ConfigurationError(
                f"{file} was written by another target, or from other prompts or settings; delete it"
            )
        done = _complete_lines(file)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(made_for, encoding="utf-8")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done -= done % writing.batch if done < len(order) else 0
    _cut_lines(file, done)
    with file.open("a", encoding="utf-8") as stream:
        for start in range(done, len(order), writing.batch):
            chosen = [prompts[i] for i in order[start : start + writing.batch]]
            torch.manual_seed(writing.seed + start)
            for prompt, answer in zip(chosen, continue_texts(target, chosen, writing), strict=True):
                stream.write(json.dumps({"input_ids": [*prompt, *answer], "loss_from": len(prompt)}) + "\n")
            stream.flush()
            progress(start + len(chosen), len(order))


@torch.no_grad()
def continue_texts(target: Target, prompts: Sequence[Sequence[int]], writing: Writing) -> list[list[int]]:
    """The target's continuations of a batch of prompts, each up to its end-of-text token."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if writing.temperature:
        sampling = {"do_sample": True, "temperature": writing.temperature, "top_p": 1.0, "top_k": 0}
    with quiet_transformers():
        written = target.model.generate(
            ids.to(target.device),
            attention_mask=mask.to(target.device),
            max_new_tokens=writing.max_tokens,
            pad_token_id=0,
            **sampling,
        )
    stops = _stop_tokens(target)
    return [_until(row, stops) for row in written[:, longest:].tolist()]


def _until(tokens: list[int], stops: frozenset[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1]
    return tokens


def _stop_tokens(target: Target) -> frozenset[int]:
    stop = target.model.generation_config.eos_token_id
    return frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])


def _fingerprint(target: Target, prompts: Sequence[Sequence[int]], writing: Writing) -> str:
    digest = hashlib.sha256(json.dumps([prompts, attrs.asdict(writing)]).encode())
    return f"{target.fingerprint()} {digest.hexdigest()}"


def _complete_lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(line.endswith(b"\n") for line in stream)


def _cut_lines(file: Path, count: int) -> None:
    """Keeps the first `count` lines of a file, if there is one."""
    if not file.is_file():
        return
    with file.open("rb+") as stream:
        for _ in range(count):
            stream.readline()
        stream.truncate(stream.tell())
