"""Prompts to ids in a thread of their own, so that event loops do not wait for tokenizers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from specplug.errors import RequestError
from specplug.frontend.frontend import Frontend
from specplug.text.prompts import EncodedPrompt, Message, Prompt


def encoder_thread() -> ThreadPoolExecutor:
    """The thread: one, because a tokenizer may be used by one thread at a time."""
    return ThreadPoolExecutor(1, thread_name_prefix="specplug-encoder")


class AsyncEncoding:
    """What `AsyncLLM` does with texts and ids before and beside generation."""

    _frontend: Frontend
    _encoder: ThreadPoolExecutor

    async def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[EncodedPrompt]:
        """One prompt or several → their ids, for `submit`.

        Raises:
            RequestError: a prompt is invalid; the message names its place.
        """
        return await self._in_encoder(self._frontend.encode, prompts)

    async def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without the special tokens that the tokenizer adds to prompts; there may be none.

        Raises:
            RequestError: the text is invalid.
        """
        ids: list[int] = await self._in_encoder(self._frontend.encode_plain, text)
        return ids

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        text: str = await self._in_encoder(self._frontend.decode, ids)
        return text

    async def render(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any
    ) -> list[EncodedPrompt]:
        """One conversation or several → the texts of the chat template and their ids, for `submit`.

        Args:
            messages: see `LLM.chat`.
            options: of the tokenizer's `apply_chat_template`.

        Raises:
            RequestError: there is no template, or it cannot render the messages.
        """
        return await self._in_encoder(lambda: self._frontend.render(messages, **options))

    async def _in_encoder(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._frontend.engine.lock.check_process()
        try:
            future = self._encoder.submit(function, *arguments)
        except RuntimeError as error:
            raise RequestError("the engine is closed") from error
        return await asyncio.wrap_future(future)
