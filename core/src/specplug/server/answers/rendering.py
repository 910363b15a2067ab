"""From the messages of a request to a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from specplug.errors import RequestError
from specplug.server.errors import ApiError
from specplug.server.protocol.chat import Message
from specplug.server.state import ServerState
from specplug.text.prompts import EncodedPrompt

_FROM_LLM = "give one with chat_template=, or use generate()"


class Conversation(Protocol):
    """The fields of a request that make its prompt.

    Attributes:
        add_generation_prompt: None adds it unless the last message is continued.
        continue_final_message: whether the last message is continued.
        chat_template_kwargs: more variables of the template.
    """

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None


async def render(state: ServerState, messages: list[Message], options: Conversation) -> EncodedPrompt:
    """Renders a conversation with the chat template.

    Args:
        state: the server's.
        messages: the conversation.
        options: the request.

    Raises:
        ApiError: there is no template, or it cannot render the messages.
    """
    engine = state.engine
    continues = bool(options.continue_final_message)
    opens = options.add_generation_prompt
    variables = options.chat_template_kwargs or {}
    try:
        _check_variables(engine.get_tokenizer(), variables)
        rendered = await engine.render(
            [message.for_template() for message in messages],
            chat_template=state.settings.chat_template,
            add_generation_prompt=not continues if opens is None else opens,
            continue_final_message=continues,
            **variables,
        )
    except RequestError as error:
        message = str(error).replace(_FROM_LLM, "start the server with --chat-template")
        raise ApiError(400, message, param="messages") from error
    return rendered[0]


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Refuses names that are not variables of the template but arguments of the tokenizer: the template itself, for example."""
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    for name in variables:
        if name in taken:
            raise ApiError(
                400, f"chat_template_kwargs: '{name}' is not a variable of the template", param="chat_template_kwargs"
            )
