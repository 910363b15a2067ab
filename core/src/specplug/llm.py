"""The offline API: `LLM(...)`, then `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from specplug.configuration.engine import EngineConfig
from specplug.engine.startup import StepReport, start_engine
from specplug.errors import CheckpointError, RequestError
from specplug.model.checkpoint import resolve_checkpoint
from specplug.outputs import CompletionOutput, RequestOutput
from specplug.request import Request, SpeculationStats
from specplug.sampling.params import SamplingParams
from specplug.tiny import resolve_model

Prompt = str | Sequence[int] | Mapping[str, Any]


@attrs.frozen(eq=False)
class StreamedPiece:
    """New tokens of one completion, as they are committed.

    Attributes:
        request_id: whose.
        index: which completion.
        token_ids: the new ids.
        sources: for each id the method that drafted it, None for the target's own.
        token_texts: for each id the text it completes; empty while a character is incomplete.
        finish_reason: set on the last piece.
        metrics: what speculation did for the completion so far; the same object in all its pieces.
    """

    request_id: str
    index: int
    token_ids: list[int]
    sources: list[str | None]
    token_texts: list[str]
    finish_reason: str | None
    metrics: SpeculationStats

    @property
    def text(self) -> str:
        """The text that the new tokens add."""
        return "".join(self.token_texts)


class LLM:
    """A target model with its speculators, ready to generate.

    Args:
        model: a folder, a hub name, or `tiny` for the embedded model.
        speculative_config: the method and its keys, as in vLLM; None for plain decoding.
        memory: bytes for everything together, such as `8GiB`.
        on_step: told of the six startup steps.
        options: see `EngineConfig`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        speculative_config: Mapping[str, Any] | None = None,
        memory: int | float | str | None = None,
        on_step: Callable[[StepReport], None] = lambda report: None,
        **options: Any,
    ) -> None:
        known = {field.name for field in attrs.fields(EngineConfig)}
        for name in options:
            if name not in known:
                from specplug.errors import ConfigurationError, did_you_mean

                raise ConfigurationError(f"LLM has no option '{name}'{did_you_mean(name, known)}")
        self.config = EngineConfig.create(str(model), speculative_config=speculative_config, memory=memory, **options)
        self._tokenizer: Any = None
        self._numbers = itertools.count()
        self.engine = start_engine(self.config, tokenizer=self._optional_tokenizer, on_step=on_step)

    # ---- generation -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Generates completions; the order of the outputs is that of the prompts.

        Args:
            prompts: text, token ids, `{"prompt": …}` or `{"prompt_token_ids": …}`, or a list of these.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show a progress bar on a terminal.

        Raises:
            RequestError: a prompt that can never be served; none of the prompts is then run.
        """
        listed = _prompt_list(prompts)
        params = _params_list(sampling_params, len(listed))
        families = self._submit(listed, params)
        self._run(len(listed), use_tqdm)
        return [self._output(request_id, text, family) for (request_id, text, family) in families]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamedPiece]:
        """Generates completions and yields their tokens as they are committed, prompts interleaved."""
        listed = _prompt_list(prompts)
        families = self._submit(listed, _params_list(sampling_params, len(listed)))
        index_of = {id(request): index for _, _, family in families for index, request in enumerate(family)}
        decoders = {id(request): self._decode_stream() for _, _, family in families for request in family}
        try:
            while self.engine.has_unfinished_requests:
                for output in self.engine.step():
                    request = output.request
                    yield StreamedPiece(
                        request_id=request.id,
                        index=index_of[id(request)],
                        token_ids=output.new_tokens,
                        sources=output.sources,
                        token_texts=[decoders[id(request)](token) for token in output.new_tokens],
                        finish_reason=request.finish_reason,
                        metrics=request.stats,
                    )
        finally:
            for request_id, _, _ in families:
                self.engine.abort(request_id)

    def _submit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> list[tuple[str, str | None, list[Request]]]:
        encoded = [self._encode(prompt) for prompt in prompts]
        families: list[tuple[str, str | None, list[Request]]] = []
        try:
            for (text, ids), param in zip(encoded, params, strict=True):
                request_id = str(next(self._numbers))
                families.append((request_id, text, self.engine.add_request(request_id, ids, param)))
        except BaseException:
            for request_id, _, _ in families:
                self.engine.abort(request_id)
            raise
        return families

    def _run(self, total: int, use_tqdm: bool) -> None:
        try:
            with _ProgressBar(total, use_tqdm) as advance:
                while self.engine.has_unfinished_requests:
                    advance(sum(output.request.is_finished for output in self.engine.step()))
        except BaseException:
            for request in list(self.engine.scheduler.requests()):
                self.engine.abort(request.id)
            raise

    def _output(self, request_id: str, prompt: str | None, family: list[Request]) -> RequestOutput:
        completions = [
            CompletionOutput(
                index=index,
                text=self.decode(request.output_ids),
                token_ids=request.output_ids,
                finish_reason=request.finish_reason,
                stop_reason=request.stop_token if request.stop_token in request.params.stop_token_ids else None,
                token_sources=request.sources,
                metrics=request.stats,
            )
            for index, request in enumerate(family)
        ]
        ids = family[0].tokens[: family[0].num_prompt_tokens]
        return RequestOutput(request_id, prompt, ids, completions, all(r.is_finished for r in family))

    # ---- text -----------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            RequestError: the engine runs on token ids alone.
        """
        tokenizer = self._optional_tokenizer()
        if tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init=True): give prompts as token ids")
        return tokenizer

    def _optional_tokenizer(self) -> Any:
        if self.config.skip_tokenizer_init:
            return None
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            source = resolve_model(self.config.tokenizer or self.config.model)
            folder = resolve_checkpoint(source, self.config.revision if self.config.tokenizer is None else None)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.config.trust_remote_code)
            except Exception as error:
                summary = " ".join(str(error).split())[:200]
                raise CheckpointError(
                    f"{folder} has no tokenizer that can be loaded ({summary}); name one with tokenizer=, or give token "
                    "ids and skip_tokenizer_init=True"
                ) from error
        return self._tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens; empty without a tokenizer."""
        tokenizer = self._optional_tokenizer()
        return "" if tokenizer is None else tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _decode_stream(self) -> Callable[[int], str]:
        """A function that turns successive ids into text, holding back incomplete characters."""
        tokenizer = self._optional_tokenizer()
        backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if backend is None:
            return lambda token: ""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(backend, token) or ""

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if "prompt" in prompt:
                return self._encode(prompt["prompt"])
            raise RequestError("a prompt given as a mapping needs the key 'prompt' or 'prompt_token_ids'")
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer()(prompt)["input_ids"]
        return None, list(prompt)

    # ---- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all requests and lets go of all memory."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    listed = list(params)
    if len(listed) != count:
        raise RequestError(f"{len(listed)} sampling_params for {count} prompts; give one for all, or one for each")
    return listed


class _ProgressBar:
    """A progress bar over finished completions; does nothing unless asked for."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from rich.progress import Progress

            self._bar = Progress(transient=True)
            self._task = self._bar.add_task("generating", total=total)

    def __enter__(self) -> Callable[[int], None]:
        if self._bar is None:
            return lambda finished: None
        self._bar.start()
        return lambda finished: self._bar.advance(self._task, finished)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
