"""Chooses the verifier of every row: core's, or the `verify` of the speculator that drafted for the row."""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from specplug.contract.types import Proposal
from specplug.contract.verification import Verdict, VerificationBatch, VerificationRow
from specplug.errors import ModelOutputError, PluginError
from specplug.model.device import to_device
from specplug.model.pending import PendingTokens
from specplug.plugins.registry import PluginRegistry, RegisteredSpeculator
from specplug.request import Request
from specplug.sampling.distributions import DistributionRow, StepDistributions, argmax, nan_message
from specplug.sampling.randomness import EngineRandomness
from specplug.sampling.workspace import Workspace
from specplug.speculation.verification.ahead import draw, match, matches_ahead
from specplug.speculation.verification.matching import follow
from specplug.speculation.verification.verdict import check_verdict

logger = logging.getLogger("specplug")


class Verification:
    """Builds the arguments of the `verify` hook, calls it, and checks its verdict."""

    def __init__(
        self,
        registry: PluginRegistry,
        speculators: Sequence[RegisteredSpeculator],
        workspace: Workspace,
        randomness: EngineRandomness,
        vocab_size: int,
        *,
        strict: bool,
    ) -> None:
        self._randomness = randomness
        self._registry = registry
        self._core = registry.core_verify()
        self._overriders = {s.method: s.verify for s in speculators if s.overrides_verify}
        self._workspace = workspace
        self._vocab_size = vocab_size
        self._strict = strict

    def verify(self, requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        """Decides the tokens that every row emits.

        Args:
            requests: the rows that produce a token.
            offsets: each row's first entry in `logits`; one more at the end.
            logits: [entries, vocabulary].

        Returns:
            The verdict. A row that cannot be verified has failed (`Request.fail`); its part of the verdict is not valid.
        """
        try:
            return self._verify(requests, offsets, logits)
        except PluginError:
            raise
        except Exception as error:  # NaN, rules or parameters of one row; which one is found by verifying each alone
            logger.debug("verification failed for a batch, its rows are verified one by one: %s", error)
            return self._verify_alone(requests, offsets, logits)

    def _verify_alone(self, requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        accepted: list[Sequence[int]] = []
        next_tokens: list[int] = []
        for request, begin, end in zip(requests, offsets, offsets[1:], strict=False):
            try:
                verdict = self._verify([request], [0, end - begin], logits[begin:end])
            except PluginError:
                raise
            except Exception as error:
                request.fail(error)
                verdict = Verdict([()], [-1])
            accepted += verdict.accepted
            next_tokens += verdict.next_tokens
        return Verdict(accepted, next_tokens)

    def _verify(self, requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        if self.is_unobserved and all(self._is_plainly_greedy(request) for request in requests):
            return self._match_greedily(requests, offsets, logits)
        self._workspace.begin_step()
        methods = [request.draft.method if request.draft else None for request in requests]
        if not any(method in self._overriders for method in methods):
            return self._ask(self._core, requests, offsets, logits)
        accepted: list[Sequence[int]] = [()] * len(requests)
        next_tokens = [-1] * len(requests)
        groups: dict[str | None, list[int]] = {}
        for index, method in enumerate(methods):
            groups.setdefault(method if method in self._overriders else None, []).append(index)
        for method, rows in groups.items():
            entries = [list(range(offsets[row], offsets[row + 1])) for row in rows]
            selection = to_device(list(itertools.chain(*entries)), logits.device)
            verdict = self._ask(
                self._core if method is None else self._overriders[method],
                [requests[row] for row in rows],
                [0, *itertools.accumulate(len(span) for span in entries)],
                logits[selection],
            )
            for row, path, token in zip(rows, verdict.accepted, verdict.next_tokens, strict=True):
                accepted[row], next_tokens[row] = path, token
        return Verdict(accepted, next_tokens)

    @cached_property
    def is_unobserved(self) -> bool:
        """Whether no plugin observes verification."""
        return not self._registry.observes("verify")

    def draw(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        """The tokens that `verify` would decide for rows that `draws_ahead` names, left on the device: see `ahead.draw`."""
        return draw(requests, logits, self._randomness, self._workspace)

    def matches(self, requests: Sequence[Request]) -> bool:
        """Whether `match` decides as `verify` would."""
        return self.is_unobserved and not self._overriders and all(matches_ahead(request) for request in requests)

    @staticmethod
    def match(
        requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor, pending: PendingTokens
    ) -> torch.Tensor:
        """What `verify` would decide, left on the device: see `ahead.match`."""
        return match(requests, offsets, logits, pending)

    def _is_plainly_greedy(self, request: Request) -> bool:
        return (
            request.params.greedy
            and request.rules is None
            and (request.draft is None or request.draft.method not in self._overriders)
        )

    @staticmethod
    def _match_greedily(requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        """The verdict of core's verifier for greedy rows, without computing distributions."""
        tokens, bad = argmax(logits)
        if bad is not None:
            request = requests[bisect_right(offsets, bad) - 1]
            raise ModelOutputError(nan_message(request.id, len(request.tokens)))
        accepted: list[Sequence[int]] = []
        next_tokens: list[int] = []
        for request, begin, end in zip(requests, offsets, offsets[1:], strict=False):
            draft = request.draft
            if draft is None:
                path: list[int] = []
                token = tokens[begin]
            else:
                path, token = follow(draft.tokens, draft.parents, tokens[begin:end])
            accepted.append(path)
            next_tokens.append(token)
        return Verdict(accepted, next_tokens)

    def _ask(
        self, verify: Callable[..., Any], requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor
    ) -> Verdict:
        drafts = [request.draft for request in requests]
        batch = VerificationBatch(
            [
                VerificationRow(
                    row_id=request.slot,
                    method=draft.method if draft else None,
                    tokens=request.view,
                    num_prompt_tokens=request.num_prompt_tokens,
                    sampling=request.params,
                    randomness=request.randomness,
                )
                for request, draft in zip(requests, drafts, strict=True)
            ]
        )
        proposal = Proposal(
            tokens=[draft.tokens if draft else [] for draft in drafts],
            parents=[draft.parents if draft else None for draft in drafts],
            probs=[draft.probs if draft else None for draft in drafts],
        )
        distributions = StepDistributions(
            logits,
            offsets,
            [
                DistributionRow(
                    params=request.params,
                    rules=request.rules,
                    tokens=request.tokens,
                    num_prompt_tokens=request.num_prompt_tokens,
                    draft_tokens=draft.tokens if draft else (),
                    parents=draft.parents if draft else None,
                    name=request.id,
                )
                for request, draft in zip(requests, drafts, strict=True)
            ],
            self._workspace,
        )
        try:
            verdict = verify(batch=batch, proposal=proposal, target=distributions)
            return verdict if verify is self._core else check_verdict(verdict, proposal, self._vocab_size)
        except ModelOutputError:
            raise  # an error of the model, not of a plugin
        except Exception as error:
            if verify is self._core:
                raise
            if self._strict:
                raise PluginError(f"verify: {type(error).__name__}: {error}") from error
            logger.warning("a plugin's verify failed, core verifies instead: %s: %s", type(error).__name__, error)
            return self._registry.verifier.verify(batch, proposal, distributions)
