"""From prompts to an engine's requests."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specplug.config.engine import EngineConfig
from specplug.config.vllm import translate_options
from specplug.engine.startup.report import StepReport
from specplug.engine.startup.start import start_engine
from specplug.errors import CheckpointError, ConfigurationError, RequestError
from specplug.frontend.output_builder import OutputBuilder
from specplug.frontend.submission import Lora, Submission
from specplug.lora.registry import AdapterRegistry, LoadedAdapter
from specplug.lora.request import LoRARequest
from specplug.request import Request
from specplug.sampling.defaults import default_sampling_params
from specplug.sampling.params import SamplingParams
from specplug.text.prompts import EncodedPrompt, LazyTokenizer, Message, Prompt, encode_prompts, plain_ids, render_chats
from specplug.text.token_decoder import TokenDecoder
from specplug.tiny import resolve_model
from specplug.values import shown


class Frontend:
    """A running engine with its tokenizer. Any number of threads may use it.

    Args:
        model: see `LLM`.
        speculative_config: see `LLM`.
        memory: see `LLM`.
        on_step: see `LLM`.
        options: see `LLM`.

    Attributes:
        config: the engine's configuration.
        engine: the engine.
        tokenizer: returns the tokenizer, or None.
        outputs: builds what callers get.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        speculative_config: Mapping[str, Any] | None,
        memory: int | float | str | None,
        on_step: Callable[[StepReport], None],
        options: Mapping[str, Any],
    ) -> None:
        if not callable(on_step):
            raise ConfigurationError(f"on_step={shown(on_step)}: expected a function of a StepReport")
        self.config = EngineConfig.create(
            model, speculative_config=speculative_config, memory=memory, **translate_options(options)
        )
        source = None if self.config.skip_tokenizer_init else resolve_model(self.config.tokenizer or self.config.model)
        self.tokenizer = LazyTokenizer(
            source,
            self.config.revision if self.config.tokenizer is None else None,
            trust_remote_code=self.config.trust_remote_code,
        )
        self._numbers = itertools.count()
        self._encoding = threading.Lock()  # a tokenizer may be used by one thread at a time
        self.engine = start_engine(self.config, tokenizer=self.tokenizer, on_step=on_step)
        self.outputs = OutputBuilder(self.tokenizer, self.engine.unverified_methods)

    # ---- from prompts to requests ---------------------------------------------------------------------------------

    def encode(self, prompts: Prompt | Iterable[Prompt]) -> list[EncodedPrompt]:
        """One prompt or several → their ids.

        Raises:
            RequestError: a prompt is invalid; the message names its place.
        """
        with self._encoding:
            return encode_prompts(prompts, self.tokenizer)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text without the special tokens that the tokenizer adds to prompts; there may be none.

        Raises:
            RequestError: the text is invalid.
        """
        with self._encoding:
            return plain_ids(text, self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        size = self.engine.vocab_size
        for position, token in enumerate(ids):
            if not 0 <= token < size:
                raise RequestError(f"token id {token} at position {position} is outside the vocabulary of {size:,}")
        with self._encoding:
            return TokenDecoder.of(self.tokenizer.required("decoding")).decode(ids)

    def render(self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any) -> list[EncodedPrompt]:
        """One conversation or several → the texts of the chat template and their ids.

        Raises:
            RequestError: there is no template, or it cannot render the messages.
        """
        with self._encoding:
            return render_chats(messages, self.tokenizer, **options)

    def make(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        request_ids: Sequence[str] | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[Submission]:
        """The requests of a call, checked but not queued.

        Args:
            encoded: the prompts.
            sampling_params: one for all prompts, or one for each; None uses the model's generation_config.
            request_ids: a name for each prompt; None numbers them.
            lora_request: an adapter for all prompts, or one for each.

        Raises:
            RequestError: a request can never be served; the message names the place of its prompt.
        """
        params = self.params_list(sampling_params, len(encoded))
        ids = [str(next(self._numbers)) for _ in encoded] if request_ids is None else request_ids
        adapters = _one_each(lora_request, len(encoded))
        submitted: list[Submission] = []
        with self._encoding:  # bad words are tokenized too
            for request_id, prompt, param in zip(ids, encoded, params, strict=True):
                try:
                    options: dict[str, Any] = {"cache_salt": prompt.cache_salt, "priority": prompt.priority}
                    family = self.engine.make_request(request_id, prompt.ids, param, **options)
                except RequestError as error:  # callers know their prompts by index, not by request id
                    raise RequestError(prompt.where + str(error).removeprefix(f"request '{request_id}': ")) from error
                submitted.append(Submission(request_id, prompt.text, family))
        for submission, prompt, adapter in zip(submitted, encoded, adapters, strict=True):
            try:
                self._assign(submission.family, adapter)
            except RequestError as error:
                raise RequestError(f"{prompt.where}{error}") from error
        return submitted

    def _assign(self, family: list[Request], wanted: Lora) -> None:
        """Gives the sequences of a request an adapter, which may have to be loaded first."""
        if wanted is None:
            return
        if not isinstance(wanted, (LoRARequest, str)):
            raise RequestError(f"lora_request={shown(wanted)}: expected a LoRARequest, or the name of a loaded adapter")
        adapter = self.adapters.assign(wanted, family)
        for request in family:
            request.adapter = adapter

    def params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        """The parameters of each of `count` prompts; None is the model's defaults.

        Raises:
            RequestError: they are no sampling parameters, or not one for each prompt.
        """
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
            raise RequestError(
                f"sampling_params={params!r}: expected a SamplingParams, or a list with one for each prompt"
            )
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each")
        return params

    def default_sampling_params(self) -> SamplingParams:
        """The model's generation_config, then the defaults."""
        return default_sampling_params(resolve_model(self.config.model), self.config.revision)

    # ---- adapters -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> AdapterRegistry:
        """The LoRA adapters.

        Raises:
            RequestError: requests may not use any, or the engine is closed.
        """
        if self.engine.is_closed:
            raise RequestError("the engine is closed")
        if self.engine.adapters is None:
            raise RequestError("lora_request: adapters are off; start with enable_lora=True or lora_modules")
        return self.engine.adapters

    def load_adapter(self, wanted: LoRARequest) -> LoadedAdapter:
        """Loads an adapter and keeps it until it is removed.

        Raises:
            RequestError: it is no LoRARequest, cannot be loaded, shares name or number with another one, or has no room.
        """
        if not isinstance(wanted, LoRARequest):
            raise RequestError(f"{shown(wanted)}: expected a LoRARequest")
        try:
            return self.adapters.load(wanted)
        except CheckpointError as error:
            raise RequestError(f"lora_request '{wanted.lora_name}': {error}") from error


def _one_each(given: Lora | Sequence[Lora], count: int) -> Sequence[Lora]:
    if given is None or isinstance(given, (LoRARequest, str)) or not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise RequestError(f"{len(given)} lora_requests for {count} prompts; give one for all, or one for each")
    return given
