"""Every check of the kit, in the order in which they run."""

from __future__ import annotations

from specplug.testing.check import Check
from specplug.testing.checks import (
    budgets,
    counters,
    distributions,
    endings,
    greedy,
    learning,
    leftovers,
    loading,
    memory,
    parameters,
    perfect,
    progress,
    promises,
    rollback,
    rows,
    sampling,
    seeds,
    startup,
    streams,
    tokens,
    validity,
    wrappers,
)

CHECKS: tuple[Check, ...] = (
    startup.CHECK,
    loading.CHECK,
    validity.CHECK,
    budgets.CHECK,
    promises.CHECK,
    greedy.CHECK,
    sampling.CHECK,
    distributions.CHECK,
    streams.CHECK,
    seeds.CHECK,
    parameters.CHECK,
    endings.CHECK,
    counters.CHECK,
    tokens.CHECK,
    rollback.CHECK,
    rows.CHECK,
    learning.CHECK,
    memory.CHECK,
    leftovers.CHECK,
    progress.CHECK,
    perfect.CHECK,
    wrappers.CHECK,
)
