"""How often consumers are told: what that costs their event loop decides."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import attrs
import pytest

from specplug.streams.delivery import Delivery

pytestmark = pytest.mark.unit


@attrs.define(eq=False)
class Consumer:
    """A stream whose consumer takes a while of processor time for each output."""

    loop: asyncio.AbstractEventLoop
    busy: float
    woken_at: float = -math.inf
    has_ended: bool = False
    times_told: int = 0

    def notify(self) -> None:
        self.times_told += 1
        until = time.thread_time() + self.busy
        while time.thread_time() < until:
            pass


def seconds_between(busy: float, number: int) -> float:
    """Seconds between two outputs of each of several streams, once that is measured."""

    async def measure() -> float:
        loop = asyncio.get_running_loop()
        delivery: Any = Delivery()
        streams = [Consumer(loop, busy) for _ in range(number)]
        for _ in range(60):
            for stream in streams:
                stream.woken_at = -math.inf
                delivery.touch(stream)
            delivery.wake()
            await asyncio.sleep(0)
        assert [stream.times_told for stream in streams] == [60] * number
        for stream in streams:
            delivery.touch(stream)
        begun = time.monotonic()
        for stream in streams:
            stream.woken_at = begun
        while streams[0].times_told == 60:
            delivery.wake()
            await asyncio.sleep(0)
        return time.monotonic() - begun

    return asyncio.run(measure())


def test_consumers_that_cost_more_are_told_less_often() -> None:
    cheap, dear = seconds_between(0.00002, 4), seconds_between(0.0003, 4)
    assert dear >= 4 * 0.0003 / 0.05 * 0.9, "a twentieth of the time"
    assert dear > 2 * cheap


def test_the_last_output_never_waits() -> None:
    async def measure() -> list[int]:
        loop = asyncio.get_running_loop()
        delivery: Any = Delivery()
        streams = [Consumer(loop, 0.0, woken_at=time.monotonic() + 60, has_ended=ended) for ended in (False, True)]
        for stream in streams:
            delivery.touch(stream)
        delivery.wake()
        await asyncio.sleep(0)
        return [stream.times_told for stream in streams]

    assert asyncio.run(measure()) == [0, 1]
