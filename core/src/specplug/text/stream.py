"""The text of one output, token by token: whole characters, and stop strings at any position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from specplug.text.detokenizer import incremental_detokenizer


class TextStream:
    """The text of one output as it grows.

    Released text never changes. Text that may be the beginning of a stop string is held back until that is decided.

    Args:
        tokenizer: decodes the ids.
        stop: strings that end the output.
        prompt_ids: the ids before the output. Their text is not part of the output, and stop strings are not searched in it.
            It decides whether the output begins with a space, and the output may complete its last character.
        skip_special_tokens: whether special tokens leave no text.
        include_stop: whether the stop string stays in the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._step = incremental_detokenizer(tokenizer, prompt_ids, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held_back = max((len(s) for s in stop), default=1) - 1
        self._released: list[str] = []
        self._waiting = ""  # text that is not released: new text, and text held back
        self._queued: list[int] = []  # tokens that are decoded when their text is asked for: nothing depends on it
        self._starts: list[int] = []  # for each new token, where its text begins in `_waiting`
        self._finished = False
        self.stop_string: str | None = None

    @property
    def text(self) -> str:
        """All text so far."""
        self._decode()
        return "".join([*self._released, self._waiting])

    def push(self, token: int, *, may_stop: bool = True) -> bool:
        """Adds one token; returns whether a stop string is now complete."""
        if not self._stop:
            self._queued.append(token)
            return False
        return self._add(token, may_stop)

    def _decode(self) -> None:
        queued, self._queued = self._queued, []
        for token in queued:
            self._add(token)

    def _add(self, token: int, may_stop: bool = False) -> bool:
        piece = self._step(token)
        new = len(self._waiting)
        self._starts.append(new)
        self._waiting += piece
        if not piece or not may_stop:
            return False
        hits = [(place, s) for s in self._stop if (place := self._waiting.find(s, max(0, new - len(s) + 1))) >= 0]
        if not hits:
            return False
        place, self.stop_string = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
        self._waiting = self._waiting[: place + len(self.stop_string) if self._include_stop else place]
        return True

    def finish(self) -> None:
        """Releases the text that was held back; no token follows."""
        self._finished = True

    def take(self, count: int) -> list[str]:
        """The text released since the last call, split over the `count` tokens committed since then.

        Text that was held back before belongs to the first of them. The last one has no text if it was not pushed.
        """
        self._decode()
        waiting = self._waiting
        end = len(waiting) if self._finished else max(0, len(waiting) - self._held_back)
        if len(self._starts) > 1:
            bounds = [0, *(min(start, end) for start in self._starts[1:]), end]
            pieces = [waiting[a:b] for a, b in pairwise(bounds)]
        else:
            pieces = [waiting[:end]]
        self._starts.clear()
        self._released.append(waiting[:end])
        self._waiting = waiting[end:]
        return pieces + [""] * (count - len(pieces))
