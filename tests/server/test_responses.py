"""/v1/responses through OpenAI's client."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest

from support.serving import Live, wait_until

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 24}
QUESTION = "def add(a, b):"


def chat(client: openai.OpenAI, *messages: tuple[str, str]) -> Any:
    """The same conversation as a chat completion."""
    listed: list[Any] = [{"role": role, "content": content} for role, content in messages]
    return client.chat.completions.create(model="tiny", temperature=0, max_tokens=24, messages=listed)


def test_a_response_is_the_chat_completion_in_another_shape(client: openai.OpenAI) -> None:
    expected = chat(client, ("system", "Reply in code."), ("user", QUESTION))
    made = client.responses.create(
        input=QUESTION, instructions="Reply in code.", store=False, metadata={"a": "b"}, **GREEDY
    )
    assert made.output_text == expected.choices[0].message.content
    assert made.id.startswith("resp-")
    assert (made.object, made.model, made.error, made.store) == ("response", "tiny", None, False)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert (made.instructions, made.temperature, made.metadata) == ("Reply in code.", 0, {"a": "b"})
    (message,) = made.output
    assert (message.type, message.status) == ("message", "incomplete")
    usage, same = made.usage, expected.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        same.prompt_tokens,
        24,
        same.prompt_tokens + 24,
    )
    assert usage.input_tokens_details.cached_tokens > 0, "the chat's prompt is cached"
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_a_stop_string_completes_it(client: openai.OpenAI) -> None:
    made = client.responses.create(input=QUESTION, extra_body={"stop": ["\n"], "ignore_eos": True}, **GREEDY)
    assert (made.status, made.incomplete_details) == ("completed", None)
    assert "\n" not in made.output_text


def test_a_stream_has_openais_events_and_the_same_text(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **GREEDY)
    events: list[Any] = list(client.responses.create(input=QUESTION, stream=True, **GREEDY))
    kinds = [event.type for event in events]
    num_deltas = kinds.count("response.output_text.delta")
    assert num_deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * num_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    created, last = events[0].response, events[-1].response
    assert (created.status, created.usage, created.output) == ("in_progress", None, [])
    assert (last.id, last.status, last.output_text) == (created.id, "incomplete", whole.output_text)
    assert last.usage.output_tokens == 24
    assert events[-2].item == last.output[0]
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}


def test_the_clients_own_accumulation_of_a_stream_holds(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **GREEDY, extra_body={"stop": ["\n"], "ignore_eos": True})
    with client.responses.stream(input=QUESTION, **GREEDY, extra_body={"stop": ["\n"], "ignore_eos": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == whole.output_text


def test_a_conversation_goes_on_with_the_output_of_the_last_response(client: openai.OpenAI) -> None:
    first = client.responses.create(input=[{"role": "user", "content": QUESTION}], **GREEDY)
    following = [{"type": "input_text", "text": "def sub("}, {"type": "input_text", "text": "a, b):"}]
    second = client.responses.create(
        input=[  # type: ignore[list-item]
            {"role": "user", "content": QUESTION},
            *(item.model_dump() for item in first.output),
            {"type": "message", "role": "user", "content": following},
        ],
        **GREEDY,
    )
    expected = chat(client, ("user", QUESTION), ("assistant", first.output_text), ("user", "def sub(\na, b):"))
    assert second.output_text == expected.choices[0].message.content


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("previous_response_id", "resp-1"),
        ("conversation", "conv-1"),
        ("background", True),
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", "auto"),
        ("include", ["message.output_text.logprobs"]),
        ("reasoning", {"effort": "low"}),
        ("text", {"format": {"type": "json_object"}}),
        ("truncation", "auto"),
        ("prompt", {"id": "x"}),
        ("top_logprobs", 2),
        ("n", 2),
        ("return_token_ids", True),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_unsupported_fields_are_named(http: httpx.Client, field: str, value: Any) -> None:
    answer = http.post("/v1/responses", json={"input": "x", field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["message"] == f"'{field}' is not supported yet; leave it out"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "input", "required"),
        ({"input": 1}, "input", "expected a string, or a list of messages"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.type", "'message'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'user'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "'input_text'",
        ),
        ({"input": "x", "max_tokens": 3}, "max_tokens", "unknown field"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"input": "x", "temperature": -1}, "temperature", "a number from 0"),
        ({"input": "x", "min_tokens": 9, "max_output_tokens": 2}, "min_tokens", "at most"),
        ({"input": "import os " * 3000}, None, "the prompt has"),
        ({"input": "x", "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "not a variable"),
    ],
)
def test_bad_values_are_named(http: httpx.Client, fields: dict[str, Any], param: str | None, message: str) -> None:
    answer = http.post("/v1/responses", json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_values_that_change_nothing_are_accepted(http: httpx.Client) -> None:
    neutral = {
        "text": {"format": {"type": "text"}},
        "tools": [],
        "previous_response_id": None,
        "truncation": "disabled",
        "service_tier": "auto",
        "user": "me",
        "stream_options": {"include_obfuscation": False},
    }
    assert http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2, **neutral}).status_code == 200


def test_an_aborted_stream_ends_incomplete_and_a_late_one_failed(client: openai.OpenAI, server: Live) -> None:
    long: dict[str, Any] = {**GREEDY, "max_output_tokens": 900, "input": QUESTION, "stream": True}
    stream = client.responses.create(**long, extra_body={"ignore_eos": True, "request_id": "mine"})
    events: list[Any] = [next(iter(stream))]
    assert httpx.post(f"{server.url}/abort", json={"request_id": "mine"}).json() == {"aborted": True}
    events += list(stream)
    assert (events[-1].type, events[-1].response.incomplete_details.reason) == ("response.incomplete", "abort")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == text
    events = list(client.responses.create(**long, extra_body={"ignore_eos": True, "timeout": 0.05}))
    assert events[-1].type == "response.failed"
    assert "timeout of 0.05 s" in events[-1].response.error.message
    server.wait_idle()


def test_a_client_that_leaves_frees_everything(client: openai.OpenAI, server: Live) -> None:
    stream = client.responses.create(
        **{**GREEDY, "max_output_tokens": 900}, input=QUESTION, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_until(lambda: server.engine.num_unfinished)
    threading.Thread(target=stream.close).start()
    server.wait_idle()
