"""Files and checkpoints that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from specplug.tiny import resolve_model
from support.models import save_model


def make_files(folder: Path) -> None:
    """Files that cannot be used."""
    (folder / "bad.json").write_text('{\n  "method": lookup\n}')
    (folder / "latin.json").write_bytes('{"method": "café"}'.encode("latin-1"))


def make_targets(folder: Path) -> None:
    """Checkpoints that cannot be used."""
    good = save_model(folder / "mute", "llama")
    (folder / "empty").mkdir()

    def spoilt(name: str) -> Path:
        copy = shutil.copytree(good, folder / name)
        shutil.copy(Path(resolve_model("tiny"), "tokenizer.json"), copy)
        return copy

    (spoilt("unweighted") / "model.safetensors").unlink()
    (spoilt("pickled") / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    weights = (good / "model.safetensors").read_bytes()
    (spoilt("truncated") / "model.safetensors").write_bytes(weights[:-100])
    (spoilt("garbled") / "model.safetensors").write_bytes(b"\xff" * 1000)
    tensors = load_file(good / "model.safetensors")
    short = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(short, spoilt("short") / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((good / "config.json").read_text())
    (spoilt("reshaped") / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    (spoilt("unheard") / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    (spoilt("misconfigured") / "config.json").write_text("{")
    index = "model.safetensors.index.json"
    (spoilt("sharded") / index).write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    (spoilt("misindexed") / index).write_text("{")
    (spoilt("misguided") / "generation_config.json").write_text("{")
