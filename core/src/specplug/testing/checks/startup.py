"""The engine starts with the speculator, and no weights are read before they are asked for."""

from __future__ import annotations

from collections.abc import Callable

from specplug.config.engine import EngineConfig
from specplug.contract.types import Proposal, ProposalBatch
from specplug.engine.memory_plan import format_bytes
from specplug.engine.planning import plan_engine
from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check
from specplug.testing.failures import FundamentalFailure, describe, expect
from specplug.testing.leaks import live_bytes, only_what_is_new, watch_weight_reads
from specplug.testing.session import Session
from specplug.testing.subject import Subject, kept_randomness, quiet


def startup(subject: Subject) -> str:
    """Starts one engine for every architecture."""
    names = subject.used_architectures()
    for architecture in names:
        folder = subject.targets.get(architecture) if architecture != "given" else subject.targets.get()
        with subject.start(folder) as session:
            raised: list[Exception] = []
            calls = _collect(session, raised)
            session.generate([[3, 4, 5, 3, 4]], [SamplingParams(temperature=0, max_tokens=4)])
        if raised and len(raised) == len(calls):
            raise FundamentalFailure("that propose raises nothing", f"every call raised {describe(raised[0])}")
    return f"on {', '.join(names)}"


def _collect(session: Session, raised: list[Exception]) -> list[int]:
    """Notes what `propose` raises; returns the list of its calls, as numbers of rows."""
    calls: list[int] = []

    def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> Proposal | None:
        calls.append(len(batch.rows))
        try:
            return call()
        except Exception as error:
            raised.append(error)
            raise

    session.around_propose(propose)
    return calls


STARTUP = Check(
    "startup",
    "the engine starts with it",
    "Hooks have the right names and arguments, the settings are accepted, and one request is served on every architecture.",
    "Look at the names and arguments of your `@hookimpl` methods, and at the keys you read from the configuration.",
    startup,
)


_TABLES = 4 << 20


def loading(subject: Subject) -> str:
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


LOADING = Check(
    "loading",
    "load_speculator reads headers and no weights",
    "A plan, or a refusal for lack of memory, costs no weight loading.",
    "Use `target.model(...)` and `target.weights(...)`: they read headers now, and core fills them once the plan "
    "is accepted.",
    loading,
)
