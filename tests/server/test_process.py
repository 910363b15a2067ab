"""`specplug serve` as a process: sockets, TLS, signals, and errors in one line."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from specplug.cli.main import cli
from specplug.server.app import create_app
from specplug.server.process import Endpoint, run_server
from specplug.server.settings import ServerSettings
from specplug.server.state import ServerState
from support.serving import wait_until

NGRAM = '{"method": "ngram", "num_speculative_tokens": 4}'
LONG = {"prompt": "import os", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


class Process:
    """A server process; its standard error is collected."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "specplug", "serve", "tiny", "--memory", "256MiB", "--no-compile", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += []
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def address(self) -> str:
        """Waits until it serves."""
        wait_until(lambda: "Serving" in self.text or self.process.poll() is not None, 120)
        assert "Serving" in self.text, self.text
        return self.text.split(" at ")[1].split(";")[0]

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Process]:
    process = Process("--port", "0", *arguments, **environment)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait(10)
        process._reader.join(10)
        for stream in (process.process.stdout, process.process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.slow
def test_a_server_answers_curl_from_the_beginning_and_drains_on_sigterm() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with serving("--speculative-config", NGRAM, "--port", port, "--access-log") as server:
        statuses: list[int] = []

        def is_ready() -> bool:
            try:
                statuses.append(httpx.get(f"http://127.0.0.1:{port}/health").status_code)
            except httpx.TransportError:
                return False
            return statuses[-1] == 200

        wait_until(is_ready, 120)
        assert set(statuses) == {200, 503}, "it says that it is not ready while the model is loaded"
        url = server.address()
        if shutil.which("curl"):
            body = json.dumps({"prompt": "import os", "max_tokens": 4})
            made = subprocess.run(
                ["curl", "-sS", f"{url}/v1/completions", "--json", body], capture_output=True, text=True, check=True
            )
            assert json.loads(made.stdout)["usage"]["completion_tokens"] == 4
        answers: list[httpx.Response] = []
        body = {**LONG, "max_tokens": 400}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
        )
        thread.start()
        wait_until(lambda: httpx.get(f"{url}/load").json() == {"server_load": 1})
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Waiting up to 30 s for 1 sequences" in server.text)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.get(f"{url}/health").status_code == 503
        thread.join(60)
        assert answers[0].json()["usage"]["completion_tokens"] == 400
        assert server.process.wait(30) == 0
        assert '"POST /v1/completions HTTP/1.1" 200' in server.text
        assert "Traceback" not in server.text


@pytest.mark.slow
@pytest.mark.parametrize("second", [True, False])
def test_requests_that_do_not_end_are_aborted(second: bool) -> None:
    options = ["--drain-timeout", "60" if second else "0.3"]
    with serving(*options) as server:
        url = server.address()
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            if second:
                wait_until(lambda: "Waiting up to" in server.text)
                server.process.send_signal(signal.SIGINT)
            events = [line for line in lines if line]
        assert '"finish_reason":"abort"' in events[-2]
        assert events[-1] == "data: [DONE]"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.text


@pytest.mark.slow
def test_a_connection_may_be_idle_for_longer_than_clients_keep_it() -> None:
    loaded = threading.Event()
    state = ServerState(ServerSettings(model_names=("tiny",)))
    endpoint = Endpoint(port=0)
    listener = endpoint.bind()
    request = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"

    async def run() -> list[bytes]:
        serving = asyncio.ensure_future(
            run_server(create_app(state), state, endpoint, listener, lambda: loaded.wait() or None)  # type: ignore[return-value]
        )
        await asyncio.sleep(0.3)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        parts = []
        for pause in (0.0, 5.5):  # OpenAI's client keeps an idle connection for 5 s
            await asyncio.sleep(pause)
            writer.write(request)
            parts.append(await asyncio.wait_for(reader.readuntil(b"}"), 20))
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 20)
        writer.close()
        return parts

    try:
        first, second = asyncio.run(run())
    finally:
        loaded.set()
    assert b" 200 OK" in first
    assert b" 200 OK" in second


@pytest.mark.slow
def test_a_socket_file_and_a_key_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with serving("--uds", str(path), SPECPLUG_API_KEY="secret") as server:
        assert server.address() == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as http:
            assert http.get("/v1/models").status_code == 401
            found = http.get("/v1/models", headers={"Authorization": "Bearer secret"}).json()
            assert found["data"][0]["id"] == "tiny"
        other = Process("--uds", str(path))
        assert other.process.wait(60) == 1
        wait_until(lambda: other.text)
        assert f"--uds {path}: Address already in use" in other.text
        assert server.end() == 0
        assert not path.exists()


@pytest.mark.slow
def test_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-keyout", key, "-out", certificate, "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    with serving("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)) as server:
        url = server.address()
        assert url.startswith("https://127.0.0.1:")
        import ssl

        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{url}/health", verify=context).status_code == 200
        assert server.end() == 0


@pytest.mark.slow
def test_interrupts_while_loading_and_an_open_address() -> None:
    with serving("--host", "0.0.0.0") as server:
        server.address()
        wait_until(lambda: "everybody who can reach" in server.text)
        assert server.end(signal.SIGINT) == 0
    with serving() as server:
        wait_until(lambda: "reading" in server.text or "1/6" in server.text, 60)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) in (0, 130)
        assert "Traceback" not in server.text


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["serve", *arguments], prog_name="specplug")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "99999 is not in the range"),
        (["--api-key", " "], "--api-key: a key is empty"),
        (["--request-timeout", "0"], "--request-timeout 0: expected a positive number"),
        (["--root-path", "api"], "--root-path api: expected a path that begins with '/'"),
        (["--max-body-size", "x"], "--max-body-size 'x': expected a size"),
        (["--chat-template", "nothing"], "--chat-template 'nothing' cannot be read: No such file"),
        (["--ssl-keyfile", "nothing"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "nothing"], "TLS: nothing cannot be used"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 8000"),
        (["--uds", "/nothing/x"], "--uds /nothing/x: No such file"),
        (["--max-model-len", "0"], "max_model_len=0"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str) -> None:
    result = run("tiny", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    result = run("tiny")
    assert result.exit_code == 1
    assert result.stderr == (
        "specplug: error: specplug serve needs uvicorn, not installed here: pip install 'specplug[serve]'\n"
    )


def test_a_port_in_use_is_told_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("no/such-model", "--port", str(port))
    assert result.exit_code == 1
    assert f"--port {port}: Address already in use" in result.stderr
