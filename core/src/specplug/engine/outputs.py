"""What steps have committed, until it is delivered: counted, decoded to text, and told to listeners."""

from __future__ import annotations

from specplug.engine.commit import Committed
from specplug.request import Request, StepOutput
from specplug.stats import SpeculationStats


class StepOutputs:
    """The outputs of the current step. On a GPU those of one step are delivered once the next one's forward runs."""

    def __init__(self) -> None:
        self._committed: list[Committed | StepOutput] = []
        self._delivered: dict[int, StepOutput] = {}  # by the request's number

    def add(self, entry: Committed | StepOutput) -> None:
        """Takes in what was committed, or an output that has been counted and decoded."""
        self._committed.append(entry)

    @property
    def has_ended(self) -> bool:
        """Whether a request has ended whose last tokens wait: nobody may learn of an end before the tokens."""
        return any(entry.request.is_finished for entry in self._committed)

    def has(self, request: Request) -> bool:
        """Whether there is an output of a request."""
        return request.number in self._delivered or any(entry.request is request for entry in self._committed)

    def deliver(self, total: SpeculationStats) -> None:
        """Counts what was committed, decodes its text, and hands it to whoever listens.

        Args:
            total: the engine's counters.
        """
        committed, self._committed = self._committed, []
        for entry in committed:
            output = entry.deliver(total) if isinstance(entry, Committed) else entry
            before = self._delivered.get(output.request.number)
            self._delivered[output.request.number] = output if before is None else before.joined(output)
            if output.request.listener is not None:
                output.request.listener.add(output)

    def drop(self, request: Request) -> None:
        """Forgets what would be returned of a request that was aborted; listeners have had it."""
        self._delivered.pop(request.number, None)

    def take(self) -> list[StepOutput]:
        """What was delivered since the last call, one output per request."""
        delivered, self._delivered = self._delivered, {}
        return list(delivered.values())
