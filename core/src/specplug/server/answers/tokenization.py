"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from specplug.errors import SpecplugError
from specplug.server.answers.rendering import render
from specplug.server.errors import ApiError, api_error
from specplug.server.protocol.tokens import DetokenizeBody, TokenizeBody
from specplug.server.state import ServerState
from specplug.text.token_decoder import TokenDecoder


async def tokenize(state: ServerState, body: TokenizeBody) -> dict[str, Any]:
    """The ids of a text or a conversation.

    Raises:
        ApiError: it cannot be encoded.
    """
    state.check_model(body.model)
    engine = state.engine
    try:
        if body.messages is not None:
            prompt = await render(state, body.messages, body)
            ids = prompt.ids
        elif body.add_special_tokens is False:
            ids = await engine.encode_plain(body.prompt or "")
        else:
            ids = (await engine.encode(body.prompt or ""))[0].ids
        tokenizer = engine.get_tokenizer()
    except SpecplugError as error:
        raise api_error(error, state.settings.retry_after) from error
    result: dict[str, Any] = {"count": len(ids), "max_model_len": engine.engine.plan.max_model_len, "tokens": ids}
    if body.return_token_strs:
        result["token_strs"] = [TokenDecoder.of(tokenizer).token(token) for token in ids]
    return result


async def detokenize(state: ServerState, body: DetokenizeBody) -> dict[str, Any]:
    """The text of ids.

    Raises:
        ApiError: an id is outside the vocabulary.
    """
    state.check_model(body.model)
    try:
        text = await state.engine.decode(body.tokens)
    except SpecplugError as error:
        raise ApiError(400, str(error), param="tokens") from error
    return {"prompt": text}
