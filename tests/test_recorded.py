"""A recorded function gives what the function gives, call after call; on a GPU too where there is one."""

from __future__ import annotations

import pytest
import torch

from quaver import awq_search
from quaver.awq_search import Feedback, compensated, nearest, settled
from quaver.int4 import GROUP
from quaver.recorded import Recorded

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block", "n_wide"), [(awq_search._compensated_block, 3), (awq_search._settled_block, 4)])
def test_blocks_of_rounding_give_the_same_recorded_and_change_nothing(block, n_wide, device):
    recorded = Recorded(block)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = [torch.rand(24, GROUP, device=device) + 0.1 for _ in range(n_wide)]
        inputs.append(torch.rand(GROUP, GROUP, device=device) + 0.1)
        if block is awq_search._settled_block:
            inputs.append(torch.rand(GROUP, device=device) + 0.1)
        before = [one.clone() for one in inputs]
        plain = block(*inputs)
        assert all(torch.equal(one, two) for one, two in zip(plain, recorded(*inputs), strict=True))
        assert all(torch.equal(one, two) for one, two in zip(before, inputs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_on_any_device_is_as_good_as_on_a_cpu(device):
    torch.manual_seed(0)
    weight, x = torch.randn(32, 4 * GROUP), torch.randn(3000, 4 * GROUP) @ torch.randn(4 * GROUP, 4 * GROUP) / 16
    second = x.T @ x / len(x)

    def error(weight, second):
        feedback = Feedback.of(second)
        found = settled(weight, second, compensated(weight, second, nearest(weight), feedback))
        return float(awq_search.row_errors(found.dequantize() - weight, second).sum())

    assert error(weight.to(device), second.to(device)) == pytest.approx(error(weight, second), rel=0.01)
