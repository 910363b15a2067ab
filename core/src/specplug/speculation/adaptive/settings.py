"""All constants of the automatic draft length."""

from __future__ import annotations

import attrs


@attrs.frozen
class AdaptiveSettings:
    """What the automatic draft length assumes, and how fast it learns."""

    first_acceptance: float = 0.6
    first_drafts: float = 3.0
    trusts: tuple[float, ...] = (24.0, 6.0, 1.5)
    trust_handicaps: tuple[float, ...] = (1.0, 1.05, 1.1)
    depth_trust: float = 2.0
    position_trust: float = 12.0
    memory: float = 0.99
    row_memory: float = 0.94
    change_below: float = 0.04
    change_keeps: float = 0.3
    likeness_rate: float = 0.02
    all_change_below: float = 0.5
    asleep_memory: float = 0.5 ** (1 / 128)
    hopeless_misses: int = 8
    hopeless_below: float = 0.3
    first_scores: float = 2.0
    score_memory: float = 0.97
    first_continuation: float = 0.8
    fill_memory: float = 0.9
    verify_slope: float = 0.015
    least_slope: float = 0.003
    level_rate: float = 0.1
    max_weight: float = 256.0
    cost_memory: float = 0.999
    noise_rate: float = 0.03
    fine: float = 0.03
    steep: float = 0.015
    fastest_surprise: float = 0.6
    slowest_surprise: float = 1.6
    borrowed_weight: float = 4.0
    borrowed_level_timings: int = 8
    other_rows_count: float = 0.25
    catch_up_memory: float = 0.8
    warm_after: int = 2
    warm_lasts: int = 512
    warm_share: float = 0.5
    negligible: float = 0.01
    likely: float = 0.9
    first_depth: int = 3
    hold_steps: int = 8
    drafts_per_hold: float = 2.0
    least_fill: float = 0.25
    margin: float = 1.02
    leeway: int = 2
    caution: float = 0.8
    try_from: float = 0.93
    try_cold_from: float = 0.85
    cold_doubt: float = 0.1
    advanced_steps: float = 3.0
    first_share: float = 0.03
    first_share_steps: int = 512
    share: float = 0.015
    hopeless_share: float = 0.012
    useless_share: float = 0.006
    useless_misses: int = 12
    saved_steps: float = 4.0
    foreseen_steps: int = 256
    vary_new: int = 2
    vary_every: int = 8
    vary_known: int = 32
    new_timings: int = 24
    known_timings: int = 256
    close_gain: float = 1.5
    longest_pause: int = 32
    longest_pause_compared: int = 8
    first_look_within: int = 32
    probed_together: int = 4
    most_reserved: float = 2.0
    rest: int = 12
    long_rest: int = 32
    rest_misses: int = 3
    learn_every: int = 2
