"""Responses that are lists of choices: completions and chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from specplug.errors import SpecplugError
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.server.answers.accounting import Usage, speculation_of
from specplug.server.answers.events import Header
from specplug.server.answers.generation import interleave
from specplug.server.errors import api_error
from specplug.server.protocol.sampling import SamplingBody
from specplug.server.state import ServerState
from specplug.server.streaming import DONE
from specplug.streams.stream import RequestStream
from specplug.text.prompts import EncodedPrompt


class Answer(Protocol):
    """What distinguishes completions from chat completions."""

    prefix: str
    """Of the `id` of a response."""
    whole: str
    """OpenAI's name of a response."""
    chunk: str
    """OpenAI's name of a part of a stream."""

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A finished choice."""

    def opening(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The choices of the first chunk for a prompt; may be empty."""

    def delta(self, index: int, completion: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk; None if there is nothing to send."""

    def prepare(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """The outputs that a whole response shows and counts."""

    def more(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """More fields of a whole response."""


class ChoicesReply:
    """A `Reply` with choices.

    Args:
        state: the server's.
        body: the request.
        answer: shapes the choices.
        encode: makes the prompts.
        params: makes the sampling parameters.
    """

    def __init__(
        self,
        state: ServerState,
        body: SamplingBody,
        answer: Answer,
        *,
        encode: Callable[[], Awaitable[list[EncodedPrompt]]],
        params: Callable[[], SamplingParams],
    ) -> None:
        self.prefix = answer.prefix
        self.params = params
        self._state = state
        self._body = body
        self._answer = answer
        self._encode = encode

    async def encode(self) -> list[EncodedPrompt]:
        """The prompts of the request."""
        return await self._encode()

    def whole(self, request_id: str, model: str, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response, once everything is generated."""
        answer = self._answer
        outputs = answer.prepare(outputs)
        choices = [
            answer.choice(index, output, completion)
            for index, output in enumerate(outputs)
            for completion in output.outputs
        ]
        more = answer.more(outputs)
        metrics = speculation_of(self._state, [each.metrics for output in outputs for each in output.outputs])
        if metrics is not None:
            more["metrics"] = metrics
        return Header(request_id, answer.whole, model).response(choices, usage=Usage.of(outputs).as_json(), **more)

    async def events(self, request_id: str, model: str, streams: list[RequestStream]) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events. What goes wrong after its beginning is an event too."""
        answer, header = self._answer, Header(request_id, self._answer.chunk, model)
        usage, opened, num_finished = Usage(), set[int](), 0
        options = self._body.stream_options
        counts_last = bool(options and options.include_usage)
        counts_always = bool(options and options.continuous_usage_stats)
        silent: dict[str, Any] = {"usage": None} if counts_last else {}
        try:
            async for index, output in interleave(streams):
                parts: list[dict[str, Any]] = []
                if index not in opened:
                    opened.add(index)
                    usage.add_prompt(output)
                    parts += answer.opening(index, output)
                for completion in output.outputs:
                    usage.completion_tokens += len(completion.token_ids)
                    part = answer.delta(index, completion) if completion.error is None else None
                    if part is not None:
                        parts.append(part)
                num_finished += output.finished
                more = {"usage": usage.as_json()} if counts_always else silent
                if parts and num_finished == len(streams):
                    families = [each.stats for stream in streams for each in stream.submission.family]
                    metrics = speculation_of(self._state, families)
                    more = more if metrics is None else {**more, "metrics": metrics}
                if parts:
                    chunks = [header.event([part], **silent) for part in parts[:-1]]
                    yield b"".join([*chunks, header.event(parts[-1:], **more)])
        except SpecplugError as error:
            yield api_error(error, self._state.settings.retry_after).event
            yield DONE
            return
        if counts_last:
            yield header.event([], usage=usage.as_json())
        yield DONE
