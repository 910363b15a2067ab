"""The target: hidden states at boundaries, embeddings, logits, and its own continuations."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from specplug import CheckpointError, ConfigurationError, resolve_model


@attrs.frozen(eq=False)
class States:
    """Inputs and labels of the head.

    Attributes:
        features: [B, T, n · hidden], the target states at the boundaries, ascending by depth.
        final: [B, T, hidden], after the target's final norm; its logits are the labels.
    """

    features: torch.Tensor
    final: torch.Tensor


class _Output(list[Any]):
    """A base model's output with given states; every other field is None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _Given(torch.nn.Module):
    """Replaces the base model and returns given states."""

    states: torch.Tensor

    @property
    def decoder(self) -> _Given:
        """Some models call their base model's decoder directly."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Output([self.states])


class Target:
    """A causal LM in evaluation mode, whose parameters never change.

    Attributes:
        model: the model, as Transformers runs it.
        tokenizer: its tokenizer, or None.
        name: what the user called it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()
        self.hidden_size: int = self.config.hidden_size
        self.num_layers: int = self.config.num_hidden_layers
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._layers = self._find_layers()
        self._given = _Given()
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)
        self._head._modules[model.base_model_prefix] = self._given

    @classmethod
    def load(cls, source: str, *, dtype: str | None = None, device: str | None = None) -> Target:
        """Loads a target from safetensors; code from the checkpoint never runs.

        Args:
            source: a folder, a hub name, or `tiny`.
            dtype: a dtype's name; None: the checkpoint's own on a GPU, float32 on a CPU.
            device: None: a GPU if there is one.

        Raises:
            CheckpointError: there is none, or it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = resolve_model(source)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype) if dtype else ("auto" if place.type == "cuda" else torch.float32)
        with quiet_transformers():
            try:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, use_safetensors=True)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(f"the target '{source}' cannot be loaded: {reason}") from error
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError, KeyError, ImportError):
                tokenizer = None
        return cls(model.to(place), tokenizer, source)

    @torch.no_grad()
    def states(self, ids: torch.Tensor, boundaries: Sequence[int]) -> States:
        """Runs the target over right-padded rows: int64 [B, T] → states. Causality keeps padding out of what precedes it."""
        kept: dict[int, torch.Tensor] = {}
        handles = [self._tap(boundary, kept) for boundary in boundaries]
        try:
            final = self._base()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return States(torch.cat([kept[boundary] for boundary in boundaries], dim=-1), final)

    @torch.no_grad()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., hidden]."""
        return self.model.get_input_embeddings()(token_ids)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """[N, hidden] → [N, vocabulary], through the model's own forward, so that its scales and soft-caps hold."""
        self._given.states = final.to(self.dtype)[None]
        ids = torch.zeros(1, len(final), dtype=torch.long, device=final.device)
        try:
            return self._head(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self._given.states

    def output_rows(self, ids: torch.Tensor | None) -> torch.Tensor:
        """A copy of rows of the output layer, float32 [len(ids) or vocabulary, hidden]."""
        weight = self.model.get_output_embeddings().weight
        return (weight if ids is None else weight[ids]).float().clone()

    @torch.no_grad()
    def final_norm_weight(self) -> torch.Tensor | None:
        """The weight of the final RMSNorm, float32 [hidden]; None if it is another norm.

        Measured, not read: what an RMSNorm makes of ones is its effective weight, whatever it stores.
        """
        base = self._base()
        owner = getattr(base, "decoder", base)
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
            norm = getattr(owner, name, None)
            if norm is not None and getattr(norm, "bias", None) is None:
                return norm(torch.ones(1, self.hidden_size, device=self.device, dtype=self.dtype))[0].float()
        return None

    def fingerprint(self) -> str:
        """A hash of the configuration and of samples of every parameter."""
        digest = hashlib.sha256(f"{type(self.model).__name__} {self.dtype}".encode())
        for name, parameter in self.model.named_parameters():
            flat = parameter.detach().flatten()
            at = torch.linspace(0, len(flat) - 1, min(64, len(flat)), dtype=torch.float64, device="cpu").long()
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(flat[at.to(flat.device)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _base(self) -> Any:
        return getattr(self.model, self.model.base_model_prefix)

    def _find_layers(self) -> Any:
        lists = [
            (len(name), module)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.num_layers
        ]
        if not lists:
            raise ConfigurationError(
                f"the target {type(self.model).__name__} has no list of its {self.num_layers} decoder layers to tap"
            )
        return min(lists, key=lambda found: found[0])[1]

    def _tap(self, boundary: int, kept: dict[int, torch.Tensor]) -> Any:
        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[boundary] = args[0] if args else kwargs["hidden_states"]

        def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[boundary] = output if isinstance(output, torch.Tensor) else output[0]

        if boundary == self.num_layers:
            return self._layers[-1].register_forward_hook(after)
        return self._layers[boundary].register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps Transformers' own bars and notices out of ours; what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
