"""A prompt on its way through the engine."""

from __future__ import annotations

import attrs

from specplug.lora.request import LoRARequest
from specplug.outputs import RequestMetrics
from specplug.request import Request

Lora = LoRARequest | str | None
"""What a prompt may have as its adapter: one, the name of a loaded one, or none."""


@attrs.frozen(eq=False)
class Submission:
    """A prompt as requests of the engine.

    Attributes:
        id: the request's name.
        prompt: the prompt's text, if it has one.
        family: its sequences, one for each completion.
    """

    id: str
    prompt: str | None
    family: list[Request]

    @property
    def lora_request(self) -> LoRARequest | None:
        """Its adapter."""
        adapter = self.family[0].adapter
        return None if adapter is None else adapter.request

    @property
    def metrics(self) -> RequestMetrics:
        """Its times so far."""
        first = self.family[0]
        ends = [request.finished_time for request in self.family]
        return RequestMetrics(
            arrival_time=first.arrival_time,
            first_token_time=first.first_token_time,
            finished_time=max((end for end in ends if end is not None), default=None),
        )
