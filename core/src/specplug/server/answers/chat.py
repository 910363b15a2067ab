"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specplug.outputs import CompletionOutput, RequestOutput
from specplug.sampling.params import SamplingParams
from specplug.server.answers.choices import ChoicesReply
from specplug.server.answers.logprobs import chat_logprobs, prompt_logprobs
from specplug.server.answers.rendering import render
from specplug.server.answers.serving import serve
from specplug.server.protocol.chat import ChatBody
from specplug.server.state import ServerState
from specplug.text.prompts import EncodedPrompt


async def create_chat_completion(state: ServerState, body: ChatBody, request: Request) -> Response:
    """Serves one request.

    Raises:
        ApiError: it cannot be served, or not now.
        ClientGoneError: the client left.
    """

    async def encode() -> list[EncodedPrompt]:
        return [await render(state, body.messages, body)]

    def params() -> SamplingParams:
        return body.sampling_params(state.default_options, max_tokens=body.limit, logprobs=body.num_logprobs)

    reply = ChoicesReply(state, body, _ChatAnswer(body), encode=encode, params=params)
    return await serve(state, request, body, reply)


class _ChatAnswer:
    """Shapes the choices of chat completions."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, body: ChatBody) -> None:
        self._body = body

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A finished choice."""
        return self._choice(completion, {"message": {"role": "assistant", "content": completion.text, "refusal": None}})

    def opening(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The role of each message."""
        choices: list[dict[str, Any]] = []
        for completion in range(self._body.n or 1):
            delta = {"role": "assistant", "content": ""}
            choices.append({"index": completion, "delta": delta, "logprobs": None, "finish_reason": None})
        if self._body.return_token_ids:
            choices[0]["prompt_token_ids"] = output.prompt_token_ids
        return choices

    def delta(self, index: int, completion: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk."""
        wants_tokens = self._body.return_token_ids or completion.logprobs is not None
        if not (completion.text or completion.finish_reason or (wants_tokens and completion.token_ids)):
            return None
        return self._choice(completion, {"delta": {"content": completion.text} if completion.text else {}})

    def prepare(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """The outputs as they are."""
        return outputs

    def more(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """What vLLM returns beside the choices."""
        more: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(outputs[0].prompt_logprobs)
        if self._body.return_token_ids:
            more["prompt_token_ids"] = outputs[0].prompt_token_ids
        return more

    def _choice(self, completion: CompletionOutput, content: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": completion.index,
            **content,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            choice["logprobs"] = chat_logprobs(completion.token_ids, completion.logprobs, self._body.num_logprobs or 0)
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice
