"""The token sequences that write a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specplug.errors import RequestError
from specplug.text.reading import Reading

_PRIVATE = "\ue000"  # a character that no vocabulary holds as such
# Texts that words are encoded behind. Of one that does not merge with a word the ids stay the same.
_BEFORE = ("\n", "(", ".", "0", "a")


def bad_word_ids(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token sequences that write these words: at the start of a text, behind other text, and behind a space.

    A word is encoded as it is, so that its own white space counts. A sequence that does not have that white space in its text
    is left out (the tokenizer has lost it), and so is one with the unknown token, which stands for other words too.

    Raises:
        RequestError: the tokenizer has lost white space of a word, so that no sequence of ids tells it from another word.
    """
    sequences: list[list[int]] = []
    reading = Reading.of(tokenizer)
    unknown = _unknown(tokenizer, reading)
    for word in words:
        known = [
            ids
            for ids in _encodings(word, tokenizer, reading)
            if not any(token in ids and text not in word for token, text in unknown.items())
        ]
        faithful = [ids for ids in known if _has_white_space_of(word, ids, reading)]
        if not faithful and (known or not word.strip()):
            raise RequestError(
                f"bad_words: {word!r} cannot be banned, since the tokenizer loses white space of it; give the word without"
            )
        for ids in faithful:
            if ids not in sequences:
                sequences.append(ids)
    return sequences


def _unknown(tokenizer: Any, reading: Reading) -> dict[int, str]:
    """The ids that stand for whatever the vocabulary does not hold, and their texts; none where all can be written."""
    ids = _encode(_PRIVATE, tokenizer)
    if _PRIVATE in reading.decode(ids):
        return {}
    if (declared := getattr(tokenizer, "unk_token_id", None)) is not None:
        ids.append(declared)
    return {token: reading.decode([token]).strip() for token in ids}


def _encodings(word: str, tokenizer: Any, reading: Reading) -> Iterator[list[int]]:
    """What a text's tokens end with where it ends with the word."""
    alone = _encode(word, tokenizer)
    if alone:
        yield alone
    for text in (word, " " + word):
        for before in _BEFORE:
            first, whole = _encode(before, tokenizer), _encode(before + text, tokenizer)
            if len(whole) > len(first) and whole[: len(first)] == first and reading.decode(first).strip(" ") == before:
                yield whole[len(first) :]
                break


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _has_white_space_of(word: str, ids: Sequence[int], reading: Reading) -> bool:
    """Whether the text of ids, behind other text, holds the white space at both ends of a word."""
    text = reading.after_text(ids)
    core = word.strip()
    if not core:
        return word in text
    head, tail = word[: len(word) - len(word.lstrip())], word[len(word.rstrip()) :]
    start = text[: len(text) - len(text.lstrip())]
    return start.endswith(head) and text[len(text.rstrip()) :] == tail
