"""From the ids of an output, one at a time, to the text that each completes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from specplug.text.reading import BROKEN, Reading, backend_of

_CONTEXT = 8  # ids before an output that may belong to its first character
_MOST_CONTEXT = 32
_MOST_PENDING = 16  # ids without text, before what can be told of them is released
_UNDECIDED = 3  # characters: the bytes of one that is incomplete read as so many broken ones at most


def decode_stepwise(tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Callable[[int], str]:
    """A function from each next id of an output to the text that it completes.

    Args:
        tokenizer: of either kind.
        prompt_ids: what the output follows; its text is never returned, but characters that begin in it are.
        skip_special_tokens: whether special tokens leave no text.
    """
    reading = Reading.of(tokenizer)
    context = _context(reading, prompt_ids, skip_special_tokens)
    backend = backend_of(tokenizer)
    if backend is None:
        return _Window(reading, context, skip_special_tokens)
    return _FastDecoder(reading, backend, context, skip_special_tokens)


def _context(reading: Reading, prompt_ids: Sequence[int], skip: bool) -> list[int]:
    """The last ids of a prompt that leave text; they begin with a whole character."""
    context: list[int] = []
    for token in reversed(prompt_ids):
        if not reading.is_silent(token, skip_special_tokens=skip):
            context.insert(0, token)
            if len(context) >= _MOST_CONTEXT or (
                len(context) >= _CONTEXT and not reading.decode(context, skip_special_tokens=skip).startswith(BROKEN)
            ):
                break
    return context


class _FastDecoder:
    """For tokenizers written in Rust: their own stream where it is right and quick, else a window.

    The stream returns the text of a prompt that ends inside a character, keeps all ids that leave no text, and gives up when
    text changes that it has returned.
    """

    def __init__(self, reading: Reading, backend: Any, context: Sequence[int], skip: bool) -> None:
        self._reading = reading
        self._backend = backend
        self._skip = skip
        self._shown = list(context)
        self._pending: list[int] = []
        self._stream = DecodeStream(ids=self._shown, skip_special_tokens=skip)
        self._window: _Window | None = None
        if reading.decode(context, skip_special_tokens=skip).endswith(BROKEN):
            self._window = _Window(reading, context, skip)

    def __call__(self, token: int) -> str:
        if self._window is not None:
            return self._through_window([token])
        self._pending.append(token)
        try:
            piece = self._stream.step(self._backend, token)
        except Exception:  # tokenizers raises nothing more specific
            piece, failed = None, True
        else:
            failed = False
        if piece:
            self._shown, self._pending = self._pending, []
            return piece
        if failed or len(self._pending) > _MOST_PENDING:
            self._window = _Window(self._reading, self._shown, self._skip)
            return self._through_window(self._pending)
        return ""

    def _through_window(self, tokens: Sequence[int]) -> str:
        assert self._window is not None
        piece = "".join(map(self._window, tokens))
        if self._window.is_settled:
            self._shown, self._pending = self._window.ids, []
            self._stream = DecodeStream(ids=self._shown, skip_special_tokens=self._skip)
            self._window = None
        return piece


class _Window:
    """Decodes the last ids together, and returns what each adds to the text that has been returned.

    What has been returned never changes, though later bytes may change how earlier ones read: with byte fallback, `a`
    followed by a byte that belongs to no character reads as two broken ones.

    Attributes:
        ids: the window.
    """

    def __init__(self, reading: Reading, context: Sequence[int], skip: bool) -> None:
        self._reading = reading
        self._skip = skip
        self.ids = list(context)
        self._done = len(self.ids)  # ids before this place have no text to come
        self._text = self._decode(self.ids)
        self._returned = self._text.rstrip(BROKEN)
        self._broken_before = len(self._text) - len(self._returned)  # of the context; they may become a character

    @property
    def is_settled(self) -> bool:
        """Whether the text of all ids has been returned."""
        return self._text == self._returned

    def __call__(self, token: int) -> str:
        self.ids.append(token)
        text = self._decode(self.ids)
        if text == self._text and self._reading.is_silent(token, skip_special_tokens=self._skip):
            self.ids.pop()
            return ""
        self._text = text
        is_whole = not text.endswith(BROKEN)
        if not is_whole and len(self.ids) - self._done <= _MOST_PENDING:
            return ""
        if not text.startswith(self._returned):
            self._begin_anew()
        end = len(self._text) - (0 if is_whole else _UNDECIDED)
        piece = self._text[len(self._returned) : end]
        if not piece:
            return ""
        if is_whole:
            self._move()
        else:
            self._shorten(self._text[end:])
        still_broken = min(self._broken_before, len(piece) - len(piece.lstrip(BROKEN)))
        self._broken_before = 0
        return piece[still_broken:]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._reading.decode(ids, skip_special_tokens=self._skip)

    def _begin_anew(self) -> None:
        """What has been returned reads otherwise now: the ids after it are read as if they followed something else."""
        anchor = self._reading.anchor
        self.ids = [*anchor, *self.ids[self._done :]]
        self._done = len(anchor)
        self._text, self._returned = self._decode(self.ids), self._decode(anchor)

    def _move(self) -> None:
        """All is returned: only the newest ids are still needed, to read the next ones behind them."""
        start = self._done
        while start and self._decode(self.ids[start:]).startswith(BROKEN):  # inside a character
            start -= 1
        del self.ids[:start]
        self._done = len(self.ids)
        self._text = self._returned = self._decode(self.ids)

    def _shorten(self, rest: str) -> None:
        """All but `rest` is returned; a run of broken bytes must stay broken without its beginning."""
        tail = self.ids[-_MOST_PENDING // 2 :]
        for ids in (tail, [self.ids[self._done], *tail], tail):
            self.ids, self._text = ids, self._decode(ids)
            if self._text.endswith(rest):
                break
        self._done = len(self.ids) - _UNDECIDED
        self._returned = self._text[:-_UNDECIDED]
