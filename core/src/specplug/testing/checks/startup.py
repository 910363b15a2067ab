"""The engine starts with the speculator, and generates."""

from __future__ import annotations

from collections.abc import Callable

from specplug.contract.types import Proposal, ProposalBatch
from specplug.sampling.params import SamplingParams
from specplug.testing.check import Check, FundamentalFailure, describe
from specplug.testing.session import Session
from specplug.testing.subject import Subject


def run(subject: Subject) -> str:
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


CHECK = Check(
    "startup",
    "the engine starts with it",
    "Hooks have the right names and arguments, the settings are accepted, and one request is served on every architecture.",
    "Look at the names and arguments of your `@hookimpl` methods, and at the keys you read from the configuration.",
    run,
)
