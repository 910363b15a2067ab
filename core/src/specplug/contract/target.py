"""What a speculator may build on: the target, and core's own machinery for models and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from specplug.contract.memory import MemoryRegion
    from specplug.model.rows import ForwardRow


class TargetModel(Protocol):
    """The target as speculators see it. Weights are not loaded yet when `load_speculator` receives it.

    Attributes:
        config: the model's configuration, as Transformers reads it.
        source: the folder or hub name the user gave.
        revision: of a hub name.
        dtype: of its parameters and states.
        device: where it runs.
        vocab_size: token ids it knows: those of its logits.
        hidden_size: width of its residual stream.
        num_layers: decoder layers; boundaries of `SpeculatorTraits.hidden_states` go from 0 to here.
        weight_bytes: bytes of its parameters and buffers.
        max_model_len: tokens of a row, prompt and output, as far as is known before the memory plan.
        max_num_seqs: rows in a batch.
        max_num_batched_tokens: tokens in one forward, drafts included.
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
        """The target's tokenizer; None when its checkpoint has none."""
        ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape → embeddings [..., hidden], as the target's first layer sees them. From warm-up on."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States after the final norm [N, hidden] → logits [N, vocabulary], soft-caps and scales included. From warm-up on."""
        ...

    def weights(self, source: str, revision: str | None = None) -> WeightsHandle:
        """Opens the headers of a checkpoint; core reads the tensors after the plan was accepted.

        The checkpoint is safetensors, or where there is none `pytorch_model.bin`, of which only tensors are unpickled.

        Raises:
            CheckpointError: there is none, or it is truncated, damaged, incomplete, or holds more than tensors.
        """
        ...

    def model(
        self, source: str, *, revision: str | None = None, dtype: str | None = None, device: str | None = None
    ) -> ModelHandle:
        """Opens config and headers of a causal LM that core's own runner will run for the speculator.

        Args:
            source: a folder or hub name.
            revision: of a hub name.
            dtype: a dtype's name, or `auto` for the checkpoint's own; None takes the target's.
            device: None takes the target's.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
            UnsupportedModelError: its architecture cannot be run in packed batches.
            ConfigurationError: there is no such device.
        """
        ...


class WeightsHandle(Protocol):
    """Tensors of a checkpoint, known from its headers and read when core says so.

    Attributes:
        folder: where the checkpoint lies.
        shapes: of all its tensors, by name.
        dtypes: as they are stored.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's config.json as it is: many speculators' configurations are no model's.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        ...

    def keep(self, names: Iterable[str]) -> None:
        """Leaves all tensors but these on disk, out of `num_bytes` and `tensors`. To be called before `plan_memory`.

        Raises:
            PluginError: the checkpoint has no such tensor, or the weights are loaded already.
        """
        ...

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of the kept tensors as they will be held, floating ones as `dtype` (default: the target's)."""
        ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors on the engine's device, floating ones in the target's dtype. From warm-up on."""
        ...

    def release(self) -> None:
        """Lets go of the tensors, once modules hold what they need of them; afterwards `tensors` cannot be read."""
        ...


class ModelHandle(Protocol):
    """A causal LM of the speculator's own, run by core: paged KV, ragged batches, the same attention as the target.

    Attributes:
        config: its configuration, as Transformers reads it.
        vocab_size: token ids it knows: those of its logits.
        max_model_len: the most tokens of a row that it can hold.
        weight_bytes: bytes of its parameters and buffers.
        dtype: of its parameters.
        device: where it runs.
        folder: where its checkpoint lies.
    """

    config: PretrainedConfig
    vocab_size: int
    max_model_len: int
    weight_bytes: int
    dtype: torch.dtype
    device: torch.device
    folder: Path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in the checkpoint's folder; None when it has none."""
        ...

    def regions(
        self, *, scratch_tokens_per_row: int = 0, tables: Literal["shared", "own"] = "shared"
    ) -> list[MemoryRegion]:
        """The model's weights and KV cache, to return from `plan_memory`."""
        ...

    def forward(
        self, rows: Sequence[ForwardRow], *, logits: Literal["last", "all"] | int | Sequence[int] = "last"
    ) -> torch.Tensor:
        """Runs the model over a ragged batch and stores the KV of every token. From warm-up on.

        Args:
            rows: the new tokens of each row.
            logits: of which tokens logits are computed: each row's last, all, the last n of each row, or with a list the
                last n of the row for each (0: none of it).

        Returns:
            Logits [tokens asked for, vocabulary], rows one after the other in their order.

        Raises:
            PluginError: more tokens are asked for than a row has, or the model cannot run yet.
        """
        ...


Speculator = Any
"""Any object with `@hookimpl` methods; see `specplug.contract.hookspecs`."""
