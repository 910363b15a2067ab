"""The speculator: ingests the target's states into the head's KV cache, and drafts chains or trees."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs
import torch

from specplug import (
    BlockTable,
    ConfigurationError,
    ForwardRow,
    KVLayer,
    MemoryRegion,
    OwnTables,
    Proposal,
    SpeculatorTraits,
    hookimpl,
    pack_linears,
)
from specplug_eagle.checkpoint import EagleCheckpoint, resolve_layer_ids, validate
from specplug_eagle.drafting.chain import Chain
from specplug_eagle.drafting.dynamic_tree import DynamicTree
from specplug_eagle.drafting.loop import ChainLoop, read_drafts
from specplug_eagle.drafting.runner import HeadRunner, HeadSequence, Roots
from specplug_eagle.drafting.static_tree import StaticTree
from specplug_eagle.drafting.tree_draft import EMPTY
from specplug_eagle.settings import EagleSettings

if TYPE_CHECKING:
    from specplug import (
        MemoryBudget,
        ProposalBatch,
        ProposalRow,
        Resources,
        SpeculativeConfig,
        TargetModel,
        WeightsHandle,
    )

logger = logging.getLogger("specplug.eagle")
EMBEDDED = "tiny"
_CACHE = "head KV"
_COPIES_TO_DRAW = 8
"""Copies of a node's distribution that exist at once while it is truncated (sorted values and indices, sums, scattered) and
sampled from. The distributions of earlier nodes exist too, and at the end all of them twice, when they are stacked."""


@attrs.define(eq=False)
class EagleSpeculator:
    """Drafts with an EAGLE head. Its KV cache uses the target's block tables, or its own in engines that share none.

    Attributes:
        checkpoint: the head's checkpoint: specification and tensor names.
        weights: the handle of its tensors.
        target: the target, whose embedding and LM head it may borrow.
        tree: the shape of drafts: a chain or a tree.
        traits: the target states that the head reads. On a GPU chains are drafted early: a loop finds out what was accepted.
    """

    checkpoint: EagleCheckpoint
    weights: WeightsHandle
    target: TargetModel
    tree: Chain | StaticTree | DynamicTree
    traits: SpeculatorTraits
    _runner: HeadRunner | None = attrs.field(default=None, init=False, repr=False)
    _loop: ChainLoop | None = attrs.field(default=None, init=False, repr=False)
    _most_rows: int | None = attrs.field(default=None, init=False, repr=False)
    _tables: OwnTables | None = attrs.field(default=None, init=False, repr=False)
    _sequences: dict[int, HeadSequence] = attrs.field(factory=dict, init=False, repr=False)

    @hookimpl
    def plan_memory(self, budget: MemoryBudget) -> list[MemoryRegion]:
        """The head's weights and KV cache, and the intermediate results of drafting."""
        self._most_rows = None if budget.shares_tables else budget.max_num_seqs
        spec = self.checkpoint.spec
        layer = KVLayer(spec.num_kv_heads, spec.head_dim, spec.head_dim)
        tokens = budget.max_num_batched_tokens
        loops = isinstance(self.tree, Chain)
        if loops:
            tokens += budget.loop_tokens(self.tree.max_depth)
        states = (
            tokens * (spec.feature_size + 6 * spec.hidden_size + 2 * spec.intermediate_size) * budget.dtype.itemsize
        )
        states += budget.compiled_output_bytes(2 * spec.hidden_size * budget.dtype.itemsize)
        width, inner = self.tree.width, self.tree.num_inner
        copies = 1 if isinstance(self.tree, Chain) and self.target.device.type == "cpu" else 2 * width
        if self.tree.samples:
            copies = max(2 * inner, inner + _COPIES_TO_DRAW * width)
        rows = budget.max_num_seqs + (budget.loop_rows if loops else 0)
        logits = rows * copies * spec.draft_vocab_size * torch.float32.itemsize
        ids = spec.draft_vocab_size * torch.int64.itemsize if spec.draft_vocab_size != spec.vocab_size else 0
        return [
            MemoryRegion("head weights", "weights", fixed_bytes=self.weights.num_bytes()),
            MemoryRegion(
                _CACHE,
                "kv_cache",
                layers=(layer,) * spec.num_layers,
                dtype=budget.dtype,
                scratch_tokens_per_row=max(self.tree.scratch, self.tree.max_nodes),
                tables="shared" if budget.shares_tables else "own",
            ),
            MemoryRegion("head states and distributions", "buffers", fixed_bytes=states + logits + ids),
        ]

    @hookimpl
    def warmup(self, resources: Resources) -> None:
        """Builds the head from its tensors, and on a GPU runs every number of rows once."""
        head, warnings = self.checkpoint.build(self.weights.tensors, embed=self.target.embed, logits=self.target.logits)
        for warning in warnings:
            logger.warning("%s: %s", self.weights.folder, warning)
        head.to(resources.device)  # buffers that are not in the checkpoint: RoPE frequencies
        pack_linears(head)
        self.weights.release()
        self._tables = None if self._most_rows is None else OwnTables(resources, self._most_rows)
        self._runner = HeadRunner(head, resources, resources.kv_caches[_CACHE])
        for count in resources.row_buckets if resources.device.type != "cpu" else (1,):
            rows = []
            for block in range(min(count, resources.num_blocks)):
                table = BlockTable(resources.block_size)
                table.extend([block])
                rows.append(ForwardRow([0], 0, table))
            hidden = torch.zeros(len(rows), head.spec.hidden_size, dtype=self.target.dtype, device=resources.device)
            with torch.inference_mode():
                self._runner.run(rows, None, hidden)
        if isinstance(self.tree, Chain) and resources.device.type != "cpu":
            self.use_loop(resources)

    def use_loop(self, resources: Resources) -> None:
        """Drafts greedy chains without looking at their tokens in between; pays where the host would wait for them."""
        assert self._runner is not None, "warmup builds the head first"
        self._loop = ChainLoop(self._runner, resources, self.traits.hidden_states, self.tree.max_depth)

    @hookimpl
    def propose(self, batch: ProposalBatch) -> Proposal:
        """Runs the head over the target's new states, and drafts for the rows that have a budget."""
        if self._tables is not None:
            self._tables.give(batch)
        for row_id, _ in batch.ended:
            self._sequences.pop(row_id, None)
        drafts = [EMPTY] * len(batch.rows)
        with torch.inference_mode():
            entries = self._new_entries(batch)
            if self._loop is not None and not self._samples(batch):
                is_early = any(row.upcoming is not None for row in batch.rows)
                looped = [
                    place for place, entry in entries.items() if is_early or self._loop.suits(batch.rows[place], entry)
                ]
                if looped:
                    rows = [batch.rows[place] for place in looped]
                    found, lengths = self._loop.draft(rows, [entries.pop(place) for place in looped])
                    if len(looped) == len(batch.rows) and not batch.uses_scores:
                        return Proposal(found[..., 0], lengths=lengths)
                    for place, draft in zip(looped, read_drafts(found, lengths), strict=True):
                        drafts[place] = draft
            roots, places = self._catch_up(batch, entries)
            if roots is not None and self._runner is not None:
                for place, draft in zip(places, self.tree.draft(roots, self._runner), strict=True):
                    drafts[place] = draft
        return Proposal(
            tokens=[draft.tokens for draft in drafts],
            parents=[draft.parents for draft in drafts],
            scores=[draft.scores for draft in drafts],
            probs=[draft.probs for draft in drafts],
        )

    def _samples(self, batch: ProposalBatch) -> bool:
        """Whether any token is sampled."""
        return self.tree.samples and any(row.gains_by_sampling for row in batch.rows)

    def _new_entries(self, batch: ProposalBatch) -> dict[int, ForwardRow]:
        """The rows with new target states, by their index in the batch: each state with the token after it."""
        entries = {}
        for place, row in enumerate(batch.rows):
            sequence = self._follow(row)
            if len(row.new_positions):
                assert row.table is not None, "core gives every row its blocks"
                start, stop = row.new_positions.start, row.new_positions.stop
                tokens = row.tokens[start + 1 : stop + 1]
                if row.upcoming is not None:
                    tokens += row.upcoming.placeholders
                entries[place] = ForwardRow(tokens, start, row.table, first=sequence.begin, upcoming=row.upcoming)
        return entries

    def _catch_up(self, batch: ProposalBatch, entries: dict[int, ForwardRow]) -> tuple[Roots | None, list[int]]:
        """Runs the head over every new target state. Their KV overwrites that of drafts.

        Returns:
            The rows that may draft, and their indices in the batch.
        """
        assert self._runner is not None, "warmup comes before propose"
        if not entries:
            return None, []
        owners, rows = list(entries), list(entries.values())
        features = self._features(batch, owners)
        fused = self._runner.head.fuse(features[0] if len(features) == 1 else torch.cat(features, dim=-1))
        result = self._runner.run(rows, None, fused)
        last, drafting = -1, []
        for forward, place in zip(rows, owners, strict=True):
            last += len(forward.tokens)
            if batch.rows[place].budget.max_nodes:
                drafting.append((place, last, forward.first))
        if not drafting:
            return None, []
        at = torch.tensor([last for _, last, _ in drafting], device=fused.device, dtype=torch.long)
        places = [place for place, _, _ in drafting]
        roots = Roots(
            rows=[batch.rows[place] for place in places],
            first=[first for _, _, first in drafting],
            output=result.output[at],
            hidden=result.feedback[at],
        )
        return roots, places

    def _features(self, batch: ProposalBatch, owners: Sequence[int]) -> list[torch.Tensor]:
        """The new states of these rows, [T, hidden] per boundary."""
        states = [batch.hidden_states[boundary] for boundary in self.traits.hidden_states]
        spans = [batch.rows[place].new_states for place in owners]
        count = sum(span.stop - span.start for span in spans)
        if spans[0].start == 0 and spans[-1].stop == count:  # nobody is left out
            return [part[:count] for part in states]
        return [torch.cat([part[span] for span in spans]) for part in states]

    def _follow(self, row: ProposalRow) -> HeadSequence:
        """Updates a row's record. After a gap in its states, the row begins anew: earlier positions are masked."""
        if row.is_new:
            parent = None if row.forked_from is None else self._sequences.get(row.forked_from)
            begin = row.new_positions.start - row.num_cached_tokens if parent is None else parent.begin
            self._sequences[row.row_id] = HeadSequence(begin, row.new_positions.start)
        sequence = self._sequences[row.row_id]
        if not sequence.end - sequence.spare <= row.new_positions.start <= sequence.end:
            sequence.begin = row.new_positions.start
        sequence.end = row.new_positions.stop
        sequence.spare = 0 if row.upcoming is None else len(row.upcoming) - 1
        return sequence


@hookimpl
def load_speculator(config: SpeculativeConfig, target: TargetModel) -> EagleSpeculator:
    """Reads the head's configuration and headers; see `EagleSettings` for the keys.

    Raises:
        ConfigurationError: an unknown key or a wrong value, no head, or a head for another target.
        CheckpointError: the checkpoint is not an EAGLE head, is an unsupported variant, or is damaged.
    """
    settings = config.settings(EagleSettings)
    weights = target.weights(_source(config.method, settings, target), settings.revision)
    checkpoint = EagleCheckpoint.open(
        weights,
        norm_before_residual=settings.norm_before_residual,
        norm_output=settings.norm_output,
        rope_theta=settings.rope_theta,
    )
    spec = checkpoint.spec
    wanted = {"eagle": "eagle1", "eagle3": "eagle3"}.get(config.method, spec.family)
    if spec.family != wanted:
        right: Literal["eagle", "eagle3"] = "eagle3" if spec.family == "eagle3" else "eagle"
        raise ConfigurationError(
            f"{weights.folder} contains an {'EAGLE-3' if right == 'eagle3' else 'EAGLE-1'} head; its method is '{right}', "
            f"not '{config.method}'"
        )
    validate(spec, target)
    layers = resolve_layer_ids(
        spec,
        target.num_layers,
        override=settings.eagle_aux_hidden_state_layer_ids,
        convention=settings.layer_id_convention,
    )
    warnings = list(checkpoint.warnings)
    if layers.ambiguous:
        warnings.append(
            f"the target layer ids are taken as {layers.convention} ids ({layers.reason}); if few drafts are accepted, "
            "measure with: python -m specplug_eagle.calibrate"
        )
    for warning in warnings:
        logger.warning("%s: %s", weights.folder, warning)
    weights.keep(checkpoint.names.values())
    tree = make_tree(settings, config.num_speculative_tokens, spec.draft_vocab_size)
    return EagleSpeculator(
        checkpoint=checkpoint,
        weights=weights,
        target=target,
        tree=tree,
        traits=SpeculatorTraits(
            hidden_states=("final",) if spec.uses_final_state else layers.boundaries,
            max_nodes=tree.max_nodes,
            max_depth=tree.max_depth,
            drafts_early=isinstance(tree, Chain) and target.device.type != "cpu",
        ),
    )


def make_tree(
    settings: EagleSettings, num_speculative_tokens: int, draft_vocab_size: int
) -> Chain | StaticTree | DynamicTree:
    """The shape of drafts for the settings."""
    if settings.is_dynamic:
        depth, top_k, total = settings.dynamic_sizes()
        return DynamicTree(depth, min(top_k, draft_vocab_size), total)
    sampled = settings.draft_sample_method == "probabilistic"
    paths = settings.static_paths()
    if paths is None:
        return Chain(num_speculative_tokens, sampled=sampled)
    tree = StaticTree(paths, sampled=sampled)
    return Chain(tree.max_nodes, sampled=sampled) if tree.max_depth == tree.max_nodes else tree


def _source(method: str, settings: EagleSettings, target: TargetModel) -> str:
    embedded = settings.model == EMBEDDED or (settings.model is None and target.source == EMBEDDED)
    if embedded and method == "eagle3":
        return str(Path(__file__).parent / EMBEDDED)
    if settings.model is None or embedded:
        raise ConfigurationError(
            f"speculative_config of method '{method}' needs the key 'model': a folder or hub name of a draft head"
            + ("; the embedded head for the target tiny is of method 'eagle3'" if embedded else "")
        )
    return settings.model
