"""What needs no cluster, and no `ray`: the keys of `build_openai_app`, conversations, responses of a replica, metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

import specplug
from specplug import ConfigurationError
from specplug_ray.exposition import merge
from specplug_ray.messages import Forwarded, Head, conversation_of, forwarded, respond
from specplug_ray.options import read_options

pytestmark = pytest.mark.unit
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_defaults_follow_the_engine() -> None:
    options = read_options({"model": "tiny", "engine": {"max_num_seqs": 8}, "deployment": {"autoscaling_config": {}}})
    (model,) = options.models
    assert (model.model, model.names, model.deployment_name) == ("tiny", ("tiny",), "specplug-tiny")
    assert model.deployment["max_ongoing_requests"] == 16
    assert model.deployment["autoscaling_config"] == {"target_ongoing_requests": 8}
    assert "request_router_config" not in model.deployment
    assert options.ingress["graceful_shutdown_timeout_s"] == model.deployment["graceful_shutdown_timeout_s"]


def test_what_is_given_stands() -> None:
    args = {
        "models": [
            {"model": "tiny", "served_model_name": ["a/b", "c"], "routing": "prefix"},
            {
                "model": "tiny",
                "served_model_name": "d",
                "deployment": {"max_ongoing_requests": 3},
                "server": {"retry_after": 9},
            },
        ],
        "server": {"api_keys": ["secret"], "request_timeout": 5.0},
        "replica_timeout": 7,
    }
    options = read_options(args)
    first, second = options.models
    assert first.deployment_name == "specplug-a-b"
    assert first.deployment["request_router_config"]["request_router_class"].endswith(".PrefixCacheAffinityRouter")
    assert second.deployment["max_ongoing_requests"] == 3
    assert options.settings.model_names == ("a/b", "c", "d")
    assert options.settings.api_keys == ("secret",)
    assert first.settings.api_keys == ()  # the ingress checks keys
    assert (first.settings.request_timeout, second.settings.request_timeout) == (5.0, 5.0)
    assert (first.settings.retry_after, second.settings.retry_after) == (1, 9)
    assert options.replica_timeout == 7.0


def test_an_adapters_name_means_its_model() -> None:
    adapters = {"sql": "adapters/sql", "chat": "org/chat"}
    options = read_options({"model": "tiny", "served_model_name": "t", "engine": {"lora_modules": adapters}})
    assert options.models[0].served == options.settings.model_names == ("t", "sql", "chat")
    assert options.models[0].settings.model_names == ("t",)
    assert options.models[0].adapters == adapters


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "expected 'model', the target, or 'models'"),
        ({"models": []}, "expected 'model', the target, or 'models'"),
        ({"model": "tiny", "models": []}, "model and models were given"),
        ({"model": 3}, "model=3: expected a folder"),
        ({"models": [{"model": "tiny"}, {"model": ""}]}, r"models\[1\]\.model='': expected a folder"),
        ({"model": "tiny", "replicas": 2}, "args: unknown key 'replicas'; known: model, served_model_name"),
        ({"models": [{"model": "tiny"}], "routing": "load"}, "args: unknown key 'routing'; known: model, models"),
        ({"model": "tiny", "engine": {"max_num_seqs": 0}}, "engine: max_num_seqs=0"),
        ({"model": "tiny", "engine": {"max_rows": 1}}, "engine: .*max_rows"),
        ({"model": "tiny", "server": {"root_path": "/x"}}, "server: unknown key 'root_path'"),
        ({"model": "tiny", "server": {"updates_adapters": True}}, "server: unknown key 'updates_adapters'"),
        ({"model": "tiny", "engine": {"lora_modules": {"tiny": "a"}}}, "the name 'tiny' is given to several"),
        ({"model": "tiny", "deployment": 2}, "deployment: expected a mapping, got int"),
        ({"model": "tiny", "routing": "random"}, "routing='random': expected one of load, conversation, prefix"),
        ({"model": "tiny", "replica_timeout": 0}, "replica_timeout=0: expected a positive number"),
        ({"models": [{"model": "tiny"}, {"model": "tiny"}]}, "'tiny' is given to several models"),
        (
            {"models": [{"model": "tiny", "served_model_name": name} for name in ("a/b", "a-b")]},
            "make the same name of a deployment: specplug-a-b, specplug-a-b",
        ),
    ],
)
def test_errors_name_the_key(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_options(args)


def test_a_conversation_keeps_its_key() -> None:
    first = conversation_of({"messages": [SYSTEM, user("a")]}, None)
    later = [SYSTEM, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert first == conversation_of({"messages": later}, None)
    assert first != conversation_of({"messages": [SYSTEM, user("b")]}, None)
    assert conversation_of({"messages": later}, "mine") == "mine"
    assert conversation_of({"prompt": "x" * 2000}, None) == conversation_of({"prompt": "x" * 1024 + "y"}, None)
    assert conversation_of({"prompt": [1, 2]}, None) != conversation_of({"prompt": [1, 3]}, None)
    assert [conversation_of(body, None) for body in (None, {}, [], {"messages": []}, {"messages": 3})] == [""] * 5


def test_what_is_forwarded_has_a_text() -> None:
    scope = {"type": "http", "path": "/x", "headers": [], "app": object(), "client": ("127.0.0.1", 1)}
    assert forwarded(scope, b"", None) == Forwarded(
        {"type": "http", "path": "/x", "headers": [], "client": None, "server": None}, b"", "/x"
    )
    assert forwarded(scope, b"", {"prompt": "a"}).prompt == "a"
    assert "Be brief." in forwarded(scope, b"", {"messages": [SYSTEM]}).prompt


REQUEST = Forwarded({"type": "http", "method": "POST", "path": "/", "headers": []}, b"abc", "/")


def test_a_response_in_parts() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await PlainTextResponse(body, 201)(scope, receive, send)

    async def collect() -> list[Any]:
        return [part async for part in respond(app, REQUEST)]

    head, *parts = asyncio.run(collect())
    assert isinstance(head, Head)
    assert head.status == 201
    assert (b"content-length", b"3") in head.headers
    assert parts == [b"abc"]


def test_what_an_application_raises_is_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("no")

    async def collect() -> None:
        async for _ in respond(app, REQUEST):
            pass

    with pytest.raises(LookupError):
        asyncio.run(collect())


def test_leaving_ends_the_application() -> None:
    ended: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0)
        finally:
            ended.append("events")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await StreamingResponse(events())(scope, receive, send)
        finally:
            ended.append("app")

    async def leave() -> None:
        parts = respond(app, REQUEST)
        assert isinstance(await anext(parts), Head)
        assert await anext(parts) == b"x"
        await parts.aclose()

    asyncio.run(leave())
    assert "app" in ended


def test_metrics_of_replicas_are_told_apart() -> None:
    texts = []
    for number in (1, 2):
        registry = CollectorRegistry()
        Counter("vllm:tokens", "Tokens", ("engine",), registry=registry).labels("0").inc(number)
        texts.append((f"r{number}", generate_latest(registry)))
    text = merge(texts).decode()
    families = [family for family in text_string_to_metric_families(text) if family.name == "vllm:tokens"]
    assert [family.type for family in families] == ["counter"]
    values = {
        (s.labels["replica"], s.labels["engine"]): s.value for s in families[0].samples if s.name.endswith("total")
    }
    assert values == {("r1", "0"): 1.0, ("r2", "0"): 2.0}


def test_core_does_not_import_ray() -> None:
    pattern = re.compile(r"^\s*(?:import|from) (?:ray|specplug_ray)\b", re.MULTILINE)
    files = list(Path(specplug.__file__).parent.rglob("*.py"))
    assert files
    assert not [path for path in files if pattern.search(path.read_text(encoding="utf-8"))]
