"""Incremental detokenization: from each next id of an output to the text that it completes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from specplug.text.token_decoder import BROKEN, TokenDecoder, backend_of

_CONTEXT = 8  # ids before the output that may belong to its first character
_MOST_CONTEXT = 32
_MOST_PENDING = 16  # ids without complete text; more release what is certain
_UNDECIDED = 3  # an incomplete character decodes to at most this many replacement characters


def incremental_detokenizer(
    tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool
) -> Callable[[int], str]:
    """A function from each next id of an output to the text that it completes.

    Args:
        tokenizer: written in Rust or in Python.
        prompt_ids: the ids before the output. Their text is not returned, except an incomplete last character.
        skip_special_tokens: whether special tokens have no text.
    """
    decoder = TokenDecoder.of(tokenizer)
    context = _context(decoder, prompt_ids, skip_special_tokens)
    backend = backend_of(tokenizer)
    if backend is None:
        return _Window(decoder, context, skip_special_tokens)
    return _FastDecoder(decoder, backend, context, skip_special_tokens)


def _context(decoder: TokenDecoder, prompt_ids: Sequence[int], skip: bool) -> list[int]:
    """The last ids of a prompt that have text, from the beginning of a character."""
    context: list[int] = []
    for token in reversed(prompt_ids):
        if not decoder.is_silent(token, skip_special_tokens=skip):
            context.insert(0, token)
            if len(context) >= _MOST_CONTEXT or (
                len(context) >= _CONTEXT and not decoder.decode(context, skip_special_tokens=skip).startswith(BROKEN)
            ):
                break
    return context


class _FastDecoder:
    """For tokenizers written in Rust: their `DecodeStream`, which is fast, and a `_Window` in the cases that it gets wrong.

    `DecodeStream` returns text of the prompt if the prompt ends inside a character, accumulates ids without text, and fails
    if returned text changes.
    """

    def __init__(self, decoder: TokenDecoder, backend: Any, context: Sequence[int], skip: bool) -> None:
        self._decoder = decoder
        self._backend = backend
        self._skip = skip
        self._shown = list(context)
        self._pending: list[int] = []
        self._stream = DecodeStream(ids=self._shown, skip_special_tokens=skip)
        self._window: _Window | None = None
        if decoder.decode(context, skip_special_tokens=skip).endswith(BROKEN):
            self._window = _Window(decoder, context, skip)

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
            self._window = _Window(self._decoder, self._shown, self._skip)
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
    """Decodes the last ids together, and returns the text that each adds.

    Returned text never changes, although later bytes may change how earlier ones decode: with byte fallback, `a` followed by
    an invalid byte decodes to two replacement characters.

    Attributes:
        ids: the window.
    """

    def __init__(self, decoder: TokenDecoder, context: Sequence[int], skip: bool) -> None:
        self._decoder = decoder
        self._skip = skip
        self.ids = list(context)
        self._done = len(self.ids)  # all text of the ids before this index is returned
        self._text = self._decode(self.ids)
        self._returned = self._text.rstrip(BROKEN)
        self._broken_before = len(self._text) - len(self._returned)  # of the context; they may become one character

    @property
    def is_settled(self) -> bool:
        """Whether the text of all ids has been returned."""
        return self._text == self._returned

    def __call__(self, token: int) -> str:
        self.ids.append(token)
        text = self._decode(self.ids)
        if text == self._text and self._decoder.is_silent(token, skip_special_tokens=self._skip):
            self.ids.pop()
            return ""
        self._text = text
        is_whole = not text.endswith(BROKEN)
        if not is_whole and len(self.ids) - self._done <= _MOST_PENDING:
            return ""
        if not text.startswith(self._returned):
            self._restart()
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
        return self._decoder.decode(ids, skip_special_tokens=self._skip)

    def _restart(self) -> None:
        """Returned text has changed: the ids after it are decoded after the anchor instead."""
        anchor = self._decoder.anchor
        self.ids = [*anchor, *self.ids[self._done :]]
        self._done = len(anchor)
        self._text, self._returned = self._decode(self.ids), self._decode(anchor)

    def _move(self) -> None:
        """All text is returned: only the last ids are needed, as context of the next ones."""
        start = self._done
        while start and self._decode(self.ids[start:]).startswith(BROKEN):  # inside a character
            start -= 1
        del self.ids[:start]
        self._done = len(self.ids)
        self._text = self._returned = self._decode(self.ids)

    def _shorten(self, rest: str) -> None:
        """All text but `rest` is returned; drops ids such that `rest` still decodes the same."""
        tail = self.ids[-_MOST_PENDING // 2 :]
        for ids in (tail, [self.ids[self._done], *tail], tail):
            self.ids, self._text = ids, self._decode(ids)
            if self._text.endswith(rest):
                break
        self._done = len(self.ids) - _UNDECIDED
        self._returned = self._text[:-_UNDECIDED]
