"""The kit's statistics are scipy's, and see what they must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from specplug.testing.statistics import THRESHOLD, chi_square_p, joint_p_values, uniform_p
from support.statistics import p_value

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("cells", [2, 7, 300])
@pytest.mark.parametrize("bias", [0.0, 0.02, 0.3])
def test_p_values_are_scipys(cells: int, bias: float) -> None:
    rng = np.random.default_rng(cells)
    probs = rng.dirichlet(np.ones(cells))
    drawn = (1 - bias) * probs + bias * np.eye(cells)[0]
    counts = rng.multinomial(20_000, drawn)
    ours = chi_square_p(torch.tensor(counts), torch.tensor(probs * 20_000))
    assert ours == pytest.approx(p_value(counts, probs), rel=1e-6, abs=1e-300)


def test_two_cells_by_hand() -> None:
    assert chi_square_p(torch.tensor([60, 40]), torch.tensor([50.0, 50.0])) == pytest.approx(chi2.sf(4.0, 1))


def test_impossible_tokens_must_not_come() -> None:
    assert chi_square_p(torch.tensor([99, 1]), torch.tensor([100.0, 0.0])) == 0.0
    assert chi_square_p(torch.tensor([100, 0]), torch.tensor([100.0, 0.0])) == 1.0


def test_uniform() -> None:
    values = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert uniform_p(values) > THRESHOLD
    assert uniform_p(values.square()) < THRESHOLD


def test_a_bias_of_one_percent_is_seen() -> None:
    rng = np.random.default_rng(0)
    joint = torch.tensor(rng.dirichlet(np.ones(16**3)).reshape(16, 16, 16))
    drawn = torch.tensor(rng.choice(16**3, size=200_000, p=joint.flatten().numpy()))
    samples = torch.stack([drawn // 256, drawn // 16 % 16, drawn % 16], dim=1)
    assert min(joint_p_values(samples, joint).values()) > THRESHOLD
    samples[::100, 2] = 3
    assert min(joint_p_values(samples, joint).values()) < THRESHOLD
