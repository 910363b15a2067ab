"""The contestants of a comparison: plain decoding, speculation methods, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from specplug.bench.measurement import Advance, Measurement, Measurer
from specplug.bench.workload import Cell, Workload

if TYPE_CHECKING:
    from specplug.engine.startup.report import StepReport
    from specplug.llm import LLM

PLAIN = "plain decoding"  # not a valid method name
OnStep = Callable[["StepReport"], None]


class Contestant(Protocol):
    """One row of the comparison.

    Attributes:
        label: the name in reports.
        kind: `plain`, `method` or `peer`.
        config: the speculative configuration.
        learns: whether drafts may depend on earlier requests; known only after it was open.
        is_taught: whether it learns, and has served requests since it was opened.
    """

    label: str
    kind: str
    config: Mapping[str, Any] | None
    learns: bool
    is_taught: bool

    def open(self, on_step: OnStep) -> None:
        """Prepares for runs."""

    def close(self) -> None:
        """Releases everything; may be called twice."""

    def cannot(self, cell: Cell) -> str | None:
        """Returns why it cannot run a setting; None if it can."""

    def run(self, workload: Workload, cell: Cell, advance: Advance) -> Measurement:
        """Generates the workload once."""


class EngineContestant:
    """specplug itself, with or without a method.

    Args:
        label: the name.
        target: the model.
        config: the speculative configuration; None for plain decoding.
        options: keywords of `LLM`.
    """

    def __init__(self, label: str, target: str, config: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
        self.label = label
        self.kind = "plain" if config is None else "method"
        self.config = config
        self.learns = False
        self.is_taught = False
        self._target = target
        self._options = options
        self._llm: LLM | None = None
        self._measurer: Measurer | None = None

    def open(self, on_step: OnStep) -> None:
        """Starts the engine.

        Raises:
            SpecplugError: the engine does not start; a note names the contestant.
        """
        from specplug.errors import SpecplugError
        from specplug.llm import LLM

        try:
            self._llm = LLM(self._target, speculative_config=self.config, on_step=on_step, **self._options)
        except SpecplugError as error:
            error.add_note(f"starting {self.label}")
            raise
        self.learns = any(speculator.traits.learns for speculator in self._llm.engine.chain.speculators)
        self.is_taught = False
        self._measurer = Measurer(self._llm)

    @property
    def engine(self) -> Any:
        """The running engine."""
        assert self._llm is not None
        return self._llm.engine

    def close(self) -> None:
        """Closes the engine."""
        if self._llm is not None and self._measurer is not None:
            self._measurer.close()
            self._llm.close()
        self._llm = self._measurer = None

    def cannot(self, cell: Cell) -> str | None:
        """Returns None: an engine can run every setting."""
        return None

    def run(self, workload: Workload, cell: Cell, advance: Advance) -> Measurement:
        """Generates the workload once.

        Raises:
            RequestError: a prompt cannot be served.
        """
        assert self._measurer is not None
        workload.check_length(self.engine.plan.max_model_len)
        self.is_taught = self.learns
        return self._measurer.run(workload, cell, advance)


def why_missing(contestant: Contestant, workload: Workload, cell: Cell) -> str | None:
    """Returns why a contestant cannot run a workload under a setting; None if it can."""
    reason = contestant.cannot(cell)
    if reason is None and contestant.learns and workload.repeats(cell.batch):
        needed = len(workload.requests(cell.batch))
        reason = f"it learns: needs {needed} different prompts, got {len(workload.prompts)}"
    return reason


def label_configs(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a short name for each configuration: its methods, and the keys in which it differs from others with these."""
    names = ["+".join(_methods(config)) for config in configs]
    labels = []
    for name, config in zip(names, configs, strict=True):
        rivals = [other for rival, other in zip(names, configs, strict=True) if rival == name and other is not config]
        differing = [key for key in _keys([config, *rivals]) if any(config.get(key) != r.get(key) for r in rivals)]
        differing.sort(key=lambda key: key != "num_speculative_tokens")
        details = " ".join(_describe(key, config[key]) for key in differing if key in config)
        labels.append(f"{name} {details}".strip())
    return [
        f"{label} ({labels[:i].count(label) + 1})" if label in labels[:i] else label for i, label in enumerate(labels)
    ]


def _keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for config in configs for key in config))


def _methods(config: Any) -> list[str]:
    """Returns the methods of a configuration and its fallbacks. Invalid ones are skipped; the engine refuses them."""
    if not isinstance(config, dict):
        return []
    return [str(config.get("method", "?")), *_methods(config.get("fallback"))]


def _describe(key: str, value: Any) -> str:
    if key == "num_speculative_tokens":
        return f"{value} tokens"
    return f"{key}={'...' if isinstance(value, dict) else value}"
