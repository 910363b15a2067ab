"""A narrow copy of a model, in which the parity probe finds faults that the rounding of real weights would hide.

It has the model's code, all its layers and its configuration, except that widths are divided, the vocabulary is cut and
windows are a few tokens long. Weights are random, in float32, on the CPU. So rows of a few tokens reach beyond every window,
and a difference is a fault and not rounding. With real weights in bfloat16 the probe would be expensive at the length of a
real window, and inexact: rounding alone changes the experts that a token is routed to.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from specplug.errors import UnsupportedModelError
from specplug.model.architecture.architecture import Architecture
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.architecture.trace import disable_padding_checks
from specplug.model.attention.interface import IMPLEMENTATION, register
from specplug.model.kv_cache import KVCache
from specplug.model.load.wrappers import drop_towers, make_model
from specplug.model.runner import ModelRunner

WINDOW = 4
_HEADS = re.compile(r"(attention_heads|key_value_heads|kv_heads|^n_heads?)$")
_WIDTHS = re.compile(r"^(hidden_size|d_model|n_embd)$|(intermediate_size|ffn_dim|n_inner)$")
_WINDOWS = re.compile(r"window(_size)?$")
_DEPTHS = re.compile(r"^(num_hidden_layers|num_layers|n_layers|depth)$")
_VOCABULARY = re.compile(r"^vocab_size")
_NARROWEST, _FEWEST_IDS, _ALIGNMENT = 64, 512, 8
_SMALL_BYTES, _MOST_BYTES = 16 << 20, 1 << 30


def make_narrow_copy(
    config: Any,
    architecture: Architecture,
    num_blocks: int,
    block_size: int,
    rows: tuple[int, int] = (0, 0),
    *,
    trust_remote_code: bool = False,
) -> ModelRunner | None:
    """Builds a narrow copy, bound to its own KV cache.

    Args:
        config: the configuration of the real model.
        architecture: of the real model.
        num_blocks: blocks of the KV cache.
        block_size: tokens of a block.
        rows: slots and entries per slot of recurrent states.
        trust_remote_code: as for the real model.

    Returns:
        Its runner; None where a narrow copy would have other layers, cannot be built, or would not be small.

    Raises:
        UnsupportedModelError: the model is refused with short windows; what was learned of its long ones may be wrong.
    """
    short = copy.deepcopy(config)
    if _shorten_windows(short):
        inspect_architecture(short, torch.float32, trust_remote_code=trust_remote_code)
    own = None
    for narrow in _narrow_configs(config, is_small=architecture.weight_bytes <= _SMALL_BYTES):
        try:
            own = inspect_architecture(narrow, torch.float32, trust_remote_code=trust_remote_code)
        except UnsupportedModelError:
            continue
        if own.layers == architecture.layers and own.weight_bytes <= _MOST_BYTES:
            break
    else:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(narrow, own.towers, trust_remote_code)
        _shake(model)
    device = torch.device("cpu")
    cache = KVCache(own.kv_layers, num_blocks, block_size, torch.float32, device)
    return ModelRunner(model, own, cache, device, states=rows)


def _build(config: Any, towers: tuple[str, ...], trust_remote_code: bool) -> torch.nn.Module:
    register()
    model = make_model(config, torch.float32, IMPLEMENTATION, trust_remote_code=trust_remote_code)
    drop_towers(model, towers)
    disable_padding_checks(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _shake(model: torch.nn.Module) -> None:
    """Weights by which every layer's attention changes the logits: matrices keep a state's norm, no vector is all zero."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter is getattr(table, "weight", None):
            parameter.normal_()  # a large residual stream: then rounding does not grow from layer to layer
        elif parameter.dim() > 1:
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
        elif parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, device=parameter.device), alpha=0.1)


def _narrow_configs(config: Any, *, is_small: bool) -> Iterator[Any]:
    """Configurations to try, the narrowest first: heads and widths are divided by a common divisor of their kind."""
    text = config.get_text_config()
    heads, widths = _counts(text, _HEADS), _counts(text, _WIDTHS)
    of_heads, of_widths = _common(heads), _common(widths) // _ALIGNMENT or 1  # kernels for experts want round widths
    of_both = math.gcd(of_heads, of_widths)
    tried = [(1, 1)]
    if not is_small:
        narrowest = max(d for d in _divisors(of_widths) if d == 1 or text.hidden_size // d >= _NARROWEST)
        both = max(d for d in _divisors(of_both) if d == 1 or text.hidden_size // d >= _NARROWEST)
        tried = [(of_heads, narrowest), (both, both)]  # the latter where a head's width follows from the state's
    for head_divisor, width_divisor in tried:
        narrow = copy.deepcopy(config)
        own = narrow.get_text_config()
        _shorten_windows(narrow)
        for part in set(getattr(narrow, "sub_configs", None) or ()):
            tower = getattr(narrow, part, None)
            if tower is not None and tower is not own:  # it is left out, but built
                _change(tower, _counts(tower, _DEPTHS), lambda number: 1)
        if not is_small:
            _divide(own, heads, head_divisor)
            _divide(own, widths, width_divisor)
            _change(own, _counts(own, _VOCABULARY), lambda number: min(number, _FEWEST_IDS))
            for part in (narrow, own):
                if getattr(part, "pad_token_id", None) is not None:
                    vars(part)["pad_token_id"] = 0  # it may be outside the vocabulary now
        yield narrow


def _shorten_windows(config: Any) -> bool:
    """Whether there were any."""
    own = config.get_text_config()
    windows = _counts(own, _WINDOWS)
    _change(own, windows, lambda number: min(number, WINDOW))
    return bool(windows)


def _change(config: Any, fields: list[tuple[str, Any]], change: Callable[[int], int]) -> None:
    for name, value in fields:
        vars(config)[name] = [change(number) for number in value] if isinstance(value, (list, tuple)) else change(value)


def _divide(config: Any, fields: list[tuple[str, Any]], divisor: int) -> None:
    _change(config, fields, lambda number: number // divisor)


def _common(fields: list[tuple[str, Any]]) -> int:
    return math.gcd(*(number for _, value in fields for number in _numbers(value))) or 1


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _counts(config: Any, pattern: re.Pattern[str]) -> list[tuple[str, Any]]:
    """Fields by name that hold a positive number, or one per layer."""
    found = [(name, value) for name, value in vars(config).items() if pattern.search(name)]
    return [(name, value) for name, value in found if _numbers(value) and all(_is_count(n) for n in _numbers(value))]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
