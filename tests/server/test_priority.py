"""The field `priority` and the argument of `AsyncLLM.generate`: who is served first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from specplug import AsyncLLM, SamplingParams
from specplug.server.metrics import ServerMetrics
from support.serving import OPTIONS, TEMPLATE, Live, live

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "import os"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "import os"}]}),
    ("/v1/responses", {"input": "import os"}),
    ("/v1/specplug/trace", {"prompt": "import os"}),
]
PRIORITIES = [4, 3, 2, 1]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    options = {**OPTIONS, "max_num_seqs": 1, "scheduling_policy": "priority"}
    metrics = ServerMetrics("tiny")
    with (
        AsyncLLM("tiny", observers=[metrics.observer], **options) as engine,
        live(engine, metrics, chat_template=TEMPLATE) as running,
    ):
        yield running


def test_every_endpoint_serves_lower_numbers_first(server: Live) -> None:
    async def main() -> list[int]:
        ended: list[int] = []
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def send(priority: int, path: str, body: dict[str, Any]) -> None:
                answer = await client.post(path, json={**body, "priority": priority, "ignore_eos": True})
                assert answer.status_code == 200, answer.text
                ended.append(priority)

            first = {"prompt": "x", "max_tokens": 150, "num_speculative_tokens": 0}
            tasks = [asyncio.create_task(send(9, "/v1/completions", first))]
            await until(lambda: len(server.engine.engine.scheduler.running) == 1)
            for priority, (path, body) in zip(PRIORITIES, BODIES, strict=True):
                limit = "max_output_tokens" if "input" in body else "max_tokens"
                tasks.append(asyncio.create_task(send(priority, path, {**body, limit: 5})))
            await until(lambda: len(server.engine.engine.scheduler.waiting) == 4)
            await asyncio.gather(*tasks)
        return ended

    assert asyncio.run(main()) == [9, 1, 2, 3, 4]
    server.wait_idle()


def test_the_argument_of_generate(server: Live) -> None:
    async def main() -> list[int]:
        ended: list[int] = []

        async def send(priority: int, max_tokens: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            async for _ in server.engine.generate("x", params, priority=priority):
                pass
            ended.append(priority)

        tasks = [asyncio.create_task(send(7, 100))]
        await until(lambda: len(server.engine.engine.scheduler.running) == 1)
        tasks += [asyncio.create_task(send(priority, 5)) for priority in (3, -1, 0)]
        await asyncio.gather(*tasks)
        return ended

    assert asyncio.run(main()) == [7, -1, 0, 3]
    server.wait_idle()


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not become true")
