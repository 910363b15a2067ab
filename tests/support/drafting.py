"""What the tests of draft models share: perturbed copies, a recording speculator, and a log of what the draft ran."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specplug import LLM, ForwardRow, MemoryBudget, MemoryRegion, Proposal, ProposalBatch, Resources, hookimpl
from specplug.speculation.draft_length import FixedDraftLength
from specplug_draft_model import DraftModelSpeculator, load_speculator
from support.models import VOCABULARY
from support.reference import load_reference
from support.speculators import Oracle, TreeSpeculator, provide


def drafted_by(model: Path | str, gamma: int = 4, **keys: Any) -> dict[str, Any]:
    """LLM options of a draft model."""
    return {
        "speculative_config": {
            "method": "draft_model",
            "model": str(model),
            "num_speculative_tokens": gamma,
            **keys,
        }
    }


def options_of(kind: str, models: dict[str, Path], known: Sequence[list[int]] = ()) -> dict[str, Any]:
    """LLM options of a way to draft: plain, ngram, draft_model, eagle3, eagle3 tree, or tree.

    Args:
        kind: the way.
        models: the folders of `draft` and `head`.
        known: sequences that the tree's oracle knows.
    """
    if kind == "plain":
        return {}
    if kind == "ngram":
        config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        return {"speculative_config": config}
    if kind == "draft_model":
        return drafted_by(models["draft"])
    if kind.startswith("eagle3"):
        tree = {"tree_depth": 3, "tree_top_k": 4, "tree_total_tokens": 14} if "tree" in kind else {}
        config = {"method": "eagle3", "model": str(models["head"]), "num_speculative_tokens": 3, **tree}
        return {"speculative_config": config}
    assert kind == "tree", kind
    return provide(lambda c, t: TreeSpeculator(Oracle(list(known), VOCABULARY), (0, 2, "final"), 9, top_k=2))


def speculator_of(llm: LLM) -> DraftModelSpeculator:
    """The engine's draft model speculator."""
    (found,) = (s.instance for s in llm.engine.chain.speculators if isinstance(s.instance, DraftModelSpeculator))
    return found


def perturbed_copy(source: Path, folder: Path, scale: float, seed: int = 0) -> Path:
    """A model that mostly, and not always, says what another one says."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Recorded:
    """A draft model whose proposals are kept.

    Attributes:
        inner: the speculator.
        loops: whether it drafts as on a GPU, without looking at a token before the next one.
        proposals: (committed tokens, drafted tokens, reported distributions or None) of every row that was drafted for.
    """

    def __init__(self, inner: DraftModelSpeculator, *, loops: bool = False) -> None:
        self.inner = inner
        self.loops = loops
        self.traits = inner.traits
        self.proposals: list[tuple[list[int], list[int], Any]] = []

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        return self.inner.plan_memory(budget)

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        self.inner.warmup(resources)
        if self.loops:
            self.inner.use_loop(resources)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        proposal = self.inner.propose(batch)
        assert proposal.probs is not None
        for row, tokens, probs in zip(batch.rows, proposal.tokens, proposal.probs, strict=True):
            if len(tokens):
                self.proposals.append((list(row.tokens), list(tokens), probs))
        return proposal


def recorded(
    model: Path | str, gamma: int = 4, *, loops: bool = False, **keys: Any
) -> tuple[dict[str, Any], list[Recorded]]:
    """LLM options of a draft model, and where its recorder will be."""
    made: list[Recorded] = []

    def make(config: Any, target: Any) -> Recorded:
        made.append(Recorded(load_speculator(config, target), loops=loops))
        return made[-1]

    config = {"method": "recorded", "model": str(model), "num_speculative_tokens": gamma, **keys}
    return {"plugins": {"recorded": make}, "speculative_config": config}, made


class SleepyPolicy(FixedDraftLength):
    """Lets rows sleep now and then, and varies their budgets; a budget of zero only keeps the draft up to date."""

    def __init__(self, seed: int, rate: float = 0.06) -> None:
        self.random = random.Random(seed)
        self.rate = rate
        self.asleep: dict[int, int] = {}
        self.naps = 0

    def length_of(self, request: Any, speculator: Any) -> int | None:
        left = self.asleep.get(request.number, 0)
        if left:
            self.asleep[request.number] = left - 1
            return None
        if self.random.random() < self.rate:
            self.asleep[request.number] = self.random.choice([1, 2, 5, 12])
            self.naps += 1
        return self.random.randint(0, 4)


class ForwardLog:
    """Sees every forward of the draft, and refuses a gap, a token run twice, and a token that is not the row's.

    A row's incarnation is its block table. What was run from its beginning is kept; a run that begins before the end of
    that is right only where its first token differs from what was run there: a rejected draft.

    Attributes:
        run: tokens run per incarnation.
        catch_ups: per incarnation, the lengths of its runs of committed tokens.
        reruns: runs that overwrote rejected drafts.
        forks: incarnations that began with the KV of another row, a fork's parent or one in the prefix cache.
    """

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.engine
        self.model = speculator_of(llm).model
        self.run: dict[int, list[int]] = {}
        self.catch_ups: dict[int, list[int]] = {}
        self.reruns = 0
        self.forks = 0
        self._tables: list[Any] = []  # alive, so that no address is used twice
        self._forward = self.model.forward
        self.model.forward = self.forward  # type: ignore[method-assign]

    def forward(self, rows: list[ForwardRow], **options: Any) -> torch.Tensor:
        requests = {id(request.table): request for request in self.engine.scheduler.running}
        assert len({id(row.table) for row in rows}) == len(rows), "a row twice in one forward"
        assert sum(len(row.tokens) for row in rows) <= self.engine.config.max_num_batched_tokens
        for row in rows:
            request, key = requests[id(row.table)], id(row.table)
            assert row.tokens, "an empty row"
            if key not in self.run:
                known = max(request.num_forked_tokens, self._in_prefix_cache(row.table))
                assert row.start <= known, "a new row begins in its middle"
                self.run[key] = request.tokens[: row.start]
                self.catch_ups[key] = []
                self.forks += row.start > 0
                self._tables.append(row.table)
            run = self.run[key]
            assert row.start <= len(run), f"positions {len(run)} to {row.start} were left out"
            if row.start < len(run):
                assert run[row.start] != row.tokens[0], f"position {row.start} was run twice with the same token"
                self.reruns += 1
            run[row.start :] = row.tokens
            if row.start < len(request.tokens):
                assert run == request.tokens[: len(run)], "something else than the row's own tokens was run"
                self.catch_ups[key].append(len(row.tokens))
        return self._forward(rows, **options)

    def _in_prefix_cache(self, table: Any) -> int:
        """Positions at the beginning of a row whose cached blocks are known to hold the draft's KV."""
        contents = [self.engine.scheduler.allocator.cached.get(block) for block in table.blocks]
        known = itertools.takewhile(lambda content: content is not None and content.followers, contents)
        return sum(1 for _ in known) * table.block_size


def compare_kv(llm: LLM, draft: Path, atol: float = 3e-4) -> int:
    """Compares the draft's KV of every running row with a fresh prefill of its committed tokens.

    Returns:
        How many tokens were compared.
    """
    speculator = speculator_of(llm)
    cache = next(c for c in reversed(llm.engine._shared_caches) if c is not llm.engine.runner.cache)
    compared = 0
    for request in llm.engine.scheduler.running:
        sequence = speculator._sequences.get(request.slot)
        if sequence is None or not sequence.num_stored:
            continue
        count = sequence.num_stored
        assert count <= len(request.tokens)
        with torch.no_grad():
            past = load_reference(draft)(torch.tensor([request.tokens[:count]]), use_cache=True).past_key_values
        assert request.table is not None
        slots = torch.tensor(list(request.table.slots(0, count)), dtype=torch.long)
        for layer, stored in enumerate(past.layers):
            torch.testing.assert_close(cache.keys[layer].cpu()[:, slots], stored.keys[0], atol=atol, rtol=1e-3)
            torch.testing.assert_close(cache.values[layer].cpu()[:, slots], stored.values[0], atol=atol, rtol=1e-3)
        compared += count
    return compared
