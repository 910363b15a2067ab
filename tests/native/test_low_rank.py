"""What adapters add to a linear layer, by the kernel."""

from __future__ import annotations

import pytest
import torch

from specplug.native import library

pytestmark = pytest.mark.skipif(not library.load(), reason="no kernels on this machine")


def inputs(rows: int, ins: int, outs: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + ins + outs)
    shapes = ((rows, outs), (rows, ins), (3, rank, ins), (3, rank, outs))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def expected(numbers: list[torch.Tensor], ranks: list[int], segments: list[list[int]]) -> torch.Tensor:
    output, states, down, up = (each.double() for each in numbers)
    for begin, end, slot in segments:
        rank = ranks[slot]
        output[begin:end] += states[begin:end] @ down[slot, :rank].t() @ up[slot, :rank]
    return output


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "ins", "outs", "ranks"),
    [(1, 8, 8, [1, 1, 1]), (9, 70, 300, [10, 0, 5]), (40, 515, 257, [64, 3, 16]), (9, 256, 1024, [16, 16, 16])],
)
def test_it_adds_to_the_rows_of_segments(
    dtype: torch.dtype, rows: int, ins: int, outs: int, ranks: list[int], threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers = inputs(rows, ins, outs, max(ranks), dtype)
        cuts = [0, rows // 3, rows // 2, rows - rows // 9, rows]
        segments = [[cuts[0], cuts[1], 0], [cuts[2], cuts[3], 2], [cuts[3], cuts[4], 1]]
        many = torch.tensor(ranks, dtype=torch.int32)
        result = torch.ops.specplug.add_low_rank(*numbers, many, torch.tensor(segments, dtype=torch.int32))
        exact = expected(numbers, ranks, segments)
        tolerance = 2e-6 if dtype == torch.float32 else 4.5e-3
        assert (result - exact).abs().max() <= tolerance * exact.abs().max()
        assert torch.equal(result[cuts[1] : cuts[2]], numbers[0][cuts[1] : cuts[2]])
        for row in range(rows):  # bit-equal alone
            slot = next((slot for begin, end, slot in segments if begin <= row < end), None)
            own = [] if slot is None else [[0, 1, slot]]
            alone = [each[row : row + 1] for each in numbers[:2]]
            one = torch.tensor(own, dtype=torch.int32).view(-1, 3)
            assert torch.equal(torch.ops.specplug.add_low_rank(*alone, *numbers[2:], many, one)[0], result[row])
    finally:
        torch.set_num_threads(before)


def test_shapes_of_a_batch_and_no_segments() -> None:
    output, states, down, up = inputs(6, 8, 10, 2, torch.float32)
    ranks, none = torch.tensor([2, 2, 2], dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32)
    result = torch.ops.specplug.add_low_rank(output[None], states.view(2, 3, 8), down, up, ranks, none)
    assert torch.equal(result, output[None])
    assert result.data_ptr() != output.data_ptr()


@pytest.mark.parametrize(
    ("segment", "rank"),
    [([0, 7, 0], 2), ([-1, 2, 0], 2), ([3, 2, 0], 2), ([0, 2, 3], 2), ([0, 2, -1], 2), ([0, 2, 0], 5)],
)
def test_offsets_are_checked(segment: list[int], rank: int) -> None:
    numbers = inputs(6, 8, 10, 2, torch.float32)
    ranks = torch.tensor([rank, 2, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="add_low_rank: segment"):
        torch.ops.specplug.add_low_rank(*numbers, ranks, torch.tensor([segment], dtype=torch.int32))


def test_sizes_and_dtypes_are_checked() -> None:
    output, states, down, up = inputs(6, 8, 10, 2, torch.float32)
    ranks, segments = torch.tensor([2, 2, 2], dtype=torch.int32), torch.tensor([[0, 6, 0]], dtype=torch.int32)
    add = torch.ops.specplug.add_low_rank
    for wrong in (
        (output, states.half(), down, up, ranks, segments),
        (output, states, down.bfloat16(), up, ranks, segments),
        (output[:5], states, down, up, ranks, segments),
        (output, states[:, :7], down, up, ranks, segments),
        (output, states, down, up[:, :1], ranks, segments),
        (output, states, down, up, ranks.long(), segments),
        (output, states, down, up, ranks, segments[:, :2]),
    ):
        with pytest.raises(RuntimeError, match="add_low_rank"):
            add(*wrong)
