"""Training texts: JSON lines in, token ids with a loss mask out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from specplug import ConfigurationError

SHORTEST = 3  # the first draft step reads two tokens and predicts the third
_KINDS = ("text", "messages", "prompt", "input_ids")


@attrs.frozen(eq=False)
class Sample:
    """One text.

    Attributes:
        ids: int32 [T].
        learned: bool [T]: the tokens that count in the loss.
    """

    ids: torch.Tensor
    learned: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


def read_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields (line number, object) of a JSON lines file; empty lines are skipped.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not an object of one known kind.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def read_samples(path: Path, tokenizer: Any, vocab_size: int, max_length: int) -> list[Sample]:
    """Reads and tokenises texts. Texts over `max_length` tokens are cut; texts without a label are left out.

    Args:
        path: JSON lines of `{"text"}`, `{"messages"}` (loss on the assistant's tokens), `{"prompt", "completion"}` (loss
            on the completion, which ends with the end-of-text token) or `{"input_ids", "loss_from"}`.
        tokenizer: the target's; None allows `input_ids` only.
        vocab_size: of the target.
        max_length: tokens.

    Raises:
        ConfigurationError: an invalid line, named by its number, or no text is left.
    """
    samples = []
    for number, entry in read_lines(path):
        try:
            ids, learned = _tokens(entry, tokenizer)
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(f"token {max(ids)} is not among the target's {vocab_size} tokens")
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}, line {number}: {error}") from error
        except Exception as error:  # a chat template may raise anything
            raise ConfigurationError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
        mask = torch.tensor(learned[:max_length], dtype=torch.bool, device="cpu")
        if bool(mask[SHORTEST - 1 :].any()):
            samples.append(Sample(torch.from_numpy(np.asarray(ids[:max_length], dtype=np.int32)), mask))
    if not samples:
        raise ConfigurationError(f"{path} holds no text of at least {SHORTEST} tokens to learn from")
    return samples


def read_prompts(path: Path, tokenizer: Any, prompt_tokens: int) -> list[list[int]]:
    """Reads prompts for the target to continue.

    Messages are cut before the last answer, completions are dropped, and of a text without a prompt the first
    `prompt_tokens` tokens are taken.

    Raises:
        ConfigurationError: an invalid line, named by its number, or no prompt.
    """
    prompts = []
    for number, entry in read_lines(path):
        try:
            prompts.append(_prompt(entry, tokenizer, prompt_tokens))
        except Exception as error:
            raise ConfigurationError(f"{path}, line {number}: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConfigurationError(f"{path} holds no prompt")
    return prompts


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of tokens and masks, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(sample.ids.numpy().tobytes())
        digest.update(sample.learned.numpy().tobytes())
    return digest.hexdigest()


def count_tokens(samples: Sequence[Sample], vocab_size: int) -> torch.Tensor:
    """How often each token is a label: int64 [vocabulary]."""
    counts = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    for start in range(0, len(samples), 4096):
        learned = torch.cat([sample.ids[sample.learned] for sample in samples[start : start + 4096]])
        counts += torch.bincount(learned, minlength=vocab_size)
    return counts


def choose_vocabulary(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The most frequent tokens, ties by id, ascending: int64 [size]."""
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def _parse(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path}, line {number}: not JSON: {error}") from error
    found = [kind for kind in _KINDS if isinstance(entry, dict) and kind in entry]
    if len(found) != 1:
        raise ConfigurationError(
            f'{path}, line {number}: expected an object with one of "text", "messages", "prompt" and "completion", or '
            '"input_ids"'
        )
    kind, value = found[0], entry[found[0]]
    if kind == "input_ids":
        good = isinstance(value, list) and all(type(i) is int for i in value)
        first = entry.get("loss_from", 0)
        if not good or type(first) is not int or first < 0:
            raise ConfigurationError(
                f'{path}, line {number}: "input_ids" should be a list of integers and "loss_from" an integer of at least 0'
            )
    elif kind == "messages":
        if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
            raise ConfigurationError(f'{path}, line {number}: "messages" should be a list of objects with a "role"')
    elif not isinstance(value, str) or not isinstance(entry.get("completion", ""), str):
        raise ConfigurationError(f'{path}, line {number}: "{kind}" and its completion should be strings')
    return entry


def _tokens(entry: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    if "input_ids" in entry:
        ids, first = entry["input_ids"], entry.get("loss_from", 0)
        return ids, [i >= first for i in range(len(ids))]
    _need(tokenizer)
    if "text" in entry:
        ids = tokenizer(entry["text"]).input_ids
        return ids, [True] * len(ids)
    if "prompt" in entry:
        if "completion" not in entry:
            raise ConfigurationError('"prompt" comes without "completion"; --regenerate lets the target write it')
        prompt = tokenizer(entry["prompt"]).input_ids
        answer = tokenizer(entry["completion"], add_special_tokens=False).input_ids
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    return _conversation(entry["messages"], tokenizer)


def _conversation(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Masks each answer, beginning where its text differs from its prompt; templates may drop parts of earlier answers."""
    ids = _render(tokenizer, messages, False)
    learned = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _common(ids, _render(tokenizer, messages[:turn], True))
            end = _common(ids, _render(tokenizer, messages[: turn + 1], False))
            learned[start:end] = [True] * max(end - start, 0)
    if not any(learned):
        raise ConfigurationError('"messages" holds no answer of the assistant')
    return ids, learned


def _prompt(entry: Mapping[str, Any], tokenizer: Any, prompt_tokens: int) -> list[int]:
    if "input_ids" in entry:
        return entry["input_ids"][: entry.get("loss_from", 0) or prompt_tokens]
    _need(tokenizer)
    if "messages" in entry:
        turns = entry["messages"]
        answers = [turn for turn, message in enumerate(turns) if message["role"] == "assistant"]
        return _render(tokenizer, turns[: answers[-1]] if answers else turns, True)
    if "prompt" in entry:
        return tokenizer(entry["prompt"]).input_ids
    return tokenizer(entry["text"]).input_ids[:prompt_tokens]


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], prompt: bool) -> list[int]:
    if not messages:
        return []
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    return tokenizer(text, add_special_tokens=False).input_ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ConfigurationError('the target has no tokenizer; give "input_ids"')
