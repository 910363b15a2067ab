"""POST /v1/responses: the chat path with OpenAI's newer shapes. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specplug.errors import SpecplugError
from specplug.outputs import RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.server.answers.accounting import Usage, speculation_of
from specplug.server.answers.events import encode_json
from specplug.server.answers.generation import interleave
from specplug.server.answers.rendering import render
from specplug.server.answers.serving import serve
from specplug.server.errors import ApiError, api_error
from specplug.server.protocol.responses import ResponseBody
from specplug.server.state import ServerState
from specplug.streams.stream import RequestStream
from specplug.text.prompts import EncodedPrompt

_WHY_INCOMPLETE = {"length": "max_output_tokens", "abort": "abort"}


async def create_response(state: ServerState, body: ResponseBody, request: Request) -> Response:
    """Serves one request.

    Raises:
        ApiError: it cannot be served, or not now.
        ClientGoneError: the client left.
    """
    return await serve(state, request, body, _ResponseReply(state, body))


class _ResponseReply:
    """A `Reply` with one message."""

    prefix = "resp"

    def __init__(self, state: ServerState, body: ResponseBody) -> None:
        self._state = state
        self._body = body
        self._created = int(time.time())
        self._params: SamplingParams | None = None

    async def encode(self) -> list[EncodedPrompt]:
        """The conversation as a prompt."""
        conversation = self._body.conversation
        try:
            return [await render(self._state, conversation.messages, conversation)]
        except ApiError as error:
            error.param = "input" if error.param == "messages" else error.param
            raise

    def params(self) -> SamplingParams:
        """The sampling parameters."""
        body = self._body
        self._params = body.sampling_params(
            self._state.default_options, max_tokens=body.max_output_tokens, logprobs=None
        )
        return self._params

    def whole(self, request_id: str, model: str, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response, once everything is generated."""
        (output,) = outputs
        (completion,) = output.outputs
        reason = completion.finish_reason
        metrics = speculation_of(self._state, [completion.metrics])
        response = self._response(
            request_id,
            model,
            "incomplete" if reason in _WHY_INCOMPLETE else "completed",
            output=[_message(request_id, [_part(completion.text)], reason)],
            incomplete_details={"reason": _WHY_INCOMPLETE[reason]} if reason in _WHY_INCOMPLETE else None,
            usage=_usage(Usage.of(outputs)),
        )
        return response if metrics is None else {**response, "metrics": metrics}

    async def events(self, request_id: str, model: str, streams: list[RequestStream]) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events with OpenAI's names."""
        number = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            data = encode_json({"type": kind, "sequence_number": number, **fields})
            number += 1
            return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

        item = {"output_index": 0, "item_id": _message_id(request_id)}
        part = {**item, "content_index": 0}
        begun = self._response(request_id, model, "in_progress")
        yield (
            event("response.created", response=begun)
            + event("response.in_progress", response=begun)
            + event("response.output_item.added", output_index=0, item=_message(request_id, [], None))
            + event("response.content_part.added", **part, part=_part(""))
        )
        texts: list[str] = []
        ids: list[int] = []
        last: RequestOutput | None = None
        try:
            async for _, last in interleave(streams):
                for completion in last.outputs:
                    ids += completion.token_ids
                    if completion.text:
                        texts.append(completion.text)
                        yield event("response.output_text.delta", **part, delta=completion.text, logprobs=[])
        except SpecplugError as error:
            failure = {"code": "server_error", "message": str(api_error(error))}
            yield event("response.failed", response=self._response(request_id, model, "failed", error=failure))
            return
        assert last is not None
        assert last.outputs
        (completion,) = last.outputs
        completion.text, completion.token_ids = "".join(texts), ids
        response = self.whole(request_id, model, [last])
        yield (
            event("response.output_text.done", **part, text=completion.text, logprobs=[])
            + event("response.content_part.done", **part, part=_part(completion.text))
            + event("response.output_item.done", output_index=0, item=response["output"][0])
            + event(f"response.{response['status']}", response=response)
        )

    def _response(self, request_id: str, model: str, status: str, **fields: Any) -> dict[str, Any]:
        body, params = self._body, self._params
        assert params is not None
        return {
            "id": request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            **fields,
        }


def _message_id(request_id: str) -> str:
    return f"msg-{request_id.removeprefix('resp-')}"


def _message(request_id: str, content: list[dict[str, Any]], finish_reason: str | None) -> dict[str, Any]:
    status = "incomplete" if finish_reason in _WHY_INCOMPLETE else "completed" if finish_reason else "in_progress"
    return {
        "id": _message_id(request_id),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
