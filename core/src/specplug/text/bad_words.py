"""The token sequences that spell a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specplug.errors import RequestError
from specplug.text.token_decoder import TokenDecoder

_PRIVATE = "\ue000"  # a character that no vocabulary contains
# Words are encoded after these texts, to see their tokens inside a text. A text that merges with the word is skipped.
_BEFORE = ("\n", "(", ".", "0", "a")


def bad_word_ids(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token sequences that spell these words: at the start of a text, after other text, and after a space.

    A word is encoded as it is, white space included. Two kinds of sequences are left out: those whose text has lost that
    white space, and those with the unknown token, which represents other words too.

    Raises:
        RequestError: the tokenizer drops white space of a word, so that the ids do not distinguish it from another word.
    """
    sequences: list[list[int]] = []
    decoder = TokenDecoder.of(tokenizer)
    unknown = _unknown(tokenizer, decoder)
    for word in words:
        known = [
            ids
            for ids in _encodings(word, tokenizer, decoder)
            if not any(token in ids and text not in word for token, text in unknown.items())
        ]
        faithful = [ids for ids in known if _has_white_space_of(word, ids, decoder)]
        if not faithful and (known or not word.strip()):
            raise RequestError(
                f"bad_words: {word!r} cannot be banned: the tokenizer drops its white space; give the word without it"
            )
        for ids in faithful:
            if ids not in sequences:
                sequences.append(ids)
    return sequences


def _unknown(tokenizer: Any, decoder: TokenDecoder) -> dict[int, str]:
    """The ids of unknown text, and their texts; empty if the tokenizer can encode any text."""
    ids = _encode(_PRIVATE, tokenizer)
    if _PRIVATE in decoder.decode(ids):
        return {}
    if (declared := getattr(tokenizer, "unk_token_id", None)) is not None:
        ids.append(declared)
    return {token: decoder.decode([token]).strip() for token in ids}


def _encodings(word: str, tokenizer: Any, decoder: TokenDecoder) -> Iterator[list[int]]:
    """The tokens at the end of a text that ends with the word."""
    alone = _encode(word, tokenizer)
    if alone:
        yield alone
    for text in (word, " " + word):
        for before in _BEFORE:
            first, whole = _encode(before, tokenizer), _encode(before + text, tokenizer)
            if len(whole) > len(first) and whole[: len(first)] == first and decoder.decode(first).strip(" ") == before:
                yield whole[len(first) :]
                break


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _has_white_space_of(word: str, ids: Sequence[int], decoder: TokenDecoder) -> bool:
    """Whether the text of ids, after other text, has the white space at both ends of a word."""
    text = decoder.after_text(ids)
    core = word.strip()
    if not core:
        return word in text
    head, tail = word[: len(word) - len(word.lstrip())], word[len(word.rstrip()) :]
    start = text[: len(text) - len(text.lstrip())]
    return start.endswith(head) and text[len(text.rstrip()) :] == tail
