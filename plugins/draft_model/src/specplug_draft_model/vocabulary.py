"""Maps the target's token ids to the draft model's, by their tokenizers.

Two tokens are the same if they stand for the same bytes: `Ġthe` of a byte-level and `▁the` of a SentencePiece vocabulary are.
Drafts are restricted to shared tokens; the draft model gets its unknown token for a committed token that it does not know.
Speculation stays lossless, because drafts are sampled from the reported distributions over shared tokens (token-level
intersection: Timor et al. 2502.05202).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from specplug import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("specplug.draft_model")
LEAST_SHARED = 0.1
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
Meaning = bytes | str


@attrs.frozen(eq=False)
class VocabularyMap:
    """A one-to-one map between the tokens that target and draft share.

    Attributes:
        target_ids: int64 [S], ascending: the target's id of each shared token; None when shared token i has the id i in both.
        draft_ids: int64 [S], the draft's id of each shared token; None likewise.
        size: S, how many tokens are shared.
        known: the draft's id for every target id; None when target ids below `size` are also the draft's.
        unknown: the draft's id for all other target tokens.
        is_target_whole: whether the shared tokens are the target's whole vocabulary in its own order.
    """

    target_ids: torch.Tensor | None
    draft_ids: torch.Tensor | None
    size: int
    known: Sequence[int] | None
    unknown: int
    is_target_whole: bool

    def to_draft(self, tokens: Sequence[int]) -> Sequence[int]:
        """Target ids → draft ids."""
        if self.known is not None:
            known = self.known
            return [known[token] for token in tokens]
        if self.is_target_whole:
            return tokens
        return [token if token < self.size else self.unknown for token in tokens]

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """The draft's logits [N, draft vocabulary] → those of the shared tokens [N, S]."""
        if self.draft_ids is not None:
            return logits.index_select(-1, self.draft_ids)
        return logits if logits.shape[-1] == self.size else logits[:, : self.size]

    def reported_ids(self, device: torch.device) -> torch.Tensor | None:
        """int64 [S] target ids for `DraftDistributions.token_ids`; None when they are the target's whole vocabulary."""
        if self.is_target_whole:
            return None
        return (
            torch.arange(self.size, device=device, dtype=torch.long)
            if self.target_ids is None
            else self.target_ids.to(device)
        )

    def on(self, device: torch.device) -> VocabularyMap:
        """The map with its tensors on a device."""
        if self.draft_ids is None or self.target_ids is None:
            return self
        return attrs.evolve(self, target_ids=self.target_ids.to(device), draft_ids=self.draft_ids.to(device))


def match_vocabularies(
    target: PreTrainedTokenizerBase | None,
    draft: PreTrainedTokenizerBase | None,
    target_size: int,
    draft_size: int,
) -> VocabularyMap:
    """Finds the shared tokens.

    Args:
        target: the target's tokenizer; None if its checkpoint has none.
        draft: the draft's.
        target_size: the width of the target's logits; tokenizers often fill less of it.
        draft_size: the width of the draft's.

    Raises:
        ConfigurationError: too few tokens are shared for drafts to help.
    """
    if target is None or draft is None:
        if target_size != draft_size:
            side = "draft" if draft is None else "target"
            logger.warning(
                "the %s has no tokenizer, and the vocabularies have %s (target) and %s (draft) entries: equal ids are "
                "assumed to be equal tokens; if that is wrong, few drafts are accepted",
                side,
                f"{target_size:,}",
                f"{draft_size:,}",
            )
        return _same_ids(target_size, draft_size, _unknown_id(draft, draft_size))
    unknown = _unknown_id(draft, draft_size)
    target_vocabulary = {t: i for t, i in target.get_vocab().items() if i < target_size}
    draft_vocabulary = {t: i for t, i in draft.get_vocab().items() if i < draft_size}
    if _ids_agree(target_vocabulary, draft_vocabulary):
        return _same_ids(target_size, draft_size, unknown)
    pairs = _shared_tokens(target, draft, target_vocabulary, draft_vocabulary)
    smaller = min(len(target_vocabulary), len(draft_vocabulary))
    if len(pairs) < LEAST_SHARED * smaller:
        raise ConfigurationError(
            f"draft_model: target and draft share {len(pairs):,} tokens, {len(pairs) / max(1, smaller):.1%} of the smaller "
            f"vocabulary (target {len(target_vocabulary):,}, draft {len(draft_vocabulary):,}); below {LEAST_SHARED:.0%} "
            "drafts are rarely accepted: use a draft model with the target's tokenizer or a similar one"
        )
    logger.info(
        "draft_model: %s tokens shared, %.1f%% of the smaller vocabulary", len(pairs), 100 * len(pairs) / smaller
    )
    known = [unknown] * target_size
    for target_id, draft_id in pairs.items():
        known[target_id] = draft_id
    return VocabularyMap(
        target_ids=torch.tensor(list(pairs), dtype=torch.long, device="cpu"),
        draft_ids=torch.tensor(list(pairs.values()), dtype=torch.long, device="cpu"),
        size=len(pairs),
        known=known,
        unknown=unknown,
        is_target_whole=False,
    )


def _same_ids(target_size: int, draft_size: int, unknown: int) -> VocabularyMap:
    size = min(target_size, draft_size)
    return VocabularyMap(None, None, size, None, unknown, size == target_size)


def _ids_agree(target: Mapping[str, int], draft: Mapping[str, int]) -> bool:
    """Whether common tokens have equal ids and common ids equal tokens: one tokenizer, perhaps truncated or padded."""
    tokens_of_draft = {index: token for token, index in draft.items()}
    return all(
        draft.get(token, index) == index and tokens_of_draft.get(index, token) == token
        for token, index in target.items()
    )


def _shared_tokens(
    target: PreTrainedTokenizerBase,
    draft: PreTrainedTokenizerBase,
    target_vocabulary: Mapping[str, int],
    draft_vocabulary: Mapping[str, int],
) -> dict[int, int]:
    """Target id → draft id of equal tokens, in order of target ids. Special tokens also match by role."""
    of_target, of_draft = _meanings(target, target_vocabulary), _meanings(draft, draft_vocabulary)
    pairs = {index: of_draft[meaning] for meaning, index in of_target.items() if meaning in of_draft}
    taken = set(pairs.values())
    for role in _ROLES:
        target_id, draft_id = getattr(target, role, None), getattr(draft, role, None)
        if target_id is None or draft_id is None or target_id in pairs or draft_id in taken:
            continue
        if target_id in target_vocabulary.values() and draft_id in draft_vocabulary.values():
            pairs[target_id] = draft_id
            taken.add(draft_id)
    return dict(sorted(pairs.items()))


def _meanings(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]) -> dict[Meaning, int]:
    """The bytes that each token stands for, or the name of a special token → its id; the lowest of several.

    SentencePiece does not use a byte token (`<0x4D>`) if another piece stands for that byte. Such a byte token is entered by
    its name.
    """
    special = set(tokenizer.all_special_tokens)
    is_byte_level = sum("Ġ" in token for token in vocabulary) > sum("▁" in token for token in vocabulary)
    meanings: dict[Meaning, int] = {}
    byte_tokens: list[tuple[str, bytes, int]] = []
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        meaning: Meaning
        if token in special:
            meaning = token
        elif is_byte_level and all(character in _BYTE_OF for character in token):
            meaning = bytes(_BYTE_OF[character] for character in token)
        elif match := _BYTE_TOKEN.fullmatch(token):
            byte_tokens.append((token, bytes([int(match[1], 16)]), index))
            continue
        else:
            meaning = token.replace("▁", " ").encode()
        meanings.setdefault(meaning, index)
    for token, byte, index in byte_tokens:
        meanings.setdefault(token if byte in meanings else byte, index)
    return meanings


def _unknown_id(tokenizer: PreTrainedTokenizerBase | None, size: int) -> int:
    """The id for tokens that the draft does not know: its unknown token, else another special token."""
    for role in ("unk_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        index = getattr(tokenizer, role, None)
        if isinstance(index, int) and 0 <= index < size:
            return index
    return 0


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies (since GPT-2) represent bytes with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
