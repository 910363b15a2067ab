"""The part of specplug-sglang that needs no SGLang. The rest is written against its source and not tested."""

from __future__ import annotations

import ast
import types
from typing import Any

import attrs
import pytest

import specplug_sglang
from specplug import ConfigurationError, Proposal, SpeculatorTraits, hookimpl
from specplug.host import HostLimits, SpeculatorHost
from specplug_sglang import DraftTrees, configuration
from support.environment import ROOT

LIMITS = HostLimits(vocab_size=50, max_model_len=64, max_num_seqs=3, max_draft_tokens=4, trees=True)


@attrs.define
class Request:
    """What is read of SGLang's `Req`."""

    rid: str
    origin_input_ids_unpadded: list[int]
    output_ids: list[int] = attrs.field(factory=list)
    sampling_params: Any = attrs.field(factory=lambda: types.SimpleNamespace(max_new_tokens=32))
    done: bool = False

    def finished(self) -> bool:
        return self.done


class Tree:
    """Drafts 7 or 8 after the root, and 9 after the 8."""

    traits = SpeculatorTraits(max_nodes=4, max_depth=3)

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.ended: list[str] = []

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        self.ended += [reason for _, reason in batch.ended]
        self.rows = batch.rows
        nodes = [3 if row.budget.max_nodes else 0 for row in batch.rows]
        return Proposal([[7, 8, 9][:n] for n in nodes], [[-1, -1, 1][:n] for n in nodes])


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> Tree:
    speculator = Tree()

    def host(config: Any, limits: HostLimits) -> SpeculatorHost:
        return SpeculatorHost(config, limits, plugins={"tree": lambda config, target: speculator}, strict=True)

    monkeypatch.setattr(specplug_sglang, "SpeculatorHost", host)
    return speculator


def test_a_tree_and_its_mask(tree: Tree) -> None:
    trees = DraftTrees({"method": "tree"}, LIMITS)
    one, other = Request("a", [1, 2, 3], [4]), Request("b", [5], [6])
    tokens, mask = trees.draft([one, other])
    assert tokens.tolist() == [4, 7, 8, 9, 0, 6, 7, 8, 9, 0]
    assert (
        mask.reshape(2, 5, 5).astype(int).tolist()
        == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]] * 2
    )
    assert [row.num_prompt_tokens for row in tree.rows] == [3, 1]
    one.output_ids += [8, 9, 20]
    other.output_ids += [7, 8]
    trees.draft([one, other])
    assert [list(row.tokens) for row in tree.rows] == [[1, 2, 3, 4, 8, 9, 20], [5, 6, 7, 8]]
    assert [row.outcome.accepted for row in tree.rows] == [(1, 2), (0,)]
    one.done = True
    trees.draft([])
    assert sorted(tree.ended) == ["finished", "preempted"]
    assert trees.host.stats.num_accepted_draft_tokens == 3


def test_without_a_draft_only_the_root_is_verified(tree: Tree) -> None:
    trees = DraftTrees({"method": "tree"}, attrs.evolve(LIMITS, max_model_len=4))
    tokens, mask = trees.draft([Request("a", [1, 2, 3], [4])])
    assert tokens.tolist() == [4, 0, 0, 0, 0]
    assert mask.reshape(5, 5).astype(int).tolist() == [[1, 0, 0, 0, 0]] + [
        [1, *(int(node == place) for place in range(1, 5))] for node in range(1, 5)
    ]


@pytest.mark.parametrize("text", ["", "ngram", "[]"])
def test_a_configuration_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="SPECPLUG_SGLANG"):
        configuration({"SPECPLUG_SGLANG": text})


def test_the_documentation_says_that_it_is_not_tested() -> None:
    text = (ROOT / "docs/sglang.md").read_text(encoding="utf-8")
    assert "Not tested with SGLang" in text
    for name, use in specplug_sglang.PRIVATE_NAMES.items():
        assert f"| `{name}` | {use} |" in text
    assert specplug_sglang.VERSION in text
    source = (ROOT / "integrations/sglang/src/specplug_sglang/__init__.py").read_text(encoding="utf-8")
    top = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    assert not any(node.module and node.module.startswith("sglang") for node in top)
