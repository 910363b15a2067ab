"""A tokenizer of one word per id, so that text and token ids can be told from each other at a glance."""

from __future__ import annotations

from pathlib import Path


def word(token: int) -> str:
    """The text of a token."""
    return f"w{token}."


def save_words(folder: Path, vocabulary: int) -> Path:
    """Gives a model's folder the tokenizer: `w3. w7.` is [3, 7], and back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word(token): token for token in range(vocabulary)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder
