"""The body of a traced request."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from specplug.server.protocol.base import Count, TokenIds, one_of_forms
from specplug.server.protocol.chat import Message
from specplug.server.protocol.sampling import SamplingBody

DEFAULT_MAX_TOKENS = 128


class TraceBody(SamplingBody):
    """The body of POST /v1/specplug/trace: a completion or a reply, one at a time, always streamed.

    Attributes:
        prompt: a text or token ids to continue; or
        messages: a conversation to reply to.
        max_tokens: the most tokens to generate.
        add_generation_prompt: see chat completions; `continue_final_message` and `chat_template_kwargs` too.
    """

    prompt: Annotated[str | TokenIds | None, one_of_forms("a string or a list of token ids")] = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    max_tokens: Annotated[Count, Field(ge=1)] = DEFAULT_MAX_TOKENS
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_form(self) -> TraceBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "'prompt' or 'messages' is needed, one of them")
        if self.n not in (None, 1):
            raise PydanticCustomError("n", "'n' is not supported in a trace; send several requests")
        if self.stream is False:
            raise PydanticCustomError("stream", "'stream' is false: a trace is always a stream")
        for name in ("stream_options", "prompt_logprobs", "return_token_ids"):
            if getattr(self, name) is not None:
                raise PydanticCustomError("unsupported", "'{name}' is not supported in a trace", {"name": name})
        return self
