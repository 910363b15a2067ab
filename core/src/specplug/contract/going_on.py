"""Whether another token of a chain is worth drafting."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.contract.batch import Budget


def worth_another_token(budgets: Sequence[Budget], chances: Sequence[float | None]) -> list[bool]:
    """Which rows' chains to draft another token for: for speculators that draft token after token, all rows at once.

    A row goes on where the token is expected to save more time than verifying it takes; and all of them do only if together
    they save more than drafting takes, which is about the same for one row and for many.

    Args:
        budgets: the budgets of rows that may be given another token.
        chances: for each, how likely all its tokens so far are to be accepted, by the product of the probabilities that the
            speculator gave them; None where that is not known, as for sampled tokens: such a row goes on, and takes others
            along.

    Returns:
        For each row whether it goes on.
    """
    if len(budgets) == 1 and chances[0] is not None:  # the usual case, once for every token
        return [chances[0] >= budgets[0].least_chance + budgets[0].least_sum]
    goes = [chance is None or chance >= budget.least_chance for budget, chance in zip(budgets, chances, strict=True)]
    if None in chances:
        return goes
    surplus = sum(
        chance - budget.least_chance
        for budget, chance, own in zip(budgets, chances, goes, strict=True)
        if own and chance is not None
    )
    return goes if surplus >= max((budget.least_sum for budget in budgets), default=0.0) else [False] * len(goes)
