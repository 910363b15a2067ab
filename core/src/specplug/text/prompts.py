"""Prompts to token ids: text, ids, chat messages."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import attrs

from specplug.errors import RequestError
from specplug.model.load.checkpoint import resolve_checkpoint
from specplug.model.load.tokenizer import required_tokenizer
from specplug.values import shown, text_fault, to_python

_MEDIA = ("image", "audio", "video", "media", "multi_modal", "multimodal", "pixel")
Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LazyTokenizer:
    """A tokenizer that is loaded on first use.

    Args:
        source: a folder or hub name; None for an engine that takes token ids only.
        revision: the revision on the hub.
        trust_remote_code: whether code of the checkpoint may run.
    """

    def __init__(self, source: str | None, revision: str | None = None, *, trust_remote_code: bool = False) -> None:
        self._source = source
        self._revision = revision
        self._trust_remote_code = trust_remote_code
        self._tokenizer: Any = None

    def __call__(self) -> Any:
        """The tokenizer, or None.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        if self._source is None or self._tokenizer is not None:
            return self._tokenizer
        folder = resolve_checkpoint(self._source, self._revision, trust_remote_code=self._trust_remote_code)
        self._tokenizer = required_tokenizer(folder, trust_remote_code=self._trust_remote_code)
        return self._tokenizer

    def required(self, purpose: str) -> Any:
        """The tokenizer.

        Raises:
            RequestError: the engine takes token ids only; the message names the purpose.
        """
        tokenizer = self()
        if tokenizer is None:
            raise RequestError(f"{purpose} needs a tokenizer, and the engine has none (skip_tokenizer_init=True)")
        return tokenizer


@attrs.frozen
class EncodedPrompt:
    """A prompt as ids.

    Attributes:
        where: its place in the call, for messages, such as `prompts[2]: `; empty for a single prompt.
        text: its text, if it was given as text or rendered from messages.
        ids: its token ids.
        cache_salt: with which prompts it shares cached KV, if it says so: those with the same salt.
        priority: prompts with lower numbers come first.
    """

    where: str
    text: str | None
    ids: list[int]
    cache_salt: str | None = None
    priority: int = 0


def encode_prompts(prompts: Prompt | Iterable[Prompt], tokenizer: LazyTokenizer) -> list[EncodedPrompt]:
    """One prompt or several → their ids.

    NumPy arrays and torch tensors are converted to lists, at every level.

    Raises:
        RequestError: see `encode_prompt`; with several prompts, the message begins with the place of the invalid one.
    """
    prompts = to_python(prompts)
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        return [_encode("", prompts, tokenizer)]
    listed: list[Any] = [to_python(prompt) for prompt in prompts]
    if listed and all(isinstance(item, Integral) for item in listed):
        return [_encode("", listed, tokenizer)]
    return _each("prompts", listed, lambda where, prompt: _encode(where, prompt, tokenizer))


def _encode(where: str, prompt: Any, tokenizer: LazyTokenizer) -> EncodedPrompt:
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    check_cache_salt(salt)
    return EncodedPrompt(where, *encode_prompt(prompt, tokenizer), salt)


def render_chats(
    messages: Sequence[Message] | Sequence[Sequence[Message]], tokenizer: LazyTokenizer, **options: Any
) -> list[EncodedPrompt]:
    """One conversation or several → the texts of the chat template and their ids.

    Raises:
        RequestError: see `render_chat`; with several conversations, the message begins with the place of the invalid one.
    """
    if not isinstance(messages, Sequence):
        raise RequestError(f"messages={messages!r}: expected a list of messages, or a list of conversations")
    if messages and isinstance(messages[0], Mapping):
        return [EncodedPrompt("", *render_chat(messages, tokenizer, **options))]  # type: ignore[arg-type]
    return _each(
        "messages", messages, lambda where, each: EncodedPrompt(where, *render_chat(each, tokenizer, **options))
    )


def with_priorities(encoded: list[EncodedPrompt], priorities: Sequence[int] | None) -> list[EncodedPrompt]:
    """Prompts with a priority each, or none.

    Raises:
        RequestError: it is no list with one for each prompt.
    """
    if priorities is None:
        return encoded
    given: Any = to_python(priorities)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError(f"priority={shown(given)}: expected a list with an integer for each prompt")
    if len(given) != len(encoded):
        raise RequestError(f"{len(given)} priorities for {len(encoded)} prompts; give one for each")
    return [attrs.evolve(prompt, priority=each) for prompt, each in zip(encoded, given, strict=True)]


def _each(name: str, values: Sequence[Any], encode: Callable[[str, Any], EncodedPrompt]) -> list[EncodedPrompt]:
    encoded = []
    for index, value in enumerate(values):
        where = f"{name}[{index}]: "
        try:
            encoded.append(encode(where, value))
        except RequestError as error:
            raise RequestError(f"{where}{error}") from error
    return encoded


def encode_prompt(prompt: Prompt, tokenizer: LazyTokenizer) -> tuple[str | None, list[int]]:
    """A prompt → (its text if it was given as text, its ids).

    Raises:
        RequestError: unknown form, invalid text, text without a tokenizer, or no tokens.
    """
    prompt = to_python(prompt)
    if isinstance(prompt, str):
        _check_text(prompt, "the prompt")
        ids = list(tokenizer.required("a prompt given as text")(prompt)["input_ids"])
        if not ids:
            raise RequestError(
                "the prompt is empty: the tokenizer gives no token for it"
                + ("" if prompt else ", nor one for the beginning of a text; it needs at least one character")
            )
        return prompt, ids
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown or not set(prompt) - {"cache_salt"}:
            _check_no_media(map(str, unknown))
            named = f", not '{min(map(str, unknown))}'" if unknown else ""
            raise RequestError(f"a prompt given as a mapping has the key 'prompt' or 'prompt_token_ids'{named}")
        text, ids = prompt.get("prompt"), to_python(prompt.get("prompt_token_ids"))
        if text is not None and not isinstance(text, str):
            raise RequestError(f"'prompt' in a mapping is text, not {type(text).__name__}")
        if ids is None:
            return encode_prompt(text, tokenizer)  # type: ignore[arg-type]
        if not _is_list(ids):
            raise RequestError(f"'prompt_token_ids' in a mapping is a list of token ids, not {type(ids).__name__}")
        return text, token_ids(ids)
    if _is_list(prompt):
        return None, token_ids(prompt)
    raise RequestError(f"a prompt is text, a list of token ids or a mapping, not {type(prompt).__name__}")


def plain_ids(text: str, tokenizer: LazyTokenizer) -> list[int]:
    """The ids of a text without the special tokens that the tokenizer adds to prompts; there may be none.

    Raises:
        RequestError: invalid text, or there is no tokenizer.
    """
    _check_text(text, "the text")
    return list(tokenizer.required("text")(text, add_special_tokens=False)["input_ids"])


def check_cache_salt(salt: Any) -> None:
    """Checks a request's `cache_salt`.

    Raises:
        RequestError: it is not a text, or empty.
    """
    if salt is None:
        return
    if not isinstance(salt, str) or not salt:
        raise RequestError(f"cache_salt={reprlib.repr(salt)}: expected a text that is not empty, or None")
    _check_text(salt, "cache_salt")


def token_ids(values: Iterable[Any]) -> list[int]:
    """Converts integers of any kind to Python's. `RequestFactory` checks that they are ids of the model.

    Raises:
        RequestError: a value is not an integer.
    """
    ids = []
    for position, value in enumerate(to_python(values)):
        token = value if type(value) is int else to_python(value)
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(f"token id {reprlib.repr(token)} at position {position} is not an integer")
        ids.append(int(token))
    return ids


def _check_text(text: str, what: str) -> None:
    if fault := text_fault(text):
        raise RequestError(f"{what} holds {fault}, so it is not valid text; remove or replace that character")


def _check_no_media(names: Iterable[str]) -> None:
    for name in names:
        if any(medium in name.lower() for medium in _MEDIA):
            raise RequestError(f"'{name}' cannot be given: only the text part of a model runs; give text alone")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def render_chat(messages: Sequence[Message], tokenizer: LazyTokenizer, **options: Any) -> tuple[str, list[int]]:
    """Chat messages → (the text of the tokenizer's chat template, its ids).

    Raises:
        RequestError: no template, messages that it cannot render or that hold more than text, or a rendered text without
            tokens.
    """
    if not _is_list(messages) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            "the chat template cannot render the messages: expected a list of mappings with the keys 'role' and 'content', "
            f"not {reprlib.repr(messages)}"
        )
    for message in messages:
        content: Any = message.get("content")
        parts = [part for part in content if isinstance(part, Mapping)] if _is_list(content) else []
        _check_no_media(str(part.get("type")) for part in parts)
    loaded = tokenizer.required("chat")
    if not options.get("chat_template") and not getattr(loaded, "chat_template", None):
        raise RequestError("the tokenizer has no chat template; give one with chat_template=, or use generate()")
    try:
        text = str(loaded.apply_chat_template(list(messages), tokenize=False, **options))
    except Exception as error:
        raise RequestError(f"the chat template cannot render the messages: {type(error).__name__}: {error}") from error
    _check_text(text, "the rendered chat template")
    ids = list(loaded(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise RequestError("the chat template cannot render the messages: the rendered text has no tokens")
    return text, ids
