"""Full queues, deadlines, aborts, and clients that are slow or vanish: the right status, and nothing is left behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from specplug import AsyncLLM
from support.serving import OPTIONS, Live, live, wait_until

LONG = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
COMPLETIONS = "/v1/completions"


@pytest.fixture(autouse=True)
def _leaves_nothing(server: Live) -> Iterator[None]:
    yield
    server.wait_idle()


def raw(url: str, body: dict[str, Any] | bytes, *, length: int | None = None, path: str = COMPLETIONS) -> socket.socket:
    """A connection on which a request has been sent."""
    parts = urlsplit(url)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data)
    return connection


def test_a_full_queue_is_a_503_with_retry_after(server: Live, http: httpx.Client) -> None:
    with ThreadPoolExecutor(14) as pool:
        answers = list(pool.map(lambda _: http.post(COMPLETIONS, json={**LONG, "max_tokens": 60}), range(14)))
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(served) >= 8
    assert len(served) + len(refused) == 14
    assert refused
    assert len({answer.json()["choices"][0]["text"] for answer in served}) == 1
    for answer in refused:
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_ends_its_request(server: Live, stream: bool) -> None:
    connection = raw(server.url, {**LONG, "stream": stream, "n": 2})
    wait_until(lambda: len(server.engine.engine.scheduler.running) == 2)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
    before = server.engine.engine.num_generated_tokens
    connection.close()
    server.wait_idle(5)
    assert server.engine.engine.num_generated_tokens - before < 2000


def test_openais_client_can_leave_a_stream(server: Live, client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    with client.completions.create(
        model="tiny", prompt="import os", max_tokens=1500, stream=True, extra_body=extra
    ) as stream:
        assert next(iter(stream)).choices[0].finish_reason is None
    server.wait_idle(5)


@pytest.mark.parametrize("stream", [False, True])
def test_abort_ends_a_request_by_its_name(server: Live, http: httpx.Client, stream: bool) -> None:
    found: list[httpx.Response] = []
    body = {**LONG, "request_id": "mine", "stream": stream}
    thread = threading.Thread(target=lambda: found.append(http.post(COMPLETIONS, json=body)))
    thread.start()
    wait_until(lambda: server.engine.engine.scheduler.running)
    taken = http.post(COMPLETIONS, json=body)
    assert taken.status_code == 409
    assert taken.json()["error"]["param"] == "request_id"
    assert http.get("/load").json() == {"server_load": 1}
    assert http.post("/abort", json={"request_id": "mine"}).json() == {"aborted": True}
    thread.join(60)
    assert found[0].status_code == 200
    assert '"finish_reason":"abort"' in found[0].text.replace(" ", "")
    assert http.post("/abort", json={"request_id": "mine"}).json() == {"aborted": False}


def test_a_deadline_is_a_504_or_an_event(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={**LONG, "timeout": 0.05})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    streamed = http.post(COMPLETIONS, json={**LONG, "timeout": 0.3, "stream": True})
    assert streamed.status_code == 200
    events = streamed.text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "timeout_error"
    assert events[-1] == "data: [DONE]"


def test_bodies_are_limited_in_size_and_time(server: Live) -> None:
    with live(server.engine, max_body_bytes=1000, body_timeout=0.2) as small, httpx.Client(base_url=small.url) as http:
        answer = http.post(COMPLETIONS, json={"prompt": "x" * 2000})
        assert (answer.status_code, answer.headers["Connection"]) == (413, "close")
        parts = (b'{"prompt": "' + b"x" * 600 for _ in range(3))
        answer = http.post(COMPLETIONS, content=parts, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        connection = raw(small.url, b'{"prompt"', length=100)
        received = b""
        while part := connection.recv(1000):  # until the server closes it
            received += part
        assert received.startswith(b"HTTP/1.1 408 ")
        connection.close()
        raw(small.url, b'{"prompt"', length=100).close()
        assert http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_client_that_does_not_read_is_given_up(server: Live) -> None:
    with live(server.engine, send_buffer=4096, send_timeout=0.4) as impatient:
        body = {**LONG, "stream": True, "logprobs": 20, "n": 4}
        parts = urlsplit(impatient.url)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((parts.hostname, parts.port))
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(lambda: impatient.state.num_requests == 1)
        wait_until(lambda: impatient.state.num_requests == 0, 30)
        connection.close()


def test_a_failing_request_is_a_500_and_the_server_goes_on(
    server: Live, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("specplug.engine.commit.gather_logprobs", fail)
        for body in ({**LONG, "logprobs": 1}, {**LONG, "logprobs": 1, "stream": True}):
            answer = http.post(COMPLETIONS, json=body)
            assert answer.status_code == (200 if "stream" in body else 500)
            assert '"code":"generation_failed"' in answer.text.replace(" ", "")
            assert "no room" in answer.text
    assert http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_server_without_an_engine_says_so_and_a_dead_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with live(None) as starting, httpx.Client(base_url=starting.url, timeout=60) as http:
        for answer in (
            http.get("/health"),
            http.get("/v1/models"),
            http.post(COMPLETIONS, json={"prompt": "x"}),
            http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}),
            http.post("/tokenize", json={"prompt": "x"}),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "starting"
            assert answer.headers["Retry-After"] == "1"
        assert http.get("/version").status_code == http.get("/metrics").status_code == 200
        with AsyncLLM("tiny", **OPTIONS) as engine:
            starting.state.set_engine(engine)
            assert http.get("/health").status_code == 200
            pool = ThreadPoolExecutor(2)
            bodies = [LONG, {**LONG, "stream": True}]
            running = [pool.submit(http.post, COMPLETIONS, json=body) for body in bodies]
            wait_until(lambda: len(engine.engine.scheduler.running) == 2)
            time.sleep(0.05)
            monkeypatch.setattr(engine.engine.runner, "forward", None)
            whole, streamed = (each.result(60) for each in running)
            assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_stopped")
            assert '"code":"engine_stopped"' in streamed.text.replace(" ", "")
            for answer in (http.get("/health"), http.post(COMPLETIONS, json={"prompt": "x"})):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
