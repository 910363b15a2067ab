"""What an author says about a speculator, so that a check is neither vacuous nor unfair."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Flags:
    """Capabilities of a speculator. None lets the kit find out; True or False makes a promise that is checked.

    Attributes:
        deterministic: at temperature 0 its drafts depend on nothing but the row.
        samples: at temperatures above 0 it samples drafts and reports what they were drawn from.
        proposes_trees: some of its drafts branch.
        owns_kv: it plans a KV cache of its own.
        reads_states: it declares target states.
        drafts: it drafts something on the kit's targets, whose prompts and outputs repeat themselves.
    """

    deterministic: bool | None = None
    samples: bool | None = None
    proposes_trees: bool | None = None
    owns_kv: bool | None = None
    reads_states: bool | None = None
    drafts: bool | None = None
