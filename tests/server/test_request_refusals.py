"""What is refused: the status, OpenAI's error object, and the field that it names."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from support.serving import Live

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "suffix", "x"),
        (COMPLETIONS, "best_of", 2),
        (COMPLETIONS, "response_format", {"type": "json_object"}),
        (COMPLETIONS, "structured_outputs", {"regex": "a"}),
        (COMPLETIONS, "use_beam_search", True),
        (COMPLETIONS, "truncate_prompt_tokens", 5),
        (CHAT, "response_format", {"type": "json_schema", "json_schema": {}}),
        (CHAT, "tools", [{"type": "function"}]),
        (CHAT, "tool_choice", "auto"),
        (CHAT, "functions", [{}]),
        (CHAT, "reasoning_effort", "low"),
        (CHAT, "modalities", ["audio"]),
        (CHAT, "chat_template", "{{ x }}"),
        (CHAT, "store", True),
        (CHAT, "parallel_tool_calls", True),
    ],
)
def test_unsupported_fields_are_named(http: httpx.Client, path: str, field: str, value: Any) -> None:
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    error = refusal(http.post(path, json={**body, field: value}))
    assert error["param"] == field
    assert error["message"] == f"'{field}' is not supported yet; leave it out"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"response_format": {"type": "text"}, "suffix": None, "best_of": 1, "priority": 0, "user": "me"}),
        (CHAT, {"tools": [], "tool_choice": "none", "store": False, "service_tier": "auto", "metadata": {"a": "b"}}),
        (CHAT, {"modalities": ["text"], "response_format": None, "n": None, "stop": None, "logit_bias": None}),
    ],
)
def test_values_that_change_nothing_are_accepted(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    assert http.post(path, json={**body, "max_tokens": 2, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"promt": "x"}, "promt", "unknown field"),
        ({"guided_json": {}}, "guided_json", "unknown field"),
        ({"temperature": "0"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "a number from 0"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"min_p": 2}, "min_p", "from 0 to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"seed": 2**64}, "seed", "64-bit"),
        ({"stop": [1]}, "stop", "expected a string or a list of strings"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "outside the vocabulary"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids.0", "greater than or equal to 0"),
        ({"stop_token_ids": [4096]}, "stop_token_ids", "outside the vocabulary"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens", "at most max_tokens=3"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "unknown field"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [[]]}, None, "the prompt is empty"),
        ({"prompt": {"a": 1}}, "prompt", "expected a string, a list of strings"),
        ({"prompt": ["x", 1]}, "prompt", "expected a string, a list of strings"),
        ({"prompt": [4096]}, None, "token id 4096 at position 0 is outside the vocabulary"),
        ({"prompt": [1] * 2048}, None, "the prompt has 2,048 tokens"),
        ({"prompt": ["x"] * 10, "n": 100}, "prompt", "more than 256 completions"),
        ({"prompt": "\ud800"}, None, "lone surrogate"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"priority": 1}, "priority", "start with scheduling_policy='priority'"),
        ({"priority": "1"}, "priority", "valid integer"),
        ({"timeout": 0}, "timeout", "greater than 0"),
    ],
)
def test_bad_values_are_named(http: httpx.Client, fields: dict[str, Any], param: str | None, message: str) -> None:
    error = refusal(http.post(COMPLETIONS, content=json.dumps({"prompt": "x", **fields}), headers=JSON))
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages.0.tool_calls"),
    ],
)
def test_bad_messages_are_named(http: httpx.Client, messages: Any, param: str) -> None:
    assert refusal(http.post(CHAT, json={"messages": messages}))["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'"x"',
        b"null",
        b"\xff",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
        b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
    ],
)
def test_bad_json_is_a_400(http: httpx.Client, body: bytes) -> None:
    refusal(http.post(COMPLETIONS, content=body, headers=JSON))


def test_other_types_paths_methods_and_models(http: httpx.Client, client: openai.OpenAI, server: Live) -> None:
    refusal(http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}), 415)
    refusal(http.post(COMPLETIONS, content=b'{"prompt": "x"}'), 415)
    refusal(http.get("/nothing"), 404)
    refusal(http.get(COMPLETIONS), 405)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here; served: tiny") as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    server.wait_idle()


def test_a_mistyped_name_is_named(http: httpx.Client) -> None:
    error = refusal(http.post(COMPLETIONS, json={"promt": "x"}))
    assert error["param"] == "promt"
    assert "unknown field" in error["message"]
    assert "(and 1 more)" in error["message"]


def test_an_openapi_schema_names_every_path(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert {
        COMPLETIONS,
        CHAT,
        "/v1/responses",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/abort",
        "/health",
        "/version",
    } <= set(schema["paths"])
