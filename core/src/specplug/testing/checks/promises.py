"""What the author's flags say is what the speculator does."""

from __future__ import annotations

from specplug.testing.check import Check, CheckFailure, NotApplicable
from specplug.testing.drive import Drive, drive_rollbacks
from specplug.testing.subject import Subject


def run(subject: Subject) -> str:
    """Compares flags with one drive."""
    folder = subject.targets.get()
    drive: Drive = subject.remember("rollbacks 0", lambda: drive_rollbacks(subject, folder, seed=0))
    with subject.start(folder) as session:
        traits = session.speculator.traits
        caches = any(region.layers for region in session.regions())
    sampled = [record for record in drive.records if not record.params.greedy]
    seen = {
        "drafts": any(record.draft.tokens for record in drive.records),
        "samples": any(record.draft.values is not None for record in sampled),
        "proposes_trees": any(record.draft.branches for record in drive.records),
        "reads_states": traits.needs_states,
        "owns_kv": caches,
    }
    promised = [name for name in seen if getattr(subject.flags, name) is not None]
    for name in promised:
        if getattr(subject.flags, name) != seen[name]:
            raise CheckFailure(f"{name} = {getattr(subject.flags, name)}, as its flags say", f"{name} is {seen[name]}")
    found = ", ".join(name for name, value in seen.items() if value) or "nothing"
    if not promised:
        raise NotApplicable(f"no flag is set; found: {found}")
    return f"found: {found}"


CHECK = Check(
    "promises",
    "the flags of its test are what it does",
    "A flag that is set keeps the other checks from passing because nothing was drafted, sampled or branched.",
    "Set what is true: a flag that does not hold is as wrong as a speculator that does not do it.",
    run,
)
