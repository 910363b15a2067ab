"""The bodies of /tokenize, /detokenize and /abort."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from specplug.server.protocol.base import Body, TokenIds
from specplug.server.protocol.chat import ConversationBody, Message


class TokenizeBody(ConversationBody):
    """The body of POST /tokenize: a text, or a conversation that the chat template renders."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "expected either 'prompt' or 'messages'")
        if self.messages is not None and self.add_special_tokens is not None:
            raise PydanticCustomError(
                "add_special_tokens", "'add_special_tokens' is for 'prompt': a chat template adds its own"
            )
        return self


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class AbortBody(Body):
    """The body of POST /abort.

    Attributes:
        request_id: the `id` of a response, or the `request_id` that the request gave itself.
    """

    request_id: str
