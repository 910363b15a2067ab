"""The parity probe: is the packed, paged forward the same function as the model's own?

It runs the first time that an architecture meets these versions of torch and Transformers, and its verdict is kept on disk:
that is how "any architecture" is checked. Two things are compared:

- the model's code: a narrow float32 copy (see `narrow_copy`) gives the logits of its own eager attention, over prefill, decode
  and verification steps of ragged rows that reach beyond every window;
- the arithmetic on this device and in this dtype: in every attention layer of the loaded model, the
  result is the formula over the same queries, keys and values in float32. Logits cannot show that: rounding in bfloat16
  (a token that is routed to other experts) changes them as much as a fault does.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from specplug import native
from specplug.cache_folder import CacheError, check_private, new_file, private_folder
from specplug.errors import UnsupportedModelError
from specplug.model.attention.eager import attend_row
from specplug.model.attention.interface import IMPLEMENTATION, AttentionSite
from specplug.model.batch import ForwardBatch
from specplug.model.checks.difference import TOLERANCE, relative_difference
from specplug.model.checks.probe import MOST_HELD, measure_states, packed, probe_steps, spare_tokens
from specplug.model.compile.artifacts import cache_key, config_facts, device_name
from specplug.model.load.int8 import Int8Linear
from specplug.model.load.narrow_copy import make_narrow_copy
from specplug.model.load.packing import PackedLinear
from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")
_REVISION = 3  # verdicts of other probes do not count
_LENGTHS = (9, 23)
_BLOCK_SIZE = 4
# Of a narrow copy's logits. Deep models make up to 1e-3 of float32's rounding, a fault in one layer makes 0.03 and more.
_NARROW_TOLERANCE = 5e-3
# Of one attention layer; torch's float32 matmuls may be less exact than float32 on a GPU.
_ATTENTION_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 0.02, torch.float16: 0.005}


def check_parity(
    runner: ModelRunner,
    config: Any,
    block_size: int,
    *,
    trust_remote_code: bool = False,
    cache_folder: Path | None = None,
) -> bool:
    """Compares a model's packed forward with its own eager attention.

    Args:
        runner: the loaded model; the first blocks of its KV cache are overwritten.
        config: the model's configuration, part of the key under which the verdict is kept.
        block_size: tokens of a KV block.
        trust_remote_code: whether the model's own code may be run.
        cache_folder: where verdicts are kept; by default specplug's cache folder.

    Returns:
        Whether the probe ran (False: there was a verdict on disk).

    Raises:
        UnsupportedModelError: the two disagree.
    """
    record = _record(cache_folder)
    key = _key(runner, config)
    if record is not None and _load(record).get(key):
        return False
    dtype = runner.cache.dtype
    name = runner.architecture.name
    num_blocks = 2 * -(-(max(_LENGTHS) + MOST_HELD) // _BLOCK_SIZE)
    narrow = make_narrow_copy(
        config,
        runner.architecture,
        num_blocks,
        _BLOCK_SIZE,
        (len(_LENGTHS), MOST_HELD),
        trust_remote_code=trust_remote_code,
    )
    if narrow is None and runner.num_ranks > 1:
        raise UnsupportedModelError(
            f"no small copy of {name} can be made, and a target of {runner.num_ranks} ranks cannot be compared with its own "
            "attention; give check_parity=False"
        )
    if narrow is None:  # then compare the logits of the real weights, whose difference includes rounding
        logger.debug("no narrow copy of %s can be made: the probe takes the model itself", name)
        difference, limit = measure_difference(runner, block_size), TOLERANCE[dtype]
    else:
        difference, limit = _measure_narrow_copy(narrow), _NARROW_TOLERANCE
    if not difference <= limit:
        raise UnsupportedModelError(
            f"{name} gives other logits packed and paged than by its own attention (relative difference "
            f"{difference:.2g}, at most {limit:g} is rounding): its attention does something the interface does not show"
        )
    for site, change in enumerate(measure_attention(runner, block_size)):
        if not change <= _ATTENTION_TOLERANCE[dtype]:
            raise UnsupportedModelError(
                f"{name}: the attention of '{runner.architecture.calls[site].module}' is not what its formula gives in "
                f"float32 (relative difference {change:.2g}, at most {_ATTENTION_TOLERANCE[dtype]:g} is rounding)"
            )
    for module, change in measure_states(runner, _probe_rows(runner), block_size):
        if not change <= _ATTENTION_TOLERANCE[dtype]:
            raise UnsupportedModelError(
                f"{name}: the recurrent state of '{module}' is not what its own function gives in float32 (relative "
                f"difference {change:.2g}, at most {_ATTENTION_TOLERANCE[dtype]:g} is rounding)"
            )
    if record is not None:
        _save(record, key)
    return True


def _measure_narrow_copy(narrow: ModelRunner) -> float:
    try:
        return measure_difference(narrow, _BLOCK_SIZE)
    except Exception as error:  # of the model's own code, with its own attention
        raise UnsupportedModelError(
            f"{narrow.architecture.name} cannot be run with this configuration: {type(error).__name__}: {error}"
        ) from error
    finally:
        narrow.close()


@torch.inference_mode()
def measure_difference(runner: ModelRunner, block_size: int) -> float:
    """The largest relative root-mean-square difference of a step's logits to the model's own."""
    rows = _probe_rows(runner)
    own = [_own_logits(runner, ids) for ids in rows]
    worst = 0.0
    for step in probe_steps(runner, rows, block_size):
        theirs = torch.cat([own[row.number][row.positions] for row in step])
        worst = max(worst, relative_difference(runner.forward([row.row for row in step])[packed(step)], theirs))
    return worst


@torch.inference_mode()
def measure_attention(runner: ModelRunner, block_size: int) -> list[float]:
    """Per attention layer, the largest relative root-mean-square difference of a step to the formula in float32."""
    worst = [0.0] * len(runner.sites)
    usual = [site.attend for site in runner.sites]

    def watch(index: int) -> Any:
        site = runner.sites[index]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *how: Any) -> torch.Tensor:
            attended = usual[index](query, key, value, *how)
            worst[index] = max(worst[index], relative_difference(attended[0], _by_formula(site, query[0], *how)))
            return attended

        return attend

    try:
        for index, site in enumerate(runner.sites):
            site.attend = watch(index)  # type: ignore[method-assign]
        for step in probe_steps(runner, _probe_rows(runner), block_size):
            runner.forward([row.row for row in step])
    finally:
        for site, attend in zip(runner.sites, usual, strict=True):
            site.attend = attend  # type: ignore[method-assign]
    return worst


def _by_formula(
    site: AttentionSite,
    query: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What `AttentionSite.attend` must return, [T, heads, value_dim] in float32, from the keys and values it stored."""
    assert isinstance(site.batch, ForwardBatch)
    pieces = []
    for span in site.batch.spans:
        low, mask = span.mask(window, torch.float32)
        slots = torch.tensor(list(span.slot_numbers[low:]), dtype=torch.long, device=query.device)
        keys, values = (tensor.index_select(1, slots).float() for tensor in (site.keys, site.values))
        rows = query[:, span.first : span.last].float()
        sunk = None if sinks is None else sinks.float()
        pieces.append(attend_row(rows, keys, values, mask, scaling, softcap, sunk).transpose(0, 1))
    return torch.cat(pieces)


def _probe_rows(runner: ModelRunner) -> list[list[int]]:
    """The ids of two ragged rows; of one where there is recurrent state for one."""
    generator = torch.Generator().manual_seed(0)
    limit = min(runner.architecture.context_length, runner.cache.num_slots // 2) - spare_tokens(runner)
    vocabulary = runner.architecture.vocab_size
    rows = [
        torch.randint(vocabulary, (min(count, limit),), generator=generator, dtype=torch.long, device="cpu").tolist()
        for count in _LENGTHS
    ]
    return rows if runner.states is None else rows[-runner.states.slots :]


def _own_logits(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one row by the model's own eager attention, without a cache."""
    model: Any = runner.model
    model.set_attn_implementation("eager")
    try:
        with runner.states.unbound() if runner.states else nullcontext():
            tokens = torch.tensor([ids], device=runner.device, dtype=torch.long)
            return model(input_ids=tokens, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


def _key(runner: ModelRunner, config: Any) -> str:
    facts = {
        "config": config_facts(config),
        "dtype": str(runner.cache.dtype),
        "device": device_name(runner.device),
        "packed": sum(isinstance(module, PackedLinear) for module in runner.model.modules()),
        "int8": sum(isinstance(module, Int8Linear) for module in runner.model.modules()),
        "native": native.key() if runner.attends_natively else None,
        "windows": [site.window for site in runner.sites],
        "revision": _REVISION,
    }
    return cache_key(runner.architecture.name, facts)


def _record(folder: Path | None) -> Path | None:
    """The file of verdicts; None where no folder can be trusted: then every start probes."""
    try:
        record = (folder or private_folder()) / "parity.json"
        if record.exists():
            check_private(record)
    except CacheError as error:
        logger.debug("no parity verdicts are kept: %s", error)
        return None
    return record


def _load(record: Path) -> dict[str, bool]:
    try:
        loaded = json.loads(record.read_text(encoding="utf-8"))
        return loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError):
        return {}


def _save(record: Path, key: str) -> None:
    """Adds a verdict; a cache folder that cannot be written only means probing again next time."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with new_file(record) as temporary:
            temporary.write_text(json.dumps({**_load(record), key: True}, indent=1), encoding="utf-8")
    except OSError:
        return
