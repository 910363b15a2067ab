"""plan_memory covers what is used, and is close to it."""

from __future__ import annotations

from specplug.engine.memory_plan import format_bytes
from specplug.testing.check import Check, expect
from specplug.testing.drive import mixed_params
from specplug.testing.live import host_bytes, live_bytes, live_tensors, only_what_is_new, tracing
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt

_SLACK = 64 << 10
_HOST_SLACK = 4 << 20
_RELATIVE = 0.02
_FACTOR, _MARGIN = 4, 16 << 20


def run(subject: Subject) -> str:
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
        own = plan.target_weights + plan.target_kv + plan.buffers - plan.step_bytes - buffers
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


CHECK = Check(
    "memory",
    "plan_memory covers what it uses, and is close to it",
    "An engine that was accepted does not run out of memory, and gives rows the blocks there is room for.",
    "Declare weights, KV and buffers in `plan_memory`, peaks while drafting included, and large numpy arrays and tables "
    "of Python objects too.",
    run,
)
