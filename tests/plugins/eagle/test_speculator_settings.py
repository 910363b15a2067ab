"""The keys of `eagle` and `eagle3`: what they do, and one clear error for each that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specplug import ConfigurationError
from specplug.config.engine import EngineConfig
from specplug.engine.planning import PlannedEngine, plan_engine
from specplug_eagle import EagleSettings
from specplug_eagle.drafting.chain import Chain
from specplug_eagle.drafting.dynamic_tree import DynamicTree
from specplug_eagle.drafting.static_tree import StaticTree
from support.heads import BOUNDARIES, drafted_by_head, save_eagle1, save_eagle3
from support.models import save_model

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    save_model(root / "target", "llama", num_hidden_layers=8)
    save_model(root / "wide", "llama", hidden_size=64)
    save_model(root / "words", "llama", vocab_size=80)
    save_eagle1(root / "one")
    save_eagle3(root / "three", draft_vocab=40)
    flat = save_eagle3(root / "flat")  # in the authors' layout, where ids may be of either convention
    config = json.loads((flat / "config.json").read_text())
    layers = config["transformer_layer_config"]
    layers |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 64, "model_type": "llama"}
    layers["eagle_aux_hidden_state_layer_ids"] = [3, 5, 6]
    (flat / "config.json").write_text(json.dumps(layers))
    return root


def plan(root: Path, head: str, method: str = "eagle3", target: str = "target", **keys: Any) -> PlannedEngine:
    options = drafted_by_head(root / head, method=method, **keys)
    return plan_engine(EngineConfig.create(str(root / target), memory="64MiB", **options))


def tree_of(planned: PlannedEngine) -> Chain | StaticTree | DynamicTree:
    return planned.speculators[0].instance.tree


@pytest.mark.parametrize(
    ("keys", "nodes", "depth"),
    [
        ({}, 4, 4),
        ({"num_speculative_tokens": 7}, 7, 7),
        ({"speculative_token_tree": "eagle"}, 25, 5),
        ({"speculative_token_tree": "[(0,), (1,), (0, 0)]"}, 3, 2),
        ({"speculative_token_tree": [[0], [0, 0], [0, 1], [0, 0, 0]]}, 4, 3),
        ({"speculative_token_tree": [0, 1, (1, 0)]}, 3, 2),
        ({"tree_depth": 3}, 59, 4),
        ({"tree_top_k": 5}, 59, 8),
        ({"tree_total_tokens": 20}, 19, 8),
        ({"tree_depth": 2, "tree_top_k": 3, "tree_total_tokens": 9}, 8, 3),
    ],
)
def test_the_shape_that_is_asked_for(root: Path, keys: dict[str, Any], nodes: int, depth: int) -> None:
    options = drafted_by_head(root / "three", **{key: v for key, v in keys.items() if key != "num_speculative_tokens"})
    options["speculative_config"] |= keys
    planned = plan_engine(EngineConfig.create(str(root / "target"), memory="64MiB", **options))
    (registered,) = planned.speculators
    assert (registered.traits.max_nodes, registered.traits.max_depth) == (nodes, depth)
    shape = StaticTree if "speculative_token_tree" in keys else Chain
    assert isinstance(tree_of(planned), DynamicTree if any(key.startswith("tree_") for key in keys) else shape)


def test_the_authors_defaults() -> None:
    assert EagleSettings(tree_depth=7).dynamic_sizes() == (7, 10, 60)
    paths = EagleSettings(speculative_token_tree="eagle").static_paths()
    assert paths is not None
    widths = [sum(len(path) == depth for path in paths) for depth in range(1, 6)]
    assert widths == [4, 8, 8, 3, 2]
    assert len({path[:-1] for path in paths}) == 11


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"draft_sample_method": "random"}, r"draft_sample_method='random': expected one of greedy, probabilistic"),
        ({"draft_sample_method": 3}, r"eagle3.draft_sample_method=3: expected str"),
        ({"tree_depth": -1}, r"tree_depth=-1: expected an integer of at least 0"),
        ({"tree_top_k": 0}, r"tree_top_k=0: expected an integer of at least 1"),
        ({"tree_total_tokens": 1}, r"tree_total_tokens=1: expected an integer of at least 2"),
        ({"tree_top_k": "5"}, r"eagle3.tree_top_k='5': expected"),
        ({"tree_top_k": 2.5}, r"eagle3.tree_top_k=2.5: expected"),
        ({"tree_depth": True}, r"eagle3.tree_depth=True: expected"),
        ({"tree_depth": 3, "speculative_token_tree": "eagle"}, r"exclude each other"),
        ({"speculative_token_tree": "medusa"}, r"speculative_token_tree='medusa': expected paths of sibling ranks"),
        ({"speculative_token_tree": "[(0,), (1,)"}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": "__import__('os')"}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": []}, r"speculative_token_tree=\[\]: expected paths"),
        ({"speculative_token_tree": "[]"}, r"speculative_token_tree=\[\]: expected paths"),
        ({"speculative_token_tree": 7}, r"speculative_token_tree=7: expected paths"),
        ({"speculative_token_tree": {"0": 1}}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": [(0,), ()]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": [(0,), (-1,)]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": [(0,), ("1",)]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": [(0,), (True,)]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": [True]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": [(0,), (0.5,)]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": ["0"]}, r"speculative_token_tree=.*: expected paths"),
        ({"speculative_token_tree": "((((((((((" * 300}, r"speculative_token_tree=.{0,120}: expected paths"),
        ({"speculative_token_tree": [(0,), (1, 0)]}, r"path \(1, 0\) without \(1,\)"),
        ({"speculative_token_tree": [(0,), (2,)]}, r"path \(2,\) without \(1,\)"),
        ({"speculative_token_tree": [(0, 0)]}, r"path \(0, 0\) without \(0,\)"),
        ({"layer_id_convention": "input"}, r"eagle3.layer_id_convention='input': expected"),
        ({"norm_output": "yes"}, r"eagle3.norm_output='yes': expected"),
        ({"norm_before_residual": 1}, r"eagle3.norm_before_residual=1: expected"),
        ({"rope_theta": "big"}, r"eagle3.rope_theta='big': expected"),
        ({"eagle_aux_hidden_state_layer_ids": 2}, r"eagle3.eagle_aux_hidden_state_layer_ids=2: expected"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3]}, r"2 target layer ids \(2, 3\) were given, .* takes 3"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 9]}, r"layer id 9 does not exist: the target has 8 layers"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 3]}, r"twice"),
        ({"tree_dept": 3}, r"unknown key 'tree_dept' for method 'eagle3'.*tree_depth"),
        ({"revision": 1}, r"eagle3.revision=1: expected"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else None,
)
def test_a_wrong_value_is_one_clear_error(root: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        plan(root, "three", **keys)
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_a_missing_head_is_named(root: Path) -> None:
    for method in ("eagle", "eagle3"):
        config = {"method": method, "num_speculative_tokens": 3}
        with pytest.raises(ConfigurationError, match=f"method '{method}' needs the key 'model'"):
            plan_engine(EngineConfig.create(str(root / "target"), memory="64MiB", speculative_config=config))


@pytest.mark.parametrize(
    ("head", "method", "message"),
    [
        ("one", "eagle3", r"one contains an EAGLE-1 head; its method is 'eagle', not 'eagle3'"),
        ("three", "eagle", r"three contains an EAGLE-3 head; its method is 'eagle3', not 'eagle'"),
    ],
)
def test_the_other_method_is_pointed_out(root: Path, head: str, method: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(root, head, method)


@pytest.mark.parametrize(("head", "method"), [("one", "eagle"), ("three", "eagle3")])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("wide", r"hidden size 32, but the target's is 64"),
        ("words", r"vocabulary of 64 tokens, but the target's has 80"),
    ],
)
def test_another_targets_head_is_refused_with_both_values(
    root: Path, head: str, method: str, target: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(root, head, method, target)


@pytest.mark.parametrize(
    ("head", "keys", "boundaries", "warned"),
    [
        ("three", {}, BOUNDARIES, False),
        ("three", {"eagle_aux_hidden_state_layer_ids": [8, 1, 4]}, (1, 4, 8), False),
        ("three", {"eagle_aux_hidden_state_layer_ids": [1, 4, 6], "layer_id_convention": "output"}, (2, 5, 7), False),
        ("three", {"layer_id_convention": "output"}, (1, 3, 4), False),
        ("flat", {}, (3, 5, 6), True),
        ("flat", {"layer_id_convention": "boundary"}, (3, 5, 6), False),
        ("flat", {"layer_id_convention": "output"}, (4, 6, 7), False),
    ],
)
def test_the_target_states_that_are_read(
    root: Path,
    caplog: pytest.LogCaptureFixture,
    head: str,
    keys: dict[str, Any],
    boundaries: tuple[int, ...],
    warned: bool,
) -> None:
    planned = plan(root, head, **keys)
    assert planned.speculators[0].traits.hidden_states == boundaries
    assert any("specplug_eagle.calibrate" in record.getMessage() for record in caplog.records) == warned


def test_eagle_1_reads_the_final_state(root: Path) -> None:
    assert plan(root, "one", "eagle").speculators[0].traits.hidden_states == ("final",)
    with pytest.raises(ConfigurationError, match="takes no layer ids"):
        plan(root, "one", "eagle", eagle_aux_hidden_state_layer_ids=[1, 2, 3])


def test_overrides_reach_the_head(root: Path) -> None:
    keys = {"norm_before_residual": True, "norm_output": True, "rope_theta": 5000}
    for overrides in ({}, keys):
        spec = plan(root, "three", **overrides).speculators[0].instance.checkpoint.spec
        assert spec.norm_before_residual == spec.norm_output == bool(overrides)
        assert spec.rope.theta == (5000.0 if overrides else 10000.0)


def test_more_children_than_the_draft_vocabulary_are_cut(root: Path) -> None:
    tree = tree_of(plan(root, "three", tree_top_k=100, tree_depth=1))
    assert isinstance(tree, DynamicTree)
    assert tree.top_k == 40
