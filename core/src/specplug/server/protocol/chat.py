"""The body of a chat completion request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from specplug.server.protocol.base import Body, Count, one_of_forms
from specplug.server.protocol.sampling import MAX_LOGPROBS, SamplingBody


class TextPart(Body):
    """A part of a message's content. Images, audio and files are not supported."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation.

    Attributes:
        role: who wrote it.
        content: its text, or parts with text, which are joined by line breaks.
        name: the author's name, for templates that use it.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "audio": (),
        "refusal": (),
        "annotations": ([],),
        "reasoning": (),
        "reasoning_content": (),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], one_of_forms("a string, or a list of parts of the type 'text'")]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": text, **({} if self.name is None else {"name": self.name})}


class ConversationBody(Body):
    """Messages, and how the chat template renders them.

    Attributes:
        add_generation_prompt: end with the beginning of a reply; so unless the last message is continued.
        continue_final_message: continue the last message instead of replying to it.
        chat_template_kwargs: more variables of the template.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_ending(self) -> ConversationBody:
        if self.add_generation_prompt and self.continue_final_message:
            raise PydanticCustomError(
                "add_generation_prompt", "'add_generation_prompt' and 'continue_final_message' exclude each other"
            )
        return self


class ChatBody(ConversationBody, SamplingBody):
    """The body of POST /v1/chat/completions.

    Attributes:
        max_tokens: the older name of `max_completion_tokens`.
        max_completion_tokens: the most tokens to generate; by default up to the context length.
        logprobs: whether to return log-probabilities.
        top_logprobs: of how many tokens at each position.
        metadata: labels for the caller's own use; not read, like `user`, `safety_identifier` and `prompt_cache_key`.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingBody.neutral,
        "tools": ([],),
        "tool_choice": ("none",),
        "functions": ([],),
        "function_call": ("none",),
        "parallel_tool_calls": (),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": (),
        "echo": (False,),
        "add_special_tokens": (False,),
        "mm_processor_kwargs": (),
        "include_reasoning": (True,),
    }

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "'top_logprobs' needs logprobs=true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """The number of most likely tokens to score at each position; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """The most tokens to generate."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
