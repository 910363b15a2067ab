"""Turning what users give into token ids: text, ids, chat messages, bad words."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from specplug.errors import RequestError
from specplug.model.checkpoint import resolve_checkpoint
from specplug.model.tokenizer import required_tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LazyTokenizer:
    """A tokenizer that is loaded when it is first needed.

    Args:
        source: a folder or hub name; None for an engine that runs on token ids alone.
        revision: the revision on the hub.
        trust_remote_code: whether code that comes with it may run.
    """

    def __init__(self, source: str | None, revision: str | None = None, *, trust_remote_code: bool = False) -> None:
        self._source = source
        self._revision = revision
        self._trust_remote_code = trust_remote_code
        self._tokenizer: Any = None

    def __call__(self) -> Any:
        """The tokenizer, or None.

        Raises:
            CheckpointError: there is none that can be loaded.
        """
        if self._source is None or self._tokenizer is not None:
            return self._tokenizer
        folder = resolve_checkpoint(self._source, self._revision, trust_remote_code=self._trust_remote_code)
        self._tokenizer = required_tokenizer(folder, trust_remote_code=self._trust_remote_code)
        return self._tokenizer

    def required(self, purpose: str) -> Any:
        """The tokenizer.

        Raises:
            RequestError: the engine runs on token ids alone; the message names the purpose.
        """
        tokenizer = self()
        if tokenizer is None:
            raise RequestError(f"{purpose} needs a tokenizer, and the engine has none (skip_tokenizer_init=True)")
        return tokenizer


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several → a list."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, Integral) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def encode_prompt(prompt: Prompt, tokenizer: LazyTokenizer) -> tuple[str | None, list[int]]:
    """A prompt → (its text if it was given as text, its ids).

    Raises:
        RequestError: it is of no known form, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one character")
        ids = tokenizer.required("a prompt given as text")(prompt)["input_ids"]
        return prompt, list(ids)
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            named = f", not '{min(map(str, unknown))}'" if unknown else ""
            raise RequestError(f"a prompt given as a mapping has the key 'prompt' or 'prompt_token_ids'{named}")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"'prompt' in a mapping is text, not {type(text).__name__}")
        if ids is None:
            return encode_prompt(text, tokenizer)  # type: ignore[arg-type]
        if not _is_list(ids):
            raise RequestError(f"'prompt_token_ids' in a mapping is a list of token ids, not {type(ids).__name__}")
        return text, _token_ids(ids)
    if _is_list(prompt):
        return None, _token_ids(prompt)
    raise RequestError(f"a prompt is text, a list of token ids or a mapping, not {type(prompt).__name__}")


def _token_ids(values: Sequence[Any]) -> list[int]:
    """Integers of any kind become Python's; whether they are ids of the model is checked with the request."""
    for position, token in enumerate(values):
        if isinstance(token, bool):
            raise RequestError(f"token id {token} at position {position} is not an integer")
    return [int(token) if isinstance(token, Integral) else token for token in values]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def render_chat(messages: Sequence[Message], tokenizer: LazyTokenizer, **options: Any) -> list[int]:
    """Chat messages → token ids, by the tokenizer's chat template.

    Raises:
        RequestError: no template, or messages it cannot render.
    """
    if not _is_list(messages) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            "the chat template cannot render the messages: expected a list of mappings with the keys 'role' and 'content', "
            f"not {reprlib.repr(messages)}"
        )
    loaded = tokenizer.required("chat")
    if not options.get("chat_template") and not getattr(loaded, "chat_template", None):
        raise RequestError("the tokenizer has no chat template; give one with chat_template=, or use generate()")
    try:
        text = loaded.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:
        raise RequestError(f"the chat template cannot render the messages: {type(error).__name__}: {error}") from error
    return list(loaded(text, add_special_tokens=False)["input_ids"])


def bad_word_ids(words: Sequence[str], tokenizer: Callable[[], Any]) -> list[list[int]]:
    """The token sequences of words that must not appear, as they stand at the start of a text and inside one."""
    loaded = tokenizer()
    if loaded is None:
        raise RequestError("bad_words needs a tokenizer, and the engine has none (skip_tokenizer_init=True)")
    sequences: list[list[int]] = []
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = list(loaded(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in sequences:
                sequences.append(ids)
    return sequences
