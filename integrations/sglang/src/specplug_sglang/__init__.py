"""Runs specplug's speculators inside SGLang: `--speculative-algorithm SPECPLUG`.

Written against the source of SGLang 0.5.23, and not tested with it: see README.md. SGLang's registry of speculative
algorithms takes a worker class, and its n-gram worker asks for a tree of draft tokens in one method; the worker here answers
that with specplug's speculators, and leaves verification, grammars and everything else as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import attrs
import numpy as np

from specplug import ConfigurationError, SamplingParams, TokenView
from specplug.host import Draft, HostLimits, HostRow, SpeculatorHost

__all__ = ["DraftTrees", "register"]

ALGORITHM = "SPECPLUG"
ENVIRONMENT = "SPECPLUG_SGLANG"
VERSION = "0.5.23"
PRIVATE_NAMES = {
    "srt.speculative.spec_registry.CustomSpecAlgo": "extended: an algorithm that SGLang treats as its n-gram one",
    "srt.arg_groups.speculative_hook._handle_ngram": "called: the defaults of the server's arguments",
    "srt.speculative.ngram_worker.NGRAMWorker": "extended: _prepare_draft_tokens, _update_ngram_corpus, clear_cache_pool",
}
"""Everything of SGLang's that is used and not documented as public, in the version above."""


def register() -> None:
    """The function of SGLang's `sglang.srt.plugins`: registers the algorithm SPECPLUG.

    Raises:
        ConfigurationError: there is no SGLang, or it has another version.
    """
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError as error:
        raise ConfigurationError(f"SGLang is not installed: pip install sglang=={VERSION}") from error
    if version != VERSION:
        raise ConfigurationError(
            f"specplug-sglang is written against the source of SGLang {VERSION}, and this is SGLang {version}: it uses "
            f"{len(PRIVATE_NAMES)} names that SGLang may change; install sglang=={VERSION}"
        )
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    class Algorithm(CustomSpecAlgo):
        def is_ngram(self) -> bool:
            return True

        def has_draft_kv(self) -> bool:
            return False

        def handle_server_args(self, server_args: Any) -> None:
            from sglang.srt.arg_groups.speculative_hook import _handle_ngram

            _handle_ngram(server_args)

    @SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=False, spec_class=Algorithm)
    def _make(server_args: Any) -> type:
        return _worker_class()


def _worker_class() -> type:
    from sglang.srt.speculative.ngram_worker import NGRAMWorker

    class SpecplugWorker(NGRAMWorker):
        """SGLang's n-gram worker, whose trees come from specplug's speculators."""

        def alloc_memory_pool(self, **options: Any) -> None:
            super().alloc_memory_pool(**options)
            model = self.model_runner.model_config
            limits = HostLimits(
                vocab_size=model.vocab_size,
                max_model_len=model.context_len,
                max_num_seqs=self.max_batch_size,
                max_num_batched_tokens=self.max_batch_size * self.draft_token_num,
                max_draft_tokens=self.draft_token_num - 1,
                trees=True,
            )
            self.draft_trees = DraftTrees(configuration(), limits)

        def clear_cache_pool(self) -> None:
            super().clear_cache_pool()
            self.draft_trees.end_all()

        def _prepare_draft_tokens(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
            self.prev_token_ids: list[int] = []  # read by SGLang's own code alone
            self.prev_accept_lens = [0] * len(batch.reqs)
            return self.draft_trees.draft(batch.reqs)

        def _update_ngram_corpus(self, batch: Any) -> None:
            """SGLang's own n-grams are not used."""

    return SpecplugWorker


def configuration(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The speculative configuration in the environment.

    Raises:
        ConfigurationError: it is missing, or no JSON object.
    """
    text = environment.get(ENVIRONMENT, "")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"the environment variable {ENVIRONMENT} is {text!r}: expected specplug's speculative configuration, for example "
            '{"method": "ngram"}'
        )
    return found


@attrs.define(eq=False)
class _Known:
    """A request that speculators know, its row, and the row's tokens."""

    request: Any
    row: HostRow
    tokens: list[int]


class DraftTrees:
    """Asks speculators for the drafts of SGLang's requests.

    Args:
        config: the speculative configuration.
        limits: SGLang's sizes. `max_draft_tokens` is one less than SGLang's `speculative_num_draft_tokens`.
    """

    def __init__(self, config: Mapping[str, Any], limits: HostLimits) -> None:
        assert limits.max_draft_tokens is not None
        self.host = SpeculatorHost(dict(config), limits)
        self._size = limits.max_draft_tokens + 1
        self._known: dict[str, _Known] = {}

    def draft(self, requests: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Drafts for a batch.

        Args:
            requests: SGLang's, whose `output_ids` have everything that was generated.

        Returns:
            The tokens of all trees, int64 [requests * size], and their masks, bool [requests * size * size]: whether a node is
            an ancestor of another, or the same. Node 0 is the request's last token; nodes that are not needed are its children.
        """
        requests = list(requests)
        present = {request.rid for request in requests}
        for name in [name for name in self._known if name not in present]:
            known = self._known.pop(name)
            self.host.end(known.row, "finished" if known.request.finished() else "preempted")
        rows = [self._updated(request) for request in requests]
        tokens = np.zeros((len(rows), self._size), dtype=np.int64)
        masks = np.zeros((len(rows), self._size, self._size), dtype=bool)
        for place, (row, draft) in enumerate(zip(rows, self.host.propose(rows), strict=True)):
            tokens[place, 0] = row.tokens[-1]
            parents = [-1] if draft is None else [-1, *(parent + 1 for parent in draft.parent_list())]
            if draft is not None:
                tokens[place, 1 : 1 + len(draft)] = draft.tokens
            parents += [0] * (self._size - len(parents))
            for node, parent in enumerate(parents):
                if parent >= 0:
                    masks[place, node] = masks[place, parent]
                masks[place, node, node] = True
        return tokens.reshape(-1), masks.reshape(-1)

    def end_all(self) -> None:
        """Ends all rows."""
        for known in self._known.values():
            self.host.end(known.row, "aborted")
        self._known.clear()

    def _updated(self, request: Any) -> HostRow:
        known = self._known.get(request.rid)
        prompt, output = request.origin_input_ids_unpadded, request.output_ids
        if known is None:
            tokens = [*map(int, prompt), *map(int, output)]
            sampling = SamplingParams(temperature=0.0, max_tokens=request.sampling_params.max_new_tokens)
            row = self.host.add(TokenView(tokens), num_prompt_tokens=len(prompt), sampling=sampling)
            self._known[request.rid] = _Known(request, row, tokens)
            return row
        new = [int(token) for token in output[len(known.tokens) - len(prompt) :]]
        known.tokens += new
        known.row.advance(len(known.tokens), _path(known.row.draft, new[:-1]))
        return known.row


def _path(draft: Draft | None, tokens: Iterable[int]) -> list[int]:
    """The nodes of a draft that these tokens follow."""
    path: list[int] = []
    if draft is None:
        return path
    parents = draft.parent_list()
    for token in tokens:
        at = path[-1] if path else -1
        child = next((n for n, p in enumerate(parents) if p == at and draft.tokens[n] == token), None)
        if child is None:
            break
        path.append(child)
    return path
