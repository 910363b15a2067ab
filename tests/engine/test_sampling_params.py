"""Every sampling parameter against a slow, independent reference; ends inside an accepted run; what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from specplug import LLM, SamplingParams
from specplug.errors import RequestError
from specplug.testing.models import save_words, word
from support.follow import Follow
from support.models import VOCABULARY, save_model
from support.reference import MARGIN
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide
from support.stepwise import Expected, Stepwise

NEW_TOKENS = 14
MAX_MODEL_LEN = 40
EOS = frozenset({2, 9, 17, 33})
COMBINATIONS = 40
Options = dict[str, Any]

# Every parameter alone. Each is given the output without it, so that it can name tokens that would be chosen.
CHANGING: dict[str, Callable[[list[int]], Options]] = {
    "presence_penalty": lambda out: {"presence_penalty": 2.0},
    "presence_penalty negative": lambda out: {"presence_penalty": -2.0},
    "frequency_penalty": lambda out: {"frequency_penalty": 2.0},
    "frequency_penalty negative": lambda out: {"frequency_penalty": -2.0},
    "repetition_penalty": lambda out: {"repetition_penalty": 1.7},
    "repetition_penalty below 1": lambda out: {"repetition_penalty": 0.6},
    "stop": lambda out: {"stop": f"{word(out[2])[1:]} {word(out[3])[:-1]}"},
    "stop kept": lambda out: {"stop": [word(out[5]), word(out[2])], "include_stop_str_in_output": True},
    "stop after min_tokens": lambda out: {"stop": [word(token) for token in out[1:9]], "min_tokens": 4},
    "stop_token_ids": lambda out: {"stop_token_ids": [out[3], out[6]]},
    "stop_token_ids kept": lambda out: {"stop_token_ids": [out[3]], "include_stop_str_in_output": True},
    "max_tokens": lambda out: {"max_tokens": 5},
    "max_tokens 1": lambda out: {"max_tokens": 1},
    "max_tokens None": lambda out: {"max_tokens": None, "ignore_eos": True},
    "min_tokens": lambda out: {"min_tokens": 9, "stop_token_ids": out[:9]},
    "logit_bias": lambda out: {"logit_bias": {out[0]: -50, out[4]: 1.5, (out[2] + 1) % VOCABULARY: 4.0}},
    "logit_bias by text": lambda out: {"logit_bias": {str(out[0]): -50}},
    "allowed_token_ids": lambda out: {"allowed_token_ids": [*range(5, 20), *out[2:4]]},
    "allowed and banned": lambda out: {"allowed_token_ids": [7, 9], "bad_words": [word(7), word(9)], "min_tokens": 5},
    "bad_words": lambda out: {"bad_words": [word(out[1])]},
    "bad_words of two": lambda out: {"bad_words": [f"{word(out[2])} {word(out[3])}"]},
    "bad_words_ids": lambda out: {"bad_words_ids": [out[2:4], [out[1]], [VOCABULARY + 3], [3, VOCABULARY]]},
    "bad_words beyond the vocabulary": lambda out: {
        "bad_words": [word(out[1]), word(VOCABULARY + 2), f"{word(out[0])} {word(VOCABULARY)}"]
    },
    "bad_words of three": lambda out: {"bad_words": [" ".join(map(word, out[1:4])), f"{word(3)} {word(4)}"]},
}
NEUTRAL: dict[str, Callable[[list[int]], Options]] = {
    "none": lambda out: {},
    "n": lambda out: {"n": 3},
    "temperature": lambda out: {"temperature": 1.7, "top_k": 1},
    "temperature near 0": lambda out: {"temperature": 1e-40},
    "top_k": lambda out: {"top_k": 1, "temperature": 0.6},
    "top_p": lambda out: {"top_p": 1e-6, "temperature": 1.2},
    "min_p": lambda out: {"min_p": 1.0, "temperature": 1.2},
    "seed": lambda out: {"seed": 5},
    "seed sampled": lambda out: {"seed": 5, "temperature": 1.0, "top_k": 1},
    "logprobs": lambda out: {"logprobs": 2},
    "prompt_logprobs": lambda out: {"prompt_logprobs": 0},
    "skip_special_tokens": lambda out: {"skip_special_tokens": False},
    "num_speculative_tokens": lambda out: {"num_speculative_tokens": 2},
    "num_speculative_tokens 0": lambda out: {"num_speculative_tokens": 0},
}


@attrs.frozen
class Case:
    name: str
    prompt: list[int]
    params: SamplingParams
    expected: Expected


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Stepwise:
    folder = save_model(tmp_path_factory.mktemp("target"), "llama", eos_token_id=sorted(EOS))
    return Stepwise(save_words(folder, VOCABULARY + 6), EOS)  # a tokenizer may know more than the model


@pytest.fixture(scope="module")
def cases(reference: Stepwise) -> list[Case]:
    alone = {name: (make, name in CHANGING) for name, make in {**CHANGING, **NEUTRAL}.items()}
    found = [
        _find(reference, name, make, changes, index) for index, (name, (make, changes)) in enumerate(alone.items())
    ]
    combined = (
        _find(reference, f"combination {index}", _combination(index), False, 1000 + index)
        for index in range(COMBINATIONS)
    )
    return [*found, *combined]


def _prompt(seed: int) -> list[int]:
    """Ragged, with repeated tokens."""
    choose = random.Random(seed)
    few = choose.sample(range(3, VOCABULARY), 5)
    return [choose.choice(few) for _ in range(choose.randint(3, 14))]


def _find(reference: Stepwise, name: str, make: Callable[[list[int]], Options], changes: bool, index: int) -> Case:
    """A prompt on which the parameters matter and the reference is never nearly undecided."""
    for attempt in range(200):
        prompt = _prompt(1000 * index + attempt)
        base = {"temperature": 0, "max_tokens": NEW_TOKENS}
        free = reference.generate(prompt, SamplingParams(**base, ignore_eos=True), max_model_len=MAX_MODEL_LEN)
        plain = reference.generate(prompt, SamplingParams(**base), max_model_len=MAX_MODEL_LEN)
        params = SamplingParams(**{**base, **make(free.tokens)})
        expected = reference.generate(prompt, params, max_model_len=MAX_MODEL_LEN)
        if expected.margin > MARGIN and (not changes or expected.text != plain.text):
            return Case(name, prompt, params, expected)
    raise AssertionError(f"no decisive prompt for {name}")


def _combination(seed: int) -> Callable[[list[int]], Options]:
    def make(out: list[int]) -> Options:
        choose = random.Random(seed)
        options: Options = {
            "presence_penalty": choose.uniform(-2, 2),
            "frequency_penalty": choose.uniform(-2, 2),
            "repetition_penalty": choose.uniform(0.6, 1.9),
            "logit_bias": {token: choose.uniform(-4, 4) for token in (*choose.sample(out, 3), choose.randrange(64))},
            "allowed_token_ids": [*choose.sample(range(VOCABULARY), 40), *out[::2]],
            "bad_words": [
                " ".join(map(word, out[start : start + choose.randint(1, 3)])) for start in choose.sample(range(10), 3)
            ],
            "min_tokens": choose.randint(1, 10),
            "stop_token_ids": choose.sample(out, 2),
            "stop": [word(token) for token in choose.sample(out, 2)],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "n": 2,
            "logprobs": choose.randint(0, 3),
            "prompt_logprobs": choose.randint(-1, 3),
            "num_speculative_tokens": choose.randint(0, 3),
        }
        options |= choose.choice([{}, {"temperature": choose.uniform(0.3, 2), **choose.choice(_DETERMINISTIC)}])
        return {name: value for name, value in options.items() if choose.random() < 0.45 or name in ("top_k", "min_p")}

    return make


_DETERMINISTIC: list[Options] = [{"top_k": 1}, {"min_p": 1.0, "top_k": 1, "seed": 3}, {"top_k": 1, "top_p": 0.1}]


def _speculators(reference: Stepwise, known: list[list[int]]) -> dict[str, Options]:
    oracle = Oracle(known, VOCABULARY, hit_rate=0.8)
    return {
        "plain": {},
        "chain": provide(lambda c, t: TokenSpeculator(oracle)),
        "tree": provide(lambda c, t: TreeSpeculator(oracle, (1,), 9)),
        "model": provide(lambda c, t: ModelSpeculator(t, reference.folder, c.num_speculative_tokens)),
    }


@pytest.mark.parametrize("kind", ["plain", "chain", "tree", "model"])
def test_equals_the_stepwise_reference(reference: Stepwise, cases: list[Case], kind: str) -> None:
    known = [case.prompt + case.expected.tokens for case in cases]
    with LLM(
        reference.folder,
        strict=True,
        memory="64MiB",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=12,
        max_num_batched_tokens=60,
        block_size=4,
        **_speculators(reference, known)[kind],
    ) as llm:
        outputs = llm.generate([case.prompt for case in cases], [case.params for case in cases])
        stats = llm.engine.stats
    wrong = {}
    for case, output in zip(cases, outputs, strict=True):
        assert len(output.outputs) == case.params.n
        for got in output.outputs:
            seen = (got.token_ids, got.text, got.finish_reason, got.stop_reason)
            if seen != attrs.astuple(case.expected)[:4]:
                wrong[case.name] = (case.params, seen, case.expected)
            assert len(got.token_sources) == len(got.token_ids)
            if case.params.num_speculative_tokens == 0:
                assert got.metrics.num_draft_tokens == 0
    assert not wrong
    if kind == "plain":
        assert stats.num_draft_tokens == 0
    else:
        assert 100 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
        assert len(stats.acceptance_histogram) > 3


# ---- ends inside an accepted run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(reference: Stepwise) -> tuple[list[int], list[int]]:
    """A prompt and its output: distinct tokens, one end-of-sequence token, at index 7."""
    free = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, repetition_penalty=1.9)
    for seed in range(3000):
        prompt = _prompt(seed)
        expected = reference.generate(prompt, free)
        out = expected.tokens
        if [i for i, t in enumerate(out) if t in EOS] == [7] and len(set(out)) == len(out) and expected.margin > MARGIN:
            return prompt, out
    raise AssertionError("no such prompt")


END_CASES: dict[str, tuple[Callable[[list[int]], Options], int, str, Callable[[list[int]], Any]]] = {
    "eos": (lambda out: {}, 8, "stop", lambda out: None),
    "ignore_eos": (lambda out: {"ignore_eos": True}, 14, "length", lambda out: None),
    "stop token": (lambda out: {"stop_token_ids": [out[4]]}, 5, "stop", lambda out: out[4]),
    "eos is a stop token too": (lambda out: {"stop_token_ids": [out[7]]}, 8, "stop", lambda out: out[7]),
    "ignored eos is a stop token": (
        lambda out: {"stop_token_ids": [out[7]], "ignore_eos": True},
        8,
        "stop",
        lambda out: out[7],
    ),
    "stop string": (lambda out: {"stop": word(out[3])}, 4, "stop", lambda out: word(out[3])),
    "max_tokens": (lambda out: {"max_tokens": 6}, 6, "length", lambda out: None),
    "max_tokens at a stop": (lambda out: {"max_tokens": 5, "stop_token_ids": [out[4]]}, 5, "stop", lambda out: out[4]),
    "min_tokens passed": (lambda out: {"min_tokens": 7}, 8, "stop", lambda out: None),
}


@pytest.mark.parametrize("name", list(END_CASES))
def test_ends_inside_an_accepted_run(reference: Stepwise, run: tuple[list[int], list[int]], name: str) -> None:
    prompt, out = run
    make, length, reason, stop_reason = END_CASES[name]
    params = SamplingParams(
        **{"temperature": 0, "max_tokens": NEW_TOKENS, "repetition_penalty": 1.9, "logprobs": 0, **make(out)}
    )
    follow = Follow([prompt + out])
    with LLM(
        reference.folder, strict=True, memory="32MiB", check_parity=False, **provide(lambda c, t: follow, gamma=12)
    ) as llm:
        pieces = list(llm.stream(prompt, params))
        got = llm.generate(prompt, params)[0].outputs[0]
        assert llm.engine.scheduler.allocator.num_free == llm.engine.plan.num_blocks
        assert llm.engine.num_generated_tokens == 2 * length
    assert got.token_ids == out[:length] == [token for piece in pieces for token in piece.token_ids]
    assert (got.finish_reason, got.stop_reason) == (reason, stop_reason(out))
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason]
    assert len(pieces) == 2, "the run was not accepted as one"
    assert got.token_sources[:-1] == [None, *["throwaway"] * (length - 2)]
    assert got.metrics.num_accepted_draft_tokens == sum(source is not None for source in got.token_sources)
    assert len(got.logprobs or ()) == len(got.token_sources) == length
    assert "".join(piece.text for piece in pieces) == got.text
    if not params.stop:  # nothing is held back; a token that ends the output leaves no text
        shown = len(got.text.split())
        assert [text for piece in pieces for text in piece.token_texts] == [
            f" {word(token)}" if index < shown else "" for index, token in enumerate(got.token_ids)
        ]


def test_caps_are_honoured(reference: Stepwise, run: tuple[list[int], list[int]]) -> None:
    prompt, out = run
    follow = Follow([prompt + out])
    caps = [None, 0, 1, 2, 9]
    params = [
        SamplingParams(
            temperature=0,
            repetition_penalty=1.9,
            max_tokens=10,
            ignore_eos=True,
            seed=index,
            num_speculative_tokens=cap,
        )
        for index, cap in enumerate(caps)
    ]
    with LLM(reference.folder, strict=True, memory="32MiB", **provide(lambda c, t: follow, gamma=4)) as llm:
        outputs = [output.outputs[0] for output in llm.generate([prompt] * len(caps), params)]
    assert all(output.token_ids == out[:10] for output in outputs)
    assert outputs[1].token_sources == [None] * 10
    assert [output.metrics.num_steps for output in outputs] == [3, 10, 6, 4, 3]
    oracle = Oracle([prompt + out], VOCABULARY, 0.9)
    with LLM(
        reference.folder, strict=True, memory="32MiB", **provide(lambda c, t: TreeSpeculator(oracle, (0,), 9))
    ) as llm:
        for output, cap in zip(llm.generate([prompt] * len(caps), params), caps, strict=True):
            metrics = output.outputs[0].metrics
            assert output.outputs[0].token_ids == out[:10]
            assert metrics.num_draft_tokens <= metrics.num_spec_steps * (9 if cap is None else cap)


# ---- what is refused ----------------------------------------------------------------------------------------------

INVALID: dict[str, list[Any]] = {
    "n": [0, -1, 1.0, "2", True, None],
    "presence_penalty": [2.1, -2.1, "1", None, float("nan"), True],
    "frequency_penalty": [2.1, -2.1, "1", None, float("nan")],
    "repetition_penalty": [0, -1.0, 1e-39, 1e39, float("inf"), float("nan"), "1", None],
    "temperature": [-0.1, 1e39, float("nan"), float("inf"), "1", None, False],
    "top_p": [0, -0.1, 1.1, float("nan"), "1", None],
    "top_k": [-2, 1.5, "3", None, True],
    "min_p": [-0.1, 1.1, float("nan"), "0", None],
    "seed": [1.0, "1", True, 2**63, -(2**63) - 1],
    "stop": ["", ["a", ""], [3], 5, [None]],
    "stop_token_ids": [[-1], ["a"], 5, [1.0], [True], "1"],
    "ignore_eos": [1, None, "yes"],
    "max_tokens": [0, -1, 2.0, "5", True],
    "min_tokens": [-1, 1.0, None, "1"],
    "logprobs": [-2, 1.5, "3", True],
    "prompt_logprobs": [-2, 1.5, "3", True],
    "detokenize": [1, None],
    "skip_special_tokens": [0, None],
    "include_stop_str_in_output": [1, None],
    "logit_bias": [{-1: 1.0}, {"x": 1.0}, {1: "a"}, {1: float("inf")}, {1: float("nan")}, [1, 2], 5],
    "allowed_token_ids": [[-1], ["a"], 5, [1.5]],
    "bad_words": ["", ["a", ""], [3], 5],
    "bad_words_ids": [[()], [(-1,)], [("a",)], [5], "5", [(1.0,)]],
    "num_speculative_tokens": [-1, 1.5, "3", True],
}
UNSUPPORTED = {
    "structured_outputs": {"json": {}},
    "extra_args": {"a": 1},
    "logprob_token_ids": [1],
    "flat_logprobs": True,
    "spaces_between_special_tokens": False,
    "thinking_token_budget": 5,
    "repetition_detection": {},
}


def test_every_parameter_has_its_refusals() -> None:
    assert {field.name for field in attrs.fields(SamplingParams)} == {*INVALID, *UNSUPPORTED}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_invalid_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert f"sampling parameter {name}=" in message
    assert repr(value[0] if isinstance(value, list) else value).strip("{}") in message
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_unsupported_parameters_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is not supported"):
        SamplingParams(**{name: UNSUPPORTED[name]})


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(RequestError, match=r"min_tokens=9: expected at most max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    with pytest.raises(RequestError, match=r"stop .*detokenize=False"):
        SamplingParams(stop="a", detokenize=False)


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_refused(reference: Stepwise, name: str) -> None:
    value: Any = {VOCABULARY: 1.0} if name == "logit_bias" else [3, VOCABULARY]
    with (
        LLM(reference.folder, skip_tokenizer_init=True, memory="32MiB", check_parity=False) as llm,
        pytest.raises(RequestError, match=f"{name} names token id {VOCABULARY}, outside the vocabulary of 64"),
    ):
        llm.generate([[5, 6]], SamplingParams(**{name: value}))
