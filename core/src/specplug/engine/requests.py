"""Makes requests from prompts and sampling parameters, or refuses them with one clear error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from specplug.engine.memory_plan import MemoryPlan
from specplug.errors import RequestError
from specplug.model.architecture.architecture import Architecture
from specplug.request import Request
from specplug.sampling.params import MAX_SEED, SamplingParams
from specplug.sampling.randomness import EngineRandomness, RowRandomness
from specplug.sampling.rules import LogitsRules
from specplug.text.bad_words import bad_word_ids
from specplug.text.prompts import check_cache_salt, token_ids
from specplug.text.stream import TextStream
from specplug.values import is_integer, shown


class RequestFactory:
    """Makes the requests of one engine.

    Args:
        plan: the engine's memory plan.
        architecture: the target's.
        eos_ids: the ids that end a sequence.
        randomness: the engine's random streams.
        tokenizer: returns the tokenizer, or None.
        device: the device of the logits.
        scheduling_policy: whether requests may have priorities: `fcfs` or `priority`.

    Attributes:
        vocab_size: how many token ids the target has.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        architecture: Architecture,
        eos_ids: frozenset[int],
        randomness: EngineRandomness,
        tokenizer: Callable[[], Any],
        device: torch.device,
        scheduling_policy: str,
    ) -> None:
        self._plan = plan
        self.vocab_size = architecture.vocab_size
        self._eos_ids = eos_ids
        self._randomness = randomness
        self._tokenizer = tokenizer
        self._device = device
        self._has_priorities = scheduling_policy == "priority"
        self._context_note = architecture.context_note
        self._numbers = itertools.count()
        self._last_words: tuple[tuple[str, ...], list[list[int]]] = ((), [])

    def make(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[Request]:
        """The sequences of a request, one per completion. All but the first are forked from the first.

        Raises:
            RequestError: the prompt or a parameter can never be served; the message says why.
        """
        try:
            ids = token_ids(prompt_ids)
        except RequestError as error:
            raise RequestError(f"request '{request_id}': {error}") from error
        self._check_prompt(request_id, ids)
        self._check_ids(request_id, params)
        try:
            check_cache_salt(cache_salt)
        except RequestError as error:
            raise RequestError(f"request '{request_id}': {error}") from error
        self._check_priority(request_id, priority)
        room = self._plan.max_model_len - len(ids)
        limit = min(params.max_tokens or room, room)
        params = attrs.evolve(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        words = self._bad_words(request_id, params)
        family = [self._request(request_id, ids, params, index, stop_ids, words) for index in range(params.n)]
        family[0].fork_group = family[1:]
        for request in family:
            request.cache_salt = cache_salt
            request.priority = priority
        return family

    def _request(
        self,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        index: int,
        stop_ids: frozenset[int],
        words: list[list[int]],
    ) -> Request:
        number = next(self._numbers)
        seed = None if params.seed is None else (params.seed + index + MAX_SEED) % (2 * MAX_SEED) - MAX_SEED
        scored = params.prompt_logprobs if index == 0 else None  # once for the whole family
        rules = None
        if params.changes_logits:
            rules = LogitsRules(params, self.vocab_size, stop_ids, words, self._device)
        return Request(
            id=request_id,
            number=number,
            tokens=list(ids),
            num_prompt_tokens=len(ids),
            params=attrs.evolve(params, seed=seed, prompt_logprobs=scored),
            stop_ids=stop_ids,
            randomness=RowRandomness(self._randomness, number, seed),
            rules=rules,
            text=self._text(request_id, ids, params),
        )

    def _text(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> TextStream | None:
        tokenizer = self._tokenizer() if params.detokenize else None
        if tokenizer is None:
            if params.stop:
                raise RequestError(
                    f"request '{request_id}': stop strings need a tokenizer, and the engine has none; use stop_token_ids"
                )
            return None
        return TextStream(
            tokenizer,
            params.stop,
            prompt_ids=prompt_ids,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
        )

    def _bad_words(self, request_id: str, params: SamplingParams) -> list[list[int]]:
        given = [list(ids) for ids in params.bad_words_ids]
        if not params.bad_words:
            return given
        words, ids = self._last_words  # encoding some takes milliseconds, and requests mostly come with the same
        if words == params.bad_words:
            return given + ids
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise RequestError(f"request '{request_id}': bad_words needs a tokenizer, and the engine has none")
        try:
            ids = bad_word_ids(params.bad_words, tokenizer)
        except RequestError as error:
            raise RequestError(f"request '{request_id}': {error}") from error
        self._last_words = params.bad_words, ids
        return given + ids

    def _check_prompt(self, request_id: str, ids: list[int]) -> None:
        if not ids:
            raise RequestError(f"request '{request_id}': the prompt is empty; it needs at least one token")
        for position, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"request '{request_id}': token id {token} at position {position} is outside the vocabulary of "
                    f"{self.vocab_size:,}"
                )
        if len(ids) >= self._plan.max_model_len:
            raise RequestError(
                f"request '{request_id}': the prompt has {len(ids):,} tokens, the longest sequence is "
                f"{self._plan.max_model_len:,} tokens (prompt and output); {self._advice(len(ids))}"
            )

    def _advice(self, length: int) -> str:
        """How to serve a prompt of this length, if that is possible."""
        context = self._plan.context_length
        if length >= context:
            return f"shorten it: {self._context_note or f'the model has positions for {context:,} tokens'}"
        if self._plan.limited_by == "max_model_len":
            return "shorten it, or start with a larger max_model_len"
        return f"shorten it, or start with more memory (the KV cache holds {self._plan.num_kv_tokens:,} tokens)"

    def _check_priority(self, request_id: str, priority: int) -> None:
        if not is_integer(priority):
            raise RequestError(f"request '{request_id}': priority={shown(priority)}: expected an integer")
        if priority and not self._has_priorities:
            raise RequestError(
                f"request '{request_id}': priority={priority}: requests are served first come, first served; start with "
                "scheduling_policy='priority' (--scheduling-policy priority)"
            )

    def _check_ids(self, request_id: str, params: SamplingParams) -> None:
        for name in ("allowed_token_ids", "logit_bias", "stop_token_ids"):
            for token in getattr(params, name):
                if token >= self.vocab_size:
                    raise RequestError(
                        f"request '{request_id}': {name} names token id {token}, outside the vocabulary of "
                        f"{self.vocab_size:,}"
                    )
