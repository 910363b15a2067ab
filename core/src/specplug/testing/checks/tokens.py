"""A speculator that declares `token_only` drafts as a function of the row's tokens."""

from __future__ import annotations

from specplug.testing.check import Check, CheckFailure, NotApplicable, expect_drafts
from specplug.testing.drive import Drive, drive_rollbacks
from specplug.testing.fresh import choose, difference, fresh_drafts
from specplug.testing.subject import Subject


def run(subject: Subject) -> str:
    """The same tokens in two engines that differ in all randomness."""
    folder = subject.targets.get()
    with subject.start(folder) as session:
        token_only = session.speculator.traits.token_only
    if subject.learns:
        raise NotApplicable("its drafts may depend on other requests, as traits.learns says")
    if not token_only and not subject.flags.deterministic:
        raise NotApplicable("it declares neither traits.token_only nor the flag deterministic")
    drive: Drive = subject.remember("rollbacks 0", lambda: drive_rollbacks(subject, folder, seed=0))
    records = [record for record in drive.records if token_only or record.params.greedy]
    records = choose(records, subject.scaled(80, 30), seed=2)
    first = fresh_drafts(subject, folder, records, seed=21)
    second = fresh_drafts(subject, folder, list(reversed(records)), seed=22)
    pairs = [(a, b) for a, b in zip(first, reversed(second), strict=True) if a is not None and b is not None]
    different = [(a, b) for a, b in pairs if difference(a, b)]
    if different:
        one, other = different[0]
        promise = "traits.token_only promises" if token_only else "the flag deterministic promises"
        raise CheckFailure(
            f"the same drafts for the same tokens, as {promise}: no global random numbers, no clock, no other rows",
            f"{len(different)} of {len(pairs)} differ from engine to engine; the first: {one.paths[:4]} and {other.paths[:4]}",
        )
    expect_drafts(sum(len(one.tokens) for one, _ in pairs))
    return f"{len(pairs)} prefixes, alike in two engines"


CHECK = Check(
    "tokens",
    "a token-only or deterministic speculator drafts the same for the same tokens",
    "Such a speculator keeps its rows after a fault, may run in hosts without row ids, and can be debugged.",
    "No global random numbers, no clock, no other rows; one that learns from other requests declares `traits.learns`.",
    run,
)
