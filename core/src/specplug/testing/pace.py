"""How long a speculator may take for one call."""

from __future__ import annotations

from specplug.testing.check import FundamentalFailure

MOST_SECONDS = 1.0
_MOST_STEPS = 4.0
_MOST_IN_A_ROW = 3


class Pace:
    """Ends the kit early where every `propose` takes long: each check would take minutes, and all would be slow alike."""

    def __init__(self) -> None:
        self._slow: list[float] = []

    def note(self, proposing: float, rest: float) -> None:
        """Notes a step of the engine.

        Args:
            proposing: seconds in `propose`; 0 where it was not called.
            rest: seconds of the step without it.

        Raises:
            FundamentalFailure: several calls in a row were slow.
        """
        if proposing <= 0:
            return
        limit = max(MOST_SECONDS, _MOST_STEPS * rest)
        self._slow = [*self._slow, proposing] if proposing > limit else []
        if len(self._slow) >= _MOST_IN_A_ROW:
            raise FundamentalFailure(
                f"at most {MOST_SECONDS:g} s for a call of propose, or {_MOST_STEPS:g} times the target's own step",
                f"{len(self._slow)} calls in a row took {min(self._slow):.1f} to {max(self._slow):.1f} s, "
                f"the target's own part of the last step {rest:.2f} s",
            )
