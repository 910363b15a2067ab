"""The engine's configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import attrs

from specplug.configuration.speculative import parse_speculative_config
from specplug.contract.settings import SpeculativeConfig
from specplug.errors import ConfigurationError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*$", re.IGNORECASE)
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(value: int | float | str) -> int:
    """Parses `8GiB`, `500MB` or a number of bytes.

    Raises:
        ConfigurationError: the text is not a size.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value <= 0:
            raise ConfigurationError(f"memory={value!r}: expected a positive size such as '8GiB'")
        return int(value)
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None or float(match.group(1)) <= 0:
        raise ConfigurationError(f"memory={value!r}: expected a size such as '8GiB' or '500MB'")
    unit = (match.group(2) or "b").lower()
    base = 1024 if "i" in unit else 1000
    return int(float(match.group(1)) * base ** _UNITS.get(unit[0], 0))


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigurationError(f"{name}={value!r}: expected an integer of at least 1")
    return value


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Everything an engine is started with. Names are vLLM's where vLLM has them.

    Attributes:
        model: a local folder or a hub name; `tiny` is the embedded model.
        tokenizer: another folder or hub name for the tokenizer.
        revision: the checkpoint's revision on the hub.
        dtype: `auto` (the checkpoint's own) or a dtype's name.
        device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, …
        trust_remote_code: whether code that comes with a checkpoint may run. Off by default.
        skip_tokenizer_init: run on token ids alone.
        max_model_len: the longest sequence; None takes what the model and the memory allow.
        max_num_seqs: the most rows in a batch.
        max_num_batched_tokens: the most tokens in one target forward, drafts included.
        max_num_draft_tokens: the most draft tokens that one step verifies, over all rows; None sets no limit of its own. A
            large batch is bound by computing: scored trees then keep the best nodes of all rows together.
        block_size: tokens of a KV block.
        memory: bytes that everything together may use; None takes a share of what is free.
        seed: of the engine's random streams.
        speculative: the chain of speculators, or None for plain decoding.
        chain_verification: how sampled chains are verified: `block` (accepts more) or `standard`.
        strict: raise a plugin's fault instead of going on without its drafts.
        allowed_plugins: methods or distributions that may be loaded; None allows all.
        denied_plugins: methods or distributions that may not.
        plugins: method → plugin for speculators that are not installed: an object implementing `load_speculator`, or a
            plain function of (config, target); or an observer, an object with wrappers alone, under any name.
        check_parity: run the parity probe at warm-up when this architecture is new here.
        compile: whether forwards are compiled, once per architecture and machine: `auto` does so where it pays and a C++
            compiler is there; True for small models too; False never. Results change by rounding alone.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 1024
    max_num_draft_tokens: int | None = None
    block_size: int = 16
    memory: int | None = None
    seed: int = 0
    speculative: SpeculativeConfig | None = None
    chain_verification: str = "block"
    strict: bool = False
    allowed_plugins: tuple[str, ...] | None = None
    denied_plugins: tuple[str, ...] = ()
    plugins: Mapping[str, Any] = attrs.field(factory=dict)
    check_parity: bool = True
    compile: bool | str = "auto"

    def __attrs_post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_draft_tokens",
            "block_size",
        ):
            _positive(name, getattr(self, name))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "every row needs at least one token in a step"
            )
        if self.compile not in (True, False, "auto"):
            raise ConfigurationError(f"compile={self.compile!r}: expected 'auto', True or False")
        if self.chain_verification not in ("block", "standard"):
            raise ConfigurationError(f"chain_verification={self.chain_verification!r}: expected 'block' or 'standard'")

    @classmethod
    def create(
        cls,
        model: str,
        *,
        speculative_config: Mapping[str, Any] | None = None,
        memory: int | float | str | None = None,
        **options: Any,
    ) -> EngineConfig:
        """Builds a configuration from what users write: a speculative config as a mapping, memory as `8GiB`."""
        return cls(
            model=str(model),
            speculative=parse_speculative_config(speculative_config),
            memory=None if memory is None else parse_bytes(memory),
            **options,
        )
