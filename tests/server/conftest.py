"""One engine and one server for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from specplug import AsyncLLM
from specplug.server.metrics import ServerMetrics
from support.serving import OPTIONS, Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    metrics = ServerMetrics("tiny")
    with (
        AsyncLLM("tiny", max_queued_requests=4, observers=[metrics.observer], **OPTIONS) as engine,
        live(engine, metrics, speculative_metrics="detailed") as running,
    ):
        yield running


@pytest.fixture(scope="module")
def http(server: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
