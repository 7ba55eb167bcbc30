"""A recorded function gives what the function gives, call after call; on a GPU too where there is one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from quaver import awq_search, recorded
from quaver.awq_search import Feedback, compensated, nearest, settled
from quaver.int4 import GROUP
from quaver.recorded import Recorded, loose

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [awq_search._compensated_block, awq_search._settled_block, awq_search._clipped_group])
def test_blocks_of_the_search_give_the_same_recorded_and_change_nothing(block, device):
    fast = Recorded(block)
    # Of one row, the columns of which lie side by side as they are, and of two kinds in turn.
    for seed, n_rows in enumerate((24, 1, 40, 24, 1)):
        torch.manual_seed(seed)

        def some(*shape):
            return torch.rand(*shape, device=device) + 0.1

        rows, square = [some(n_rows, GROUP) for _ in range(4)], some(GROUP, GROUP)
        inputs = {
            awq_search._compensated_block: [*rows[:3], square],
            awq_search._settled_block: [*rows, square, some(GROUP)],
            awq_search._clipped_group: [rows[0], square, *rows[1:3]],
        }[block]
        before = [one.clone() for one in inputs]
        plain = block(*inputs)
        assert all(torch.equal(one, two) for one, two in zip(plain, fast(*inputs), strict=True))
        assert all(torch.equal(one, two) for one, two in zip(before, inputs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_forgotten_is_recorded_again(device):
    twice = Recorded(lambda x: (x + x,))
    for value in (1.0, 2.0):
        x = torch.full((3,), value, device=device)
        assert twice(x)[0].tolist() == twice(x)[0].tolist() == [2 * value] * 3
        recorded.forget()


@pytest.mark.parametrize("device", DEVICES)
def test_recordings_beside_each_other_take_turns_in_the_same_memory(device):
    def once(x):
        return ((x + 1) * (x - 1),)

    def twice(x):
        return (((x + 2) * (x - 2)).sqrt() + (x * x).sum(),)

    first = Recorded(once)
    fast = [first, Recorded(twice, beside=first)]
    for value in range(2, 8):
        x = torch.full((1 << 19,), float(value), device=device)
        # What the one leaves is still there when the other has run.
        found = [one(x)[0] for one in fast]
        assert torch.equal(found[0], once(x)[0])
        assert torch.equal(found[1], twice(x)[0])
        if value == 5:
            recorded.forget()


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


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_left_alone_for_a_while_and_then_collected_as_before(collects):
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ValueError, match="in it"), recorded.undisturbed():
            assert not gc.isenabled()
            raise ValueError("in it")
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("device", DEVICES)
def test_an_older_recording_may_become_garbage_while_another_is_made(device):
    x, old = torch.ones(3, device=device), []

    def wasteful(x):
        # In a ring only the collector finds it, which looks when there are many new objects.
        ring = [*old]
        ring.append(ring)
        old.clear()
        del ring
        assert len([[] for _ in range(100_000)]) == 100_000
        return (x + 1,)

    new = Recorded(wasteful)
    new(x)
    old.append(Recorded(lambda x: (x + x,)))
    for _ in range(3):
        old[0](x)
    for _ in range(2):
        assert new(x)[0].tolist() == [2.0] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_what_records_a_method_of_its_own_goes_before_garbage_is_collected(device):
    class Doubling:
        def __init__(self):
            self.fast = Recorded(loose(self.twice))

        def twice(self, x):
            return (x + x,)

    with recorded.undisturbed():
        one, x = Doubling(), torch.ones(3, device=device)
        assert [one.fast(x)[0].tolist() for _ in range(3)] == [[2.0] * 3] * 3
        gone = weakref.ref(one)
        del one
        assert gone() is None
