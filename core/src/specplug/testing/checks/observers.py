"""Wrappers look, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from specplug.contract.hooks import hookimpl
from specplug.contract.types import Proposal, ProposalBatch
from specplug.contract.verification import Verdict
from specplug.errors import PluginError
from specplug.testing.check import Check
from specplug.testing.driver import mixed_params
from specplug.testing.failures import CheckFailure, NotApplicable, expect
from specplug.testing.reference import row_drafts
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt


class _Innermost:
    """Sees what the speculator and the verifier return, before any other wrapper does."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.proposals: list[Any] = []
        self.verdicts: list[Any] = []

    @hookimpl(wrapper=True, trylast=True)
    def propose(self, batch: ProposalBatch) -> Generator[None, Any, Any]:
        """Keeps a copy."""
        proposal = yield
        self.proposals.append(_proposal_facts(proposal, len(batch.rows), self.vocabulary))
        return proposal

    @hookimpl(wrapper=True, trylast=True)
    def verify(self) -> Generator[None, Any, Any]:
        """Keeps a copy."""
        verdict = yield
        self.verdicts.append(_verdict_facts(verdict))
        return verdict


def wrappers(subject: Subject) -> str:
    """What goes into the outermost wrapper is what comes out of it."""
    folder = subject.targets.get()
    outside: tuple[list[Any], list[Any]] = ([], [])
    with subject.start(folder, strict=True) as session:
        manager = session.engine.registry.manager
        wrapped = [
            hook
            for hook in ("propose", "verify")
            if any(each.wrapper for each in getattr(manager.hook, hook).get_hookimpls())
        ]
        if not wrapped:
            raise NotApplicable("no plugin here wraps propose or verify")
        inner = _Innermost(session.vocabulary)
        manager.register(inner, "the kit's innermost wrapper")

        def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> Proposal | None:
            proposal = call()
            outside[0].append(_proposal_facts(proposal, len(batch.rows), session.vocabulary))
            return proposal

        def looking(verify: Callable[..., Any]) -> Callable[..., Any]:
            def look(**arguments: Any) -> Any:
                verdict = verify(**arguments)
                outside[1].append(_verdict_facts(verdict))
                return verdict

            return look

        session.around_propose(propose)
        verification = session.engine._verification
        verification._core = looking(verification._core)
        verification._overriders = {name: looking(verify) for name, verify in verification._overriders.items()}
        for number in range(6):
            session.add(repetitive_prompt(12, session.vocabulary, number), mixed_params(number, 16))
        try:
            session.finish()
        except PluginError as error:
            raise CheckFailure(
                "wrappers that yield once, raise nothing and return what `yield` gave", str(error)
            ) from error
    for name, before, after in (("proposal", inner.proposals, outside[0]), ("verdict", inner.verdicts, outside[1])):
        changed = sum(one != other for one, other in zip(before, after, strict=False)) + abs(len(before) - len(after))
        expect(
            not changed,
            f"wrappers return what `yield` gave them: the same {name}",
            f"{changed} of {len(after)} {name}s were changed on the way out",
        )
    return (
        f"{len(outside[0])} proposals and {len(outside[1])} verdicts unchanged by wrappers of {' and '.join(wrapped)}"
    )


def _proposal_facts(proposal: Any, count: int, vocabulary: int) -> Any:
    try:
        drafts = row_drafts(proposal, count, vocabulary)
    except Exception:  # malformed: compared by what it is
        return repr(proposal)
    return [(d.tokens, d.parents, None if d.values is None else d.values.tolist()) for d in drafts]


def _verdict_facts(verdict: Any) -> Any:
    if not isinstance(verdict, Verdict):
        return repr(verdict)
    return [list(path) for path in verdict.accepted], list(verdict.next_tokens)


WRAPPERS = Check(
    "wrappers",
    "a wrapper around propose or verify changes nothing",
    "Observers are harmless: what a tracer sees is what happens without it.",
    "Return what `yield` gave, and change nothing in it.",
    wrappers,
)
