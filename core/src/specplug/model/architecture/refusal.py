"""Errors for models that cannot be run: one line each, with the library's own text only where it helps a user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specplug.errors import UnsupportedModelError, one_line
from specplug.model.load.wrappers import auto_class


def check_kind(config: Any, *, trust_remote_code: bool) -> None:
    """Refuses everything but decoder-only language models, by the configuration alone.

    Raises:
        UnsupportedModelError: Transformers has no causal LM of this type, or it is an encoder-decoder.
    """
    import transformers

    model_type = getattr(config, "model_type", "unknown")
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own_code and auto_class(config) is None:
        text: Any = getattr(config, "text_config", None)
        instead = f", such as one of type '{text.model_type}'" if text is not None and auto_class(text) else ""
        raise UnsupportedModelError(
            f"model type '{model_type}' is not a causal language model of Transformers {transformers.__version__}; give a "
            f"text-only checkpoint{instead}"
        )
    try:
        config.get_text_config()
    except ValueError as error:
        raise UnsupportedModelError(
            f"model type '{model_type}' consists of several text models; give a checkpoint with one decoder"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder-decoder (is_encoder_decoder in config.json); give a decoder-only model"
        )


def build_failure(model_type: str, error: Exception) -> UnsupportedModelError:
    """For a model that Transformers does not build with our attention."""
    from specplug.model.architecture.masks import RECORDING

    if isinstance(error, KeyError) and error.args == (RECORDING,):
        return _own_attention(model_type)
    if isinstance(error, ImportError):
        return UnsupportedModelError(
            f"model type '{model_type}' needs a package that is not installed: {one_line(error)}; install it"
        )
    return UnsupportedModelError(
        f"Transformers cannot build model type '{model_type}' from config.json ({one_line(error)}); correct config.json, or "
        "give a checkpoint that Transformers loads"
    )


def forward_failure(model_type: str, error: Exception) -> UnsupportedModelError:
    """For a model whose forward does not run on shapes alone."""
    if isinstance(error, KeyError):
        return _own_attention(model_type)
    if reads_values(error):
        return UnsupportedModelError(
            f"model type '{model_type}' cannot be planned: its forward branches on the values of tensors (routing by indices, "
            "say), and plans are made from shapes; give a model of another type"
        )
    if isinstance(error, RuntimeError):  # PyTorch's own text, about shapes
        return UnsupportedModelError(
            f"model type '{model_type}' cannot be run with the sizes in config.json: its forward fails; check that "
            "Transformers alone can run it (run with --debug for PyTorch's own error)"
        )
    return UnsupportedModelError(
        f"model type '{model_type}' cannot run as a packed batch: its forward fails ({one_line(error)}); check that "
        "Transformers alone can run it"
    )


def reads_values(error: Exception) -> bool:
    """Whether a forward on shapes alone failed since it needs the values of tensors."""
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error)


def _own_attention(model_type: str) -> UnsupportedModelError:
    from transformers import __version__

    return UnsupportedModelError(
        f"model type '{model_type}' does not use Transformers' attention interface, through which the KV cache is paged "
        f"(Transformers {__version__} has code of its own there); give a model that uses it, or wait for a release that "
        "moves it"
    )


def check_attention(model_type: str, num_layers: int, layers: int, modules: Sequence[str]) -> None:
    """Compares the trace with the configuration.

    Args:
        model_type: of the configuration.
        num_layers: as the configuration says.
        layers: different decoder layers that called the attention interface.
        modules: that called it, in order.

    Raises:
        UnsupportedModelError: not every layer of the configuration calls it exactly once; a decoder layer may be several.
    """
    calls = len(modules)
    if calls == 0:
        raise _own_attention(model_type)
    if calls == len(set(modules)) == num_layers:
        return
    if layers != num_layers:
        what = f"{layers} layers call Transformers' attention interface, and config.json names {num_layers} layers"
    else:
        what = f"its {num_layers} layers call Transformers' attention interface {calls} times in one forward"
    raise UnsupportedModelError(
        f"model type '{model_type}' cannot be paged: {what}; each layer must call it once (hybrid, recurrent, looped and "
        "custom-attention models are not supported)"
    )


def check_positions(model_type: str, model: torch.nn.Module, *, used: bool) -> None:
    """Refuses models that need positions which a packed batch cannot give.

    Raises:
        UnsupportedModelError: the model counts positions itself, from where its batch begins or from a padding id.
    """
    offset = [name for name, module in model.named_modules() if hasattr(module, "create_position_ids_from_input_ids")]
    counting = [name for name, _ in model.named_modules() if "position" in name.rpartition(".")[2]]
    if offset:
        what = f"'{offset[0]}' numbers positions from padding_idx + 1, not from 0"
    elif not used and counting:
        what = f"it ignores position_ids: '{counting[0]}' counts positions itself"
    else:
        return
    raise UnsupportedModelError(
        f"model type '{model_type}' cannot run as a packed batch: {what}; give a decoder-only model that takes position_ids"
    )


def check_causality(model_type: str, modules: list[torch.nn.Module]) -> None:
    """Refuses encoders: their tokens attend to later ones.

    Raises:
        UnsupportedModelError: an attention layer says that it is not causal.
    """
    if any(getattr(module, "is_causal", True) is False for module in modules):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder here: its attention is not causal; give a decoder-only model (of some "
            "types: is_decoder true in config.json)"
        )
