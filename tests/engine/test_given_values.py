"""What callers give: prompts and parameters as NumPy and torch have them, text that is none, numbers that are too large."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.errors import RequestError
from specplug.sampling.distributions import process
from specplug.sampling.rules import LogitsRules
from specplug.testing.models import save_words
from support.models import VOCABULARY, save_model
from support.vocabularies import give, sentencepiece

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)
    with LLM(folder, memory="32MiB", check_parity=False) as llm:
        yield llm


IDS: list[tuple[Any, list[list[int]]]] = [
    (torch.tensor([3, 4]), [[3, 4]]),
    (torch.tensor([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
    ([torch.tensor([3, 4]), np.array([5])], [[3, 4], [5]]),
    ([torch.tensor(3), torch.tensor(4)], [[3, 4]]),
    ([[torch.tensor(3), np.uint8(4)], (5,)], [[3, 4], [5]]),
    (np.array([[3, 4]], dtype=np.uint16), [[3, 4]]),
    ({"prompt_token_ids": torch.tensor([3, 4])}, [[3, 4]]),
    ([{"prompt_token_ids": np.array([3, 4])}, {"prompt_token_ids": [np.int64(5)]}], [[3, 4], [5]]),
    (range(3, 6), [[3, 4, 5]]),
]


@pytest.mark.parametrize("index", range(len(IDS)))
def test_ids_of_numpy_and_torch_are_taken_everywhere(words: LLM, index: int) -> None:
    prompts, expected = IDS[index]
    assert [output.prompt_token_ids for output in words.generate(prompts, GREEDY)] == expected
    assert all(type(token) is int for output in words.generate(prompts, GREEDY) for token in output.prompt_token_ids)


def test_the_step_level_engine_takes_them_too(words: LLM) -> None:
    for number, prompt in enumerate([torch.tensor([3, 4]), np.array([3, 4]), [np.int64(3), 4]]):
        request = words.engine.add_request(f"own {number}", prompt, GREEDY)[0]  # type: ignore[arg-type]
        assert request.tokens == [3, 4]
        words.engine.abort(f"own {number}")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.tensor([3.0, 4.0]), "not float"),
        ([np.array([3.5])], r"prompts\[0\]: token id 3.5 at position 0 is not an integer"),
        ({"prompt_token_ids": torch.tensor([[3, 4]])}, r"token id \[3, 4\] at position 0 is not an integer"),
        ([[3], np.array([True])], r"prompts\[1\]: token id True at position 0"),
        (torch.tensor(3), "not int"),
    ],
)
def test_arrays_that_hold_no_ids_are_refused(words: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        words.generate(prompts, GREEDY)


def test_scalars_of_numpy_and_torch_in_sampling_params() -> None:
    plain = SamplingParams(
        n=2, temperature=0.5, top_k=3, top_p=0.5, seed=7, max_tokens=9, logprobs=1, ignore_eos=True,
        stop_token_ids=[3, 4], allowed_token_ids=[5, 6], logit_bias={5: 0.5}, bad_words_ids=[[3, 4], [5]],
    )  # fmt: skip
    given = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), top_k=torch.tensor(3), top_p=torch.tensor(0.5), seed=np.uint32(7),
        max_tokens=np.int16(9), logprobs=np.int8(1), ignore_eos=np.bool_(True), stop_token_ids=np.array([3, 4]),
        allowed_token_ids=[np.int64(5), torch.tensor(6)], logit_bias={np.int64(5): np.float16(0.5)},
        bad_words_ids=[torch.tensor([3, 4]), [np.int64(5)]],
    )  # fmt: skip
    assert given == plain
    assert repr(given) == repr(plain)
    for wrong in ({"n": np.float32(2)}, {"temperature": np.array([1.0])}, {"top_k": torch.tensor(1.5)}):
        with pytest.raises(RequestError, match="expected"):
            SamplingParams(**wrong)  # type: ignore[arg-type]


def test_clones_are_equal_and_their_own() -> None:
    params = SamplingParams(temperature=0.3, logit_bias={3: 1.0}, stop=["a"], bad_words_ids=[[3]])
    clone = params.clone()
    assert clone == params
    assert clone is not params
    assert clone.logit_bias is not params.logit_bias


# ---- text that is none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["w3. \ud800", "\udcff", "w3. \ude00 w4."])
def test_lone_surrogates_are_refused_by_place(words: LLM, text: str) -> None:
    with pytest.raises(RequestError, match=r"^the prompt holds .* at character \d"):
        words.generate(text, GREEDY)
    for prompts in (["w3.", text], ["w3.", {"prompt": text}]):
        with pytest.raises(RequestError, match=r"^prompts\[1\]: the prompt holds .* at character \d"):
            words.generate(prompts, GREEDY)  # type: ignore[arg-type]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [[{"role": "user", "content": each}] for each in ("w3.", text)]
    with pytest.raises(RequestError, match=r"^messages\[1\]: the rendered chat template .* at character \d"):
        words.chat(chats, GREEDY, chat_template=template)
    for name in ("stop", "bad_words"):
        with pytest.raises(RequestError, match=f"{name}=.*valid text"):
            SamplingParams(**{name: text})  # type: ignore[arg-type]
    assert str(_error(words, text)).encode()  # it can be printed


def _error(llm: LLM, prompt: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, GREEDY)
    return caught.value


@pytest.mark.parametrize(
    "wrong",
    [None, 5.0, "", [VOCABULARY], [3] * 200, {"prompt_token_ids": [-1]}, {"text": "a"}, [], ["w3."], {"prompt": ""}],
)
def test_every_prompt_error_names_the_place_in_the_call(words: LLM, wrong: Any) -> None:
    assert str(_error(words, ["w3.", wrong, [4]])).startswith("prompts[1]: ")
    with pytest.raises(RequestError, match=r"^prompts\[1\]: logit_bias names token id 64"):
        words.generate(["w3.", "w4."], [GREEDY, SamplingParams(logit_bias={VOCABULARY: 1.0})])
    assert not words.engine.has_unfinished_requests


def test_an_empty_text_is_served_where_a_text_has_a_first_token(tmp_path: Path, words: LLM) -> None:
    tokenizer = sentencepiece()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = give(save_model(tmp_path, "llama", vocab_size=len(tokenizer)), tokenizer)
    with LLM(folder, memory="32MiB", check_parity=False) as llm:
        output = llm.generate("", GREEDY)[0]
        assert (output.prompt, output.prompt_token_ids) == ("", [1])
        assert output.outputs == llm.generate([[1]], GREEDY)[0].outputs
    with pytest.raises(RequestError, match="the prompt is empty: the tokenizer gives no token"):
        words.generate("", GREEDY)


# ---- numbers that are too large -----------------------------------------------------------------------------------

BEYOND = [
    {"logit_bias": {3: 1e39}},
    {"logit_bias": {3: -1e39}},
    {"logit_bias": {3: 10**400}},
    {"repetition_penalty": 1e-39},
    {"repetition_penalty": 1e39},
    {"temperature": 1e39},
    {"temperature": 10**400},
]


@pytest.mark.parametrize("index", range(len(BEYOND)))
def test_numbers_that_float32_cannot_hold_are_refused_by_name(index: int) -> None:
    (name,) = BEYOND[index]
    with pytest.raises(RequestError, match=f"sampling parameter {name}=.*: expected .* from "):
        SamplingParams(**BEYOND[index])  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [0.0, 1e20, -1e20])
@pytest.mark.parametrize("penalty", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("temperature", [1e-45, 1e-10, 1.0, 1e20])
def test_no_combination_within_the_bounds_overflows(bias: float, penalty: float, temperature: float) -> None:
    params = SamplingParams(
        logit_bias={3: bias, 4: -bias, 5: bias}, repetition_penalty=penalty, frequency_penalty=-2, temperature=temperature,
        bad_words_ids=[[7]], top_p=0.9, min_p=1e-300,
    )  # fmt: skip
    rules = LogitsRules(params, 8, frozenset(), [[7]], torch.device("cpu"))
    logits = rules.apply(torch.linspace(-1e3, 1e3, 8)[None], [3, 4, 5, 6, 3], 2, [[]])
    probs = process(logits, [params])
    assert not logits.isnan().any()
    assert probs.sum() == pytest.approx(1)
    assert probs[0, 7] == 0
