"""The offline API: `LLM(...)`, then `generate`, `chat` or `stream`. Names and shapes are those of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specplug.engine.calls import Call, Calls
from specplug.engine.engine import CLOSED
from specplug.engine.startup.report import StepReport
from specplug.errors import GenerationError, RequestError
from specplug.frontend.frontend import Frontend
from specplug.frontend.owner import FrontendOwner
from specplug.frontend.submission import Lora
from specplug.lora.request import LoRARequest
from specplug.outputs import RequestOutput, StreamedPiece
from specplug.progress import ProgressBar
from specplug.sampling.params import SamplingParams
from specplug.text.prompts import EncodedPrompt, Message, Prompt, with_priorities

_MOST_NAMED = 5  # failures that one message names


class LLM(FrontendOwner):
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
        self._frontend = Frontend(
            model, speculative_config=speculative_config, memory=memory, on_step=on_step, options=options
        )
        self.config = self._frontend.config
        self.engine = self._frontend.engine
        self._calls = Calls(self.engine)

    # ---- generation -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Lora | Sequence[Lora] = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Generates completions, in the order of the prompts.

        Args:
            prompts: text, token ids (a list, a NumPy array or a torch tensor), `{"prompt": …}` or `{"prompt_token_ids": …}`,
                or a list of these. A mapping may have a `cache_salt`: it shares cached KV only with prompts of the same salt.
            sampling_params: one for all prompts, or one for each; None uses the model's generation_config.
            use_tqdm: show a progress bar on a terminal.
            lora_request: a LoRA adapter for all prompts, or one for each: a `LoRARequest`, or the name of a loaded one.
            priority: an integer for each prompt: those with lower numbers come first. Needs `scheduling_policy="priority"`.
            tokenization_kwargs: not supported; give token ids.
            mm_processor_kwargs: not supported.

        Raises:
            RequestError: a prompt can never be served (the message names its index, and none of the prompts runs), or the
                engine was closed.
            GenerationError: some prompts failed during generation; it carries the outputs of all.
        """
        _refuse(
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        encoded = with_priorities(self._frontend.encode(prompts), priority)
        return self._run(encoded, sampling_params, use_tqdm, lora_request)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Lora | Sequence[Lora] = None,
        priority: Sequence[int] | None = None,
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
            lora_request: see `generate`.
            priority: see `generate`.
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
        encoded = with_priorities(self._frontend.render(messages, **options), priority)
        return self._run(encoded, sampling_params, use_tqdm, lora_request)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> Iterator[StreamedPiece]:
        """Generates completions and yields their tokens when they are committed, prompts interleaved.

        The joined `text` of a completion's pieces is the text that `generate` returns. Leaving the loop aborts the rest.

        Raises:
            RequestError: see `generate`.
            GenerationError: see `generate`; raised after the last piece.
        """
        encoded = self._frontend.encode(prompts)
        submitted = self._frontend.make(encoded, sampling_params, lora_request=lora_request)
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
        self._raise_failures([self._frontend.outputs.build(each) for each in submitted] if _any_failed(call) else [])

    def abort(self, request_id: str) -> bool:
        """Ends a request; returns whether it was unfinished. Its generated tokens are kept."""
        return bool(self.engine.abort(request_id))

    def _run(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any],
        lora_request: Lora | Sequence[Lora],
    ) -> list[RequestOutput]:
        submitted = self._frontend.make(encoded, sampling_params, lora_request=lora_request)
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
        outputs = [self._frontend.outputs.build(each) for each in submitted]
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

    # ---- adapters -------------------------------------------------------------------------------------------------

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads a LoRA adapter and keeps it until `remove_lora`. Returns True.

        Raises:
            RequestError: it cannot be loaded, shares name or number with another one, or there is no room.
        """
        self._frontend.load_adapter(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Unloads an adapter by its number; requests that use it run on with it. Returns whether it was loaded."""
        return self._frontend.adapters.unload(lora_id)

    # ---- about ----------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached KV; requests that run go on with theirs. Returns True, as vLLM does on success."""
        self.engine.reset_prefix_cache()
        return True

    # ---- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all requests and frees all memory; calls in other threads end with an error."""
        self.engine.close()


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
