"""Where a model runs, by name."""

from __future__ import annotations

import pytest
import torch

from specplug import ConfigurationError
from specplug.model.device import choose_device


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_index(monkeypatch: pytest.MonkeyPatch, name: str, index: int) -> None:
    """Tensors on a GPU have one, and whether drafts may stay there is decided by comparing devices."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device(name) == torch.device("cuda", index)


def test_the_current_gpu_is_taken_where_one_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda", 2)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="use cpu"):
        choose_device("cuda")
