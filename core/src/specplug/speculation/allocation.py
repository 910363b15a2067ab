"""Dividing a step's draft tokens among rows so that the batch makes the most tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def allocate(
    gains: Sequence[Sequence[float]],
    *,
    tokens: float,
    nodes: int,
    width: Sequence[float],
    target: Sequence[float],
    ask: Callable[[int], Sequence[float]],
    level: float = 1.0,
    spent: float = 0.0,
    margin: float = 1.0,
) -> tuple[list[int], float]:
    """Maximises (expected tokens) / (target step + asking), so a costly speculator is asked for many rows or for none.

    First the best depth for all rows together is looked for, since asking costs by the deepest; up to that depth the node that
    is likeliest to be accepted is added, again and again, and the best prefix of that order is kept. Of one row the nodes come
    in order, since gains never rise along it.

    Args:
        gains: for each row the chance that its node at depth 1, 2, … is accepted, non-increasing.
        tokens: what the step is expected to bring without these drafts: one per row, and what other drafts bring.
        nodes: draft nodes that the step holds already.
        width: verified nodes that a draft has at depth 1, 2, …; 1 for a chain, less where it may have stopped.
        target: seconds of a target step with 0, 1, 2, … draft nodes, as many as all of these at least, over `level`.
        ask: seconds of a proposal for so many rows: 1 deep, 2 deep, …
        level: what `target` is to be multiplied by.
        spent: seconds of the step that are spent already.
        margin: by what factor drafting must beat not drafting.

    Returns:
        The depth of every row, 0 for none; and the expected tokens per second.
    """
    seconds = level * target[nodes] + spent
    rate = tokens / seconds
    best, best_count = rate * margin, 0
    asking = {rows: ask(rows) for rows in {1, len(gains)}}
    cheapest = min(own[0] for own in asking.values())
    if len(gains) > 1 and not might_pay(gains, tokens=tokens, rate=best, seconds=seconds, cheapest=cheapest):
        return [0] * len(gains), rate
    drafting = sum(1 for own in gains if own)
    if drafting not in asking:
        asking[drafting] = ask(drafting)
    deep, best_of_all = _best_depth(gains, tokens, nodes, width, target, asking[drafting], level, spent)
    if len(gains) == 1:
        return ([deep], best_of_all) if best_of_all > best else ([0], rate)
    order = sorted(((gain, row) for row, own in enumerate(gains) for gain in own[:deep]), reverse=True)
    depths = [0] * len(gains)
    rows = deepest = 0
    held = nodes + 0.5
    cost, table = spent, asking[1]
    for count, (gain, row) in enumerate(order, start=1):
        tokens += gain
        depth = depths[row] = depths[row] + 1
        held += width[depth - 1]
        if depth == 1 or depth > deepest:
            if depth == 1:
                rows += 1
                if rows not in asking:
                    asking[rows] = ask(rows)
                table = asking[rows]
            deepest = max(deepest, depth)
            cost = spent + table[deepest - 1]
        reached = tokens / (level * target[int(held)] + cost)
        if reached > best:
            best, best_count = reached, count
    if not best_count:
        return [0] * len(gains), rate
    if best_count < len(order):
        depths = [0] * len(gains)
        for _, row in order[:best_count]:
            depths[row] += 1
    return depths, best


def might_pay(gains: Sequence[Sequence[float]], *, tokens: float, rate: float, seconds: float, cheapest: float) -> bool:
    """Whether these drafts would beat a rate if all of them together cost no more than the shortest.

    Args:
        gains: as for `allocate`.
        tokens: what the step is expected to bring without them.
        rate: tokens per second to beat.
        seconds: of the step without them.
        cheapest: of the shortest proposal.
    """
    return tokens + sum(map(sum, gains)) > rate * (seconds + cheapest)


def _best_depth(
    gains: Sequence[Sequence[float]],
    tokens: float,
    nodes: int,
    width: Sequence[float],
    target: Sequence[float],
    asking: Sequence[float],
    level: float,
    spent: float,
) -> tuple[int, float]:
    """The depth that is best where every row drafts as deep, and the tokens per second that it brings."""
    best, best_depth = 0.0, 1
    held = nodes + 0.5
    for depth in range(max(map(len, gains), default=0)):
        if len(gains) == 1:
            tokens += gains[0][depth]
            held += width[depth]
        else:
            level_gains = [own[depth] for own in gains if len(own) > depth]
            tokens += sum(level_gains)
            held += len(level_gains) * width[depth]
        rate = tokens / (level * target[int(held)] + spent + asking[depth])
        if rate > best:
            best, best_depth = rate, depth + 1
    return best_depth, best
