"""Accepts and rejects leave no trace: the next draft is that of a fresh speculator."""

from __future__ import annotations

from specplug.testing.check import Check, CheckFailure, NotApplicable, expect_drafts
from specplug.testing.drive import Drive, drive_rollbacks
from specplug.testing.fresh import allowed_differences, choose, compare
from specplug.testing.subject import Subject


def run(subject: Subject) -> str:
    """Many random accepts and rejects, then the same tokens to a fresh speculator."""
    if subject.learns:
        raise NotApplicable("its drafts may depend on other requests, as traits.learns says")
    folder = subject.targets.get()
    drive: Drive = subject.remember("rollbacks 0", lambda: drive_rollbacks(subject, folder, seed=0))
    chosen = choose(drive.records, subject.scaled(150, 60), seed=1)
    result = compare(subject, folder, chosen)
    if len(result.wrong) > allowed_differences(result.compared):
        raise CheckFailure(
            "after accepts and rejects the drafts of a fresh speculator for the same tokens "
            "(entries of rejected drafts are overwritten, accepted ones are neither skipped nor run twice, "
            "states[i] is paired with token i; one whose drafts depend on other requests declares traits.learns)",
            result.first_difference(),
        )
    if result.compared and result.random == result.compared:
        raise NotApplicable("its drafts are random and report no probabilities: there is nothing to compare")
    expect_drafts(sum(len(record.draft.tokens) for record in chosen))
    deep = sum(depth >= 2 for depth in drive.depths)
    return f"{result.compared} drafts alike, after {len(drive.depths)} random walks, {deep} of them two or more deep"


CHECK = Check(
    "rollback",
    "after accepts and rejects it drafts what a fresh speculator drafts",
    "No stale KV entry, no skipped or repeated position, no hidden state paired with the wrong token.",
    "Entries of rejected drafts are stale: count how many were accepted (`row.outcome`), and store the rest again.",
    run,
)
