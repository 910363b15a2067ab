"""How the ids of one tokenizer read as text: alone, and inside a text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

BROKEN = "\N{REPLACEMENT CHARACTER}"
_SCANNED_IDS = 1024  # where no letter can be encoded, an anchor is looked for among so many ids


class Reading:
    """Decodes ids, and knows what they read like behind other text.

    Tokenizers of SentencePiece's kind drop the space at the start of a text. So the text of a token depends on whether
    anything precedes it. An *anchor* (ids of a plain letter or word) stands for the text before.
    """

    _known: ClassVar[WeakKeyDictionary[Any, Reading]] = WeakKeyDictionary()

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _decoder(tokenizer)
        self._encode = _encoder(tokenizer)
        self._anchor: list[int] | None = None
        self._silent: dict[bool, set[int]] = {False: set(), True: set()}
        self._texts: dict[int, str] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> Reading:
        """The reading of a tokenizer; made once for each."""
        try:
            known = cls._known.get(tokenizer)
            if known is None:
                known = cls._known[tokenizer] = cls(tokenizer)
        except TypeError:  # it cannot be hashed or weakly referred to
            known = cls(tokenizer)
        return known

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids that begin a text."""
        return self._decode(ids, skip_special_tokens)

    def after_text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids that follow other text."""
        whole = self._decode([*self.anchor, *ids], skip_special_tokens)
        before = self._decode(self.anchor, skip_special_tokens)
        return whole.removeprefix(before)

    def token(self, token: int) -> str:
        """The text of one token that follows other text, special tokens included."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.after_text([token])
        return text

    def is_silent(self, token: int, *, skip_special_tokens: bool) -> bool:
        """Whether a token leaves no text wherever it stands, as skipped special tokens do."""
        silent = self._silent[skip_special_tokens]
        if token not in silent and not self.after_text([token], skip_special_tokens=skip_special_tokens):
            silent.add(token)
        return token in silent

    @property
    def anchor(self) -> list[int]:
        """Ids that stand for the text before others; empty where no fitting one was found."""
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
        """Whether ids are plain text that stays as it is when more follows."""
        try:
            text = self._decode(ids, True)
            twice = self._decode([*ids, *ids], True)
        except Exception:  # an id that the tokenizer does not know
            return False
        plain = bool(text) and text.isprintable() and text == text.strip() and BROKEN not in text
        return plain and len(twice) > len(text) and twice.startswith(text)


def backend_of(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, or None for one that is written in Python."""
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
