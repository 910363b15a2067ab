"""Whether another token of a chain is worth drafting."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.contract.types import Budget


def worth_another_token(budgets: Sequence[Budget], chances: Sequence[float | None]) -> list[bool]:
    """Which rows' chains to draft another token for: for speculators that draft token after token, all rows at once.

    A row goes on where the token is expected to save more time than verifying it takes; and all of them do only if together
    they save more than drafting takes, which is about the same for one row and for many. What a token is expected to be
    follows from the chain before it: behind a sure one the next is likely as well, behind a doubtful one half as likely.

    Args:
        budgets: the budgets of rows that may be given another token.
        chances: for each, how likely all its tokens so far are to be accepted, by the product of the probabilities that the
            speculator gave them; None where that is not known, as for sampled tokens: such a row goes on, and takes others
            along.

    Returns:
        For each row whether it goes on.
    """
    if len(budgets) == 1 and chances[0] is not None:  # the usual case, once for every token
        return [_next(chances[0]) >= budgets[0].least_chance + budgets[0].least_sum]
    gains = [None if chance is None else _next(chance) for chance in chances]
    goes = [gain is None or gain >= budget.least_chance for budget, gain in zip(budgets, gains, strict=True)]
    if None in gains:
        return goes
    surplus = sum(
        gain - budget.least_chance
        for budget, gain, own in zip(budgets, gains, goes, strict=True)
        if own and gain is not None
    )
    return goes if surplus >= max((budget.least_sum for budget in budgets), default=0.0) else [False] * len(goes)


def _next(chance: float) -> float:
    """How likely a chain of this chance is with one more token."""
    return chance * (0.5 + 0.5 * chance)
