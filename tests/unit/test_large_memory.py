"""Memory in large pages: zeros of any dtype, which stay as long as somebody holds them."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from specplug.model import huge_pages
from specplug.model.huge_pages import allocate


@pytest.mark.parametrize("count", [0, 7, 3 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_zeros_that_outlive_their_first_holder(count: int, dtype: torch.dtype) -> None:
    whole = allocate(count, dtype)
    assert whole.shape == (count,)
    assert whole.dtype == dtype
    assert not whole.any()
    part = whole[count // 2 :]
    del whole
    gc.collect()
    part.fill_(3)
    assert bool((part == 3).all())


def test_a_system_without_such_pages_gives_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("no such pages")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Refusing)
    assert not allocate(4 << 20, torch.bfloat16).any()
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE")
    assert not allocate(4 << 20, torch.bfloat16).any()
