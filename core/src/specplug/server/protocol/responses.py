"""The body of a request for a response: OpenAI's newer form of a chat completion, without its state and its tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from specplug.server.protocol.base import Body, Count
from specplug.server.protocol.chat import ConversationBody, Message
from specplug.server.protocol.sampling import SamplingBody


class InputPart(Body):
    """A part of an item's content. Images, audio and files are not supported."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "logprobs": ([],)}
    type: Literal["input_text", "output_text"]
    text: str


class InputItem(Body):
    """An item of the input: a message. Items of an earlier response's `output` have its form.

    Attributes:
        role: who wrote it.
        content: its text, or parts with text.
        id: of the earlier output; not read, like `status`.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"phase": ()}
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[InputPart],
        BeforeValidator(
            lambda value: [{"type": "input_text", "text": value}] if isinstance(value, str) else value,
            json_schema_input_type=str | list[InputPart],
        ),
    ]
    id: str | None = None
    status: str | None = None

    @property
    def message(self) -> Message:
        """It as a message of a chat completion."""
        return Message(role=self.role, content="\n".join(part.text for part in self.content))


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("form", "expected a string, or a list of messages")
    return value


class ResponseBody(SamplingBody):
    """The body of POST /v1/responses.

    Attributes:
        input: a text, which is the user's message, or messages.
        instructions: a system message before them.
        max_output_tokens: the most tokens to generate; by default up to the context length.
        metadata: labels, returned as they are; `user`, `safety_identifier` and `prompt_cache_key` are not read.
        chat_template_kwargs: more variables of the chat template.
        n: not supported, like `prompt_logprobs` and `return_token_ids`.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingBody.neutral,
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "n": (1,),
        "parallel_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "prompt_logprobs": (),
        "reasoning": ({},),
        "return_token_ids": (False,),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("none",),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[
        list[InputItem],
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
        Field(min_length=1),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    n: None = None
    prompt_logprobs: None = None
    return_token_ids: None = None
    stream_options: None = None

    @property
    def conversation(self) -> ConversationBody:
        """The same as a chat."""
        first = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        messages = [*first, *(item.message for item in self.input)]
        return ConversationBody(messages=messages, chat_template_kwargs=self.chat_template_kwargs)
