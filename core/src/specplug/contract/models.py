"""The target, and handles to checkpoints and models of a speculator's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from specplug.contract.resources import MemoryRegion
    from specplug.model.kv_cache import KVCache
    from specplug.model.paged import PagedBatch
    from specplug.model.rows import ForwardRow


class TargetModel(Protocol):
    """The target. When `load_speculator` receives it, its weights are not loaded yet.

    Attributes:
        config: the model's configuration, as Transformers reads it.
        source: the folder or hub name that the user gave.
        revision: the revision of a hub name.
        dtype: the dtype of parameters and hidden states.
        device: the device it runs on.
        vocab_size: the width of its logits.
        hidden_size: the width of its residual stream.
        num_layers: decoder layers; the last boundary of `SpeculatorTraits.hidden_states`.
        weight_bytes: bytes of its parameters and buffers.
        max_model_len: the most tokens of a row, prompt and output; the memory plan may reduce it.
        max_num_seqs: the most rows in a batch.
        max_num_batched_tokens: the most tokens in one forward, drafts included.
    """

    config: PretrainedConfig
    source: str
    revision: str | None
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    hidden_size: int
    num_layers: int
    weight_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The target's tokenizer; None if its checkpoint has none."""
        ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape → embeddings [..., hidden], the input of the target's first layer. From warm-up on."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States after the final norm [N, hidden] → logits [N, vocabulary], with soft-capping and scaling. From warm-up on."""
        ...

    def weights(self, source: str, revision: str | None = None) -> WeightsHandle:
        """Reads the headers of a checkpoint; core reads the tensors after it accepted the memory plan.

        The checkpoint is safetensors or else `pytorch_model.bin`, from which only tensors are unpickled.

        Raises:
            CheckpointError: it is missing, damaged or incomplete, or contains more than tensors.
        """
        ...

    def model(
        self, source: str, *, revision: str | None = None, dtype: str | None = None, device: str | None = None
    ) -> ModelHandle:
        """Reads config and headers of a causal LM that core runs for the speculator.

        Args:
            source: a folder or hub name.
            revision: the revision of a hub name.
            dtype: a dtype's name, or `auto` for the checkpoint's own; None means the target's.
            device: None means the target's.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            UnsupportedModelError: core cannot run the architecture in packed batches.
            ConfigurationError: there is no such device.
        """
        ...


class WeightsHandle(Protocol):
    """The tensors of a checkpoint: shapes now, values from warm-up on.

    Attributes:
        folder: the checkpoint's folder.
        shapes: the shapes of all tensors, by name.
        dtypes: the stored dtypes of all tensors, by name.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's config.json, not interpreted.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        ...

    def keep(self, names: Iterable[str]) -> None:
        """Selects the tensors that are read and that `num_bytes` counts. Call it before `plan_memory`.

        Raises:
            PluginError: the checkpoint has no such tensor, or the tensors have been read already.
        """
        ...

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the selected tensors on the device, with floating-point ones in `dtype` (default: the target's)."""
        ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors on the engine's device, floating-point ones in the target's dtype. From warm-up on."""
        ...

    def release(self) -> None:
        """Drops the references to the tensors, once modules hold those that are needed. `tensors` then raises `PluginError`."""
        ...


class ModelHandle(Protocol):
    """A causal LM that core runs for the speculator, with a paged KV cache and ragged batches like the target.

    Attributes:
        config: its configuration, as Transformers reads it.
        vocab_size: the width of its logits.
        max_model_len: the most tokens of a row.
        weight_bytes: bytes of its parameters and buffers.
        dtype: the dtype of its parameters.
        device: the device it runs on.
        folder: its checkpoint's folder.
        has_state: whether it has recurrent layers: then every `ForwardRow` needs the row's `row_id` as its `slot`, in `held`
            how many of its tokens may be rejected, new rows need `begin`, and there is no `step`.
    """

    config: PretrainedConfig
    vocab_size: int
    has_state: bool
    max_model_len: int
    weight_bytes: int
    dtype: torch.dtype
    device: torch.device
    folder: Path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in the checkpoint's folder; None if there is none."""
        ...

    @property
    def kv_cache(self) -> KVCache:
        """Its KV cache, for `Resources.compile_loop`. From warm-up on."""
        ...

    def step(self, batch: PagedBatch, token_ids: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the model within a loop; see `Resources.compile_loop`. From warm-up on.

        Args:
            batch: the loop's batch over `kv_cache`.
            token_ids: int64 [T], on the model's device.
            last: int64 [L], the tokens to compute logits for; None for all.

        Returns:
            Logits [L, vocabulary].

        Raises:
            PluginError: the model cannot run yet.
        """
        ...

    def begin(self, slot: int, position: int, forked_from: int | None = None) -> int:
        """Says from where a new row is to be run, and gives a fork its parent's recurrent state. From warm-up on.

        Args:
            slot: the row's `row_id`.
            position: how many of its first tokens have KV.
            forked_from: the row's, where these come from its parent.

        Returns:
            `position`; 0 for a model with recurrent state where no state of that position is kept. The row's tokens are then
            run again from the first one, and their KV is stored again.
        """
        ...

    def regions(
        self, *, scratch_tokens_per_row: int = 0, tables: Literal["shared", "own"] = "shared"
    ) -> list[MemoryRegion]:
        """The regions of its weights and KV cache, to return from `plan_memory`; for the arguments see `MemoryRegion`."""
        ...

    def forward(
        self, rows: Sequence[ForwardRow], *, logits: Literal["last", "all"] | int | Sequence[int] = "last"
    ) -> torch.Tensor:
        """Runs the model over a ragged batch and stores the KV of every token. From warm-up on.

        Args:
            rows: the new tokens of each row.
            logits: the tokens to compute logits for: the last of each row, all, the last n of each row, or a list with the
                number of last tokens for each row.

        Returns:
            Logits [selected tokens, vocabulary], rows concatenated in order.

        Raises:
            PluginError: a row has fewer tokens than were selected, or the model cannot run yet.
        """
        ...
