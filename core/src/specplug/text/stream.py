"""Decoding one output token by token: whole characters only, and stop strings wherever they appear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one output as it grows.

    What has been released never changes: with stop strings, text that could still turn out to be the beginning of one is
    held back until it is decided.

    Args:
        tokenizer: decodes the ids.
        stop: strings that end the output.
        skip_special_tokens: whether special tokens leave no text.
        include_stop: whether the stop string stays in the text.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), *, skip_special_tokens: bool = True, include_stop: bool = False
    ) -> None:
        self._step = _decoder(tokenizer, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held_back = max((len(s) for s in stop), default=1) - 1
        self._released = 0
        self._starts: list[int] = []
        self._finished = False
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> bool:
        """Adds one token; returns whether a stop string is now complete."""
        piece = self._step(token)
        self._starts.append(len(self.text))
        self.text += piece
        if not piece or not may_stop:
            return False
        new = len(self.text) - len(piece)
        hits = [(place, s) for s in self._stop if (place := self.text.find(s, max(0, new - len(s) + 1))) >= 0]
        if not hits:
            return False
        place, self.stop_string = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
        self.text = self.text[: place + len(self.stop_string)] if self._include_stop else self.text[:place]
        return True

    def finish(self) -> None:
        """Nothing will follow: what was held back is released."""
        self._finished = True

    def take(self, count: int) -> list[str]:
        """The text released since the last call, split over the `count` tokens committed since then.

        Text that was held back earlier goes with the first of them. The last of them has no text if it was not pushed.
        """
        end = len(self.text) if self._finished else max(self._released, len(self.text) - self._held_back)
        bounds = [self._released, *(max(self._released, min(start, end)) for start in self._starts[1:]), end]
        pieces = [self.text[a:b] for a, b in pairwise(bounds)]
        self._starts.clear()
        self._released = end
        return [*pieces, *[""] * (count - len(pieces))]


def _decoder(tokenizer: Any, skip_special_tokens: bool) -> Callable[[int], str]:
    """A function from each next id to the text it completes."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    if backend is not None and hasattr(backend, "decode_batch"):
        return _FastDecoder(backend, skip_special_tokens)
    return _SlowDecoder(tokenizer, skip_special_tokens)


class _FastDecoder:
    """For tokenizers written in Rust: their own stream, begun anew where it finds that released text would have changed.

    That happens with byte-fallback vocabularies: `a` followed by a byte that belongs to no character decodes to `��`.
    """

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def __call__(self, token: int) -> str:
        self._pending.append(token)
        try:
            piece = self._stream.step(self._backend, token)
        except Exception:  # tokenizers raises nothing more specific
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            piece = "".join(self._stream.step(self._backend, each) or "" for each in self._pending)
        if not piece:
            return ""
        self._pending.clear()
        return piece


class _SlowDecoder:
    """For tokenizers written in Python: decodes a sliding window of ids and returns what the last one adds."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._start = 0
        self._done = 0

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        before = self._decode(self._start, self._done)
        text = self._decode(self._start, len(self._ids))
        if text.endswith("�") or len(text) <= len(before):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=self._skip)
