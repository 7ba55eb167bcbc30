"""The INT8 rows: within half a step, read back as written, and products as exact as plain ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from quaver.int8 import Int8Embedding, Int8Linear, Int8Weight


def random_weight(n_out, n_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_out, n_in, generator=generator) * torch.rand(n_out, 1, generator=generator).mul(4).exp()


def linear_of(weight, bias=None):
    made = Int8Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.load_state_dict({**Int8Weight.nearest(weight).tensors(), **({} if bias is None else {"bias": bias})})
    return made


def embedding_of(weight, ids=None):
    made = Int8Embedding(len(weight), weight.shape[1], pruned=ids is not None)
    made.load_state_dict({**Int8Weight.nearest(weight).tensors(), **({} if ids is None else {"kept_ids": ids})})
    return made


def rms(x):
    return x.double().square().mean().sqrt().item()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 300.0]))
def test_rounding_stays_within_half_a_step(seed, size):
    weight = random_weight(12, 40, seed) * size
    weight[3] = 0
    rounded = Int8Weight.nearest(weight)
    error = (rounded.dequantize() - weight).abs()
    # Half a step, and what rounding the scale itself to 8 bits may cut off at the end of the range.
    assert bool((error <= rounded.scales[:, None] * (0.5 + 127 * 2**-8)).all())
    assert bool((error.amax(1) <= weight.abs().amax(1) / 127 * 1.01).all())
    assert bool((rounded.dequantize()[3] == 0).all())
    assert rounded.values.abs().max() <= 127


def test_what_is_stored_reads_back():
    weight = Int8Weight.nearest(random_weight(24, 100))
    stored = weight.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "weight_int8": (torch.int8, (24, 100)),
        "weight_scale": (torch.bfloat16, (24,)),
    }
    assert torch.equal(stored["weight_scale"].float(), weight.scales)
    assert torch.equal(weight.dequantize()[5], weight.values[5].float() * weight.scales[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_out", "n_in"), [(16, 128), (7, 33), (8, 36), (3, 96), (48, 256), (384, 1024)])
def test_error_is_at_most_twice_that_of_a_plain_product(n_out, n_in, dtype):
    weight = random_weight(n_out, n_in) / 50
    linear, exact_weight = linear_of(weight), Int8Weight.nearest(weight).dequantize()
    for n_rows in (1, 3, 40):
        # Sums of whole numbers times these activations pass float16's 65,504.
        x = torch.randn(2, n_rows, n_in, generator=torch.Generator().manual_seed(1)).mul(10).to(dtype)
        exact = x.double() @ exact_weight.double().T
        plain = F.linear(x, exact_weight.to(dtype))
        y = linear(x)
        assert y.dtype == dtype and y.shape == exact.shape
        assert rms(y - exact) <= 2 * rms(plain - exact) + 1e-7 * rms(exact)


def test_a_bias_is_added():
    bias = torch.randn(16)
    linear = linear_of(random_weight(16, 128), bias)
    assert torch.equal(linear(torch.zeros(3, 128)), bias.expand(3, 16))


def test_bfloat16_goes_through_the_operator_and_float32_does_not(monkeypatch):
    calls = []
    operator = torch.ops.aten._weight_int8pack_mm

    def spy(x, weight, scale):
        calls.append(x.dtype)
        return operator(x, weight, scale)

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", spy)
    linear = linear_of(random_weight(16, 128))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        linear(torch.ones(1, 128, dtype=dtype))
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize("offset", [1, 8])
def test_weights_and_inputs_may_begin_anywhere(offset):
    """As tensors of a mapped file do: the operator ends the process on some processors."""
    linear = linear_of(random_weight(48, 64))
    bytes_ = torch.zeros(48 * 64 + offset, dtype=torch.int8)
    bytes_[offset:] = linear.weight_int8.flatten()
    for n_rows in (1, 3, 4, 10):
        linear.weight_int8 = bytes_[offset:].view(48, 64)
        inputs = torch.randn(n_rows * 64 + offset, generator=torch.Generator().manual_seed(n_rows)).bfloat16()
        x = inputs[offset:].view(n_rows, 64)
        wanted = F.linear(x.float(), linear.dequantize())
        assert rms(linear(x).float() - wanted) <= 0.01 * rms(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_gives_its_rows(dtype):
    weight = random_weight(20, 8)
    table = embedding_of(weight)
    table.dtype = dtype
    ids = torch.tensor([[0, 19], [7, 7]])
    wanted = Int8Weight.nearest(weight).dequantize()[ids]
    assert table(ids).dtype == dtype
    torch.testing.assert_close(table(ids).float(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=0)
    assert not len(table.pruned(ids))


def test_pruned_rows_are_known_and_never_another_row():
    weight = random_weight(4, 8)
    table = embedding_of(weight, torch.tensor([1, 5, 6, 30], dtype=torch.int32))
    assert torch.equal(table(torch.tensor([30, 1, 6])), Int8Weight.nearest(weight).dequantize()[[3, 0, 2]])
    assert table.pruned(torch.tensor([0, 1, 2, 30, 31])).tolist() == [0, 2, 31]
    for absent in (0, 2, 7, 31):
        with pytest.raises(IndexError):
            table(torch.tensor([1, absent]))
