"""The parity probe: is the packed, paged forward the same function as the model's own?

It runs the first time an architecture is met with these versions of torch and Transformers, and its verdict is kept on
disk. "Any architecture" is thereby a checked fact and not a hope.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from specplug import native
from specplug.cache import CacheError, check_private, new_file, private_folder
from specplug.errors import UnsupportedModelError
from specplug.model import attention
from specplug.model.blocks import BlockTable
from specplug.model.cache_key import cache_key, config_facts, device_name
from specplug.model.difference import TOLERANCE, relative_difference
from specplug.model.forward import ForwardRow
from specplug.model.packing import PackedLinear
from specplug.model.runner import ModelRunner

logger = logging.getLogger("specplug")
_SHORT, _LONG = 5, 9


def check_parity(runner: ModelRunner, config: Any, block_size: int, *, cache_folder: Path | None = None) -> bool:
    """Compares two ragged rows over two steps with the model's own eager attention.

    Args:
        runner: the loaded model; the first blocks of its KV cache are overwritten.
        config: the model's configuration, part of the key under which the verdict is kept.
        block_size: tokens of a KV block.
        cache_folder: where verdicts are kept; by default specplug's cache folder.

    Returns:
        Whether the probe ran (False: a verdict was on record).

    Raises:
        UnsupportedModelError: the two disagree.
    """
    record = _record(cache_folder)
    key = _key(runner, config)
    if record is not None and _load(record).get(key):
        return False
    difference = measure_difference(runner, block_size)
    limit = TOLERANCE[runner.cache.keys[0].dtype]
    if not difference <= limit:
        raise UnsupportedModelError(
            f"{runner.architecture.name} gives other logits packed and paged than by its own attention (relative difference "
            f"{difference:.2g}, at most {limit:g} is rounding): its attention does something the interface does not show"
        )
    if record is not None:
        _save(record, key)
    return True


@torch.inference_mode()
def measure_difference(runner: ModelRunner, block_size: int) -> float:
    """The relative root-mean-square difference of the logits, the worse of both steps."""
    vocabulary = runner.architecture.vocab_size
    generator = torch.Generator().manual_seed(0)
    limit = min(_LONG, runner.architecture.context_length, runner.cache.num_slots // 2)
    rows = [
        torch.randint(vocabulary, (count,), generator=generator, dtype=torch.long, device="cpu").tolist()
        for count in (min(_SHORT, limit), limit)
    ]
    tables = []
    blocks_each = -(-limit // block_size)
    for number in range(2):
        table = BlockTable(block_size)
        table.extend(range(number * blocks_each, (number + 1) * blocks_each))
        tables.append(table)
    cuts = [max(1, len(ids) - 2) for ids in rows]
    first = [ForwardRow(ids[:cut], 0, table) for ids, cut, table in zip(rows, cuts, tables, strict=True)]
    second = [ForwardRow(ids[cut:], cut, table) for ids, cut, table in zip(rows, cuts, tables, strict=True)]
    packed = [runner.forward(first), runner.forward(second)]
    expected = [_own_logits(runner.model, ids, runner.device) for ids in rows]
    reference = [
        torch.cat([logits[:cut] for logits, cut in zip(expected, cuts, strict=True)]),
        torch.cat([logits[cut:] for logits, cut in zip(expected, cuts, strict=True)]),
    ]
    return max(relative_difference(ours, theirs) for ours, theirs in zip(packed, reference, strict=True))


def _own_logits(model: Any, ids: list[int], device: torch.device) -> torch.Tensor:
    """Logits [T, V] of one row by the model's own eager attention, without any cache."""
    model.set_attn_implementation("eager")
    try:
        return model(input_ids=torch.tensor([ids], device=device, dtype=torch.long), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(attention.IMPLEMENTATION)


def _key(runner: ModelRunner, config: Any) -> str:
    facts = {
        "config": config_facts(config),
        "dtype": str(runner.cache.keys[0].dtype),
        "device": device_name(runner.device),
        "packed": sum(isinstance(module, PackedLinear) for module in runner.model.modules()),
        "native": native.key() if runner.attends_natively else None,
    }
    return cache_key(runner.architecture.name, facts)


def _record(folder: Path | None) -> Path | None:
    """Where verdicts are kept; None where no folder can be trusted: then every start probes."""
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
