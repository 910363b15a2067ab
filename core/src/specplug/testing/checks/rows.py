"""Rows that sleep, fork, are preempted or aborted, and reused row ids never mix."""

from __future__ import annotations

from specplug.testing.check import Check, CheckFailure, NotApplicable, expect_drafts
from specplug.testing.drive import drive_rows
from specplug.testing.fresh import allowed_differences, choose, compare
from specplug.testing.subject import Subject


def run(subject: Subject) -> str:
    """Everything that rows can go through, then the same tokens to a fresh speculator."""
    if subject.learns:
        raise NotApplicable("its drafts may depend on other requests, as traits.learns says")
    folder = subject.targets.get()
    drive = drive_rows(subject, folder, seed=3)
    with subject.start(folder) as session:
        traits = session.speculator.traits
        caches = [region for region in session.regions() if region.layers]
    shares = traits.token_only or (bool(caches) and all(region.tables == "shared" for region in caches))
    records = [record for record in drive.records if shares or not record.forked]
    chosen = choose(records, subject.scaled(150, 60), seed=1)
    result = compare(subject, folder, chosen)
    if len(result.wrong) > allowed_differences(result.compared):
        raise CheckFailure(
            "the drafts of a fresh speculator for the same tokens (forget batch.ended first, drop what is kept for the row_id "
            "of a row with is_new, begin at new_positions.start, continue a fork only from shared KV; one whose drafts "
            "depend on other requests declares traits.learns)",
            result.first_difference(),
        )
    if result.compared and result.random == result.compared:
        raise NotApplicable("its drafts are random and report no probabilities: there is nothing to compare")
    expect_drafts(sum(len(record.draft.tokens) for record in chosen))
    return (
        f"{result.compared} drafts alike, {drive.naps} naps, {drive.forks} forks, {drive.preemptions} preemptions, "
        f"{drive.aborts} aborts in {drive.steps} steps"
    )


CHECK = Check(
    "rows",
    "reused row ids, aborts, forks, preemption and sleeping rows leave no trace",
    "What is kept of a row belongs to that row, from its beginning to its end.",
    "Handle `batch.ended` before `batch.rows`; drop what you kept when `row.is_new`; start at `row.new_positions.start`.",
    run,
)
