"""Measure the tiny head on held-out texts of its target and record the figures beside its weights.

python plugins/eagle/tiny/measure.py --texts build/tiny-head --out plugins/eagle/src/specplug_eagle/tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from specplug_eagle.train.batches import collate
from specplug_eagle.train.data import read_samples
from specplug_eagle.train.evaluate import Acceptance, evaluate
from specplug_eagle.train.folder import HeadFolder
from specplug_eagle.train.states import LiveStates
from specplug_eagle.train.target import Target

TEMPERATURES = (0.0, 0.7, 1.0)
LONGEST = 8


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="what make.sh wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shipped head")
    args = parser.parse_args()

    run = args.texts / "run"
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(run / name, args.out / name)
        (args.out / name).chmod(0o644)
    target = Target.load("tiny")
    folder = HeadFolder(str(args.out))
    head = folder.head(target)
    states = LiveStates(target, head.spec.layer_ids or ())

    def measured(temperature: float, gamma: int) -> Acceptance:
        samples = read_samples(args.texts / f"held_out_{temperature}.jsonl", None, target.vocab_size, 2048)
        batches = [
            collate(samples, tuple(range(i, min(i + 16, len(samples)))), target.device)
            for i in range(0, len(samples), 16)
        ]
        return evaluate(head, target, states, batches, gamma, temperature or 1.0)

    held_out: dict[str, Any] = {}
    for gamma in (1, 2, 3, 4, 5, 6, LONGEST):
        greedy = measured(0.0, gamma)
        held_out[f"greedy_length_{gamma}"] = round(greedy.greedy_length, 4)
    held_out["greedy_agreement_by_step"] = [round(value, 4) for value in greedy.agreement]
    for temperature in TEMPERATURES[1:]:
        sampled = measured(temperature, 5)
        held_out[f"overlap_at_{temperature}_by_step"] = [round(value, 4) for value in sampled.overlap]
        held_out[f"sampled_length_5_at_{temperature}"] = round(sampled.sampled_length, 4)
    training = json.loads((run / "training.json").read_text(encoding="utf-8"))
    record = {
        "target": "tiny",
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "texts": training["texts"],
        "tokens": training["tokens"],
        "options": training["options"],
        "steps": training["epochs"][-1]["step"],
        "loss": round(training["epochs"][-1]["loss"], 4),
        "minutes": round(training["seconds"] / 60, 2),
        "device": training["device"],
        "torch": training["torch"],
        "held_out": held_out,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
