"""A model of a speculator's own: configuration and headers at once, weights when core loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from specplug.contract.resources import MemoryRegion
from specplug.errors import PluginError
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.architecture.refusal import check_kind
from specplug.model.compile.trace import TensorBatch
from specplug.model.kv_cache import KVCache
from specplug.model.load.checkpoint import choose_dtype, load_config, read_headers, resolve_checkpoint
from specplug.model.load.quantised import is_quantised
from specplug.model.load.tokenizer import load_tokenizer
from specplug.model.load.weights import count_weights, load_model
from specplug.model.paged import PagedBatch, forward_batch
from specplug.model.recurrent.layers import bytes_per_row
from specplug.model.rows import ForwardRow
from specplug.model.runner import ModelRunner
from specplug.plugins.lazy_weights import Progress
from specplug.values import as_integer, as_tuple, is_integer, shown


class LazyModel:
    """See `specplug.ModelHandle`."""

    def __init__(
        self,
        source: str,
        revision: str | None,
        dtype: str | None,
        target_dtype: torch.dtype,
        device: torch.device,
        label: str,
        *,
        max_num_seqs: int,
        has_own_device: bool = False,
    ) -> None:
        self.folder: Path = resolve_checkpoint(source, revision)
        self.config = load_config(self.folder)
        check_kind(self.config, trust_remote_code=False)
        headers = read_headers(self.folder)
        usual: str | torch.dtype = "auto" if is_quantised(self.config) else target_dtype
        self.dtype = choose_dtype(dtype or usual, self.config)
        self.device = device
        self._label = label
        self._has_own_device = has_own_device
        dense = inspect_architecture(self.config, self.dtype)
        self.has_state = bool(dense.state_calls)
        self._states = (max_num_seqs, 1)
        self._architecture = count_weights(self.folder, headers, self.config, dense, self.dtype, device)
        self.vocab_size = self._architecture.vocab_size
        self.max_model_len = self._architecture.context_length
        self.weight_bytes = self._architecture.loaded_bytes(self.dtype, device)
        self.loading_bytes = self._architecture.loading_bytes
        self._model: torch.nn.Module | None = None
        self.runner: ModelRunner | None = None

    def regions(
        self, *, scratch_tokens_per_row: int = 0, tables: Literal["shared", "own"] = "shared"
    ) -> list[MemoryRegion]:
        """See `ModelHandle.regions`."""
        device = self.device if self._has_own_device else None
        rows, held = self._states = (self._states[0], 1 + scratch_tokens_per_row)
        return [
            MemoryRegion(f"{self._label}.weights", "weights", fixed_bytes=self.weight_bytes, device=device),
            MemoryRegion(
                f"{self._label}.kv",
                "kv_cache",
                fixed_bytes=rows * bytes_per_row(self._architecture.state_calls, held, self.dtype),
                layers=self._architecture.kv_layers,
                dtype=self.dtype,
                scratch_tokens_per_row=scratch_tokens_per_row,
                tables=tables,
                device=device,
            ),
        ]

    @cached_property
    def tokenizer(self) -> Any:
        """See `ModelHandle.tokenizer`."""
        return load_tokenizer(self.folder)

    def materialize(self, progress: Progress) -> None:
        """Loads the weights."""
        own = self._architecture
        self._model = load_model(
            self.folder, self.config, self.dtype, self.device, towers=own.towers, read_weights=own.read_weights
        )
        progress(1.0)

    def bind(self, caches: Mapping[str, KVCache]) -> None:
        """Connects the model to its KV cache, if the speculator planned one."""
        cache = caches.get(f"{self._label}.kv")
        if cache is not None and self._model is not None:
            self.runner = ModelRunner(self._model, self._architecture, cache, self.device, states=self._states)

    def forward(
        self, rows: Sequence[ForwardRow], *, logits: Literal["last", "all"] | int | Sequence[int] = "last"
    ) -> torch.Tensor:
        """See `ModelHandle.forward`."""
        runner = self._bound()
        if isinstance(logits, str) and logits == "all":
            return runner.forward(rows)
        is_last = isinstance(logits, str) and logits == "last"
        counts = [1] * len(rows) if is_last else _counts(rows, logits)
        index: list[int] = []
        end = 0
        for row, count in zip(rows, counts, strict=True):
            end += len(row.tokens)
            index.extend(range(end - count, end))
        return runner.forward(rows, index)

    def begin(self, slot: int, position: int, forked_from: int | None = None) -> int:
        """See `ModelHandle.begin`."""
        states = self._bound().states
        if states is None:
            return position
        if forked_from is None or not states.reaches(forked_from, position):
            return 0
        states.copy(forked_from, slot)
        return position

    def step(
        self, batch: PagedBatch | TensorBatch, token_ids: torch.Tensor, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `ModelHandle.step`."""
        given = forward_batch(batch) if isinstance(batch, PagedBatch) else batch
        return self._bound().over_batch(given, token_ids, last)

    @property
    def kv_cache(self) -> KVCache:
        """See `ModelHandle.kv_cache`."""
        return self._bound().cache

    def _bound(self) -> ModelRunner:
        if self.runner is None:
            raise PluginError(
                "the model cannot run yet: return its regions() from plan_memory, and call forward from warmup on"
            )
        return self.runner

    def close(self) -> None:
        """Drops model and cache."""
        if self.runner is not None:
            self.runner.close()
        self.runner = self._model = None


def _counts(rows: Sequence[ForwardRow], logits: Any) -> list[int]:
    """The number of last tokens of each row to compute logits for.

    Raises:
        PluginError: there is not one integer per row, or it exceeds the row's tokens.
    """
    several = as_integer(logits)
    given = (several,) * len(rows) if is_integer(several) else as_tuple(several)
    if not isinstance(given, tuple):
        raise PluginError(f"forward: logits={shown(logits)}: expected 'last', 'all', an integer, or one per row")
    counts = [as_integer(each) for each in given]
    if len(counts) != len(rows):
        raise PluginError(f"forward: logits has {len(counts)} entries for {len(rows)} rows")
    for row, count in enumerate(counts):
        if not is_integer(count, 0) or count > len(rows[row].tokens):
            raise PluginError(f"forward: logits={shown(count)} for row {row}, which has {len(rows[row].tokens)} tokens")
    return counts
