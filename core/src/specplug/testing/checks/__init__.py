"""Every check of the kit, in the order in which they run."""

from __future__ import annotations

from specplug.testing.check import Check
from specplug.testing.checks import (
    drafts,
    hosts,
    observers,
    output,
    prefixes,
    requests,
    resources,
    sampling,
    startup,
    state,
)

CHECKS: tuple[Check, ...] = (
    startup.STARTUP,
    startup.LOADING,
    drafts.VALIDITY,
    drafts.BUDGETS,
    drafts.PROMISES,
    output.GREEDY,
    sampling.SAMPLING,
    sampling.DISTRIBUTIONS,
    sampling.STREAMS,
    output.SEEDS,
    output.PARAMETERS,
    requests.ENDINGS,
    requests.COUNTERS,
    drafts.TOKENS,
    state.ROLLBACK,
    state.ROWS,
    prefixes.PREFIXES,
    hosts.HOSTS,
    state.LEARNING,
    resources.MEMORY,
    resources.LEFTOVERS,
    requests.PROGRESS,
    output.PERFECT,
    observers.WRAPPERS,
)
