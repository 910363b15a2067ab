"""/v1/completions and /v1/chat/completions through OpenAI's client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from specplug import LLM
from support.serving import TEMPLATE, Live

PROMPT = "import os\n\n\ndef main("
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 32}
MESSAGES: list[Any] = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def plain() -> Any:
    """Plain decoding: the words that every response must have."""
    with LLM("tiny", dtype="float32", memory="256MiB", compile=False) as llm:
        yield llm


def reference(plain: LLM, prompt: str, **options: Any) -> Any:
    from specplug import SamplingParams

    return plain.generate(prompt, SamplingParams(temperature=0, max_tokens=32, **options), use_tqdm=False)[0]


def test_a_completion_has_openais_shape_and_the_engines_text(client: openai.OpenAI, plain: LLM) -> None:
    expected = reference(plain, PROMPT)
    made = client.completions.create(prompt=PROMPT, **GREEDY)
    assert made.id.startswith("cmpl-")
    assert (made.object, made.model) == ("text_completion", "tiny")
    assert made.choices[0].text == expected.outputs[0].text
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(expected.prompt_token_ids), 32)
    assert made.usage.total_tokens == len(expected.prompt_token_ids) + 32


def test_a_stream_is_the_completion_in_parts(client: openai.OpenAI, plain: LLM) -> None:
    expected = reference(plain, PROMPT)
    chunks = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.outputs[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 32
    same = {**GREEDY, "extra_body": {"allowed_token_ids": [7]}}
    repeated = list(client.completions.create(prompt=PROMPT, stream=True, **same))
    assert (
        "".join(chunk.choices[0].text for chunk in repeated)
        == client.completions.create(prompt=PROMPT, **same).choices[0].text
    )
    assert len(repeated) < 20, "drafted tokens come together"


def test_several_prompts_and_completions_have_their_indices(client: openai.OpenAI, plain: LLM) -> None:
    prompts = [PROMPT, "class Node:"]
    params = {**GREEDY, "temperature": 1, "seed": 3, "n": 2}
    whole = client.completions.create(prompt=prompts, **params)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    texts = [""] * 4
    for chunk in client.completions.create(prompt=prompts, stream=True, **params):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    ids = [reference(plain, prompt).prompt_token_ids for prompt in prompts]
    assert [c.text for c in client.completions.create(prompt=ids, **params).choices] == texts
    single = client.completions.create(prompt=ids[1], **GREEDY).choices[0].text
    assert single == reference(plain, prompts[1]).outputs[0].text


def test_logprobs_are_the_engines_also_in_streams(client: openai.OpenAI, plain: LLM) -> None:
    expected = reference(plain, PROMPT, logprobs=2).outputs[0]
    whole = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0]
    assert whole.logprobs is not None
    own = [position[token].logprob for position, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert whole.logprobs.token_logprobs == pytest.approx(own, abs=1e-3)
    assert "".join(whole.logprobs.tokens or []) == whole.text
    assert [
        whole.text[begin:].startswith(token)
        for begin, token in zip(whole.logprobs.text_offset or [], whole.logprobs.tokens or [], strict=True)
    ] == [True] * 32
    streamed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(prompt=PROMPT, logprobs=2, stream=True, **GREEDY):
        part = chunk.choices[0].logprobs
        for name in streamed if part is not None else ():
            streamed[name] += getattr(part, name)
    assert streamed["tokens"] == whole.logprobs.tokens
    assert streamed["text_offset"] == whole.logprobs.text_offset
    assert streamed["token_logprobs"] == pytest.approx(whole.logprobs.token_logprobs, abs=1e-3)


def test_echo_scores_the_prompt(client: openai.OpenAI, plain: LLM) -> None:
    expected = reference(plain, PROMPT, prompt_logprobs=0)
    scored = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, temperature=0)
    choice = scored.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(expected.prompt_token_ids)
    assert choice.logprobs.token_logprobs[0] is None
    own = [
        position[token].logprob
        for position, token in zip(expected.prompt_logprobs[1:], expected.prompt_token_ids[1:], strict=True)
    ]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-3)
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    echoed = client.completions.create(prompt=PROMPT, echo=True, **GREEDY).choices[0].text
    assert echoed == PROMPT + reference(plain, PROMPT).outputs[0].text
    parts = client.completions.create(prompt=PROMPT, echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in parts) == echoed


def test_stop_strings_end_streams_exactly(client: openai.OpenAI, plain: LLM) -> None:
    text = reference(plain, PROMPT).outputs[0].text
    for stop in (text[9:12], text[20:21], text[5:17]):
        expected = text[: text.index(stop)]
        whole = client.completions.create(prompt=PROMPT, stop=["never", stop], **GREEDY).choices[0]
        assert (whole.text, whole.finish_reason) == (expected, "stop")
        assert whole.model_extra is not None
        assert whole.model_extra["stop_reason"] == stop
        parts = list(client.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY))
        assert "".join(chunk.choices[0].text for chunk in parts) == expected
        kept = client.completions.create(
            prompt=PROMPT, stop=stop, extra_body={"include_stop_str_in_output": True}, **GREEDY
        )
        assert kept.choices[0].text == expected + stop


def test_characters_of_several_tokens_arrive_whole(client: openai.OpenAI, http: httpx.Client) -> None:
    """Only bytes of these characters are sampled, and drafts put several of them into a chunk."""
    ids = http.post("/tokenize", json={"prompt": "é你好ß🙂"}).json()["tokens"]
    assert len(ids) > 10
    for seed in range(2):
        options: dict[str, Any] = {"model": "tiny", "temperature": 0.3, "max_tokens": 120, "seed": seed}
        options["extra_body"] = {"allowed_token_ids": ids}
        whole = client.completions.create(prompt="é 你好 ß🙂" * 3, **options).choices[0].text
        parts = list(client.completions.create(prompt="é 你好 ß🙂" * 3, stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in parts) == whole
        assert any(character in whole for character in "é你好ß🙂")
        assert len(parts) < 120


def test_extensions_reach_the_engine(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> Any:
        return client.completions.create(prompt=PROMPT, extra_body=extra, **GREEDY).choices[0]

    token_ids = text(return_token_ids=True).model_extra["token_ids"]
    assert len(token_ids) == 32
    first = token_ids[0]
    assert text(logit_bias={str(first): -100}, return_token_ids=True).model_extra["token_ids"][0] != first
    assert set(text(allowed_token_ids=[7, 8], return_token_ids=True).model_extra["token_ids"]) <= {7, 8}
    stopped = text(stop_token_ids=[token_ids[3]], return_token_ids=True)
    assert (stopped.finish_reason, stopped.model_extra["stop_reason"]) == ("stop", token_ids[3])
    later = text(stop_token_ids=[token_ids[0]], min_tokens=6, return_token_ids=True)
    assert len(later.model_extra["token_ids"]) >= 6
    same = text(top_k=5, min_p=0.1, repetition_penalty=1.0, ignore_eos=True, cache_salt="tenant", priority=0)
    assert same.text == text().text
    scored = text(prompt_logprobs=1).model_extra["prompt_logprobs"]
    assert scored[0] is None
    assert all(set(entry) == {"logprob", "rank", "decoded_token"} for entry in scored[1].values())


def test_speculation_is_reported_and_can_be_turned_off(client: openai.OpenAI) -> None:
    def metrics(**extra: Any) -> Any:
        made = client.completions.create(prompt=PROMPT * 3, extra_body=extra, **GREEDY)
        assert made.model_extra is not None
        return made.choices[0].text, made.model_extra["metrics"]["speculative_decoding"]

    text, drafted = metrics()
    assert drafted["num_spec_tokens"] == 4
    assert drafted["num_draft_tokens"] == drafted["by_method"]["ngram"]["num_draft_tokens"] > 0
    assert drafted["mean_acceptance_length"] > 1
    assert sum(drafted["acceptance_histogram"]) == drafted["num_spec_steps"]
    same, plain = metrics(num_speculative_tokens=0)
    assert same == text
    assert (plain["num_draft_tokens"], plain["num_steps"]) == (0, 32)
    chunks = list(client.completions.create(prompt=PROMPT * 3, stream=True, **GREEDY))
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].model_extra["metrics"]["speculative_decoding"] == drafted


def test_chat_renders_the_template(client: openai.OpenAI, plain: LLM) -> None:
    rendered = "<system>code\n<user>def add(a, b):\n<assistant>"
    expected = reference(plain, rendered).outputs[0].text
    messages: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "code"}]},
        {"role": "user", "content": "def add(a, b):"},
    ]
    made = client.chat.completions.create(messages=messages, **GREEDY)
    assert made.id.startswith("chatcmpl-")
    assert made.object == "chat.completion"
    assert (made.choices[0].message.role, made.choices[0].message.content) == ("assistant", expected)
    parts = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected
    with_stream = client.chat.completions.create(
        messages=messages, **{**GREEDY, "max_tokens": None}, max_completion_tokens=7
    )
    assert with_stream.usage is not None
    assert with_stream.usage.completion_tokens == 7


def test_chat_continues_a_message_and_passes_variables(client: openai.OpenAI, plain: LLM) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "return a"}]
    expected = reference(plain, "<user>def add(a, b):\n<assistant>return a").outputs[0].text
    made = client.chat.completions.create(messages=begun, extra_body={"continue_final_message": True}, **GREEDY)
    assert made.choices[0].message.content == expected
    expected = reference(plain, "<user>def add(a, b):\n<assistant>x").outputs[0].text
    made = client.chat.completions.create(
        messages=MESSAGES, extra_body={"chat_template_kwargs": {"opening": "x"}}, **GREEDY
    )
    assert made.choices[0].message.content == expected
    for name in ("chat_template", "tokenize", "messages", "return_dict"):
        with pytest.raises(openai.BadRequestError, match=f"'{name}' is not a variable"):
            client.chat.completions.create(
                messages=MESSAGES, extra_body={"chat_template_kwargs": {name: "x"}}, **GREEDY
            )


def test_chat_logprobs_hold_bytes_and_alternatives(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content or []
    assert len(content) == 32
    assert b"".join(bytes(each.bytes or []) for each in content).decode() == whole.message.content
    assert all(len(each.top_logprobs) == 3 for each in content)
    assert all(each.logprob == each.top_logprobs[0].logprob for each in content)  # greedy
    streamed = [
        each
        for part in client.chat.completions.create(stream=True, **options)
        if part.choices and part.choices[0].logprobs
        for each in part.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]


def test_models_tokens_and_versions_are_told(client: openai.OpenAI, server: Live, http: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra["max_model_len"] == 2048
    made = http.post("/tokenize", json={"prompt": "import os", "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert "".join(made["token_strs"]) == "import os"
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": "import os"}
    plain = http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()
    assert (plain["count"], plain["tokens"]) == (0, [])
    rendered = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": rendered}).json()["prompt"]
    assert text == "<user>def add(a, b):\n<assistant>"
    assert TEMPLATE.startswith("{%")
    assert http.post("/detokenize", json={"tokens": [4096]}).status_code == 400
    assert http.get("/health").status_code == http.get("/ping").status_code == 200
    assert set(http.get("/version").json()) == {"version"}
    assert http.get("/load").json() == {"server_load": 0}
    server.wait_idle()


def test_cached_prompts_are_counted_and_salts_keep_them_apart(client: openai.OpenAI) -> None:
    prompt = "# a prompt that no other test has\n" + PROMPT * 8

    def cached(stream: bool, **extra: Any) -> tuple[str, int]:
        if not stream:
            made = client.completions.create(prompt=prompt, extra_body=extra, **GREEDY)
            return made.choices[0].text, made.usage.prompt_tokens_details.cached_tokens
        chunks = list(
            client.completions.create(
                prompt=prompt, stream=True, stream_options={"include_usage": True}, extra_body=extra, **GREEDY
            )
        )
        text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
        return text, chunks[-1].usage.prompt_tokens_details.cached_tokens

    text, first = cached(False)
    assert first == 0
    for stream in (False, True):
        again = cached(stream)
        assert again[0] == text
        assert again[1] >= 32
    assert cached(False, cache_salt="tenant") == (text, 0)
    assert cached(True, cache_salt="tenant")[1] >= 32
