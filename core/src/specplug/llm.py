"""The offline API: `LLM(...)`, then `generate`, `chat` or `stream`. Names and shapes are vLLM's."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from specplug.configuration.engine import EngineConfig
from specplug.configuration.vllm import translate_options
from specplug.engine.engine import StepOutput
from specplug.engine.startup import StepReport, start_engine
from specplug.errors import RequestError
from specplug.metrics import Metric, engine_metrics
from specplug.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamedPiece
from specplug.progress import ProgressBar
from specplug.request import Request
from specplug.sampling.defaults import default_sampling_params
from specplug.sampling.params import SamplingParams
from specplug.text.prompts import EncodedPrompt, LazyTokenizer, Message, Prompt, encode_prompts, render_chats
from specplug.text.reading import Reading
from specplug.tiny import resolve_model


@attrs.frozen(eq=False)
class _Submitted:
    """One prompt under way: its name, its text if it has one, and its completions."""

    id: str
    prompt: str | None
    family: list[Request]


class LLM:
    """A target model with its speculators, ready to generate.

    Args:
        model: a folder, a hub name, or `tiny` for the embedded model.
        speculative_config: the method and its keys, as in vLLM; None for plain decoding.
        memory: bytes for everything together, such as `8GiB`.
        on_step: told of the six startup steps.
        options: see `EngineConfig`. vLLM's other options are accepted where they ask for nothing that is missing here.
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
        options = translate_options(options)
        self.config = EngineConfig.create(str(model), speculative_config=speculative_config, memory=memory, **options)
        source = None if self.config.skip_tokenizer_init else resolve_model(self.config.tokenizer or self.config.model)
        self._tokenizer = LazyTokenizer(
            source,
            self.config.revision if self.config.tokenizer is None else None,
            trust_remote_code=self.config.trust_remote_code,
        )
        self._numbers = itertools.count()
        self._streams: dict[int, deque[StepOutput]] = {}
        self.engine = start_engine(self.config, tokenizer=self._tokenizer, on_step=on_step)

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
        """Generates completions; the order of the outputs is that of the prompts.

        Args:
            prompts: text, token ids (a list, a NumPy array or a torch tensor), `{"prompt": …}` or `{"prompt_token_ids": …}`,
                or a list of these.
            sampling_params: one for all prompts, or one for each; None takes the model's generation_config.
            use_tqdm: show a progress bar, on a terminal.
            lora_request: not supported.
            priority: not supported; requests are served first come, first served.
            tokenization_kwargs: not supported; give token ids.
            mm_processor_kwargs: not supported.

        Raises:
            RequestError: a prompt that can never be served, named by its index; none of the prompts is then run.
        """
        _refuse(
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        encoded = encode_prompts(prompts, self._tokenizer)
        return self._run(self._submit(encoded, sampling_params), use_tqdm)

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
            chat_template_content_format: `auto` or `string`; contents are handed to the template as they are.
            add_generation_prompt: end with the beginning of a reply.
            continue_final_message: continue the last message instead of replying to it.
            tools: handed to the template.
            chat_template_kwargs: more for the template.
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
        encoded = render_chats(messages, self._tokenizer, **options)
        return self._run(self._submit(encoded, sampling_params), use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamedPiece]:
        """Generates completions and yields their tokens as they are committed, prompts interleaved.

        The joined `text` of a completion's pieces is the text that `generate` gives. Leaving the loop aborts the rest.
        """
        encoded = encode_prompts(prompts, self._tokenizer)
        submitted = self._submit(encoded, sampling_params)
        index_of = {id(request): index for each in submitted for index, request in enumerate(each.family)}
        arrived: deque[StepOutput] = deque()
        self._streams.update(dict.fromkeys(index_of, arrived))
        try:
            while arrived or _any_alive(submitted):
                if not arrived:
                    self._step()
                    continue
                output = arrived.popleft()
                request = output.request
                yield StreamedPiece(
                    request_id=request.id,
                    index=index_of[id(request)],
                    token_ids=output.new_tokens,
                    sources=output.sources,
                    token_texts=output.texts,
                    finish_reason=None if any(o.request is request for o in arrived) else request.finish_reason,
                    metrics=request.stats,
                )
        finally:
            for key in index_of:
                self._streams.pop(key, None)
            for each in submitted:
                self.abort(each.id)

    def _step(self) -> list[StepOutput]:
        """One step of the engine; whoever runs it, every stream gets what it committed for it."""
        outputs = self.engine.step()
        for output in outputs:
            if (arrived := self._streams.get(id(output.request))) is not None:
                arrived.append(output)
        return outputs

    def abort(self, request_id: str) -> bool:
        """Ends a request that is under way; returns whether it was. What it has generated is kept."""
        return bool(self.engine.abort(request_id))

    def _submit(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Submitted]:
        params = self._params_list(sampling_params, len(encoded))
        submitted: list[_Submitted] = []
        try:
            for prompt, param in zip(encoded, params, strict=True):
                request_id = str(next(self._numbers))
                try:
                    family = self.engine.add_request(request_id, prompt.ids, param)
                except RequestError as error:  # callers know their prompts by place, not by our names
                    raise RequestError(prompt.where + str(error).removeprefix(f"request '{request_id}': ")) from error
                submitted.append(_Submitted(request_id, prompt.text, family))
        except BaseException:
            for each in submitted:
                self.abort(each.id)
            raise
        return submitted

    def _run(self, submitted: list[_Submitted], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        try:
            with ProgressBar(sum(len(each.family) for each in submitted), bool(use_tqdm)) as advance:
                while _any_alive(submitted):
                    advance(sum(output.request.is_finished for output in self._step()))
        except BaseException:
            for each in submitted:
                self.abort(each.id)
            raise
        return [self._output(each) for each in submitted]

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
        return RequestOutput(
            request_id=submitted.id,
            prompt=submitted.prompt,
            prompt_token_ids=first.tokens[: first.num_prompt_tokens],
            prompt_logprobs=self._with_text(scores),
            outputs=[self._completion(index, request) for index, request in enumerate(submitted.family)],
            finished=all(request.is_finished for request in submitted.family),
            metrics=RequestMetrics(
                arrival_time=first.arrival_time,
                first_token_time=first.first_token_time,
                finished_time=max((end for end in ends if end is not None), default=None),
            ),
        )

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        ids = request.output_ids
        scored = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="" if request.text is None else request.text.text,
            token_ids=ids,
            cumulative_logprob=(
                sum(position[token].logprob for position, token in zip(request.logprobs, ids, strict=True))
                if scored
                else None
            ),
            logprobs=self._with_text(request.logprobs) if scored else None,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            spec_decode_metrics=request.stats,
            token_sources=request.sources,
            unverified_methods=[
                speculator.method
                for speculator in self.engine.chain.speculators
                if speculator.overrides_verify and speculator.method in request.stats.by_method
            ],
        )

    def _with_text(self, positions: Any) -> Any:
        """Fills in the text of the tokens in log-probabilities, as they read behind other text."""
        tokenizer = self._tokenizer() if positions else None
        if tokenizer is not None:
            reading = Reading.of(tokenizer)
            for position in positions:
                for token, logprob in (position or {}).items():
                    logprob.decoded_token = reading.token(token)
        return positions

    # ---- about ----------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            RequestError: the engine runs on token ids alone.
        """
        return self._tokenizer.required("get_tokenizer()")

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without sampling parameters: the model's generation_config over the defaults."""
        return default_sampling_params(resolve_model(self.config.model), self.config.revision)

    def get_metrics(self) -> list[Metric]:
        """The engine's counters, under vLLM's names."""
        return engine_metrics(self.engine)

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


def _any_alive(submitted: Sequence[_Submitted]) -> bool:
    return any(not request.is_finished for each in submitted for request in each.family)


def _refuse(**arguments: Any) -> None:
    """Refuses arguments of vLLM's that this engine has no use for."""
    for name, value in arguments.items():
        if value is not None:
            raise RequestError(f"{name} is not supported; leave it out")
