"""What `LLM` and `AsyncLLM` have in common for their users."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from specplug.engine.engine import Engine
from specplug.frontend.frontend import Frontend
from specplug.lora.request import LoRARequest
from specplug.metrics import Metric, engine_metrics
from specplug.sampling.params import SamplingParams


class FrontendOwner(ABC):
    """Closes the engine, and tells about it."""

    _frontend: Frontend
    engine: Engine

    @abstractmethod
    def close(self) -> None:
        """Ends all requests and frees all memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            RequestError: the engine takes token ids only.
        """
        return self._frontend.tokenizer.required("get_tokenizer()")

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of `generate` if it is given none: the model's generation_config, then the defaults."""
        return self._frontend.default_sampling_params()

    def get_metrics(self) -> list[Metric]:
        """The engine's current counters, under vLLM's names; never waits for a step."""
        return engine_metrics(self.engine)

    def list_loras(self) -> set[int]:
        """The numbers of the loaded LoRA adapters; none if they are off."""
        registry = self.engine.adapters
        return set() if registry is None else {each.request.lora_int_id for each in registry.loaded}

    @property
    def lora_requests(self) -> list[LoRARequest]:
        """The loaded LoRA adapters, in the order of their numbers."""
        registry = self.engine.adapters
        return [] if registry is None else [each.request for each in registry.loaded]
