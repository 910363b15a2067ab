"""The fields that completions and chat completions share, and the sampling parameters that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from specplug.sampling.params import SamplingParams
from specplug.server.errors import ApiError
from specplug.server.protocol.base import Body, Count, Finite, StreamOptions, TokenIds, one_of_forms

MAX_LOGPROBS = 20
MAX_COMPLETIONS = 128
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_NAME = Annotated[str, Field(min_length=1, max_length=256)]
# Set by the request itself if it says so, and by the model's generation_config otherwise.
_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "bad_words",
    "allowed_token_ids",
    "logit_bias",
    "prompt_logprobs",
    "num_speculative_tokens",
    "n",
)


class SamplingBody(Body):
    """Fields of OpenAI, vLLM and specplug that choose how tokens are sampled and returned."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "spaces_between_special_tokens": (True,),
        "use_beam_search": (False,),
        "truncate_prompt_tokens": (),
        "logprob_token_ids": (),
        "thinking_token_budget": (),
        "logits_processors": (),
        "kv_transfer_params": (),
        "vllm_xargs": (),
    }

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Finite | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    repetition_penalty: Finite | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, one_of_forms("a string or a list of strings")] = None
    stop_token_ids: TokenIds | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: TokenIds | None = None
    logit_bias: dict[str, Finite] | None = None
    prompt_logprobs: Logprobs | None = None
    num_speculative_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: _NAME | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    request_id: _NAME | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "'stream_options' needs stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError("prompt_logprobs", "'prompt_logprobs' is not available with stream=true")
        return self

    def sampling_params(
        self, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """The sampling parameters.

        Args:
            defaults: those that the model recommends, for fields that are not given.
            max_tokens: the most tokens to generate; None generates up to the context length.
            logprobs: the number of most likely tokens to score at each position.

        Raises:
            RequestError: a value is out of its range.
        """
        given = {name: value for name in _SAME_NAME if (value := getattr(self, name)) is not None}
        options = {**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs}
        if "min_tokens" not in given and max_tokens is not None and "min_tokens" in options:
            options["min_tokens"] = min(options["min_tokens"], max_tokens)
        for token in self.logit_bias or {}:
            if not token.isdecimal():
                raise ApiError(400, f"logit_bias: {token!r} is not a token id", param="logit_bias")
        return SamplingParams(**options)
