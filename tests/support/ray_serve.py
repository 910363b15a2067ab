"""Clients of an application on Ray Serve."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
import httpx

PROMPT = "def add(a, b):\n"
ENGINE = {"memory": "256MiB", "dtype": "float32", "max_num_seqs": 4, "compile": False}
"""The engine's options in every replica."""


def body_of(tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy request for exactly so many tokens."""
    return {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def post(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    """Sends a request for a completion."""
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)


@attrs.define
class Stream:
    """A streamed completion, read in a thread.

    Attributes:
        chunks: the objects of its events.
        is_done: whether it ended with `[DONE]`.
        fault: what was wrong with the connection.
    """

    url: str
    body: dict[str, Any]
    headers: dict[str, str] = attrs.field(factory=dict)
    chunks: list[dict[str, Any]] = attrs.field(factory=list)
    is_done: bool = False
    fault: Exception | None = None
    status: int = 0
    thread: threading.Thread = attrs.field(init=False)

    def start(self) -> Stream:
        """Sends it."""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        return self

    def wait(self, seconds: float = 120) -> Stream:
        """Waits for its end."""
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the stream does not end"
        return self

    @property
    def text(self) -> str:
        """What it generated."""
        return "".join(chunk["choices"][0]["text"] for chunk in self.chunks if chunk.get("choices"))

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that it ended with."""
        return next((chunk["error"] for chunk in self.chunks if "error" in chunk), None)

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, if it has generated all."""
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in self.chunks if chunk.get("choices")]
        return next((reason for reason in reasons if reason), None)

    def _read(self) -> None:
        try:
            body = {**self.body, "stream": True}
            address = f"{self.url}/v1/completions"
            with httpx.stream("POST", address, json=body, headers=self.headers, timeout=120) as response:
                self.status = response.status_code
                if response.status_code != 200:
                    response.read()
                    self.chunks.append(response.json())
                    return
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_done = True
                    elif line:
                        self.chunks.append(json.loads(line.removeprefix("data: ")))
        except Exception as error:
            self.fault = error


def wait_until(holds: Callable[[], Any], seconds: float = 120) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)
