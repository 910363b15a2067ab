"""Transformers as a peer: its own `generate` with the same weights, dtype, prompts and lengths.

Which of its assisted-generation modes corresponds to a method is said by the plugin: its module may have a function
`transformers_options(config: SpeculativeConfig)` that returns keyword arguments of `generate`, or None.
`assistant_model` is a folder or hub name there, and is loaded here.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.bench.contestants import OnStep
from specplug.bench.measurement import Advance, Measurement
from specplug.bench.workload import BenchPrompt, Cell, Workload
from specplug.config.speculative import parse_speculative_config
from specplug.errors import ConfigurationError
from specplug.model.device import choose_device
from specplug.model.load.checkpoint import choose_dtype, load_config, resolve_checkpoint
from specplug.model.load.gguf_header import is_gguf
from specplug.model.load.gguf_loading import model_options, reading_gguf
from specplug.model.load.library_output import quiet_transformers
from specplug.plugins.finder import find_plugins
from specplug.plugins.registry import PluginRegistry
from specplug.tiny import resolve_model

NAME = "transformers"
_FIXED_LENGTH = 5
"""The draft length of the peer where the method chooses its own: `generate` has no counterpart."""
_MODES = {"prompt_lookup_num_tokens": "prompt lookup", "assistant_model": "assisted generation"}
"""What reports call the modes of `generate`, by the keyword argument that selects them."""


class TransformersModel:
    """The target in Transformers, shared by its contestants; loaded while any of them is open.

    Args:
        target: the model.
        options: of the engines; `dtype`, `device`, `revision` and `trust_remote_code` are used.
    """

    def __init__(self, target: str, options: Mapping[str, Any]) -> None:
        self._target = target
        self._options = options
        self._users = 0
        self.model: Any = None

    def open(self) -> None:
        """Loads the model, unless it is loaded."""
        self._users += 1
        if self.model is None:
            self.model = self.load(resolve_model(self._target), self._options.get("revision"))

    def load(self, source: str, revision: str | None = None) -> Any:
        """Loads a model with the dtype and device of the target."""
        from transformers import AutoModelForCausalLM

        trusted = bool(self._options.get("trust_remote_code", False))
        target = resolve_checkpoint(
            resolve_model(self._target), self._options.get("revision"), trust_remote_code=trusted
        )
        dtype = choose_dtype(self._options.get("dtype", "auto"), load_config(target, trust_remote_code=trusted))
        device = choose_device(self._options.get("device", "auto"))
        folder = resolve_checkpoint(source, revision, trust_remote_code=trusted)
        with reading_gguf() if is_gguf(folder) else quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                **model_options(folder), dtype=dtype, trust_remote_code=trusted
            )
        model.to(device).eval()
        # Outputs never end early, and the sampling recommendations of the checkpoint are ignored.
        model.generation_config = type(model.generation_config)(pad_token_id=0, eos_token_id=None)
        return model

    def close(self) -> None:
        """Releases the model when the last contestant closes."""
        self._users -= 1
        if self._users <= 0:
            self.model = None


class TransformersContestant:
    """One mode of `generate`.

    Args:
        shared: the target.
        config: the speculative configuration whose counterpart this is; None for plain `generate`.
        options: keyword arguments of `generate` that select the mode; see `transformers_options`.
    """

    kind = "peer"
    learns = False
    is_taught = False

    def __init__(
        self,
        shared: TransformersModel,
        config: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.options = dict(options or {})
        other = f"generate with {', '.join(self.options)}" if self.options else "generate"
        mode = next((name for key, name in _MODES.items() if key in self.options), other)
        self.label = f"{NAME} {mode}"
        self._shared = shared
        self._loaded: dict[str, Any] = {}
        self._is_open = False

    def open(self, on_step: OnStep) -> None:
        """Loads the target and the assistant model, if there is one."""
        del on_step
        self._shared.open()
        self._is_open = True
        self._loaded = dict(self.options)
        if "assistant_model" in self._loaded:
            assistant = self._shared.load(self._loaded["assistant_model"])
            assistant.generation_config.num_assistant_tokens = self._loaded.pop("num_assistant_tokens", _FIXED_LENGTH)
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            self._loaded["assistant_model"] = assistant

    def close(self) -> None:
        """Releases the models."""
        if self._is_open:
            self._shared.close()
        self._is_open, self._loaded = False, {}

    def cannot(self, cell: Cell) -> str | None:
        """Returns why a batch is impossible: assisted generation supports one sequence."""
        return "one sequence at a time only" if self.config is not None and cell.batch > 1 else None

    @torch.inference_mode()
    def run(self, workload: Workload, cell: Cell, advance: Advance) -> Measurement:
        """Generates the workload once, in static batches with left padding."""
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
            torch.tensor(ids, device=model.device, dtype=torch.int64),
            attention_mask=torch.tensor(mask, device=model.device, dtype=torch.int64),
            max_new_tokens=max_tokens,
            stopping_criteria=[clock],
            **sampling,
            **self._loaded,
        )
        new = output[:, longest:].tolist()
        run.outputs += new
        run.tokens += sum(len(tokens) for tokens in new)
        clock.report(run, len(group))


class _Clock:
    """A stopping criterion that never stops; `generate` calls it after every step, so it can record when tokens arrive."""

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
        """Adds the recorded times to a measurement, the same for all rows of the static batch."""
        for index, (count, gap) in enumerate(self._arrivals):
            for _ in range(rows):
                if index:
                    run.add_tokens(count, gap)
                else:
                    run.first_token_seconds.append(gap)


def transformers_contestants(
    target: str, configs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[TransformersContestant]:
    """Returns plain `generate`, and the counterparts of the methods, without duplicates.

    Args:
        target: the model.
        configs: the speculative configurations; those with a fallback have no counterpart.
        options: of the engines.
    """
    shared = TransformersModel(target, options)
    contestants = [TransformersContestant(shared)]
    registry = PluginRegistry(options.get("allowed_plugins"), options.get("denied_plugins") or ())
    for config in configs:
        given = transformers_options(config, registry)
        if given is not None and all(given != other.options for other in contestants):
            contestants.append(TransformersContestant(shared, config, given))
    labels = [contestant.label for contestant in contestants]
    for contestant in contestants:
        length = contestant.options.get("num_assistant_tokens", contestant.options.get("prompt_lookup_num_tokens"))
        if labels.count(contestant.label) > 1 and length is not None:
            contestant.label += f" {length} tokens"
    return contestants


def transformers_options(config: Mapping[str, Any], registry: PluginRegistry) -> dict[str, Any] | None:
    """Returns the keyword arguments of `generate` for the counterpart of a method; None if there is none.

    Args:
        config: the speculative configuration.
        registry: has the plugin of the method.

    Raises:
        ConfigurationError: the configuration is invalid.
    """
    parsed = parse_speculative_config(config)
    if parsed is None or parsed.fallback is not None:
        return None
    options_of = getattr(registry.plugin(parsed.method), "transformers_options", None)
    if options_of is None:
        return None
    if parsed.is_auto:
        parsed = attrs.evolve(parsed, num_speculative_tokens=_FIXED_LENGTH, is_auto=False)
    options = options_of(parsed)
    return None if options is None else dict(options)


def method_model(method: str, name: str) -> str:
    """Returns the folder of a model in the package of a method, such as the draft model `tiny`; else the name itself.

    Raises:
        ConfigurationError: the method is not installed.
    """
    record = next((r for r in find_plugins() if r.method == method and r.status == "ok"), None)
    if record is None:
        raise ConfigurationError(f"no usable speculator named '{method}' (see: specplug list)")
    spec = importlib.util.find_spec(record.module.partition(":")[0])
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        if not Path(name).is_dir() and (Path(root) / name / "config.json").is_file():
            return str(Path(root) / name)
    return name
