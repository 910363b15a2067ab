"""Which boundaries a checkpoint's layer ids mean."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from specplug.errors import ConfigurationError
from specplug_eagle.checkpoint import layer_id_candidates, resolve_layer_ids
from specplug_eagle.head import HeadSpec

pytestmark = pytest.mark.unit

SPEC = HeadSpec("eagle3", 16, 16, 40, 24, 4, 2, 4, 24, layout="flat")


def spec_with(ids: Any, layout: str = "flat") -> HeadSpec:
    count = len(ids) if ids else 3
    return attrs.evolve(SPEC, layer_ids=ids and tuple(ids), layout=layout, num_aux_states=count)


@pytest.mark.parametrize(
    ("layers", "ids", "layout", "boundaries", "convention", "ambiguous"),
    [
        (32, None, "flat", (2, 16, 29), "boundary", False),
        (8, None, "speculators", (2, 4, 5), "boundary", False),
        (36, [2, 18, 33], "speculators", (2, 18, 33), "boundary", False),
        (36, [1, 17, 32], "speculators", (1, 17, 32), "boundary", False),
        (24, [2, 12, 21], "flat", (2, 12, 21), "boundary", False),
        (32, [29, 2, 16], "flat", (2, 16, 29), "boundary", False),
        (94, [1, 46, 90], "flat", (2, 47, 91), "output", False),
        (61, [1, 29, 57], "flat", (2, 30, 58), "output", False),
        (36, [1, 17, 32], "eagle_config", (2, 18, 33), "output", False),
        (48, [1, 23, 44], "eagle_config", (2, 24, 45), "output", False),
        (36, [1, 17, 33], "flat", (2, 18, 34), "output", False),
        (36, [24, 30, 36], "eagle_config", (24, 30, 36), "boundary", False),
        (61, [2, 30, 58], "eagle_config", (2, 30, 58), "boundary", False),
        (45, [4, 20, 40], "flat", (4, 20, 40), "boundary", True),
        (8, [1, 3, 8], "flat", (1, 3, 8), "boundary", False),
        (8, [0, 2, 4, 7], "flat", (0, 2, 4, 7), "boundary", True),
    ],
)
def test_known_checkpoints(
    layers: int, ids: Any, layout: str, boundaries: tuple[int, ...], convention: str, ambiguous: bool
) -> None:
    resolved = resolve_layer_ids(spec_with(ids, layout), layers)
    assert (resolved.boundaries, resolved.convention, resolved.ambiguous) == (boundaries, convention, ambiguous)
    assert resolved.reason


def test_the_user_decides() -> None:
    spec = spec_with([1, 17, 32])
    assert resolve_layer_ids(spec, 36, override=[30, 3, 9]).boundaries == (3, 9, 30)
    assert resolve_layer_ids(spec, 36, override=[3, 9, 30], convention="output").boundaries == (4, 10, 31)
    assert resolve_layer_ids(spec, 36, convention="boundary").boundaries == (1, 17, 32)
    assert not resolve_layer_ids(spec_with([4, 20, 40]), 45, convention="output").ambiguous


@pytest.mark.parametrize(
    ("ids", "layers", "options", "message"),
    [
        ([2, 18, 37], 36, {}, "id 37 does not exist: the target has 36 layers"),
        ([2, 18, 36], 36, {"convention": "output"}, "id 36 does not exist.*0 to 35"),
        ([2, 2, 5], 8, {}, "name a state twice"),
        ([2, 4, 5], 8, {"override": [2, 4]}, r"2 target layer ids \(2, 4\) were given, but the head's fc takes 3"),
        ([2, 4, 5], 8, {"override": [-1, 4, 5]}, "id -1 does not exist"),
        (None, 4, {}, "4 layers are too few for the default layer ids"),
        (None, 2, {}, "2 layers are too few for the default layer ids"),
    ],
)
def test_ids_that_cannot_be(ids: Any, layers: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve_layer_ids(spec_with(ids), layers, **options)


def test_candidates_for_calibration() -> None:
    both = layer_id_candidates(spec_with([4, 20, 40]), 45)
    assert [one.boundaries for one in both] == [(4, 20, 40), (5, 21, 41)]
    swapped = layer_id_candidates(spec_with([1, 17, 32]), 36)
    assert [one.boundaries for one in swapped] == [(2, 18, 33), (1, 17, 32)]
    assert [one.boundaries for one in layer_id_candidates(spec_with([24, 30, 36]), 36)] == [(24, 30, 36)]
    assert len(layer_id_candidates(spec_with(None), 36)) == 1


@pytest.mark.parametrize("spec", [attrs.evolve(SPEC, family="eagle1"), attrs.evolve(SPEC, single_state=True)])
def test_heads_of_the_final_state_take_no_ids(spec: HeadSpec) -> None:
    assert resolve_layer_ids(spec, 4).boundaries == ()
    assert layer_id_candidates(spec, 4)[0].boundaries == ()
    with pytest.raises(ConfigurationError, match="takes no layer ids"):
        resolve_layer_ids(spec, 8, override=[1, 2, 3])
