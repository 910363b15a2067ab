"""Several threads on one engine, several engines in several threads, and calls from inside a step."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from specplug import LLM, Proposal, SamplingParams, SpeculatorTraits, hookimpl
from specplug.engine.fair_lock import FairLock
from specplug.errors import RequestError
from specplug.testing.models import save_words
from support.engines import assert_idle
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, Oracle, TreeSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = attrs.evolve(GREEDY, max_tokens=110)
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


def start(folder: Path, **options: Any) -> LLM:
    return LLM(folder, memory="32MiB", strict=True, check_parity=False, compile=False, **options)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    with start(folder, max_num_seqs=6, **provide(lambda c, t: TreeSpeculator(ORACLE, (1,), 6))) as llm:
        yield llm


ORACLE = Oracle([], VOCABULARY, 0.8)


def ids(llm: LLM, prompt: Any, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids


def streamed(llm: LLM, prompt: Any, params: SamplingParams = GREEDY) -> list[int]:
    return [token for piece in llm.stream(prompt, params) for token in piece.token_ids]


class SlowForward:
    """Makes every step take a while, and lets a test wait for a number of them."""

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
        self.steps = 0
        self.rows = 0
        self.threads: set[int] = set()
        forward = llm.engine.runner.forward

        def slow(rows: Any, *arguments: Any, **options: Any) -> Any:
            self.steps += 1
            self.rows = max(self.rows, len(rows))
            self.threads.add(threading.get_ident())
            time.sleep(seconds)
            return forward(rows, *arguments, **options)

        patch.setattr(llm.engine.runner, "forward", slow)

    def wait(self, more: int = 2) -> None:
        until = self.steps + more
        deadline = time.monotonic() + 60
        while self.steps < until:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def join(thread: threading.Thread) -> None:
    thread.join(60)
    assert not thread.is_alive(), "the thread hangs"


def test_calls_of_many_threads_get_what_they_get_alone(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [ids(shared, prompt) for prompt in PROMPTS]
    ORACLE.known = [prompt + own for prompt, own in zip(PROMPTS, expected, strict=True)]
    seen = SlowForward(shared, monkeypatch, 0.001)
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            assert shared.get_metrics()
            shared.abort("nobody")
            time.sleep(0.002)

    def work(number: int) -> bool:
        which = number % 4
        if number % 5 == 4:  # leaves in the middle
            for _ in shared.stream([PROMPTS[which]] * 2, LONG):
                return True
        get = streamed if number % 3 == 0 else ids
        return get(shared, PROMPTS[which]) == expected[which]

    watcher, trouble = in_thread(watch)
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(work, range(60)))
    ended.set()
    join(watcher)
    assert trouble == [None]
    assert seen.rows > 1, "the calls were not batched together"
    assert_idle(shared)


def test_a_call_whose_requests_are_done_returns_at_once(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids(shared, PROMPTS[1])
    seen = SlowForward(shared, monkeypatch)
    thread, found = in_thread(lambda: len(ids(shared, PROMPTS[0], LONG)))
    seen.wait()
    assert ids(shared, PROMPTS[1]) == expected
    assert thread.is_alive()
    assert len(seen.threads) == 1, "one thread runs the steps for all"
    join(thread)
    assert found == [110]


def test_another_thread_goes_on_when_the_one_that_runs_the_steps_leaves(
    shared: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = SlowForward(shared, monkeypatch)
    first, short = in_thread(lambda: len(ids(shared, PROMPTS[0])))
    seen.wait()
    others = [in_thread(lambda: len(ids(shared, PROMPTS[1], LONG))) for _ in range(3)]
    for thread, _ in [(first, short), *others]:
        join(thread)
    assert short == [12]
    assert [found for _, found in others] == [[110]] * 3


def test_an_interrupt_loses_nobody_elses_requests(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that is interrupted runs the step, anywhere in it."""
    params = attrs.evolve(LONG, max_tokens=40)
    expected = ids(shared, PROMPTS[1], params)
    engine = shared.engine
    for owner, name in (
        (engine.runner, "forward"),
        (engine._verification, "verify"),
        (engine._states, "record"),
        (engine.chain, "propose"),
    ):
        with monkeypatch.context() as patch:
            seen = SlowForward(shared, patch)
            call = getattr(owner, name)
            is_due = threading.Event()

            def interrupted(*arguments: Any, call: Any = call, due: Any = is_due, **options: Any) -> Any:
                if due.is_set():
                    due.clear()
                    raise KeyboardInterrupt
                return call(*arguments, **options)

            patch.setattr(owner, name, interrupted)
            driver, stopped = in_thread(lambda: ids(shared, PROMPTS[0], params))
            seen.wait()
            waiting = [in_thread(lambda get=get: get(shared, PROMPTS[1], params)) for get in (ids, streamed)]
            seen.wait(3)
            is_due.set()
            for thread in (driver, *(thread for thread, _ in waiting)):
                join(thread)
            assert isinstance(stopped[0], KeyboardInterrupt)
            assert [found for _, found in waiting] == [[expected], [expected]]
        assert_idle(shared)


def test_a_slow_reader_gets_the_last_piece_of_its_stream(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends in the middle of a step, and its last output comes at the end of it."""
    params = attrs.evolve(GREEDY, max_tokens=9)
    expected = ids(shared, PROMPTS[1], params)
    propose = shared.engine.chain.propose

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)
        propose(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shared.engine.chain, "propose", slow)
        seen = SlowForward(shared, patch)
        driver, _ = in_thread(lambda: ids(shared, PROMPTS[0], LONG))
        seen.wait()
        pieces = []
        for piece in shared.stream(PROMPTS[1], params):
            pieces.append(piece)
            time.sleep(0.05)
    join(driver)
    assert [token for piece in pieces for token in piece.token_ids] == expected
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_abort_and_metrics_beside_a_call(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SlowForward(shared, monkeypatch)
    call = shared.stream(PROMPTS[0], LONG)
    name = next(call).request_id
    thread, found = in_thread(lambda: [piece.request_id for piece in call])
    seen.wait()
    assert any(metric.name == "vllm:num_requests_running" for metric in shared.get_metrics())
    assert shared.abort(name)
    assert not shared.abort(name)
    join(thread)
    assert 0 < len(found[0]) < 110
    assert_idle(shared)


def test_close_ends_the_calls_of_other_threads_with_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start(folder)
    seen = SlowForward(llm, monkeypatch)
    calls = [in_thread(lambda get=get: get(llm, PROMPTS[0], LONG)) for get in (ids, ids, streamed)]
    seen.wait(4)
    closers = [in_thread(llm.close) for _ in range(2)]
    for thread, _ in (*calls, *closers):
        join(thread)
    for _, found in calls:
        assert isinstance(found[0], RequestError)
        assert "closed" in str(found[0])
    assert [found for _, found in closers] == [[None], [None]]
    with pytest.raises(RequestError, match="closed"):
        ids(llm, PROMPTS[0])


def test_a_collected_stream_never_waits(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector runs its `finally` in the middle of a step, in the thread that runs it, or in another one."""
    expected = ids(shared, PROMPTS[1])

    def leave_a_stream() -> None:
        cycle: list[Any] = [shared.stream([PROMPTS[0]] * 3, LONG)]
        next(cycle[0])
        cycle.append(cycle)

    gc.disable()
    try:
        leave_a_stream()
        forward = shared.engine.runner.forward

        def collecting(*arguments: Any, **options: Any) -> Any:
            gc.collect()
            return forward(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(shared.engine.runner, "forward", collecting)
            assert ids(shared, PROMPTS[1]) == expected
        assert_idle(shared)
        leave_a_stream()
        seen = SlowForward(shared, monkeypatch)
        thread, found = in_thread(lambda: ids(shared, PROMPTS[1]))
        seen.wait(1)
        gc.collect()
        join(thread)
        assert found == [expected]
        assert_idle(shared)
    finally:
        gc.enable()


def test_a_deferred_task_never_waits_and_always_runs() -> None:
    lock = FairLock()
    done: list[int] = []
    with lock:
        lock.defer(lambda: done.append(1))
        assert done == []
    assert done == [1]
    with lock._changed:  # as in a collection while the lock is being passed on
        lock.defer(lambda: done.append(2))
        assert done == [1]
    with lock:
        pass
    assert done == [1, 2]


class Calling:
    """Calls the engine that asks it."""

    traits = SpeculatorTraits(token_only=True)

    def __init__(self) -> None:
        self.call: Callable[[], Any] = lambda: None
        self.errors: list[Exception] = []

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        try:
            self.call()
        except Exception as error:
            self.errors.append(error)
        return Proposal([[] for _ in batch.rows])


def test_a_hook_that_calls_its_engine_gets_one_clear_error(folder: Path) -> None:
    calling = Calling()
    with start(folder, **provide(lambda c, t: calling)) as llm:
        expected = ids(llm, PROMPTS[0])
        for call in (
            lambda: llm.generate(PROMPTS[1], GREEDY),
            lambda: next(llm.stream(PROMPTS[1], GREEDY)),
            lambda: llm.abort("0"),
            lambda: llm.engine.step(),
            llm.close,
        ):
            calling.call, calling.errors = call, []
            assert ids(llm, PROMPTS[0]) == expected
            assert calling.errors
            for error in calling.errors:
                assert isinstance(error, RequestError)
                assert "within one of its own steps" in str(error)
            assert_idle(llm)
        calling.call, calling.errors = llm.get_metrics, []
        assert ids(llm, PROMPTS[0]) == expected
        assert calling.errors == []


def test_engines_in_threads_of_their_own(folder: Path) -> None:
    """They start, run and close at the same time, over the same kernels."""
    params = attrs.evolve(GREEDY, max_tokens=60)
    prompts = [[3 + (i * j) % 50 for i in range(1, 40)] for j in (1, 2)]

    def work(number: int) -> list[list[int]]:
        options: dict[str, Any] = (
            {} if number else provide(lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens))
        )
        with start(folder, **options) as llm:
            return [ids(llm, prompt, params) for prompt in prompts for _ in range(3)]

    alone = work(1)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [alone] * 3
