"""Automatic draft lengths: `num_speculative_tokens: "auto"`.

Objective. In every step each row's draft length is chosen so that the batch has the highest *goodput*:

    expected tokens / expected seconds = (rows + Σ P(node accepted)) / (target(rows, nodes) + propose(rows, depth))

as in SmartSpec (Liu et al., arXiv 2406.14066) and vLLM's dynamic speculative decoding (its pull request 32374), but per row: a
row may get fewer tokens than another, or none.

Estimators.
    acceptance.py   AcceptanceModel, RowAcceptance: P(node accepted | depth, position), for all rows of a speculator and for
                    each row; recent drafts count more, and a row whose text changed forgets.
    cost_model.py   CostModel: seconds over rows and size, from noisy timings.
    estimates.py    SpeculatorEstimate, RowEstimate: all that is known of one speculator and of its rows; how likely a chain is
                    to be extended, where the speculator stops by its own probabilities (EAGLE-2, arXiv 2406.16858, uses
                    them as confidence).

Choice. goodput.py finds the depths that maximise it; planner.py chooses anew every few steps, as soon as there is enough new
evidence, and cuts scored drafts where another node does not pay. Chains stop themselves at the same threshold, by a rule over
all rows of a call (`Budget.worth_extending`).

Exploration rule. What looks worse is tried within an ExplorationBudget (exploration.py), a ledger as in conservative bandits
(Wu et al., arXiv 1602.04282): a share of the time flows in, each trial's expected cost is drawn from it. Other depths are
varied for their timings; rows that sleep are probed, ever more rarely while that fails (sleeping.py); what a speculator that
sees tokens alone proposes for these is compared with the text and not verified (guess.py).

Start-up rule. Before anything is measured, a drafted token is assumed to be accepted with probability 0.6 (worth 3 drafts),
verifying one to cost 1.5 % of a step, and a proposal to take time in proportion to its depth. A speculator with a state first
drafts at most 3 tokens; the limit is twice the deepest that was timed. It is shown every prompt until its costs are known.
Until 24 steps were timed, every other step has a different depth, none included. In the first 512 steps 3 % of the time flow
into the ledger, later half of that or less.

Reading order: settings, acceptance, cost_model, guess, estimates, goodput, exploration, planner, sleeping, controller
(AdaptiveDraftLength, which the chain talks to). All constants are in AdaptiveSettings, with their evidence; the ablation is in
docs/adaptive-draft-length.md.
"""

from specplug.speculation.adaptive.controller import AdaptiveDraftLength
from specplug.speculation.adaptive.settings import AdaptiveSettings

__all__ = ["AdaptiveDraftLength", "AdaptiveSettings"]
