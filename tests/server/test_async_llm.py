"""AsyncLLM: outputs of every kind, aborts, deadlines, the bounded queue, several event loops, and the end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from specplug import LLM, AsyncLLM, RequestOutput, SamplingParams
from specplug.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineDeadError,
    GenerationError,
    QueueFullError,
    RequestError,
)
from specplug.testing.models import save_words
from support.models import VOCABULARY, save_model
from support.serving import wait_until
from support.speculators import Oracle, TokenSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = attrs.evolve(GREEDY, max_tokens=110)
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12]]
ORACLE = Oracle([], VOCABULARY, 0.9)
OPTIONS: dict[str, Any] = {"memory": "32MiB", "check_parity": False, "compile": False, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncLLM]:
    drafts = provide(lambda c, t: TokenSpeculator(ORACLE))
    with AsyncLLM(folder, max_queued_requests=2, **OPTIONS, **drafts) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _leaves_nothing(engine: AsyncLLM) -> Iterator[None]:
    yield
    gc.collect()
    assert_idle(engine)


def assert_idle(engine: AsyncLLM) -> None:
    scheduler = engine.engine.scheduler
    wait_until(lambda: not engine.num_unfinished and not scheduler.has_work)
    assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
    assert len(scheduler._free_slots) == engine.config.max_num_seqs
    assert not engine._streams
    assert engine._admission.is_empty


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(limited())


async def last(engine: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY, **options: Any) -> RequestOutput:
    return [output async for output in engine.generate(prompt, params, **options)][-1]


async def running(engine: AsyncLLM, count: int) -> None:
    """Waits until so many rows run."""
    while len(engine.engine.scheduler.running) < count:
        await asyncio.sleep(0.005)


def slow_steps(engine: AsyncLLM, patch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
    import time

    step = engine.engine._advance

    def slow() -> None:
        time.sleep(seconds)
        step()

    patch.setattr(engine.engine, "_advance", slow)


@pytest.mark.parametrize("n", [1, 3])
def test_all_kinds_of_output_say_the_same(engine: AsyncLLM, plain: LLM, n: int) -> None:
    params = attrs.evolve(GREEDY, n=n, temperature=0.7, seed=4, logprobs=2, prompt_logprobs=1, stop="w9")
    for prompt in PROMPTS:
        (expected,) = plain.generate([prompt], params, use_tqdm=False)
        ORACLE.known = [prompt + completion.token_ids for completion in expected.outputs]

        async def check(prompt: list[int] = prompt, expected: RequestOutput = expected) -> None:
            cumulative = [output async for output in engine.generate(prompt, params)]
            deltas = [output async for output in engine.generate(prompt, params, output_kind="delta")]
            final = [output async for output in engine.generate(prompt, params, output_kind="final_only")]
            assert len(final) == 1
            for outputs in (cumulative, deltas, final):
                assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
                assert outputs[-1].prompt_token_ids == prompt
                assert outputs[-1].prompt_logprobs is not None
                assert len(outputs[-1].prompt_logprobs) == len(prompt)
            for whole in (cumulative[-1], final[0]):
                for mine, theirs in zip(whole.outputs, expected.outputs, strict=True):
                    assert (mine.text, mine.token_ids) == (theirs.text, theirs.token_ids)
                    assert (mine.finish_reason, mine.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
                    assert "".join(mine.token_texts) == mine.text
                    assert len(mine.logprobs or []) == len(mine.token_sources) == len(mine.token_ids)
                    assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
            for index, theirs in enumerate(expected.outputs):
                parts = [each for output in deltas for each in output.outputs if each.index == index]
                assert "".join(part.text for part in parts) == theirs.text
                assert [token for part in parts for token in part.token_ids] == theirs.token_ids
                assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [theirs.finish_reason]
                scored = [
                    token for part in parts for position in part.logprobs or [] for token in [next(iter(position))]
                ]
                assert scored == theirs.token_ids
                assert parts[-1].cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)

        run(check())


def test_outputs_hold_several_tokens_and_name_who_drafted_them(engine: AsyncLLM, plain: LLM) -> None:
    expected = plain.generate([PROMPTS[0]], LONG, use_tqdm=False)[0].outputs[0]
    ORACLE.known = [PROMPTS[0] + expected.token_ids]

    async def collect() -> list[RequestOutput]:
        return [output async for output in engine.generate(PROMPTS[0], LONG, output_kind="delta")]

    outputs = run(collect())
    assert max(len(output.outputs[0].token_ids) for output in outputs) > 1
    sources = [source for output in outputs for source in output.outputs[0].token_sources]
    assert set(sources) == {"throwaway", None}
    assert [token for output in outputs for token in output.outputs[0].token_ids] == expected.token_ids


def test_many_tasks_of_many_loops_get_what_they_get_alone(engine: AsyncLLM, plain: LLM) -> None:
    outputs = plain.generate(PROMPTS, GREEDY, use_tqdm=False)
    expected = [output.outputs[0].token_ids for output in outputs]

    async def patient(number: int) -> bool:
        while True:
            try:
                return (await last(engine, PROMPTS[number % 4])).outputs[0].token_ids == expected[number % 4]
            except QueueFullError:
                await asyncio.sleep(0.01)

    async def several() -> bool:
        return all(await asyncio.gather(*map(patient, range(8))))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: run(several()), range(4)))


def test_leaving_cancelling_and_aborting_end_the_request(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(engine, monkeypatch)

    async def leave() -> None:
        async for _ in engine.generate(PROMPTS[0], LONG):
            break

    async def cancel(seconds: float) -> None:
        task = asyncio.create_task(last(engine, PROMPTS[1], LONG))
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def abort() -> RequestOutput:
        task = asyncio.create_task(last(engine, "w3. w4.", LONG, request_id="mine"))
        while not engine.abort("mine"):
            await asyncio.sleep(0.01)
        return await task

    async def all_of_them() -> RequestOutput:
        await leave()
        for seconds in (0, 0.001, 0.03):
            await cancel(seconds)
        assert not engine.abort("nobody")
        return await abort()

    output = run(all_of_them())
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) < 110


def test_an_abort_releases_the_text_that_was_held_back(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(engine, monkeypatch)
    params = attrs.evolve(LONG, stop="never" * 20)

    async def collect() -> tuple[str, list[int]]:
        text, ids = "", []
        async for output in engine.generate(PROMPTS[0], params, "held", output_kind="delta"):
            text += output.outputs[0].text
            ids += output.outputs[0].token_ids
            if len(ids) > 5:
                engine.abort("held")
        return text, ids

    text, ids = run(collect())
    assert text == "".join(f" w{token}." for token in ids)


@pytest.mark.parametrize("kind", ["delta", "final_only"])
def test_a_deadline_ends_the_request_and_keeps_its_tokens(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    slow_steps(engine, monkeypatch, 0.02)
    with pytest.raises(DeadlineExceededError, match=r"within its timeout of 0\.2 s") as caught:
        run(last(engine, PROMPTS[0], LONG, timeout=0.2, output_kind=kind))
    if kind == "final_only":
        assert 0 < len(caught.value.outputs[0].outputs[0].token_ids) < 110


def test_the_queue_is_bounded(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(engine, monkeypatch)

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(last(engine, PROMPTS[0]) for _ in range(9)), return_exceptions=True)

    results = run(crowd())
    assert sum(isinstance(result, RequestOutput) for result in results) == 6  # four rows and two that wait
    refused = [result for result in results if not isinstance(result, RequestOutput)]
    assert {type(error) for error in refused} == {QueueFullError}
    assert "the limit is 6" in str(refused[0])


def test_prompts_are_queued_together_or_not_at_all(engine: AsyncLLM) -> None:
    async def submit() -> None:
        encoded = await engine.encode([[3, 4], [VOCABULARY + 1]])
        with pytest.raises(RequestError, match=r"prompts\[1\]: token id 65"):
            await engine.submit(encoded, GREEDY)
        with pytest.raises(RequestError, match="'a' is already in use"):
            await engine.submit(await engine.encode([[3], [4]]), GREEDY, ["a", "a"])
        assert engine.num_unfinished == 0

    run(submit())


def test_bad_arguments_are_refused(engine: AsyncLLM, folder: Path) -> None:
    for options, message in (
        ({"output_kind": "all"}, "output_kind='all': expected one of cumulative, delta, final_only"),
        ({"timeout": 0}, "timeout=0: expected a positive number"),
        ({"timeout": True}, "timeout=True: expected a positive number"),
    ):
        with pytest.raises(RequestError, match=message):
            run(last(engine, [3], **options))
    with pytest.raises(RequestError, match="takes one prompt, not 2"):
        run(last(engine, ["w3.", "w4."]))
    with pytest.raises(RequestError, match="temperature=-1"):
        run(last(engine, [3], SamplingParams(temperature=-1)))
    with pytest.raises(ConfigurationError, match="max_queued_requests=-1"):
        AsyncLLM(folder, max_queued_requests=-1)


def test_a_failing_request_fails_alone(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("no room for log-probabilities")

    monkeypatch.setattr("specplug.engine.commit.gather_logprobs", fail)

    async def both() -> list[Any]:
        scored = attrs.evolve(GREEDY, logprobs=1)
        return await asyncio.gather(last(engine, PROMPTS[0], scored), last(engine, PROMPTS[1]), return_exceptions=True)

    failed, served = run(both())
    assert isinstance(failed, GenerationError)
    assert "no room for log-probabilities" in str(failed)
    assert failed.outputs[0].outputs[0].finish_reason == "error"
    assert served.outputs[0].finish_reason == "length"


def test_draining_lets_requests_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def drain() -> None:
        async with AsyncLLM(folder, **OPTIONS) as engine:
            slow_steps(engine, monkeypatch)
            task = asyncio.create_task(last(engine, PROMPTS[0], LONG))
            await running(engine, 1)
            assert not await engine.drain(0.01)
            with pytest.raises(QueueFullError, match="shutting down"):
                await last(engine, PROMPTS[1])
            assert await engine.drain(30)
            assert (await task).outputs[0].finish_reason == "length"

    run(drain())


def test_closing_ends_open_streams_with_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def close() -> None:
        engine = AsyncLLM(folder, **OPTIONS)
        slow_steps(engine, monkeypatch)
        tasks = [asyncio.create_task(last(engine, prompt, LONG)) for prompt in PROMPTS]
        await running(engine, 4)
        await asyncio.to_thread(engine.close)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, RequestError)
            assert "the engine was closed" in str(result)
        with pytest.raises(RequestError, match="the engine is closed"):
            await last(engine, PROMPTS[0])
        engine.close()
        assert not engine.is_running

    run(close())


def test_a_fatal_error_ends_every_stream_and_the_health(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def break_it() -> None:
        engine = AsyncLLM(folder, **OPTIONS)
        engine.check_health()
        slow_steps(engine, monkeypatch)
        tasks = [asyncio.create_task(last(engine, prompt, LONG)) for prompt in PROMPTS]
        await running(engine, 4)

        def fail(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine.engine.runner, "forward", fail)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "RuntimeError: the device is gone" in str(result)
        for call in (engine.check_health, engine.check_capacity):
            with pytest.raises(EngineDeadError):
                call()
        with pytest.raises(EngineDeadError):
            await last(engine, PROMPTS[0])
        assert engine.errored
        assert not engine.num_unfinished
        await asyncio.to_thread(engine.close)

    run(break_it())
    assert "the engine stopped after an error" in caplog.text


def test_a_loop_that_is_closed_in_the_middle_leaves_nothing(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(engine, monkeypatch)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        stream = (await engine.submit(await engine.encode([PROMPTS[0]]), LONG, output_kind="delta"))[0]
        await anext(stream)
        return stream

    stream = loop.run_until_complete(begin())
    loop.close()
    assert_idle(engine)
    assert stream.has_ended


def test_many_streams_get_several_steps_in_one_output(
    engine: AsyncLLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain.generate([PROMPTS[1]], LONG, use_tqdm=False)[0].outputs[0].token_ids
    plain_steps = attrs.evolve(LONG, num_speculative_tokens=0)

    async def collect() -> list[list[list[int]]]:
        async def one() -> list[list[int]]:
            outputs = engine.generate(PROMPTS[1], plain_steps, output_kind="delta")
            return [output.outputs[0].token_ids async for output in outputs]

        return await asyncio.gather(*(one() for _ in range(4)))

    monkeypatch.setattr("specplug.streams.delivery._SHARE", 1e-7)
    for parts in run(collect()):
        assert [token for part in parts for token in part] == expected
        assert 2 <= len(parts) <= 3, "the first tokens at once, the rest at the end"
