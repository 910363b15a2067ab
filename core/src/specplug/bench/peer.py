"""Transformers as a peer: the same weights, dtype, prompts and token counts through its own `generate`."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from specplug.bench.contestant import OnStep
from specplug.bench.measurement import Advance, Measurement
from specplug.bench.workload import BenchPrompt, Cell, Workload
from specplug.errors import ConfigurationError
from specplug.model.device import choose_device
from specplug.model.load.checkpoint import choose_dtype, load_config, resolve_checkpoint
from specplug.model.load.quiet import quiet_transformers
from specplug.plugins.finder import find_plugins
from specplug.tiny import resolve_model

NAME = "transformers"
PEERS = (NAME,)
_DEFAULT_LOOKUP = 5
_DEFAULT_TOKENS = 5
_COUNTERPARTS = {"ngram": "prompt lookup", "draft_model": "assisted generation"}


class TransformersModel:
    """The target in Transformers, shared by the contestants that run on it; loaded while any of them is open.

    Args:
        target: the model.
        options: of the engines beside it: `dtype`, `device`, `revision` and `trust_remote_code` are taken from them.
    """

    def __init__(self, target: str, options: Mapping[str, Any]) -> None:
        self._target = target
        self._options = options
        self._users = 0
        self.model: Any = None

    def open(self) -> None:
        """Loads the model if nobody has."""
        self._users += 1
        if self.model is None:
            self.model = self.load(resolve_model(self._target), self._options.get("revision"))

    def load(self, source: str, revision: str | None = None) -> Any:
        """Loads a model in the target's dtype, on the target's device."""
        from transformers import AutoModelForCausalLM

        trusted = bool(self._options.get("trust_remote_code", False))
        target = resolve_checkpoint(
            resolve_model(self._target), self._options.get("revision"), trust_remote_code=trusted
        )
        dtype = choose_dtype(self._options.get("dtype", "auto"), load_config(target, trust_remote_code=trusted))
        device = choose_device(self._options.get("device", "auto"))
        folder = resolve_checkpoint(source, revision, trust_remote_code=trusted)
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trusted)
        model.to(device).eval()
        # Nothing ends an output early, and nothing of the checkpoint's sampling recommendations is used.
        model.generation_config = type(model.generation_config)(pad_token_id=0, eos_token_id=None)
        return model

    def close(self) -> None:
        """Lets go of the model when the last one closes."""
        self._users -= 1
        if self._users <= 0:
            self.model = None


class TransformersContestant:
    """One way of Transformers to generate.

    Args:
        shared: the target.
        config: the specplug method whose counterpart this is; None for plain `generate`.
    """

    kind = "peer"
    learns = False
    is_taught = False

    def __init__(self, shared: TransformersModel, config: Mapping[str, Any] | None = None) -> None:
        way = "generate" if config is None else _COUNTERPARTS[config["method"]]
        self.label = f"{NAME} {way}"
        self.config = config
        self._shared = shared
        self._options: dict[str, Any] = {}
        self._is_open = False

    def open(self, on_step: OnStep) -> None:
        """Loads target and draft."""
        del on_step
        self._shared.open()
        self._is_open = True
        if self.config is None:
            return
        count = _num_tokens(self.config)
        if self.config["method"] == "ngram":
            shortest = self.config.get("prompt_lookup_min", _DEFAULT_LOOKUP)
            longest = self.config.get("prompt_lookup_max", shortest)
            self._options = {"prompt_lookup_num_tokens": count, "max_matching_ngram_size": longest}
            return
        draft = self._shared.load(method_model("draft_model", self.config.get("model") or "tiny"))
        draft.generation_config.num_assistant_tokens = count
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        self._options = {"assistant_model": draft}

    def close(self) -> None:
        """Lets go of the models."""
        if self._is_open:
            self._shared.close()
        self._is_open, self._options = False, {}

    def cannot(self, cell: Cell) -> str | None:
        """Its speculation is for one sequence at a time."""
        return "one sequence at a time only" if self.config is not None and cell.batch > 1 else None

    @torch.inference_mode()
    def run(self, workload: Workload, cell: Cell, advance: Advance) -> Measurement:
        """Generates the workload once, in static batches, padded on the left."""
        requests = workload.requests(cell.batch)
        measured = Measurement()
        started = time.perf_counter()
        for first in range(0, len(requests), cell.batch):
            group = requests[first : first + cell.batch]
            self._generate(group, workload.max_tokens, cell.temperature, measured)
            advance(len(group) * workload.max_tokens)
        measured.seconds = time.perf_counter() - started
        return measured

    def _generate(self, group: Sequence[BenchPrompt], max_tokens: int, temperature: float, run: Measurement) -> None:
        model = self._shared.model
        longest = max(len(prompt.ids) for prompt in group)
        missing = [longest - len(prompt.ids) for prompt in group]
        ids = [[0] * pad + prompt.ids for pad, prompt in zip(missing, group, strict=True)]
        mask = [[0] * pad + [1] * len(prompt.ids) for pad, prompt in zip(missing, group, strict=True)]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        clock = _Clock(longest)
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_tokens,
            stopping_criteria=[clock],
            **sampling,
            **self._options,
        )
        new = output[:, longest:].tolist()
        run.outputs += new
        run.tokens += sum(len(tokens) for tokens in new)
        clock.report(run, len(group))


class _Clock:
    """A stopping criterion that never stops: `generate` asks it after every step, so it sees when tokens come."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._last = self._started = time.perf_counter()
        self._arrivals: list[tuple[int, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        now = time.perf_counter()
        if input_ids.shape[1] > self._length:
            self._arrivals.append((input_ids.shape[1] - self._length, now - self._last))
            self._length, self._last = input_ids.shape[1], now
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def report(self, run: Measurement, rows: int) -> None:
        """Adds what was seen, the same for all rows of the static batch."""
        for index, (count, gap) in enumerate(self._arrivals):
            for _ in range(rows):
                if index:
                    run.arrived(count, gap)
                else:
                    run.first_token_seconds.append(gap)


def transformers_contestants(
    target: str, configs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[TransformersContestant]:
    """Plain `generate`, and what Transformers has for each of the methods, once each."""
    shared = TransformersModel(target, options)
    chosen = [config for config in configs if config.get("method") in _COUNTERPARTS and "fallback" not in config]
    unique = {_counterpart_key(config): config for config in reversed(chosen)}
    contestants = [
        TransformersContestant(shared),
        *(TransformersContestant(shared, c) for c in reversed(unique.values())),
    ]
    for contestant in contestants:
        if [c.label for c in contestants].count(contestant.label) > 1 and contestant.config is not None:
            contestant.label += f" {_num_tokens(contestant.config)} tokens"
    return contestants


def _num_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens to draft: what the configuration says, if it is a number."""
    count = config.get("num_speculative_tokens")
    return count if type(count) is int else _DEFAULT_TOKENS


def _counterpart_key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a configuration its counterpart takes."""
    names = ("method", "model", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
    return tuple(str(config.get(name)) for name in names)


def method_model(method: str, name: str) -> str:
    """The folder of a model that a method's package brings under a name, such as the draft `tiny`; else the name itself.

    Raises:
        ConfigurationError: there is no such method.
    """
    record = next((r for r in find_plugins() if r.method == method and r.status == "ok"), None)
    if record is None:
        raise ConfigurationError(f"no usable speculator named '{method}' (see: specplug list)")
    spec = importlib.util.find_spec(record.module.partition(":")[0])
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        if not Path(name).is_dir() and (Path(root) / name / "config.json").is_file():
            return str(Path(root) / name)
    return name
