"""The sampling parameters of a request, with vLLM's names and meanings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from specplug.errors import RequestError
from specplug.values import text_fault, to_python

MAX_SEED = 2**63
# Logits are float32. No combination of parameters within these bounds overflows: a biased logit, divided by the smallest
# penalty and by the smallest temperature that `distributions` divides by, stays below 3.4e38.
MAX_BIAS = 1e20
MAX_PENALTY = 1e8
MAX_TEMPERATURE = 1e20
LOWEST_DIVISOR = 1e-10  # equivalent to greedy


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect(condition: Callable[[Any], bool], expected: str) -> Callable[[Any, Any, Any], None]:
    """An attrs validator whose message names the parameter, its value and what is expected."""

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        try:
            holds = condition(value)
        except (TypeError, AttributeError):  # not a list or mapping
            holds = False
        if not holds:
            raise RequestError(f"sampling parameter {attribute.name}={value!r}: expected {expected}")

    return validate


def _integer(least: int, *, or_none: bool = False) -> Any:
    text = f"an integer of at least {least}" + (", or None" if or_none else "")
    return _expect(lambda value: (or_none and value is None) or (_is_int(value) and value >= least), text)


def _number(low: float, high: float) -> Any:
    return _expect(lambda value: _is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}")


def _strings(value: Any) -> Any:
    """One string, several, or None → a tuple."""
    value = to_python(value)
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else _tuple(value)


def _ids(value: Any) -> Any:
    value = to_python(value)
    return () if value is None else _tuple(value)


def _id_sequences(value: Any) -> Any:
    value = _ids(value)
    return tuple(_ids(each) for each in value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    """An iterable → a tuple; anything else unchanged, for the validator to refuse."""
    return tuple(map(to_python, value)) if isinstance(value, Iterable) else value


def _bias(value: Mapping[Any, Any] | None) -> Any:
    """Token ids may be strings, as in JSON."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return value
    pairs = ((to_python(k), to_python(v)) for k, v in value.items())
    return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in pairs}


def _are_ids(values: Iterable[Any]) -> bool:
    return all(_is_int(i) and i >= 0 for i in values)


_text_list = _expect(
    lambda v: all(isinstance(s, str) and s and text_fault(s) is None for s in v),
    "a non-empty string of valid text, or a list of them",
)
_id_list = _expect(_are_ids, "a list of token ids")
_id_sequence_list = _expect(
    lambda v: not isinstance(v, str) and all(isinstance(i, tuple) and i and _are_ids(i) for i in v),
    "a list of non-empty lists of token ids",
)
_flag = _expect(lambda v: isinstance(v, bool), "True or False")
_count = _expect(lambda v: v is None or (_is_int(v) and v >= -1), "an integer of at least 0, -1 for all, or None")


def _unsupported(reason: str) -> Any:
    """A parameter of vLLM that is not supported: any value except its default is refused."""

    def refuse(instance: Any, attribute: Any, value: Any) -> None:
        if value != attribute.default:
            raise RequestError(f"sampling parameter {attribute.name} is not supported: {reason}")

    return refuse


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    With any speculator and at every draft position, tokens are sampled from the target's distribution after all parameters: a
    penalty counts the draft's earlier tokens, a ban holds inside the draft. They apply in this order: allowed tokens, bad
    words, `min_tokens`, `logit_bias`, penalties, temperature, `min_p`, `top_k`, `top_p`. If the bans leave no token, only
    `allowed_token_ids` holds for that position. NumPy and torch scalars, arrays and tensors are accepted as numbers and lists.

    Attributes:
        n: how many completions to generate for the prompt; they share its computed KV blocks.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for every occurrence of the token in the output.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al.
            1909.05858); 1 changes nothing; from 1e-8 to 1e8.
        temperature: 0 is greedy; otherwise logits are divided by it (by 1e-10 at least), up to 1e20.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum.
        top_k: keep the k most likely tokens (ties included); 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the most likely token's probability.
        seed: makes the output a function of the request alone: the same in any batch, with any speculator, after
            preemption (float32; in lower precision up to rounding). Completion i of `n` uses seed + i.
        stop: end the output when its text contains any of these strings; the text ends before the string.
        stop_token_ids: end the output with any of these; the id is kept in `token_ids`, its text is not.
        ignore_eos: continue after the end-of-sequence token.
        max_tokens: the most tokens to generate; None generates up to the context length.
        min_tokens: the number of tokens before any end-of-sequence token, stop token or stop string.
        logprobs: return the log-probabilities of this many most likely tokens (and of the chosen one) at each position, under
            the model's own distribution; -1 for the whole vocabulary.
        prompt_logprobs: the same for the tokens of the prompt.
        detokenize: whether to decode the output.
        skip_special_tokens: omit special tokens from the text.
        include_stop_str_in_output: keep the stop string, or the stop token's text, in the text.
        logit_bias: token id → number to add to its logit, from -1e20 to 1e20.
        allowed_token_ids: only these may be generated; empty allows all.
        bad_words: words that are not generated: the last token that would complete one, also across the end of the prompt. A
            word is used with its white space; banned are the token sequences that spell it at the start of a text, inside a
            text and after a space.
        bad_words_ids: the same as token ids, a list for each word: for engines without a tokenizer, and to ban single tokens.
        num_speculative_tokens: the most draft tokens of this request; 0 turns speculation off; None keeps the engine's.
        structured_outputs: not supported.
        extra_args: not supported.
        logprob_token_ids: not supported.
        flat_logprobs: not supported.
        spaces_between_special_tokens: not supported.
        thinking_token_budget: not supported.
        repetition_detection: not supported.
    """

    n: int = attrs.field(default=1, converter=to_python, validator=_integer(1))
    presence_penalty: float = attrs.field(default=0.0, converter=to_python, validator=_number(-2, 2))
    frequency_penalty: float = attrs.field(default=0.0, converter=to_python, validator=_number(-2, 2))
    repetition_penalty: float = attrs.field(
        default=1.0, converter=to_python, validator=_number(1 / MAX_PENALTY, MAX_PENALTY)
    )
    temperature: float = attrs.field(default=1.0, converter=to_python, validator=_number(0, MAX_TEMPERATURE))
    top_p: float = attrs.field(
        default=1.0,
        converter=to_python,
        validator=_expect(lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1"),
    )
    top_k: int = attrs.field(
        default=0,
        converter=to_python,
        validator=_expect(lambda v: _is_int(v) and v >= -1, "an integer of at least 1, or 0 for all"),
    )
    min_p: float = attrs.field(default=0.0, converter=to_python, validator=_number(0, 1))
    seed: int | None = attrs.field(
        default=None,
        converter=to_python,
        validator=_expect(
            lambda v: v is None or (_is_int(v) and -MAX_SEED <= v < MAX_SEED), "a 64-bit integer or None"
        ),
    )
    stop: tuple[str, ...] = attrs.field(default=(), converter=_strings, validator=_text_list)
    stop_token_ids: tuple[int, ...] = attrs.field(default=(), converter=_ids, validator=_id_list)
    ignore_eos: bool = attrs.field(default=False, converter=to_python, validator=_flag)
    max_tokens: int | None = attrs.field(default=16, converter=to_python, validator=_integer(1, or_none=True))
    min_tokens: int = attrs.field(default=0, converter=to_python, validator=_integer(0))
    logprobs: int | None = attrs.field(default=None, converter=to_python, validator=_count)
    prompt_logprobs: int | None = attrs.field(default=None, converter=to_python, validator=_count)
    detokenize: bool = attrs.field(default=True, converter=to_python, validator=_flag)
    skip_special_tokens: bool = attrs.field(default=True, converter=to_python, validator=_flag)
    include_stop_str_in_output: bool = attrs.field(default=False, converter=to_python, validator=_flag)
    logit_bias: Mapping[int, float] = attrs.field(
        default={},
        converter=_bias,
        validator=_expect(
            lambda v: all(_is_int(k) and k >= 0 and _is_number(b) and abs(b) <= MAX_BIAS for k, b in v.items()),
            f"a mapping of token ids to numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}",
        ),
        hash=False,
    )
    allowed_token_ids: tuple[int, ...] = attrs.field(default=(), converter=_ids, validator=_id_list)
    bad_words: tuple[str, ...] = attrs.field(default=(), converter=_strings, validator=_text_list)
    bad_words_ids: tuple[tuple[int, ...], ...] = attrs.field(
        default=(), converter=_id_sequences, validator=_id_sequence_list
    )
    num_speculative_tokens: int | None = attrs.field(
        default=None, converter=to_python, validator=_integer(0, or_none=True)
    )

    structured_outputs: Any = attrs.field(default=None, validator=_unsupported("there is no grammar backend"))
    extra_args: Any = attrs.field(default=None, validator=_unsupported("nothing reads it"))
    logprob_token_ids: Any = attrs.field(default=None, validator=_unsupported("use logprobs=-1 and pick the ids"))
    flat_logprobs: Any = attrs.field(default=False, validator=_unsupported("logprobs are lists of dicts"))
    spaces_between_special_tokens: Any = attrs.field(
        default=True, validator=_unsupported("fast tokenizers never add such spaces differently")
    )
    thinking_token_budget: Any = attrs.field(default=None, validator=_unsupported("use max_tokens"))
    repetition_detection: Any = attrs.field(default=None, validator=_unsupported("use stop or a penalty"))

    def clone(self) -> SamplingParams:
        """A copy. Parameters are immutable; `attrs.evolve(params, temperature=0)` makes a copy with changes."""
        return attrs.evolve(self, logit_bias=dict(self.logit_bias))

    def __attrs_post_init__(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"sampling parameter min_tokens={self.min_tokens!r}: expected at most max_tokens={self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise RequestError("sampling parameter stop needs the text: it cannot be used with detokenize=False")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether top_k, top_p or min_p can remove tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def changes_logits(self) -> bool:
        """Whether anything except temperature and truncation changes the distribution."""
        return bool(
            self.penalizes
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.bad_words_ids
            or self.min_tokens
        )
