"""The targets that a speculator is checked on, and what Transformers itself says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from specplug.errors import ConfigurationError
from specplug.model.load.checkpoint import resolve_checkpoint
from specplug.model.load.library_output import quiet_transformers
from specplug.testing.models import save_tiny_model, save_words
from specplug.tiny import resolve_model

NARROW = (3, 5)
"""Rows that may use these tokens alone repeat themselves before long, whatever the target thinks of it."""
MARGIN = 2e-4
"""Where the two best logits are closer, rounding may decide, and two correct programs may differ."""


class Targets:
    """Makes tiny random targets when they are asked for; or stands for one that was given.

    Args:
        root: where they are kept; several subjects may share it.
        given: a model that all checks use instead.
    """

    def __init__(self, root: Path, given: str | None = None) -> None:
        self.root = root
        self.given = given
        self._models: dict[Path, Any] = {}
        self._pairs: dict[tuple[Path, int], list[tuple[list[int], list[int]]]] = {}

    def get(self, architecture: str = "llama", **changes: Any) -> Path:
        """The folder of a target; equal arguments give the same folder. A target that was given stands for all."""
        if self.given is not None:
            return resolve_checkpoint(resolve_model(self.given))
        name = "-".join([architecture, *(f"{key}={value}" for key, value in sorted(changes.items()))])
        folder = self.root / name
        if not (folder / "done").is_file():
            save_tiny_model(folder, architecture, **changes)
            save_words(folder, self.vocabulary(folder))
            (folder / "done").touch()
        return folder

    def vocabulary(self, folder: Path) -> int:
        """How many tokens a target knows."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])

    def reference(self, folder: Path) -> Any:
        """The model by Transformers alone, in float32."""
        if folder not in self._models:
            from transformers import AutoModelForCausalLM

            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            self._models[folder] = model.eval()
        return self._models[folder]

    def forget(self) -> None:
        """Lets go of the models."""
        self._models.clear()

    def decisive_prompts(self, folder: Path, count: int, new_tokens: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, greedy output) pairs of ragged lengths on which the two best logits are never close.

        Raises:
            ConfigurationError: the target is undecided all the time.
        """
        found = self._pairs.setdefault((folder, new_tokens), [])
        attempt = 0
        while len(found) < count:
            prompt = repetitive_prompt(3 + 7 * (len(found) % 5) + len(found) % 3, self.vocabulary(folder), attempt)
            output, margin = self._generate(folder, prompt, new_tokens)
            if margin > MARGIN and all(prompt != other for other, _ in found):
                found.append((prompt, output))
            attempt += 1
            if attempt > 40 * count:
                raise ConfigurationError(f"the target {folder} has no clearly most likely token on most prompts")
        return found[:count]

    def _generate(self, folder: Path, prompt: list[int], count: int) -> tuple[list[int], float]:
        """Greedy output, and the smallest gap between the two best logits on the way. No cache, no generation config."""
        model = self.reference(folder)
        ids = torch.tensor([prompt], dtype=torch.int64, device="cpu")
        margin, past = float("inf"), None
        fed = ids
        with torch.no_grad():
            for _ in range(count):
                out = model(fed, past_key_values=past, use_cache=True)
                past = out.past_key_values
                best = out.logits[0, -1].float().topk(2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                fed = best.indices[:1][None]
                ids = torch.cat([ids, fed], dim=1)
        return ids[0, len(prompt) :].tolist(), margin


def repetitive_prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    """Token ids that come back, so that methods which look tokens up find some."""
    generator = torch.Generator().manual_seed(seed)
    period = int(torch.randint(3, 8, (1,), generator=generator, dtype=torch.int64, device="cpu"))
    low = min(3, vocabulary - 1)
    pattern = torch.randint(low, vocabulary, (period,), generator=generator, dtype=torch.int64, device="cpu").tolist()
    tokens = (pattern * (length // period + 1))[:length]
    for position in torch.randint(
        0, length, (length // 9,), generator=generator, dtype=torch.int64, device="cpu"
    ).tolist():
        tokens[position] = int(
            torch.randint(low, vocabulary, (1,), generator=generator, dtype=torch.int64, device="cpu")
        )
    return tokens


def narrow_prompt(length: int, seed: int) -> list[int]:
    """The same of two tokens alone, for rows with `allowed_token_ids=NARROW`."""
    return [NARROW[token % 2] for token in repetitive_prompt(length, 64, seed)]
