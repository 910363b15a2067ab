"""The engine's configuration."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from specplug.config.speculative import parse_speculative_config
from specplug.contract.settings import SpeculativeConfig
from specplug.errors import ConfigurationError
from specplug.lora.request import LoRARequest, parse_lora_modules
from specplug.values import as_integer, as_tuple, expect, flag, integer, is_integer, one_of, shown

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*$", re.IGNORECASE)
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(value: int | float | str) -> int:
    """Parses `8GiB`, `500MB` or a number of bytes.

    Raises:
        ConfigurationError: the text is not a size.
    """
    size = as_integer(value)
    is_number = isinstance(size, numbers.Real) and not isinstance(size, bool)
    if is_number:
        if not 1 <= size < math.inf:
            raise ConfigurationError(f"memory={shown(value)}: expected a positive size such as '8GiB'")
        return int(size)
    match = _SIZE.match(value) if isinstance(value, str) else None
    unit = (match.group(2) or "b").lower() if match else ""
    base = 1024 if "i" in unit else 1000
    parsed = float(match.group(1)) * base ** _UNITS.get(unit[0], 0) if match else 0.0
    if not 1 <= parsed < math.inf:
        raise ConfigurationError(f"memory={shown(value)}: expected a size such as '8GiB' or '500MB'")
    return int(parsed)


def _as_path(value: Any) -> Any:
    """A path → its text; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _on_by_default(value: Any) -> Any:
    """None, as vLLM has it, → True."""
    return True if value is None else value


def _as_name(kind: str) -> Callable[[Any], Any]:
    """Makes a converter of one of torch's types to its name; torch is not imported for it."""

    def convert(value: Any) -> Any:
        is_torchs = (type(value).__module__, type(value).__name__) == ("torch", kind)
        return str(value).removeprefix("torch.") if is_torchs else value

    return convert


def _text(converter: Callable[[Any], Any] | None = None, *, or_none: bool = False) -> dict[str, Any]:
    """Converter and validator of a name."""
    expected = "a text, or None" if or_none else "a text"
    check = expect(lambda value: isinstance(value, str) or (or_none and value is None), expected, ConfigurationError)
    return {"validator": check} if converter is None else {"converter": converter, "validator": check}


def _names(*, or_none: bool = False) -> dict[str, Any]:
    """Converter and validator of a list of methods or distributions; one text would be taken letter by letter."""
    return {
        "converter": as_tuple,
        "validator": expect(
            lambda value: (
                (or_none and value is None)
                or (isinstance(value, tuple) and all(isinstance(name, str) and name.strip() for name in value))
            ),
            "a list of names, such as ['ngram']" + (", or None" if or_none else ""),
            ConfigurationError,
        ),
    }


def _is_plugins(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) and name for name in value)


_INT8: dict[str, Any] = {
    "validator": expect(
        lambda value: value is None or value == "int8",
        "'int8' or None (a quantised checkpoint needs no option: its quantization_config says how it is read)",
        ConfigurationError,
    )
}
_FLAG = flag(ConfigurationError)
_POSITIVE = integer(1, ConfigurationError)
_POSITIVE_OR_NONE = integer(1, ConfigurationError, or_none=True)
_SEEDS = 2**63


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Everything an engine is started with. Names are vLLM's where vLLM has them.

    Attributes:
        model: a local folder or a hub name; `tiny` is the embedded model.
        tokenizer: another folder or hub name for the tokenizer.
        revision: the checkpoint's revision on the hub.
        dtype: `auto` (the checkpoint's own) or a dtype's name.
        quantization: `int8` quantises the target's linear layers while they are loaded, on a CPU; None, the default, keeps the
            checkpoint's precision.
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, …
        trust_remote_code: whether code that comes with a checkpoint may run. Off by default.
        skip_tokenizer_init: run on token ids alone.
        max_model_len: the longest sequence; None takes what the model and the memory allow.
        max_num_seqs: the most rows in a batch.
        max_num_batched_tokens: the most tokens in one target forward, drafts included. None takes 1,024 on a CPU, and on a GPU
            8,192 with 32 GiB of memory or more, 2,048 with 8 GiB: prompts are computed faster in larger pieces, and rows
            that decode meanwhile wait longer for each.
        max_num_draft_tokens: the most draft tokens that one step verifies, over all rows; None sets no limit of its own. A
            large batch is bound by computing: scored trees then keep the best nodes of all rows together.
        block_size: tokens of a KV block.
        tensor_parallel_size: how many processes share the target's weights and KV cache, each on a GPU of its own or with its
            share of the cores.
        scheduling_policy: the order in which requests are served: `fcfs` (first come, first served) or `priority`.
        enable_prefix_caching: whether KV is kept for later requests that begin with the same tokens.
        memory: bytes that everything together may use, on each rank; None takes a share of what is free.
        seed: of the engine's random streams.
        speculative: the chain of speculators, or None for plain decoding.
        chain_verification: how sampled chains are verified: `block` (accepts more) or `standard`.
        strict: raise a plugin's fault instead of going on without its drafts.
        allowed_plugins: methods or distributions that may be loaded; None allows all.
        denied_plugins: methods or distributions that may not.
        plugins: method → plugin for speculators that are not installed: an object implementing `load_speculator`, or a
            plain function of (config, target); or an observer, an object with wrappers alone, under any name.
        check_parity: run the parity probe at warm-up when this architecture is new here.
        enable_lora: whether requests may use LoRA adapters; `lora_modules` implies it.
        lora_modules: adapters that are loaded at the start: a mapping of names to folders, or `LoRARequest`s.
        max_loras: the most adapters that are loaded at once; None makes room for `lora_modules`, and for four at least.
        max_lora_rank: the largest rank of an adapter; None takes that of `lora_modules`, and 16 at least.
        compile: whether forwards are compiled, once per architecture and machine: `auto` does so where it pays and a C++
            compiler is there; True for small models too; False never. Results change by rounding alone.

    Raises:
        ConfigurationError: an option of the wrong type or range; the message names it, its value and what is expected.
            Integers of other libraries are taken where an integer is expected, booleans are not.
    """

    model: str = attrs.field(**_text(_as_path))
    tokenizer: str | None = attrs.field(default=None, **_text(_as_path, or_none=True))
    revision: str | None = attrs.field(default=None, **_text(or_none=True))
    dtype: str = attrs.field(default="auto", **_text(_as_name("dtype")))
    quantization: str | None = attrs.field(default=None, **_INT8)
    device: str = attrs.field(default="auto", **_text(_as_name("device")))
    trust_remote_code: bool = attrs.field(default=False, **_FLAG)
    skip_tokenizer_init: bool = attrs.field(default=False, **_FLAG)
    max_model_len: int | None = attrs.field(default=None, **_POSITIVE_OR_NONE)
    max_num_seqs: int = attrs.field(default=32, **_POSITIVE)
    max_num_batched_tokens: int | None = attrs.field(default=None, **_POSITIVE_OR_NONE)
    max_num_draft_tokens: int | None = attrs.field(default=None, **_POSITIVE_OR_NONE)
    block_size: int = attrs.field(default=16, **_POSITIVE)
    tensor_parallel_size: int = attrs.field(default=1, **_POSITIVE)
    scheduling_policy: str = attrs.field(default="fcfs", **one_of(("fcfs", "priority"), ConfigurationError))
    enable_prefix_caching: bool = attrs.field(default=True, converter=_on_by_default, validator=_FLAG["validator"])
    memory: int | None = attrs.field(default=None, converter=attrs.converters.optional(parse_bytes))
    seed: int = attrs.field(
        default=0,
        converter=as_integer,
        validator=expect(
            lambda value: is_integer(value) and -_SEEDS <= value < _SEEDS, "a 64-bit integer", ConfigurationError
        ),
    )
    speculative: SpeculativeConfig | None = attrs.field(
        default=None,
        validator=expect(
            lambda value: value is None or isinstance(value, SpeculativeConfig),
            "a SpeculativeConfig (EngineConfig.create makes one of a mapping), or None",
            ConfigurationError,
        ),
    )
    chain_verification: str = attrs.field(default="block", **one_of(("block", "standard"), ConfigurationError))
    strict: bool = attrs.field(default=False, **_FLAG)
    allowed_plugins: tuple[str, ...] | None = attrs.field(default=None, **_names(or_none=True))
    denied_plugins: tuple[str, ...] = attrs.field(default=(), **_names())
    plugins: Mapping[str, Any] = attrs.field(
        factory=dict,
        validator=expect(_is_plugins, "a mapping of method names to plugins", ConfigurationError),
    )
    check_parity: bool = attrs.field(default=True, **_FLAG)
    enable_lora: bool = attrs.field(default=False, **_FLAG)
    lora_modules: tuple[LoRARequest, ...] = attrs.field(default=(), converter=parse_lora_modules)
    max_loras: int | None = attrs.field(default=None, **_POSITIVE_OR_NONE)
    max_lora_rank: int | None = attrs.field(default=None, **_POSITIVE_OR_NONE)
    compile: bool | str = attrs.field(
        default="auto",
        validator=expect(
            lambda value: isinstance(value, bool) or (isinstance(value, str) and value == "auto"),
            "'auto', True or False",
            ConfigurationError,
        ),
    )

    def __attrs_post_init__(self) -> None:
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "every row needs at least one token in a step"
            )
        if not self.has_lora and (self.max_loras or self.max_lora_rank):
            raise ConfigurationError("max_loras and max_lora_rank need enable_lora=True or lora_modules")
        if self.has_lora and self.tensor_parallel_size > 1:
            raise ConfigurationError(
                f"tensor_parallel_size={self.tensor_parallel_size}: LoRA adapters cannot be split yet; use 1, or merge the "
                "adapter into the weights with peft's merge_and_unload()"
            )

    @property
    def has_lora(self) -> bool:
        """Whether requests may use LoRA adapters."""
        return self.enable_lora or bool(self.lora_modules)

    @classmethod
    def create(
        cls,
        model: str | os.PathLike[str],
        *,
        speculative_config: Mapping[str, Any] | None = None,
        memory: int | float | str | None = None,
        **options: Any,
    ) -> EngineConfig:
        """Builds a configuration from what users write: a speculative config as a mapping, memory as `8GiB`.

        Raises:
            ConfigurationError: an option of the wrong type or range; the message names it.
        """
        return cls(
            model=model,  # type: ignore[arg-type]  # a converter takes paths
            speculative=parse_speculative_config(speculative_config),
            memory=memory,
            **options,
        )
