"""The golden checkpoints, opened the way the engine opens them, and rewritten into other layouts and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specplug.plugins.lazy_weights import LazyWeights
from specplug_eagle.checkpoint import EagleCheckpoint
from specplug_eagle.head import DraftHead

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
Tensors = dict[str, torch.Tensor]


def handle_of(folder: Path, dtype: torch.dtype = torch.float32) -> LazyWeights:
    return LazyWeights(str(folder), None, dtype, torch.device("cpu"))


def open_head(folder: Path, **overrides: Any) -> tuple[EagleCheckpoint, DraftHead, tuple[str, ...]]:
    """Opens, keeps, loads and builds; embedding and output layer are borrowed from the golden file where needed."""
    handle = handle_of(folder)
    checkpoint = EagleCheckpoint.open(handle, **overrides)
    handle.keep(checkpoint.names.values())
    handle.materialize(lambda done: None)
    golden = load_file(folder.with_suffix(".safetensors"))
    table, output = golden.get("target.embed_tokens"), golden.get("target.lm_head")
    head, warnings = checkpoint.build(
        handle.tensors,
        embed=None if table is None else lambda ids: table[ids],
        logits=None if output is None else lambda states: states @ output.T,
    )
    return checkpoint, head, warnings


def golden_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    golden = load_file(folder.with_suffix(".safetensors"))
    return golden["features"], golden["ids"], golden["logits"]


def rewrite(
    case: str,
    folder: Path,
    *,
    tensors: Callable[[Tensors], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
    form: str = "safetensors",
) -> Path:
    """Writes a golden case anew, after changes in place, as one file or two, safetensors or pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    held = load_file(GOLDEN / case / "model.safetensors")
    golden = load_file((GOLDEN / case).with_suffix(".safetensors"))
    fields = json.loads((GOLDEN / case / "config.json").read_text(encoding="utf-8"))
    before = dict(held)
    if tensors is not None:
        tensors(held)
    if config is not None:
        config(fields)
    for name in ("embed_tokens", "lm_head"):  # what a test takes away is borrowed
        if f"{name}.weight" in before and f"{name}.weight" not in held:
            golden[f"target.{name}"] = before[f"{name}.weight"]
    save_file(golden, folder.with_suffix(".safetensors"))
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_tensors(held, folder, form)
    return folder


def write_tensors(held: Tensors, folder: Path, form: str) -> None:
    kind, _, sharded = form.partition("-")
    name, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    write: Callable[[Tensors, Path], Any] = save_file if kind == "safetensors" else torch.save  # type: ignore[assignment]
    if not sharded:
        write(held, folder / f"{name}.{ending}")
        return
    names = sorted(held)
    shards = {f"{name}-00001-of-00002.{ending}": names[::2], f"{name}-00002-of-00002.{ending}": names[1::2]}
    for file, own in shards.items():
        write({key: held[key] for key in own}, folder / file)
    index = {"weight_map": {key: file for file, own in shards.items() for key in own}}
    (folder / f"{name}.{ending}.index.json").write_text(json.dumps(index), encoding="utf-8")
