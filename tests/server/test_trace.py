"""POST /v1/specplug/trace: every step with its draft, probabilities and times."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import pytest

from specplug import LLM, AsyncLLM, Proposal, SamplingParams, hookimpl
from specplug.engine.trace import Tracer
from support.serving import Live

PROMPT = "x = [0, 1, 0, 1, 0, 1,"


def trace(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The events of a request, as JSON lines."""
    fields = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, **body}
    response = http.post("/v1/specplug/trace", json=fields, headers={"Accept": "application/jsonl"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/jsonl")
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_steps_are_the_completion(server: Live, http: httpx.Client) -> None:
    """Tokens, texts, drafters and probabilities are those of the same completion; the counters add up."""
    start, *steps, end = trace(http)
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 0, "return_token_ids": True}
    expected = http.post("/v1/completions", json=body).json()
    choice = expected["choices"][0]
    tokens = [token for step in steps for token in step["tokens"]]
    assert [token["id"] for token in tokens] == choice["token_ids"]
    assert "".join(token["text"] for token in tokens) == choice["text"]
    for token, logprob in zip(tokens, choice["logprobs"]["token_logprobs"], strict=True):
        assert math.log(token["prob"]) == pytest.approx(logprob, abs=1e-3)
    assert start["event"] == "start"
    assert start["methods"] == ["ngram"]
    assert start["prompt"] == PROMPT
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert end["finish_reason"] == choice["finish_reason"]
    assert end["usage"] == expected["usage"]
    counted = end["metrics"]["speculative_decoding"]
    nodes = [node for step in steps if step["draft"] for node in step["draft"]["nodes"]]
    assert counted["num_steps"] == len(steps)
    assert counted["num_draft_tokens"] == len(nodes)
    assert counted["num_accepted_draft_tokens"] == sum(node["accepted"] for node in nodes) > 0
    assert sum(token["method"] == "ngram" for token in tokens) == sum(node["accepted"] for node in nodes)
    server.wait_idle()


def test_drafts_say_what_became_of_them(http: httpx.Client) -> None:
    """Accepted nodes are the tokens that follow; the first rejected one is not what the target chose."""
    _, *steps, _ = trace(http)
    assert steps[0]["draft"] is None
    assert steps[0]["num_prompt_tokens"] > 1
    for step in steps[1:]:
        nodes = step["draft"]["nodes"] if step["draft"] else []
        kept = [node for node in nodes if node["accepted"]]
        assert [node["id"] for node in kept] == [token["id"] for token in step["tokens"][: len(kept)]]
        assert [node["target_prob"] for node in kept] == [token["prob"] for token in step["tokens"][: len(kept)]]
        assert [node["parent"] for node in nodes] == list(range(-1, len(nodes) - 1))
        if len(kept) < len(nodes) and len(step["tokens"]) > len(kept):
            assert nodes[len(kept)]["id"] != step["tokens"][len(kept)]["id"]
            assert nodes[len(kept)]["target_prob"] <= step["tokens"][len(kept)]["prob"]
        assert step["num_prompt_tokens"] == 0
        assert step["seconds"] >= step["propose_seconds"] >= 0


def test_plain_seconds_come_from_steps_without_drafts(http: httpx.Client) -> None:
    _, *plain, _ = trace(http, num_speculative_tokens=0)
    for step in plain:
        assert step["draft"] is None
        assert step["plain_seconds"] == pytest.approx(step["seconds"] - step["propose_seconds"], rel=1e-3)
    _, *steps, _ = trace(http)
    drafted = [step for step in steps if step["draft"]]
    each = {round(step["plain_seconds"] / len(step["tokens"]), 9) for step in drafted}
    assert len(drafted) > 1
    assert all(seconds > 0 for seconds in each)
    fastest, slowest = min(s["plain_seconds"] for s in plain[1:]), max(s["plain_seconds"] for s in plain[1:])
    assert all(fastest / 4 <= seconds <= 4 * slowest for seconds in each)


def test_a_chat_is_traced_too(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    start, *_, end = trace(http, prompt=None, messages=messages, max_tokens=4)
    assert start["prompt"] == "<user>hello\n<assistant>"
    assert end["usage"]["completion_tokens"] == 4


def test_server_sent_events(http: httpx.Client) -> None:
    """The default form: each event one `data:` line; the last one is `end`."""
    with http.stream("POST", "/v1/specplug/trace", json={"prompt": PROMPT, "max_tokens": 4}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().removesuffix("\n\n").split("\n\n")
    kinds = [json.loads(event.removeprefix("data: "))["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert set(kinds[1:-1]) == {"step"}


def test_an_abandoned_trace_frees_its_row(server: Live, http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True}
    with http.stream("POST", "/v1/specplug/trace", json=body) as response:
        next(response.iter_lines())
    server.wait_idle()


def test_an_aborted_trace_says_so(server: Live, http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "request_id": "long"}
    with http.stream("POST", "/v1/specplug/trace", json=body) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["id"] == "trace-long"
        assert http.post("/abort", json={"request_id": "long"}).json() == {"aborted": True}
        *_, last = (line for line in lines if line)
    assert json.loads(last.removeprefix("data: "))["finish_reason"] == "abort"
    server.wait_idle()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "stream": False}, "stream"),
        ({"prompt": "a", "return_token_ids": True}, "return_token_ids"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": ["a", "b"]}, "prompt"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/specplug/trace", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_info(http: httpx.Client) -> None:
    found = http.get("/v1/specplug/info").json()
    assert found["model"] == "tiny"
    assert found["methods"] == ["ngram"]
    assert found["num_speculative_tokens"] == 4
    assert found["has_chat_template"]


class Fork:
    """Drafts a tree: after the root the last token and another, and one more after the second; with scores."""

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        drafts, parents, scores = [], [], []
        for row in batch.rows:
            size = min(3, row.budget.max_nodes)
            drafts.append([row.tokens[-1], 199, 26][:size])
            parents.append([-1, -1, 1][:size])
            scores.append([math.log(0.5), math.log(0.25), math.log(0.25) + math.log(0.1)][:size])
        return Proposal(drafts, parents=parents, scores=scores)


def test_a_tree_keeps_its_form() -> None:
    """From `AsyncLLM` itself: parents, the draft's probabilities from cumulative scores, and no trace unless asked."""

    async def run(trace: bool) -> list[Any]:
        params = SamplingParams(temperature=0, max_tokens=8)
        return [each async for each in llm.generate("import os", params, trace=trace)]

    config = {"method": "fork", "num_speculative_tokens": 3}
    plugins = {"fork": lambda config, target: Fork()}
    with AsyncLLM("tiny", plugins=plugins, speculative_config=config, memory="256MiB", compile=False) as llm:
        traced = asyncio.run(run(True))[-1].outputs[0]
        untraced = asyncio.run(run(False))[-1].outputs[0]
    assert untraced.token_ids == traced.token_ids
    assert untraced.steps == []
    assert [token for step in traced.steps for token in step.tokens] == traced.token_ids
    whole = [step for step in traced.steps if len(step.nodes) == 3]
    assert whole
    for step in whole:
        assert step.is_tree
        assert [node.parent for node in step.nodes] == [-1, -1, 1]
        assert [node.draft_prob for node in step.nodes] == pytest.approx([0.5, 0.25, 0.1])


def test_nothing_is_traced_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine does not call the tracer for requests that are not traced."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(Tracer, "record", refuse)
    monkeypatch.setattr(Tracer, "end_step", refuse)
    with LLM("tiny", memory="256MiB", compile=False) as llm:
        assert len(llm.generate("import os", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
