"""load_speculator and plan_memory read headers and no weights."""

from __future__ import annotations

from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.memory.plan import format_bytes
from specplug.testing.check import Check, expect
from specplug.testing.live import live_bytes, only_what_is_new
from specplug.testing.subject import Subject, kept_randomness, quiet
from specplug.testing.weight_reads import watch_weight_reads

_TABLES = 4 << 20


def run(subject: Subject) -> str:
    """Plans an engine while everything that reads tensors from files is watched."""
    folder = subject.targets.get()
    subject.config(folder)  # what the author's fixture reads is its own affair
    config = EngineConfig.create(
        subject.source(folder),
        speculative_config=subject.config(folder),
        plugins=subject.plugins,
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
    )
    with only_what_is_new(), quiet(), kept_randomness():
        with watch_weight_reads() as reads:
            planned = plan_engine(config)
        held = live_bytes()
        planned.facade.close()
    expect(
        not reads,
        "load_speculator and plan_memory to read configuration and headers alone: open checkpoints by "
        "target.weights(...) or target.model(...), and use their tensors from warmup on",
        f"weights were read by {', '.join(sorted(set(reads)))}",
    )
    expect(
        held <= _TABLES,
        f"at most {format_bytes(_TABLES)} of tensors before the memory plan is accepted",
        f"{format_bytes(held)} are held",
    )
    return f"no weights read, {format_bytes(max(held, 0))} of tensors held"


CHECK = Check(
    "loading",
    "load_speculator reads headers and no weights",
    "A plan, or a refusal for lack of memory, costs no weight loading.",
    "Use `target.model(...)` and `target.weights(...)`: they read headers now, and core fills them once the plan "
    "is accepted.",
    run,
)
