"""Sources of the target's states: a forward each time, or a cache on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specplug import ConfigurationError
from specplug_eagle.train.batches import Batch, collate, fill
from specplug_eagle.train.data import Sample
from specplug_eagle.train.target import States, Target

_INDEX = "cache.json"


class StateSource(Protocol):
    """Gives the target's states of a batch."""

    def __call__(self, batch: Batch) -> States:
        """States [B, T, …] of a batch; entries in padding are undefined."""
        ...


class LiveStates:
    """Runs the target for every batch."""

    def __init__(self, target: Target, boundaries: Sequence[int]) -> None:
        self._target = target
        self._boundaries = tuple(boundaries)

    def __call__(self, batch: Batch) -> States:
        """Implements `StateSource`."""
        return self._target.states(batch.ids, self._boundaries)


class CachedStates:
    """States of all samples in safetensors shards, written once and read by every later epoch and run.

    Args:
        folder: of the cache; an interrupted one is completed.
        target: the target.
        boundaries: of the states.
        samples: all texts, in order.
        data: their fingerprint.
        batch_tokens: tokens that the target runs at once.
        shard_bytes: size of a shard.
        progress: called with the number of samples stored.

    Raises:
        ConfigurationError: the cache was made for another target, other data or other states, or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        boundaries: Sequence[int],
        samples: Sequence[Sample],
        data: str,
        *,
        batch_tokens: int = 4096,
        shard_bytes: int = 2**29,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._folder, self._target, self._boundaries = folder, target, tuple(boundaries)
        self._wanted = {
            "target": target.fingerprint(),
            "data": data,
            "boundaries": list(boundaries),
            "dtype": str(target.dtype).removeprefix("torch."),
        }
        self._shards: list[tuple[int, str]] = self._open()
        self._files: dict[str, Any] = {}
        self._fill(samples, batch_tokens, shard_bytes, progress)
        self._shard_of = {}
        start = 0
        for end, name in self._shards:
            self._shard_of.update(dict.fromkeys(range(start, end), name))
            start = end

    def __call__(self, batch: Batch) -> States:
        """Implements `StateSource`."""
        length, width = batch.ids.shape[1], len(self._boundaries) * self._target.hidden_size
        features = torch.zeros(len(batch.indices), length, width, dtype=self._target.dtype, device="cpu")
        final = torch.zeros(
            len(batch.indices), length, self._target.hidden_size, dtype=self._target.dtype, device="cpu"
        )
        for row, index in enumerate(batch.indices):
            stored = self._file(self._shard_of[index])
            feature, state = stored.get_tensor(f"{index}.features"), stored.get_tensor(f"{index}.final")
            features[row, : len(feature)] = feature
            final[row, : len(state)] = state
        return States(features.to(batch.ids.device), final.to(batch.ids.device))

    def _open(self) -> list[tuple[int, str]]:
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            made = {name: index["made_for"][name] for name in self._wanted}
            shards = [(int(end), str(name)) for end, name in index["shards"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"the cache {self._folder} is damaged; delete it") from error
        self._compare(made)
        for _, name in shards:
            if not (self._folder / name).is_file():
                raise ConfigurationError(f"the cache {self._folder} lacks its file {name}; delete it")
        return shards

    def _compare(self, made: Mapping[str, Any]) -> None:
        what = {
            "target": "another target",
            "data": "other data",
            "boundaries": "other layer ids",
            "dtype": "another dtype",
        }
        for name, wanted in self._wanted.items():
            if made[name] != wanted:
                told = "" if name in ("target", "data") else f" ({made[name]}, not {wanted})"
                raise ConfigurationError(
                    f"the cache {self._folder} was made for {what[name]}{told}; delete it, or give another folder"
                )

    def _fill(
        self, samples: Sequence[Sample], tokens: int, shard_bytes: int, progress: Callable[[int, int], None]
    ) -> None:
        start = self._shards[-1][0] if self._shards else 0
        held: dict[str, torch.Tensor] = {}
        size = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        lengths = [len(sample) for sample in samples]
        for indices in fill(range(start, len(samples)), lengths, tokens):
            batch = collate(samples, indices, self._target.device)
            states = self._target.states(batch.ids, self._boundaries)
            for row, index in enumerate(indices):
                held[f"{index}.features"] = states.features[row, : lengths[index]].cpu().clone()
                held[f"{index}.final"] = states.final[row, : lengths[index]].cpu().clone()
            size += sum(held[f"{index}.{part}"].nbytes for index in indices for part in ("features", "final"))
            progress(indices[-1] + 1, len(samples))
            if size >= shard_bytes or indices[-1] + 1 == len(samples):
                self._store(held, indices[-1] + 1)
                held, size = {}, 0

    def _store(self, held: dict[str, torch.Tensor], end: int) -> None:
        name = f"states-{len(self._shards):05d}.safetensors"
        save_file(held, self._folder / f"{name}.part")
        (self._folder / f"{name}.part").replace(self._folder / name)
        self._shards.append((end, name))
        part = self._folder / f"{_INDEX}.part"
        part.write_text(json.dumps({"made_for": self._wanted, "shards": self._shards}), encoding="utf-8")
        part.replace(self._folder / _INDEX)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self._folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigurationError(f"the cache {self._folder} is damaged at {name}; delete it") from error
        return self._files[name]
