"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from starlette.requests import Request
from starlette.responses import Response

from specplug.outputs import CompletionOutput, RequestOutput
from specplug.sampling.logprobs import PositionLogprobs
from specplug.sampling.params import SamplingParams
from specplug.server.answers.choices import ChoicesReply
from specplug.server.answers.logprobs import completion_logprobs, join_logprobs, prompt_logprobs
from specplug.server.answers.serving import serve
from specplug.server.protocol.completions import CompletionBody
from specplug.server.state import ServerState


async def create_completion(state: ServerState, body: CompletionBody, request: Request) -> Response:
    """Serves one request.

    Raises:
        ApiError: it cannot be served, or not now.
        ClientGoneError: the client left.
    """
    reply = ChoicesReply(
        state,
        body,
        _CompletionAnswer(state, body),
        encode=lambda: state.engine.encode(body.prompt),
        params=lambda: _params(state, body),
    )
    return await serve(state, request, body, reply, num_prompts=len(body.prompts))


def _params(state: ServerState, body: CompletionBody) -> SamplingParams:
    params = body.sampling_params(
        state.default_options,
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,  # its token is left out
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        return attrs.evolve(params, prompt_logprobs=body.logprobs)
    return params


class _CompletionAnswer:
    """Shapes the choices of completions."""

    prefix = "cmpl"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, state: ServerState, body: CompletionBody) -> None:
        self._state = state
        self._body = body
        self._lengths: dict[int, int] = {}  # of the text of each choice so far

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """A finished choice."""
        body = self._body
        prompt = self._prompt_text(output) if body.echo else ""
        logprobs = None
        if completion.logprobs is not None:
            logprobs = completion_logprobs(
                completion.token_ids, completion.logprobs, completion.token_texts, len(prompt)
            )
            if body.echo and output.prompt_logprobs is not None:
                logprobs = join_logprobs(self._prompt_logprobs(output), logprobs)
        choice = self._choice(index, completion, prompt + completion.text, logprobs)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def opening(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The prompts, if they are wanted."""
        body, choices = self._body, []
        if body.echo or body.return_token_ids:
            for completion in range(body.n or 1):
                number = index * (body.n or 1) + completion
                text = self._prompt_text(output) if body.echo else ""
                self._lengths[number] = len(text)
                choice: dict[str, Any] = {"index": number, "text": text, "logprobs": None, "finish_reason": None}
                if body.return_token_ids:
                    choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": []}
                choices.append(choice)
        return choices

    def delta(self, index: int, completion: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk."""
        body, logprobs = self._body, None
        number = index * (body.n or 1) + completion.index
        if completion.logprobs is not None:
            logprobs = completion_logprobs(
                completion.token_ids, completion.logprobs, completion.token_texts, self._lengths.get(number, 0)
            )
        wants_tokens = body.return_token_ids or logprobs is not None
        if not (completion.text or completion.finish_reason or (wants_tokens and completion.token_ids)):
            return None
        self._lengths[number] = self._lengths.get(number, 0) + len(completion.text)
        return self._choice(index, completion, completion.text, logprobs)

    def prepare(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """The outputs, without the token that was generated to score a prompt alone."""
        if self._body.max_tokens == 0:
            for output in outputs:
                output.outputs = [_without_tokens(completion) for completion in output.outputs]
        return outputs

    def more(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _choice(
        self, index: int, completion: CompletionOutput, text: str, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index * (self._body.n or 1) + completion.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return str(self._state.engine.get_tokenizer().decode(output.prompt_token_ids))

    def _prompt_logprobs(self, output: RequestOutput) -> dict[str, Any]:
        scored = completion_logprobs(output.prompt_token_ids, output.prompt_logprobs or [], None)
        first = output.prompt_token_ids[0]
        scored["tokens"][0] = str(self._state.engine.get_tokenizer().decode([first]))
        shift = len(scored["tokens"][0])
        scored["text_offset"] = [0, *(offset + shift for offset in scored["text_offset"][1:])]
        return scored


def _without_tokens(completion: CompletionOutput) -> CompletionOutput:
    logprobs: list[PositionLogprobs] | None = None if completion.logprobs is None else []
    return attrs.evolve(
        completion, text="", token_ids=[], token_texts=[], logprobs=logprobs, finish_reason="length", stop_reason=None
    )
