"""Memory: what is planned is what is used, and what ends is freed."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

from specplug.engine.memory_plan import format_bytes
from specplug.testing.check import Check
from specplug.testing.driver import mixed_params
from specplug.testing.failures import expect
from specplug.testing.leaks import LiveTensors, host_bytes, live_bytes, live_tensors, only_what_is_new, tracing
from specplug.testing.session import Session
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt

_SLACK = 64 << 10
_HOST_SLACK = 4 << 20
_RELATIVE = 0.02
_FACTOR, _MARGIN = 4, 16 << 20


def memory(subject: Subject) -> str:
    """Bytes after warmup and in a run: of tensors, less what core itself planned, and of the host's memory."""
    folder = subject.targets.get()
    subject.config(folder)
    with (
        only_what_is_new(),
        tracing(),
        subject.start(folder, max_num_seqs=8, max_num_batched_tokens=256, memory=subject.memory(24 << 20)) as session,
    ):
        engine = session.engine
        plan = engine.plan
        regions = session.regions()
        buffers = sum(region.fixed_bytes for region in regions if region.kind == "buffers")
        planned = plan.draft_weights + plan.draft_kv + buffers
        slack = _SLACK if subject.targets.given is None else _SLACK + int(_RELATIVE * plan.total_bytes)
        own = plan.target_weights + plan.target_kv + plan.recurrent_state + plan.buffers - plan.step_bytes - buffers
        grows = session.speculator.traits.learns
        warm, warm_host = _used(own)
        most, most_host = warm, warm_host

        def look(step: int) -> None:
            nonlocal most, most_host
            if step % 36 == 22 and not grows:
                tensors, host = _used(own)
                most, most_host = max(most, tensors), max(most_host, host)
            elif step % 9 == 4:
                most = max(most, live_bytes() - own)

        for number in range(16):
            prompt = repetitive_prompt((60, 9, 30)[number % 3], session.vocabulary, number)
            session.add(prompt, mixed_params(number, 40))
        session.finish(look)
    used = f"{format_bytes(max(warm, 0))} of tensors after warmup, at most {format_bytes(max(most, 0))} in a run"
    host = f"{format_bytes(warm_host)} and {format_bytes(most_host)} of Python objects and numpy arrays"
    text = f"planned {format_bytes(planned)}, used {used}; {host}"
    held = max(most, 0) + max(0, most_host - _HOST_SLACK)
    expect(
        held <= planned * (1 + _RELATIVE) + slack,
        "plan_memory returns regions for all that is held: weights, KV cache and buffers, at the engine's limits; of Python "
        f"objects and numpy arrays all beyond {format_bytes(_HOST_SLACK)}",
        text,
    )
    expect(
        planned <= _FACTOR * held + _MARGIN,
        f"a plan of at most {_FACTOR} times what is used and {format_bytes(_MARGIN)}: what is planned is lost to the KV cache",
        text,
    )
    return text


def _used(own: int) -> tuple[int, int]:
    """Bytes of tensors that are not core's, and of the host's memory that none of the tensors lives in."""
    tensors = live_tensors()
    return tensors.nbytes - own, max(0, host_bytes() - tensors.borrowed_bytes)


MEMORY = Check(
    "memory",
    "plan_memory covers what it uses, and is close to it",
    "An engine that was accepted does not run out of memory, and gives rows the blocks there is room for.",
    "Declare weights, KV and buffers in `plan_memory`, peaks while drafting included, and large numpy arrays and tables "
    "of Python objects too.",
    memory,
)


_ROWS = 8
_SLACK_HOST = 6 << 10
_SLACK_TENSORS = 20
_SLACK_BYTES = 64 << 10


def leftovers(subject: Subject) -> str:
    """What the speculator holds when nothing runs, after tens and after hundreds of requests; and what is alive at the end."""
    folder = subject.targets.get()
    subject.config(folder)
    learns = subject.learns
    with only_what_is_new(), contextlib.nullcontext() if learns else tracing():
        reference, host, tensors = _come_and_go(subject, folder)
        left = live_bytes()
    if not learns:
        expect(
            max(host) - host[0] <= _SLACK_HOST + host[0] // 8,  # caches of the interpreter grow too
            "that what is kept of a row or call, in the speculator, its class or a module, is dropped when batch.ended names "
            "the row (finished, aborted or preempted; one that learns from requests declares traits.learns)",
            f"{host[0]:,} bytes of Python objects and numpy arrays are alive when nothing runs, and "
            f"{', '.join(f'{size:,}' for size in host[1:])} after more requests have come and gone",
        )
        more = max(each.count for each in tensors) - tensors[0].count
        expect(
            more <= _SLACK_TENSORS,
            "no more tensors alive after hundreds of requests than after a few: none of a batch is kept beyond the call",
            f"{more} more",
        )
    grown = max(each.nbytes for each in tensors) - tensors[0].nbytes
    expect(
        grown <= _SLACK_BYTES,
        "no more bytes of tensors alive after hundreds of requests than after a few",
        f"{format_bytes(grown)} more",
    )
    expect(
        left <= _SLACK_BYTES,
        "no tensor of the engine alive after it was closed: no module-level cache, no global registry",
        f"{format_bytes(left)} are still alive",
    )
    if reference is not None and not subject.plugins:
        expect(
            reference() is None,
            "that nothing refers to the speculator after the engine was closed",
            f"something still refers to the {type(reference()).__name__}",
        )
    held = (
        "what it learned may grow"
        if learns
        else f"{format_bytes(host[0])} to {format_bytes(max(host))} between requests"
    )
    return f"{held}, {format_bytes(max(left, 0))} of tensors left at the end"


def _come_and_go(subject: Subject, folder: Path) -> tuple[Any, list[int], list[LiveTensors]]:
    """Returns a weak reference to the speculator, and what is alive whenever nothing runs; the first requests fill buffers."""
    host, tensors = [], []
    options: dict[str, Any] = {
        "max_num_seqs": _ROWS,
        "max_num_batched_tokens": 300,
        "block_size": 4,
        "memory": subject.memory(24 << 20),
    }
    with subject.start(folder, **options) as session:
        try:
            reference = weakref.ref(session.speculator.instance)
        except TypeError:  # it cannot be referred to weakly
            reference = None
        for round_ in range(4):
            _serve(session, subject.scaled(60, 2 * _ROWS) if round_ else 1, round_)
            _serve(session, 1, 0)  # delivers the ends
            if round_:
                host.append(0 if subject.learns else host_bytes())
                tensors.append(live_tensors())
    return reference, host, tensors


def _serve(session: Session, count: int, seed: int) -> None:
    if count == 1:
        session.add([3, 4, 5, 3, 4, 5, 3, 4], mixed_params(0, 6))
        session.finish()
        return
    if seed == 2:
        session.limit_blocks(300)
    requests = []
    for number in range(count):
        prompt = repetitive_prompt(70 + number % 9, session.vocabulary, 1000 * seed + number)
        requests += session.add(prompt, mixed_params(number, 12))

    def abort(step: int) -> None:
        for request in requests[::5]:
            if not request.is_finished and request.num_output_tokens >= 2:
                session.engine.abort(request.id)

    session.finish(abort)


LEFTOVERS = Check(
    "leftovers",
    "nothing is left behind after finish, abort, preemption and the engine's end",
    "A server that runs for weeks holds what its live rows need, and closing an engine gives back all of it.",
    "Forget a row when it ends; keep nothing of a call beyond it, in the speculator, its class or a module.",
    leftovers,
)
