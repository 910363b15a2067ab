"""The tensors of an adapter: read from safetensors, every one accounted for, matched with the layers of a target."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import torch

from specplug.errors import CheckpointError
from specplug.lora.config import AdapterConfig, read_adapter_config
from specplug.model.linears import LinearLayer
from specplug.model.load.checkpoint import TensorHeader, load_tensors, read_headers, resolve_checkpoint
from specplug.model.load.formats import not_a_folder

_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+?)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_FILE = "adapter_model.safetensors"
_ROOTS = {"model", "language_model", "text_model", "base_model"}
_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class LowRank:
    """What an adapter adds to one layer: states @ down^T @ up.

    Attributes:
        down: [rank, in].
        up: [rank, out], with the scale in it.
    """

    down: torch.Tensor
    up: torch.Tensor


@attrs.frozen(eq=False)
class AdapterWeights:
    """The low-rank layers of one adapter, on the CPU.

    Attributes:
        layers: by the target's name of the layer.
        rank: the largest rank.
    """

    layers: Mapping[str, LowRank]
    rank: int


@attrs.frozen(eq=False)
class AdapterFiles:
    """An adapter on disk that fits a target, as its headers say.

    Attributes:
        folder: where it is.
        config: its configuration.
        headers: of its tensors.
        pairs: the adapter's name of each layer → its A and its B.
        layers: the adapter's name of each layer → the target's layer.
        rank: the largest rank.
    """

    folder: Path
    config: AdapterConfig
    headers: Mapping[str, TensorHeader]
    pairs: Mapping[str, tuple[_Named, _Named]]
    layers: Mapping[str, LinearLayer]
    rank: int


def inspect_adapter(source: str, targets: Sequence[LinearLayer], model: str) -> AdapterFiles:
    """Checks that an adapter fits a target, without reading its numbers.

    Args:
        source: its folder or hub name.
        targets: the layers of the target that an adapter can be added to.
        model: the target's class, for messages.

    Raises:
        CheckpointError: it is not an adapter, is damaged, is more than low-rank layers, or belongs to another model.
    """
    folder = resolve_checkpoint(source)
    if folder.is_file():
        raise not_a_folder(folder)
    config = read_adapter_config(folder)
    headers = {name: header for name, header in read_headers(folder).items() if header.file.name == _FILE}
    if not headers:
        raise CheckpointError(
            f"{folder} has no {_FILE}, or an empty one; save the adapter with peft's save_pretrained()"
        )
    pairs = _pairs(folder, headers)
    layers = _match_targets(folder, pairs, targets, model)
    rank = max(_check_shapes(folder, config, name, layers[name], pair) for name, pair in pairs.items())
    return AdapterFiles(folder, config, headers, pairs, layers, rank)


def read_adapter(files: AdapterFiles, dtype: torch.dtype) -> AdapterWeights:
    """Reads the numbers of an adapter, as `dtype`.

    Raises:
        CheckpointError: they are not finite.
    """
    tensors = load_tensors(files.headers, _CPU, torch.float32)
    weights = {}
    for name, (down, up) in files.pairs.items():
        low_rank = LowRank(
            tensors[down.name].to(dtype).contiguous(),
            (tensors[up.name].t() * files.config.scale_of(name)).to(dtype).contiguous(),
        )
        if not bool(torch.isfinite(low_rank.down).all() and torch.isfinite(low_rank.up).all()):
            raise CheckpointError(
                f"{files.folder}: the weights of '{name}' are not finite in {dtype}; the adapter is damaged"
            )
        weights[files.layers[name].name] = low_rank
    return AdapterWeights(weights, files.rank)


@attrs.frozen
class _Named:
    name: str
    header: TensorHeader


def _pairs(folder: Path, headers: Mapping[str, TensorHeader]) -> dict[str, tuple[_Named, _Named]]:
    """The adapter's name of each layer → its A and its B.

    Raises:
        CheckpointError: a tensor is neither of them, or one of the two is missing.
    """
    sides: dict[str, dict[str, _Named]] = {}
    for key, header in headers.items():
        match = _KEY.match(key)
        if match is None:
            raise CheckpointError(
                f"{folder}: the tensor '{key}' is not part of a low-rank linear layer, and nothing else is applied; train the "
                "adapter on linear layers alone"
            )
        sides.setdefault(match["layer"], {})[match["side"]] = _Named(key, header)
    for name, pair in sides.items():
        if len(pair) < 2:
            raise CheckpointError(f"{folder}: '{name}' has lora_{min(pair)} alone; the adapter is damaged")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _match_targets(
    folder: Path, names: Iterable[str], targets: Sequence[LinearLayer], model: str
) -> dict[str, LinearLayer]:
    """The adapter's name of each layer → the target's layer. A text model may have been part of another one in training.

    Raises:
        CheckpointError: the target has no such layer.
    """
    exact = {layer.name: layer for layer in targets}
    stems: dict[str, list[LinearLayer]] = {}
    for target in targets:
        stems.setdefault(_stem(target.name), []).append(target)
    found: dict[str, LinearLayer] = {}
    for name in names:
        alike = stems.get(_stem(name), [])
        layers = [exact[name]] if name in exact else alike
        if len(layers) != 1:
            raise CheckpointError(
                f"{folder} adapts '{name}', which is not among the linear layers of {model} that an adapter can be added to "
                f"({_kinds(targets)}); the output layer, embeddings, experts and layers of which the model uses the bare "
                "weight are not, nor are layers of another model"
            )
        (layer,) = layers
        if layer in found.values():
            raise CheckpointError(f"{folder} adapts '{layer.name}' twice; the adapter is damaged")
        found[name] = layer
    return found


def _stem(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ROOTS)


def _kinds(targets: Sequence[LinearLayer]) -> str:
    return ", ".join(dict.fromkeys(layer.name.rpartition(".")[2] for layer in targets)) or "none"


def _check_shapes(
    folder: Path, config: AdapterConfig, name: str, layer: LinearLayer, pair: tuple[_Named, _Named]
) -> int:
    """The rank of a layer.

    Raises:
        CheckpointError: its matrices do not fit the target, or not the configuration.
    """
    down, up = (each.header.shape for each in pair)
    rank = config.rank_of(name)
    expected = ((rank, layer.in_features), (layer.out_features, rank))
    if (down, up) != expected:
        raise CheckpointError(
            f"{folder}: '{name}' has matrices of {list(down)} and {list(up)}, and the target with rank {rank} needs "
            f"{list(expected[0])} and {list(expected[1])}; the adapter belongs to another model, or {config.file.name} to "
            "another adapter"
        )
    return rank
