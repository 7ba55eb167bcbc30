"""Rounding a block in one kernel comes to what the many small steps come to; in Triton's interpreter without a GPU.

python -m pytest tests/gpu/test_rounding.py -q
"""

from __future__ import annotations

import pytest
import torch

from quaver.awq_search import Feedback, _compensated_block, _settled_block, compensated, nearest, row_errors, settled
from quaver.int4 import GROUP

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed here")

from quaver.kernels import rounding

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROWS = [1, 16, 3000, 18432] if ON_GPU else [1, 16, 37]


def problem(n_rows, n_groups=2, seed=0):
    """Weights, their inputs' moment and their plain rounding, on the CPU."""
    torch.manual_seed(seed)
    n_in = n_groups * GROUP
    weight, x = torch.randn(n_rows, n_in), torch.randn(8 * n_in, n_in) @ torch.randn(n_in, n_in) / n_in**0.5
    return weight, x.T @ x / len(x), nearest(weight)


def block(weight, grid, device):
    """The last group of ``weight``, a view of it, and its scales and zero points, one an input."""
    columns = slice(weight.shape[1] - GROUP, None)
    scales, zeros = (one[:, -1:].expand(-1, GROUP).contiguous() for one in (grid.scales, grid.zeros.float()))
    return weight.to(device)[:, columns], scales.to(device), zeros.to(device)


@pytest.mark.parametrize("n_rows", ROWS)
def test_a_block_is_compensated_as_in_small_steps(n_rows):
    weight, second, grid = problem(n_rows)
    feedback = Feedback.of(second)
    inverse = feedback.inverse.to(DEVICE)[GROUP:, GROUP:]
    given = (*block(weight, grid, DEVICE), inverse)
    before = [one.clone() for one in given]
    levels, errors = rounding.compensate(*given)
    assert all(torch.equal(one, two) for one, two in zip(before, given, strict=True))
    expected, missed = _compensated_block(*(one.cpu() for one in given))
    same = (levels.cpu() == expected).all(1)
    # A tie may fall either way, and what follows in its row with it.
    assert float(same.float().mean()) > 0.9
    assert float((levels.cpu() == expected).float().mean()) > 0.98
    torch.testing.assert_close(errors.cpu()[same], missed[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_rows", ROWS)
def test_a_block_is_settled_as_in_small_steps(n_rows):
    weight, second, grid = problem(n_rows)
    slope = ((grid.dequantize() - weight) @ second)[:, GROUP:]
    values = grid.values.float()[:, GROUP:]
    _, scales, zeros = block(weight, grid, DEVICE)
    own = second.to(DEVICE)[GROUP:, GROUP:]
    given = (values.to(DEVICE), slope.to(DEVICE), scales, zeros, own, own.diagonal().clone())
    before = [one.clone() for one in given]
    levels, steps = rounding.settle(*given)
    assert all(torch.equal(one, two) for one, two in zip(before, given, strict=True))
    expected, moved = _settled_block(*(one.cpu() for one in given))
    same = (levels.cpu() == expected).all(1)
    assert float(same.float().mean()) > 0.9
    assert float((levels.cpu() == expected).float().mean()) > 0.98
    torch.testing.assert_close(steps.cpu()[same], moved[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("far", [0.0, 1e30, -1e30])
def test_what_is_far_off_or_in_the_middle_goes_where_it_should(far):
    middles = torch.arange(GROUP)[None] / 2 - 20 + far
    ones, zeros = torch.ones(1, GROUP), torch.full((1, GROUP), 7.0)
    levels, _ = rounding.compensate(*(one.to(DEVICE) for one in (middles, ones, zeros, torch.eye(GROUP))))
    assert torch.equal(levels.cpu(), (middles.round() + 7).clamp(0, 15))


@pytest.mark.skipif(not ON_GPU, reason="on a CPU the search takes small steps")
def test_the_search_on_a_gpu_is_as_good_and_the_same_twice():
    weight, second, _ = problem(256, n_groups=8)

    def found(device):
        there, moment = weight.to(device), second.to(device)
        grid = nearest(there)
        return settled(there, moment, compensated(there, moment, grid, Feedback.of(moment)))

    one, two, plain = found("cuda"), found("cuda"), found("cpu")
    assert torch.equal(one.values, two.values)
    error, wanted = (float(row_errors(form.dequantize().cpu() - weight, second).sum()) for form in (one, plain))
    assert error == pytest.approx(wanted, rel=0.01)
