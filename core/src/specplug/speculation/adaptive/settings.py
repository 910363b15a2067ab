"""All constants of the automatic draft length."""

from __future__ import annotations

import attrs


@attrs.frozen
class AdaptiveSettings:
    """What the automatic draft length assumes, and how fast it learns.

    Figures in brackets are the evidence: what switching the mechanism off changes in the simulator, in percent on average
    (steady, start, change) or in its worst scenario; see docs/adaptive-draft-length.md. A dash: the mechanism has no switch of
    its own, the value was chosen by the reason given and not varied by itself.

    Attributes:
        first_acceptance: start-up: assumed probability that a drafted token is accepted (- optimistic, so that drafts are
            tried).
        first_drafts: start-up: as how many drafts that counts (- three rejections outweigh it).
        verify_slope: start-up: assumed cost of verifying one more token, over a plain step (0.0, +0.3, -2.9).
        first_continuation: start-up: assumed probability that a chain that may stop is extended (-0.9, -1.7, -0.6).
        first_scores: start-up: accepted tokens for which scores are assumed to be right (calibration: -0.4, +0.1, -2.8).
        first_depth: start-up: the deepest first draft of a speculator with a state; the limit doubles as it is reached (-
            bounds the cost of the first call).
        memory: what the acceptance counts of all rows keep per draft (- 100 drafts, some requests).
        row_memory: what a row's counts keep per draft (- 16 drafts, some sentences).
        trusts: as how many drafts of a row all others may count; the best predictor is used (-0.3, -0.3, -1.8).
        trust_handicaps: how much better each must predict to be used: rows with bad luck keep their drafts
            (tests/unit/test_adaptive_models.py).
        depth_trust: as how many drafts the depth before counts for a depth that is rarely reached (- hardly any).
        position_trust: as how many drafts all positions count for a range of positions (0.0, 0.0, -2.1).
        change_below: a run of results of a row less likely than this means that its text changed (-0.3, -0.3, -1.2).
        change_keeps: what is then kept of the row's counts (- with 0 one unlucky run would silence a row).
        all_change_below: where less than this share is accepted, a row whose text became predictable makes the counts of all
            rows count for less (tests/engine/test_adaptive_simulated.py).
        hopeless_misses: drafts in a row of which nothing was accepted, and
        hopeless_below: share that is accepted, where what nearly pays is not tried any more (the same tests).
        likeness_rate: per draft, how fast a changed row is taken for like the others again (-0.3, 0.0, -0.1; worst -5.7).
        score_memory: what calibration and continuation keep per draft (- 33 drafts).
        fill_memory: what the share of rows that get a draft keeps per row asked (+0.1, 0.0, +0.4; worst -0.9).
        level_rate: share of a timing's surprise that goes to the cost level of all sizes (- the level follows
            within 10 steps).
        max_weight: timings of one size that count at most, so that its cost can still change (-).
        cost_memory: what timings keep per later timing: an avoided size is tried again after some 1,000
            steps (-).
        noise_rate: how fast the noise of timings is learned (- 30 timings).
        fine: differences of this share between sizes are believed once they exceed the noise (+0.3, -0.1, +1.6; worst -3.2).
        steep: slopes of this share are (0.0, -0.2, -2.5).
        least_jump: share of a plain step that verifying any draft must cost in addition to be taken for a jump
            (the table of docs/adaptive-draft-length.md).
        least_slope: the least that one more token costs, over a plain step: drafts never seem free (-0.1, 0.0, +0.5).
        fastest_surprise: a timing counts for no less than this share of the expected; with `slowest_surprise`: single
            timings on a busy machine are far off (- the simulator has 1 in 100 of 2.5 times).
        slowest_surprise: and for no more than this (-).
        borrowed_weight: as how many timings the shape of another number of rows counts (0.0, +0.1, -0.9).
        borrowed_level_timings: of so many first timings the level of such a curve is the mean (-).
        other_rows_count: what timings of other numbers of rows count where timings are counted (-).
        catch_up_memory: what the cost of catching up keeps per call (+0.2, -0.2, -0.3).
        warm_after: calls in a row after which caches are warm (-0.2, +0.3, +2.2; worst -5.2).
        warm_lasts: steps for which timings with warm caches are preferred to others (-).
        warm_share: share of a cold call that a warm one is assumed to take, if none was timed lately (- optimistic, so
            that it is timed).
        negligible: proposals below this share of a plain step are taken for free (-).
        likely: probability that no chain must exceed to be extended: a sure token is always worth drafting (-).
        hold_steps: steps for which chosen depths are kept at most (+0.3, +0.3, -1.7).
        drafts_per_hold: drafts to be judged by, for each draft until depths are chosen anew (+0.1, -0.2, -4.6).
        least_fill: share of rows with a draft that is assumed at least for that (-).
        leeway: levels above the chosen depth for a single row whose speculator stops by itself (0.0, -0.2, -1.2).
        preference: how much better a later speculator of the chain must be for a row to be left to it
            (tests/engine/test_adaptive_simulated.py).
        caution: share of the time that drafts save that catching up with a row may take (- the rest is margin for error).
        try_from: drafts that reach this share of plain goodput are tried if affordable (-0.2, -0.3, +0.8; worst -5.3).
        try_cold_from: the same where only cold calls were timed (-).
        cold_doubt: share of the time that such a trial is assumed to lose in addition (-).
        advanced_steps: steps that it may overdraw (-0.1, -0.3, +0.5; worst -3.6).
        first_share: start-up: share of the time that exploration may lose (all affordable: -0.6, -1.0, -1.9).
        first_share_steps: start-up: steps for which that holds.
        share: the same later.
        hopeless_share: the same where next to nothing is accepted.
        useless_share: the same after `useless_misses` drafts in a row of which nothing was accepted (the same tests).
        useless_misses: see `useless_share`.
        saved_steps: steps that can be saved up for it (-).
        foreseen_steps: steps ahead whose earnings can be spent on showing a text to a speculator (-).
        vary_new: in one of so many steps another depth is timed while timings are few (+0.9, +1.0, -0.4).
        vary_every: the same later (-).
        vary_known: the same once costs are well known (-).
        new_timings: timings of such steps that are few (-).
        known_timings: timings after which costs are well known (-).
        close_gain: above this factor of plain goodput variation is halved: other depths cost more there (-).
        longest_pause: steps between failed probes at most; below the window of stored target states (+0.2, -0.3, -1.9).
        longest_pause_compared: the same where guesses are compared with the text, which is nearly free
            (+0.3, 0.0, +0.2; worst -2.7).
        first_look_within: steps within which a row is first probed, spread over rows (0.0, 0.0, -3.7).
        probed_together: steps by which probes are advanced to be made together (+0.2, 0.0, -1.7).
        most_reserved: steps that probes of blind rows leave in the ledger for the next prompt (0.0, 0.0, -2.4).
        rest: steps at most that are skipped while all rows sleep (0.0, -0.1, -2.5).
        long_rest: the same where every probe failed `rest_misses` times (-).
        near_rest: the same where drafts nearly pay (-).
        rest_misses: see `long_rest` (-).
        learn_every: steps that are learned from at once, to spend less CPU time (-0.2, 0.0, -1.2).
        runs_ahead: whether a proposal may return before it is computed: the next step then waits for what a speculator catches
            up with, and its surplus is what that took (with 64 rows 0.93 -> 0.98 of plain decoding in
            tests/engine/test_adaptive_simulated.py).
    """

    first_acceptance: float = 0.6
    first_drafts: float = 3.0
    verify_slope: float = 0.015
    first_continuation: float = 0.8
    first_scores: float = 2.0
    first_depth: int = 3

    memory: float = 0.99
    row_memory: float = 0.94
    trusts: tuple[float, ...] = (24.0, 6.0, 1.5)
    trust_handicaps: tuple[float, ...] = (1.0, 1.05, 1.1)
    depth_trust: float = 2.0
    position_trust: float = 12.0
    change_below: float = 0.04
    change_keeps: float = 0.3
    all_change_below: float = 0.5
    hopeless_misses: int = 8
    hopeless_below: float = 0.3
    likeness_rate: float = 0.02
    score_memory: float = 0.97
    fill_memory: float = 0.9

    level_rate: float = 0.1
    max_weight: float = 256.0
    cost_memory: float = 0.999
    noise_rate: float = 0.03
    fine: float = 0.03
    steep: float = 0.015
    least_jump: float = 0.12
    least_slope: float = 0.003
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
    hold_steps: int = 8
    drafts_per_hold: float = 2.0
    least_fill: float = 0.25
    leeway: int = 2
    preference: float = 1.1
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
    near_rest: int = 8
    rest_misses: int = 3
    learn_every: int = 2
    runs_ahead: bool = False

    @classmethod
    def where_steps_run_ahead(cls) -> AdaptiveSettings:
        """For a GPU.

        Resting rows do not wait for the host there, and a look at them costs the overlap of two steps (H200, 6.9B: 1.1 ms
        with 16 rows and 4.3 with 64, in steps of 4.8 and 5.8), so that it happens more rarely; yet not so rarely that states
        are lost between two looks (see `sleeping.is_about_to_lose_states`). One more token to verify
        costs little (0.3 % of a step at most): with a CPU's slope 16 rows took some 200 steps to draft again after 64 had
        stopped (tests/engine/test_adaptive_simulated.py).
        """
        return cls(rest=64, long_rest=64, near_rest=32, probed_together=7, verify_slope=0.003, runs_ahead=True)
