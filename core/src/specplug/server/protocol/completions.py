"""The body of a completion request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from specplug.server.protocol.base import Count, TokenIds, one_of_forms
from specplug.server.protocol.sampling import MAX_COMPLETIONS, Logprobs, SamplingBody

MAX_SEQUENCES = 256


class CompletionBody(SamplingBody):
    """The body of POST /v1/completions.

    Attributes:
        prompt: a text, several, token ids, or several lists of them.
        max_tokens: with 0 and `echo`, only the prompt is scored.
        echo: put the prompt before the completion.
        logprobs: the number of most likely tokens to score at each position.
        best_of: only as many as `n`.
        suffix: not supported.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SamplingBody.neutral, "prompt_embeds": ()}

    prompt: Annotated[
        str | TokenIds | list[str] | list[TokenIds],
        one_of_forms("a string, a list of strings, a list of token ids, or a list of such lists"),
    ]
    max_tokens: Count | None = 16
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, as a list also if there is one."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("best_of", "'best_of' is not supported yet; leave it out")
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise PydanticCustomError("max_tokens", "'max_tokens' is 0: that needs echo=true and stream=false")
        if not self.prompts:
            raise PydanticCustomError("prompt", "'prompt' is empty")
        if len(self.prompts) * (self.n or 1) > MAX_SEQUENCES:
            raise PydanticCustomError(
                "prompt", "'prompt' times 'n' asks for more than {most} completions", {"most": MAX_SEQUENCES}
            )
        if self.echo and self.stream and self.logprobs is not None:
            raise PydanticCustomError("echo", "'echo' with 'logprobs' is not available with stream=true")
        return self
