"""The offline API: `LLM(...)`, then `generate`, `chat` or `stream`. Names and shapes are those of vLLM."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from specplug.config.engine import EngineConfig
from specplug.config.vllm import translate_options
from specplug.engine.calls import Call, Calls
from specplug.engine.engine import CLOSED
from specplug.engine.startup import StepReport, start_engine
from specplug.errors import ConfigurationError, GenerationError, RequestError
from specplug.metrics import Metric, engine_metrics
from specplug.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamedPiece
from specplug.progress import ProgressBar
from specplug.request import Request
from specplug.sampling.defaults import default_sampling_params
from specplug.sampling.params import SamplingParams
from specplug.text.prompts import EncodedPrompt, LazyTokenizer, Message, Prompt, encode_prompts, render_chats
from specplug.text.token_decoder import TokenDecoder
from specplug.tiny import resolve_model
from specplug.values import shown

_MOST_NAMED = 5  # failures that one message names


@attrs.frozen(eq=False)
class _Submitted:
    """A submitted prompt: its id, its text if it has one, and its completions."""

    id: str
    prompt: str | None
    family: list[Request]


class LLM:
    """A target model with its speculators. Any number of threads may use it; their prompts are batched together.

    Args:
        model: a folder, a hub name, or `tiny` for the embedded model.
        speculative_config: the method and its options, as in vLLM; None for plain decoding.
        memory: bytes for everything together, such as `8GiB`.
        on_step: called with the progress of the six startup steps.
        options: see `EngineConfig`. vLLM's other options are accepted with values that change nothing here.
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
        if not callable(on_step):
            raise ConfigurationError(f"on_step={shown(on_step)}: expected a function of a StepReport")
        options = translate_options(options)
        self.config = EngineConfig.create(model, speculative_config=speculative_config, memory=memory, **options)
        source = None if self.config.skip_tokenizer_init else resolve_model(self.config.tokenizer or self.config.model)
        self._tokenizer = LazyTokenizer(
            source,
            self.config.revision if self.config.tokenizer is None else None,
            trust_remote_code=self.config.trust_remote_code,
        )
        self._numbers = itertools.count()
        self._encoding = threading.Lock()  # a tokenizer may be used by one thread at a time
        self.engine = start_engine(self.config, tokenizer=self._tokenizer, on_step=on_step)
        self._calls = Calls(self.engine)
        self._unverified_methods = self.engine.unverified_methods

    # ---- generation -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Generates completions, in the order of the prompts.

        Args:
            prompts: text, token ids (a list, a NumPy array or a torch tensor), `{"prompt": …}` or `{"prompt_token_ids": …}`,
                or a list of these. A mapping may have a `cache_salt`: it shares cached KV only with prompts of the same salt.
            sampling_params: one for all prompts, or one for each; None uses the model's generation_config.
            use_tqdm: show a progress bar on a terminal.
            lora_request: not supported.
            priority: not supported; requests are served first come, first served.
            tokenization_kwargs: not supported; give token ids.
            mm_processor_kwargs: not supported.

        Raises:
            RequestError: a prompt can never be served (the message names its index, and none of the prompts runs), or the
                engine was closed.
            GenerationError: some prompts failed during generation; it carries the outputs of all.
        """
        _refuse(
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        with self._encoding:
            encoded = encode_prompts(prompts, self._tokenizer)
        return self._run(encoded, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Generates replies to one conversation or several, rendered by the tokenizer's chat template.

        Args:
            messages: `[{"role": …, "content": …}, …]`, or a list of such conversations.
            sampling_params: see `generate`.
            use_tqdm: see `generate`.
            lora_request: not supported.
            priority: not supported.
            chat_template: a Jinja template instead of the tokenizer's.
            chat_template_content_format: `auto` or `string`; contents are passed to the template unchanged.
            add_generation_prompt: end with the beginning of a reply.
            continue_final_message: continue the last message instead of replying to it.
            tools: passed to the template.
            chat_template_kwargs: more options of the template.
            tokenization_kwargs: not supported.
            mm_processor_kwargs: not supported.

        Raises:
            RequestError: there is no template, or it cannot render the messages.
        """
        _refuse(
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
            chat_template_content_format=(
                None if chat_template_content_format in ("auto", "string") else chat_template_content_format
            ),
        )
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        with self._encoding:
            encoded = render_chats(messages, self._tokenizer, **options)
        return self._run(encoded, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamedPiece]:
        """Generates completions and yields their tokens when they are committed, prompts interleaved.

        The joined `text` of a completion's pieces is the text that `generate` returns. Leaving the loop aborts the rest.

        Raises:
            RequestError: see `generate`.
            GenerationError: see `generate`; raised after the last piece.
        """
        with self._encoding:
            encoded = encode_prompts(prompts, self._tokenizer)
        submitted = self._make(encoded, sampling_params)
        call = Call([request for each in submitted for request in each.family], streams=True)
        index_of = {id(request): index for each in submitted for index, request in enumerate(each.family)}
        try:
            self.engine.submit([each.family for each in submitted])
            while call.arrived or not call.has_ended:
                if not call.arrived:
                    self._calls.advance(call)
                    _check_not_cut_off(call)
                    continue
                output = call.arrived.popleft()
                request = output.request
                is_last = call.is_last(output)
                yield StreamedPiece(
                    request_id=request.id,
                    index=index_of[id(request)],
                    token_ids=output.new_tokens,
                    sources=output.sources,
                    token_texts=output.texts,
                    finish_reason=request.finish_reason if is_last else None,
                    metrics=request.stats,
                    error=request.error if is_last else None,
                )
        finally:  # the garbage collector may run this, so it must not wait
            self.engine.abandon(*(each.id for each in submitted))
        self._raise_failures([self._output(each) for each in submitted] if _any_failed(call) else [])

    def abort(self, request_id: str) -> bool:
        """Ends a request; returns whether it was unfinished. Its generated tokens are kept."""
        return bool(self.engine.abort(request_id))

    def _make(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Submitted]:
        """The requests of a call, checked but not queued."""
        params = self._params_list(sampling_params, len(encoded))
        submitted: list[_Submitted] = []
        with self._encoding:  # bad words are tokenized too
            for prompt, param in zip(encoded, params, strict=True):
                request_id = str(next(self._numbers))
                try:
                    family = self.engine.make_request(request_id, prompt.ids, param, cache_salt=prompt.cache_salt)
                except RequestError as error:  # callers know their prompts by index, not by request id
                    raise RequestError(prompt.where + str(error).removeprefix(f"request '{request_id}': ")) from error
                submitted.append(_Submitted(request_id, prompt.text, family))
        return submitted

    def _run(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any],
    ) -> list[RequestOutput]:
        submitted = self._make(encoded, sampling_params)
        call = Call([request for each in submitted for request in each.family], streams=False)
        try:
            self.engine.submit([each.family for each in submitted])
            with ProgressBar(len(call.requests), bool(use_tqdm)) as advance:
                while not call.has_ended:
                    self._calls.advance(call)
                    advance(len(call.arrived))
                    call.arrived.clear()
        except BaseException:
            self.engine.abandon(*(each.id for each in submitted))
            raise
        _check_not_cut_off(call)
        outputs = [self._output(each) for each in submitted]
        self._raise_failures(outputs)
        return outputs

    @staticmethod
    def _raise_failures(outputs: list[RequestOutput]) -> None:
        """Raises an error that names the failed prompts by their index in the call."""
        failed = [
            f"prompt {index}: {completion.error}"
            for index, output in enumerate(outputs)
            for completion in output.outputs
            if completion.error is not None
        ]
        if failed:
            more = f"; and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
            raise GenerationError("; ".join(failed[:_MOST_NAMED]) + more, outputs)

    def _params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
            raise RequestError(
                f"sampling_params={params!r}: expected a SamplingParams, or a list with one for each prompt"
            )
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each")
        return params

    def _output(self, submitted: _Submitted) -> RequestOutput:
        first = submitted.family[0]
        scores = None if first.params.prompt_logprobs is None else [None, *first.prompt_logprobs]
        ends = [request.finished_time for request in submitted.family]
        try:
            self._with_text(scores)
        except Exception as error:  # as in `_completion`
            first.fail(error)
        return RequestOutput(
            request_id=submitted.id,
            prompt=submitted.prompt,
            prompt_token_ids=first.tokens[: first.num_prompt_tokens],
            prompt_logprobs=scores,
            outputs=[self._completion(index, request) for index, request in enumerate(submitted.family)],
            finished=all(request.is_finished for request in submitted.family),
            metrics=RequestMetrics(
                arrival_time=first.arrival_time,
                first_token_time=first.first_token_time,
                finished_time=max((end for end in ends if end is not None), default=None),
            ),
            num_cached_tokens=first.num_cached_tokens or 0,
        )

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        ids = request.output_ids
        scored = request.params.logprobs is not None
        try:
            logprobs = self._with_text(request.logprobs) if scored else None
        except Exception as error:  # the tokenizer fails on its own ids
            request.fail(error)
            logprobs = request.logprobs
        is_whole = request.error is None
        return CompletionOutput(
            index=index,
            text="" if request.text is None else request.text.text,
            token_ids=ids,
            cumulative_logprob=(
                sum(position[token].logprob for position, token in zip(request.logprobs, ids, strict=is_whole))
                if scored
                else None
            ),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            spec_decode_metrics=request.stats,
            token_sources=request.sources,
            unverified_methods=[method for method in self._unverified_methods if method in request.stats.by_method],
            error=request.error if request.finish_reason == "error" else None,
        )

    def _with_text(self, positions: Any) -> Any:
        """Fills in the token texts of log-probabilities, decoded as after other text."""
        tokenizer = self._tokenizer() if positions else None
        if tokenizer is not None:
            decoder = TokenDecoder.of(tokenizer)
            for position in positions:
                for token, logprob in (position or {}).items():
                    logprob.decoded_token = decoder.token(token)
        return positions

    # ---- about ----------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            RequestError: the engine takes token ids only.
        """
        return self._tokenizer.required("get_tokenizer()")

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of `generate` if it is given none: the model's generation_config, then the defaults."""
        return default_sampling_params(resolve_model(self.config.model), self.config.revision)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached KV; requests that run go on with theirs. Returns True, as vLLM does on success."""
        self.engine.reset_prefix_cache()
        return True

    def get_metrics(self) -> list[Metric]:
        """The engine's current counters, under vLLM's names; never waits for a step."""
        return engine_metrics(self.engine)

    # ---- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all requests and frees all memory; calls in other threads end with an error."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _any_failed(call: Call) -> bool:
    return any(request.finish_reason == "error" for request in call.requests)


def _check_not_cut_off(call: Call) -> None:
    """Raises if another thread closed the engine: the outputs are incomplete."""
    if any(request.error == CLOSED for request in call.requests):
        raise RequestError("the engine was closed in another thread during this call")


def _refuse(**arguments: Any) -> None:
    """Refuses arguments of vLLM that are not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise RequestError(f"{name} is not supported; leave it out")
