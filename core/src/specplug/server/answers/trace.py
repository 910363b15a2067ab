"""POST /v1/specplug/trace: a completion with everything that is known of each step. docs/playground.md has the format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from typing import Any

import attrs
from starlette.requests import Request
from starlette.responses import Response

from specplug.errors import RequestError, SpecplugError
from specplug.outputs import CompletionOutput
from specplug.server.answers.accounting import Usage, speculation
from specplug.server.answers.events import encode_json
from specplug.server.answers.generation import start
from specplug.server.answers.rendering import render
from specplug.server.errors import api_error
from specplug.server.protocol.trace import TraceBody
from specplug.server.state import ServerState
from specplug.server.streaming import EventStream, unless_gone
from specplug.streams.stream import RequestStream
from specplug.text.prompts import EncodedPrompt
from specplug.text.token_decoder import TokenDecoder
from specplug.trace import StepTrace

_LINES = ("application/jsonl", "application/x-ndjson", "application/jsonlines")
_DIGITS = 6


def describe(state: ServerState) -> dict[str, Any]:
    """What a client must know before it sends a request.

    Raises:
        ApiError: the model is not loaded.
    """
    engine = state.engine
    config = engine.config.speculative
    has_template = state.settings.chat_template is not None
    try:
        has_template = has_template or bool(getattr(engine.get_tokenizer(), "chat_template", None))
    except RequestError:  # the engine takes token ids only
        has_template = False
    return {
        "model": state.settings.model_names[0],
        "max_model_len": engine.engine.plan.max_model_len,
        "methods": engine.engine.methods,
        "num_speculative_tokens": 0 if config is None else config.num_speculative_tokens,
        "has_chat_template": has_template,
        "defaults": dict(state.default_options),
    }


async def create_trace(state: ServerState, body: TraceBody, request: Request) -> Response:
    """Serves one request.

    Raises:
        ApiError: it cannot be served, or not now.
        ClientGoneError: the client left.
    """
    model = state.check_model(body.model)
    with ExitStack() as stack:
        request_id, names = stack.enter_context(state.in_work("trace", body.request_id, 1))
        streams: list[RequestStream] = []
        stack.callback(_close, streams)

        async def submit() -> None:
            try:
                state.ready_engine.check_capacity()
                params = body.sampling_params(state.default_options, max_tokens=body.max_tokens, logprobs=None)
                streams.extend(
                    await start(
                        state,
                        await _encode(state, body),
                        attrs.evolve(params, n=1),
                        names,
                        kind="delta",
                        timeout=body.timeout,
                        cache_salt=body.cache_salt,
                        priority=body.priority,
                        adapter=state.adapter_of(model),
                        trace=True,
                    )
                )
            except SpecplugError as error:
                raise api_error(error, state.settings.retry_after) from error

        await unless_gone(request, submit())
        as_lines = any(kind in request.headers.get("accept", "") for kind in _LINES)
        return EventStream(
            _events(state, request_id, model, streams[0], _line if as_lines else _event),
            send_timeout=state.settings.send_timeout,
            on_close=stack.pop_all().close,
            media_type=_LINES[0] if as_lines else EventStream.media_type,
        )


def _close(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.close()


async def _encode(state: ServerState, body: TraceBody) -> list[EncodedPrompt]:
    if body.messages is None:
        return await state.engine.encode(body.prompt or "")
    return [await render(state, body.messages, body)]


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(fields) + b"\n\n"


def _line(fields: dict[str, Any]) -> bytes:
    return encode_json(fields) + b"\n"


async def _events(
    state: ServerState, request_id: str, model: str, stream: RequestStream, encode: Callable[[dict[str, Any]], bytes]
) -> AsyncGenerator[bytes, None]:
    request = stream.submission.family[0]
    texts = _Texts(state)
    opening = {
        "event": "start",
        "id": request_id,
        "model": model,
        "methods": state.engine.engine.methods,
        "prompt": stream.submission.prompt,
        "prompt_token_ids": request.tokens[: request.num_prompt_tokens],
        "params": {
            name: getattr(request.params, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "num_speculative_tokens")
        },
    }
    yield encode(opening)
    usage, number = Usage(), 0
    finish_reason, stop_reason, rest = None, None, ""
    try:
        async for output in stream:
            if not usage.prompt_tokens:
                usage.add_prompt(output)
            for completion in output.outputs:
                usage.completion_tokens += len(completion.token_ids)
                finish_reason, stop_reason = completion.finish_reason, completion.stop_reason
                steps = _steps(completion, texts, number)
                number += len(steps)
                if not completion.token_ids:
                    rest = completion.text  # held back until the request was aborted
                if steps:
                    yield b"".join(map(encode, steps))
    except SpecplugError as error:
        yield encode({"event": "error", **api_error(error, state.settings.retry_after).body})
        return
    config = state.engine.config.speculative
    metrics = speculation([request.stats], "detailed", 0 if config is None else config.num_speculative_tokens)
    yield encode(
        {
            "event": "end",
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "text": rest,
            "usage": usage.as_json(),
            "metrics": metrics,
        }
    )


class _Texts:
    """The texts of token ids; None without a tokenizer."""

    def __init__(self, state: ServerState) -> None:
        try:
            self._decoder: TokenDecoder | None = TokenDecoder.of(state.engine.get_tokenizer())
        except RequestError:
            self._decoder = None

    def of(self, token: int) -> str | None:
        """The text of one token after other text."""
        return None if self._decoder is None else self._decoder.token(token)


def _steps(completion: CompletionOutput, texts: _Texts, number: int) -> list[dict[str, Any]]:
    """The events of the steps of an output, the first of which has the given number."""
    events: list[dict[str, Any]] = []
    begin = 0
    for trace in completion.steps:
        end = begin + len(trace.tokens)
        events.append(_step(number + len(events), trace, completion.token_texts[begin:end], texts))
        begin = end
    return events


def _step(number: int, trace: StepTrace, added: list[str], texts: _Texts) -> dict[str, Any]:
    tokens = [
        {
            "id": token,
            "text": added[index] if index < len(added) else None,
            "method": trace.sources[index],
            "prob": _rounded(trace.probs[index]),
        }
        for index, token in enumerate(trace.tokens)
    ]
    nodes = [
        {
            "id": node.token,
            "text": texts.of(node.token),
            "parent": node.parent,
            "draft_prob": _rounded(node.draft_prob),
            "target_prob": _rounded(node.target_prob),
            "accepted": node.accepted,
        }
        for node in trace.nodes
    ]
    return {
        "event": "step",
        "step": number,
        "tokens": tokens,
        "draft": {"method": trace.method, "is_tree": trace.is_tree, "nodes": nodes} if trace.method else None,
        "num_prompt_tokens": trace.num_prompt_tokens,
        "num_rows": trace.num_rows,
        "seconds": _rounded(trace.seconds),
        "propose_seconds": _rounded(trace.propose_seconds),
        "plain_seconds": _rounded(trace.plain_seconds),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
