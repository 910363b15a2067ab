"""From the messages of a request to a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from specplug.errors import RequestError
from specplug.server.errors import ApiError
from specplug.server.protocol.chat import Message
from specplug.server.state import ServerState
from specplug.text.prompts import EncodedPrompt

_FROM_LLM = "give one with chat_template=, or use generate()"


async def render(
    state: ServerState,
    messages: list[Message],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: Mapping[str, Any] | None,
) -> EncodedPrompt:
    """Renders a conversation with the chat template.

    Args:
        state: the server's.
        messages: the conversation.
        add_generation_prompt: None adds it unless the last message is continued.
        continue_final_message: whether the last message is continued.
        variables: more variables of the template.

    Raises:
        ApiError: there is no template, or it cannot render the messages.
    """
    engine = state.engine
    continues = bool(continue_final_message)
    try:
        _check_variables(engine.get_tokenizer(), variables or {})
        rendered = await engine.render(
            [message.for_template() for message in messages],
            chat_template=state.settings.chat_template,
            add_generation_prompt=not continues if add_generation_prompt is None else add_generation_prompt,
            continue_final_message=continues,
            **(variables or {}),
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
