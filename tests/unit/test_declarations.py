"""What a plugin declares is checked when it is declared or at the start, with plugin, hook and field named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from specplug import KVLayer, MemoryRegion, Proposal, SpeculatorTraits, hookimpl
from specplug.config.engine import EngineConfig
from specplug.engine.planning import PlannedEngine, plan_engine
from specplug.errors import InsufficientMemoryError, PluginError, SpecplugError
from specplug.model.kv_cache import BlockTable

LAYER = KVLayer(1, 4, 4)


class Planner:
    """A speculator that plans and declares what it is told to."""

    def __init__(self, regions: Any = None, traits: Any = None) -> None:
        self.regions = regions
        self.traits = traits

    @hookimpl
    def plan_memory(self, budget: Any) -> Any:
        return self.regions() if callable(self.regions) else self.regions

    @hookimpl
    def propose(self, batch: Any) -> Any:
        return Proposal([[] for _ in batch.rows])


def plan(make: Callable[[], Any], **options: Any) -> PlannedEngine:
    config = EngineConfig.create(
        "tiny",
        plugins={"mine": lambda config, target: make()},
        speculative_config={"method": "mine", "num_speculative_tokens": 3},
        device="cpu",
        **options,
    )
    return plan_engine(config)


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"top_k": -1}, "top_k=-1: expected an integer of at least 0"),
        ({"top_k": 2.5}, "top_k=2.5: expected an integer"),
        ({"top_k": True}, "top_k=True: expected an integer"),
        ({"top_k": None}, "top_k=None: expected an integer"),
        ({"hidden_states": ("last",)}, r"hidden_states=\('last',\): expected a tuple of boundaries"),
        ({"hidden_states": "final"}, "hidden_states='final': expected a tuple"),
        ({"hidden_states": 3}, "hidden_states=3: expected a tuple"),
        ({"hidden_states": (-1,)}, "hidden_states="),
        ({"hidden_states": (1.5,)}, "hidden_states="),
        ({"hidden_states": (True,)}, "hidden_states="),
        ({"max_nodes": -3}, "max_nodes=-3: expected an integer of at least 1, or None"),
        ({"max_nodes": 0}, "max_nodes=0"),
        ({"max_depth": "8"}, "max_depth='8'"),
        ({"token_only": "no"}, "token_only='no': expected True or False"),
        ({"learns": 1}, "learns=1: expected True or False"),
        ({"token_only": True, "top_k": 3}, "token_only=True with hidden_states or top_k"),
        ({"token_only": True, "hidden_states": ("final",)}, "token_only=True with hidden_states or top_k"),
    ],
)
def test_traits_that_cannot_be_meant_are_refused_with_plugin_hook_and_field(
    traits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^SpeculatorTraits: {message}"):
        SpeculatorTraits(**traits)
    with pytest.raises(PluginError, match=f"plugin 'mine' failed in load_speculator: .*{message}"):
        plan(lambda: Planner(traits=SpeculatorTraits(**traits)))


def test_traits_take_the_integers_and_lists_of_other_libraries() -> None:
    traits = SpeculatorTraits(hidden_states=[np.int64(1), "final"], top_k=torch.tensor(4), max_nodes=np.int32(9))
    assert traits == SpeculatorTraits(hidden_states=(1, "final"), top_k=4, max_nodes=9)
    assert {type(traits.top_k), type(traits.max_nodes), type(traits.hidden_states[0])} == {int}


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"top_k": 5000}, r"speculator 'mine' declares traits.top_k=5,000; the target's vocabulary has 4,096"),
        ({"hidden_states": (99,)}, "speculator 'mine' declares traits.hidden_states with boundary 99"),
    ],
)
def test_traits_that_this_target_cannot_serve_are_refused_at_the_start(traits: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        plan(lambda: Planner(traits=SpeculatorTraits(**traits)))


@pytest.mark.parametrize("traits", [{}, 0, False, {"top_k": 3}, SpeculatorTraits])
def test_traits_of_another_type_are_refused_even_if_they_are_empty(traits: Any) -> None:
    with pytest.raises(PluginError, match="plugin 'mine': its speculator's `traits` must be a SpeculatorTraits"):
        plan(lambda: Planner(traits=traits))


def test_an_attribute_traits_that_raises_is_named() -> None:
    class Raising(Planner):
        traits = property(lambda self: 1 // 0, lambda self, value: None)

    with pytest.raises(PluginError, match="plugin 'mine' failed in its attribute `traits`: ZeroDivisionError"):
        plan(Raising)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"kind": "cache"}, "kind='cache': expected 'weights' or 'kv_cache' or 'buffers'"),
        ({"kind": None}, "kind=None"),
        ({"name": ""}, "name='': expected a name"),
        ({"fixed_bytes": -(1 << 30)}, "fixed_bytes=-1073741824: expected an integer of at least 0"),
        ({"fixed_bytes": 2.5}, "fixed_bytes=2.5"),
        ({"fixed_bytes": "4 GB"}, "fixed_bytes='4 GB'"),
        ({"scratch_tokens_per_row": -1}, "scratch_tokens_per_row=-1"),
        ({"tables": "mine"}, "tables='mine': expected 'shared' or 'own'"),
        ({"device": "cpu"}, "device='cpu': expected a torch.device, or None"),
        ({"dtype": "float32"}, "dtype='float32': expected a torch.dtype, or None"),
        ({"layers": 4}, "layers=4: expected a tuple of KVLayers"),
        ({"layers": [(1, 4, 4)]}, "layers="),
        ({"layers": [LAYER]}, "table: kind='buffers' has layers: only a 'kv_cache' may have them"),
        ({"layers": [LAYER], "kind": "kv_cache"}, "table: layers need a dtype"),
    ],
)
def test_a_region_that_cannot_be_meant_is_refused_with_plugin_hook_and_field(
    region: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=f"speculator 'mine' failed in plan_memory: ValueError: .*{message}"):
        plan(lambda: Planner(lambda: [MemoryRegion(**{"name": "table", "kind": "buffers", **region})]))


@pytest.mark.parametrize("numbers", [(0, 4, 4), (1, -4, 4), (1, 4, 2.5), (True, 4, 4)])
def test_a_layer_of_a_cache_has_positive_sizes(numbers: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"KVLayer: .*expected an integer of at least 1"):
        KVLayer(*numbers)


def test_regions_take_the_integers_and_lists_of_other_libraries() -> None:
    region = MemoryRegion("kv", "kv_cache", fixed_bytes=np.int64(8), layers=[LAYER], dtype=torch.float16)
    assert (region.fixed_bytes, region.layers, region.bytes_per_token) == (8, (LAYER,), 16)


@pytest.mark.parametrize(
    "planned",
    [MemoryRegion("table", "buffers"), ["4 GB"], "4 GB", 0, {"table": 8}, [MemoryRegion("t", "buffers"), None]],
)
def test_plan_memory_returns_a_list_of_regions(planned: Any) -> None:
    with pytest.raises(PluginError, match=r"speculator 'mine': plan_memory returned .*, expected a list of MemoryReg"):
        plan(lambda: Planner(planned))


def test_two_regions_of_one_name_are_refused_with_the_name() -> None:
    with pytest.raises(PluginError, match="speculator 'mine': plan_memory returned two regions named 'table'"):
        plan(lambda: Planner([MemoryRegion("table", "buffers"), MemoryRegion("table", "weights")]))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"fixed_bytes": 900 << 30}, "900.0 GiB of it are the region 'table' of speculator 'mine': make that smaller"),
        (
            {"scratch_tokens_per_row": 10**9, "kind": "kv_cache"},
            "1,000,000,000 KV entries of each sequence are for drafts: lower scratch_tokens_per_row of speculator 'mine'",
        ),
    ],
)
def test_the_memory_error_names_whose_region_takes_too_much(region: dict[str, Any], message: str) -> None:
    regions = [
        MemoryRegion("small", "weights", fixed_bytes=64),
        MemoryRegion(**{"name": "table", "kind": "buffers", **region}),
    ]
    with pytest.raises(InsufficientMemoryError, match=message):
        plan(lambda: Planner(regions), memory="1GiB")


def test_the_memory_error_names_the_number_of_drafts() -> None:
    with pytest.raises(
        InsufficientMemoryError, match=r"1,000,000,001 KV entries .* lower num_speculative_tokens, raise"
    ):
        plan_engine(
            EngineConfig.create(
                "tiny",
                plugins={"mine": lambda config, target: Planner()},
                speculative_config={"method": "mine", "num_speculative_tokens": 10**9},
                memory="1GiB",
            )
        )


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_the_memory_error_names_the_number_of_drafts_beside_a_speculators_buffers(method: str) -> None:
    config = EngineConfig.create(
        "tiny", speculative_config={"method": method, "num_speculative_tokens": 10**6}, memory="1GiB"
    )
    with pytest.raises(InsufficientMemoryError, match=r"or lower num_speculative_tokens \(now 1000000\), max_num_seqs"):
        plan_engine(config)


@pytest.mark.parametrize("blocks", [[3, 4], [3, 7]])
def test_a_write_beyond_the_rows_blocks_says_what_was_planned_too_small(blocks: list[int]) -> None:
    table = BlockTable(4)
    table.extend(blocks)
    assert len(table.slots(0, 8)) == 8
    with pytest.raises(PluginError, match=r"KV entries 6 to 8 of a row .* hold 8: plan scratch_tokens_per_row"):
        table.slots(6, 9)


def test_a_speculator_itself_is_no_entry_of_plugins() -> None:
    config = EngineConfig.create("tiny", plugins={"mine": Planner()}, speculative_config={"method": "mine"})
    with pytest.raises(SpecplugError, match=r"plugins\['mine'\] is a speculator; give a function that returns it"):
        plan_engine(config)
