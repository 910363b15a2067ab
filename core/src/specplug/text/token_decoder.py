"""Decodes the ids of one tokenizer: at the start of a text, and after other text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

BROKEN = "\N{REPLACEMENT CHARACTER}"
_SCANNED_IDS = 1024  # if no letter can be encoded, the anchor is searched among these ids


class TokenDecoder:
    """Decodes ids, at the start of a text or after other text.

    Tokenizers such as SentencePiece drop the space at the start of a text, so the text of a token depends on whether
    anything precedes it. An *anchor* (the ids of a plain letter or word) represents the preceding text.
    """

    _known: ClassVar[WeakKeyDictionary[Any, TokenDecoder]] = WeakKeyDictionary()

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _decoder(tokenizer)
        self._encode = _encoder(tokenizer)
        self._anchor: list[int] | None = None
        self._silent: dict[bool, set[int]] = {False: set(), True: set()}
        self._texts: dict[int, str] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> TokenDecoder:
        """The decoder of a tokenizer, made once for each tokenizer."""
        try:
            known = cls._known.get(tokenizer)
            if known is None:
                known = cls._known[tokenizer] = cls(tokenizer)
        except TypeError:  # it is not hashable or not weakly referenceable
            known = cls(tokenizer)
        return known

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids at the start of a text."""
        return self._decode(ids, skip_special_tokens)

    def after_text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids after other text."""
        whole = self._decode([*self.anchor, *ids], skip_special_tokens)
        before = self._decode(self.anchor, skip_special_tokens)
        return whole.removeprefix(before)

    def token(self, token: int) -> str:
        """The text of one token after other text, special tokens included."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.after_text([token])
        return text

    def is_silent(self, token: int, *, skip_special_tokens: bool) -> bool:
        """Whether a token never has text, like a skipped special token."""
        silent = self._silent[skip_special_tokens]
        if token not in silent and not self.after_text([token], skip_special_tokens=skip_special_tokens):
            silent.add(token)
        return token in silent

    @property
    def anchor(self) -> list[int]:
        """Ids that represent preceding text; empty if no suitable ones were found."""
        if self._anchor is None:
            self._anchor = next((ids for ids in self._candidates() if self._is_anchor(ids)), [])
        return self._anchor

    def _candidates(self) -> Any:
        for letter in "xae0.":
            with contextlib.suppress(Exception):  # a tokenizer without an encoder
                yield self._encode(letter)
        for token in range(_SCANNED_IDS):
            yield [token]

    def _is_anchor(self, ids: list[int]) -> bool:
        """Whether ids are plain text that does not change when more follows."""
        try:
            text = self._decode(ids, True)
            twice = self._decode([*ids, *ids], True)
        except Exception:  # an id that the tokenizer does not know
            return False
        plain = bool(text) and text.isprintable() and text == text.strip() and BROKEN not in text
        return plain and len(twice) > len(text) and twice.startswith(text)


def backend_of(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, or None for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    return backend if backend is not None and hasattr(backend, "decode_batch") else None


def _decoder(tokenizer: Any) -> Callable[[Sequence[int], bool], str]:
    backend = backend_of(tokenizer)
    if backend is not None:
        return lambda ids, skip: str(backend.decode(ids, skip_special_tokens=skip))
    return lambda ids, skip: str(tokenizer.decode(ids, skip_special_tokens=skip))


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    backend = backend_of(tokenizer)
    if backend is not None:
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
