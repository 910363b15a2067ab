"""The target as speculators see it, and handles to checkpoints that core loads for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from specplug.contract.resources import MemoryRegion
from specplug.errors import PluginError
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.architecture.refusal import check_kind
from specplug.model.compile.trace import TensorBatch
from specplug.model.device import choose_device
from specplug.model.head import Head
from specplug.model.kv_cache import KVCache
from specplug.model.load.checkpoint import (
    choose_dtype,
    load_config,
    load_tensors,
    read_headers,
    read_json_config,
    resolve_checkpoint,
)
from specplug.model.load.quantised import is_quantised
from specplug.model.load.tokenizer import load_tokenizer
from specplug.model.load.weights import count_weights, load_model
from specplug.model.paged import PagedBatch, forward_batch
from specplug.model.recurrent.layers import bytes_per_row
from specplug.model.rows import ForwardRow
from specplug.model.runner import ModelRunner
from specplug.values import as_integer, as_tuple, is_integer, shown

Progress = Callable[[float], None]


class LazyWeights:
    """See `specplug.WeightsHandle`."""

    def __init__(self, source: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = resolve_checkpoint(source, revision, pickles=True)
        self._headers = read_headers(self.folder, pickles=True)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: header.shape for name, header in self._headers.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: header.dtype for name, header in self._headers.items()}
        self._dtype = dtype
        self._device = device
        self._tensors: dict[str, torch.Tensor] | None = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """See `WeightsHandle.config`."""
        return read_json_config(self.folder)

    def keep(self, names: Iterable[str]) -> None:
        """See `WeightsHandle.keep`."""
        wanted = set(names)
        if unknown := sorted(wanted - self.shapes.keys()):
            raise PluginError(f"{self.folder} has no tensor '{unknown[0]}' to keep")
        if self._tensors is not None:
            raise PluginError("keep() was called after the weights were loaded; call it before plan_memory")
        self._headers = {name: header for name, header in self._headers.items() if name in wanted}

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """See `WeightsHandle.num_bytes`."""
        floating = dtype or self._dtype
        total = 0
        for header in self._headers.values():
            stored = floating if header.dtype.is_floating_point else header.dtype
            total += torch.Size(header.shape).numel() * stored.itemsize
        return total

    def materialize(self, progress: Progress) -> None:
        """Reads the tensors."""
        self._tensors = load_tensors(
            self._headers, self._device, self._dtype, lambda done, total: progress(done / max(total, 1))
        )

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See `WeightsHandle.tensors`."""
        if self._tensors is None:
            raise PluginError("the tensors can be read from warmup on, until release() is called")
        return self._tensors

    def release(self) -> None:
        """See `WeightsHandle.release`."""
        self._tensors = None

    def close(self) -> None:
        """Drops the tensors."""
        self.release()


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


class TargetFacade:
    """See `specplug.TargetModel`."""

    def __init__(
        self,
        *,
        config: Any,
        source: str,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        weight_bytes: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        tokenizer: Callable[[], Any],
    ) -> None:
        self.config = config
        self.source = source
        self.revision = revision
        self.dtype = dtype
        self.device = device
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.weight_bytes = weight_bytes
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.handles: list[LazyWeights | LazyModel] = []
        self._tokenizer = tokenizer
        self._head: Head | None = None

    @classmethod
    def of_limits(
        cls,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_layers: int = 0,
        hidden_size: int = 0,
        source: str = "",
        revision: str | None = None,
        config: Any = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        weight_bytes: int = 0,
        tokenizer: Callable[[], Any] = lambda: None,
    ) -> TargetFacade:
        """A target of which no more may be known than its sizes; for the arguments see `TargetModel`."""
        return cls(
            config=config,
            source=source,
            revision=revision,
            dtype=dtype,
            device=torch.device("cpu") if device is None else device,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            weight_bytes=weight_bytes,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            tokenizer=tokenizer,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """See `TargetModel.tokenizer`."""
        return self._tokenizer()

    def attach(self, model: torch.nn.Module) -> None:
        """Makes `embed` and `logits` available, once the target is loaded."""
        self._head = Head(model)

    def _loaded_head(self) -> Head:
        if self._head is None:
            raise PluginError("the target is not loaded yet: call embed and logits from warmup on")
        return self._head

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `TargetModel.embed`."""
        return self._loaded_head().embed(token_ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `TargetModel.logits`."""
        return self._loaded_head().logits(hidden)

    def weights(self, source: str, revision: str | None = None) -> LazyWeights:
        """See `TargetModel.weights`."""
        handle = LazyWeights(source, revision, self.dtype, self.device)
        self.handles.append(handle)
        return handle

    def model(
        self, source: str, *, revision: str | None = None, dtype: str | None = None, device: str | None = None
    ) -> LazyModel:
        """See `TargetModel.model`."""
        model_device = self.device if device is None else choose_device(device)
        handle = LazyModel(
            source,
            revision,
            dtype,
            self.dtype,
            model_device,
            f"model {len(self.handles)}",
            max_num_seqs=self.max_num_seqs,
            has_own_device=model_device != self.device,
        )
        self.handles.append(handle)
        return handle

    def close(self) -> None:
        """Closes all handles."""
        for handle in self.handles:
            handle.close()
        self._head = None
