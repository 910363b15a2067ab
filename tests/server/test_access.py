"""API keys, origins and prefixes, without an engine."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from specplug.server.app import create_app
from specplug.server.settings import ServerSettings
from specplug.server.state import ServerState

pytestmark = pytest.mark.unit


def answers(*requests: tuple[str, str, dict[str, str]], root_path: str = "", **settings: Any) -> list[httpx.Response]:
    """Sends requests to a server that has no engine yet: whoever gets through gets a 503."""
    app = create_app(ServerState(ServerSettings(model_names=("tiny",), root_path=root_path, **settings)))

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return [await http.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(send())


def statuses(*requests: tuple[str, str, dict[str, str]], **settings: Any) -> list[int]:
    return [answer.status_code for answer in answers(*requests, **settings)]


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": key}


def test_every_path_but_those_of_monitoring_needs_a_key() -> None:
    keys = ("secret-1", "secret-2")
    closed = [
        "/v1/models",
        "/v1/models/tiny",
        "/openapi.json",
        "/nothing",
        "/v1/specplug/info",
        "/playground/",
        "//health",
        "/health/",
        "/V1/models",
    ]
    assert statuses(*(("GET", path, {}) for path in closed), api_keys=keys, playground=False) == [401] * len(closed)
    posts = ["/v1/completions", "/v1/chat/completions", "/v1/specplug/trace", "/tokenize", "/detokenize", "/abort"]
    assert statuses(*(("POST", path, {}) for path in posts), api_keys=keys) == [401] * len(posts)
    opened = ["/version", "/load", "/metrics"]
    assert statuses(*(("GET", path, {}) for path in opened), api_keys=keys) == [200] * 3
    assert statuses(("GET", "/health", {}), ("GET", "/ping", {}), api_keys=keys) == [503, 503]


def test_keys_are_compared_as_a_whole() -> None:
    keys = ("secret-1", "secret-2")
    good = ["Bearer secret-1", "Bearer secret-2", "bearer secret-1", "Bearer  secret-1"]
    assert statuses(*(("GET", "/v1/models", with_key(key)) for key in good), api_keys=keys) == [503] * 4
    bad = [
        "Bearer secret",
        "Bearer secret-11",
        "secret-1",
        "Basic secret-1",
        "Bearer",
        "Bearer ",
        "Bearer secret-1 x",
        "",
    ]
    assert statuses(*(("GET", "/v1/models", with_key(key)) for key in bad), api_keys=keys) == [401] * len(bad)
    (refused,) = answers(("GET", "/v1/models", {}), api_keys=keys)
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "authentication_error"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "secret" not in refused.text


def test_without_keys_everybody_gets_in() -> None:
    assert statuses(("GET", "/v1/models", {})) == [503]


def test_a_prefix_does_not_open_a_closed_path() -> None:
    keys = ("secret",)
    paths = ["/api/health", "/api/v1/models", "/health", "/api/api/health"]
    found = statuses(*(("GET", path, {}) for path in paths), api_keys=keys, root_path="/api")
    assert found == [503, 401, 503, 401]


def test_pages_of_other_origins_are_refused_unless_they_are_allowed() -> None:
    origin = {"Origin": "https://chat.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    asked = (("OPTIONS", "/v1/completions", preflight), ("GET", "/version", origin))
    for answer in answers(*asked, api_keys=("secret",)):
        assert "access-control-allow-origin" not in answer.headers
    for answer in answers(*asked, api_keys=("secret",), allowed_origins=("https://chat.example",)):
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    other = {**preflight, "Origin": "https://evil.example"}
    (refused,) = answers(("OPTIONS", "/v1/completions", other), allowed_origins=("https://chat.example",))
    assert "access-control-allow-origin" not in refused.headers


def test_only_json_is_read() -> None:
    """A page of another origin may send text to this machine without asking; JSON needs a preflight."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert statuses(("POST", "/v1/completions", {"Content-Type": kind})) == [415]
    assert statuses(("POST", "/v1/completions", {"Content-Type": "application/json; charset=utf-8"})) == [400]
