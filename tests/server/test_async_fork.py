"""AsyncLLM in a forked process: errors, and nothing hangs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from specplug import AsyncLLM, SamplingParams
from specplug.streams.stream import RequestStream
from support.forks import said_by
from support.models import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    folder = save_model(tmp_path_factory.mktemp("model"), "llama")
    with AsyncLLM(folder, memory="32MiB", check_parity=False, compile=False, skip_tokenizer_init=True) as llm:
        yield llm


@pytest.mark.parametrize("use", ["generate", "stream", "drain", "close"])
def test_a_forked_process_gets_an_error_and_no_hang(engine: AsyncLLM, use: str) -> None:
    """It has none of the engine's threads; closing what belongs to another process does nothing."""

    async def in_child(stream: RequestStream) -> None:
        if use == "generate":
            await anext(engine.generate([3, 4], GREEDY))
        elif use == "stream":
            async for _ in stream:
                pass
        elif use == "drain":
            await engine.drain()
        else:
            engine.close()

    async def work() -> str:
        stream = (await engine.submit(await engine.encode([5]), GREEDY))[0]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            task = in_child(stream)
            try:
                while True:
                    task.send(None)
            except BaseException as error:
                os.write(write, f"{type(error).__name__} {error}".encode())
            finally:
                os._exit(0)
        said = await asyncio.to_thread(said_by, child, read, write)
        assert [output async for output in stream], "the engine goes on in the process that it belongs to"
        return said

    said = asyncio.run(asyncio.wait_for(work(), 60))
    if use == "close":
        assert said == "StopIteration "
    else:
        assert f"RequestError the engine belongs to process {os.getpid()}, from which this one was forked" in said
