"""The AWQ format byte by byte, and the INT4 linear layer against float64."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quaver import int4
from quaver.errors import CheckpointError
from quaver.int4 import GROUP, Int4Linear, Int4Weight, pack, representable, require_shape, unpack


def random_weight(n_out: int, n_in: int, seed: int = 0) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    groups = (n_out, n_in // GROUP)
    return Int4Weight(
        torch.randint(0, 16, (n_out, n_in), generator=generator, dtype=torch.uint8),
        torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8),
        representable(torch.rand(groups, generator=generator) * 0.01 + 0.001),
    )


def stored_linear(weight: Int4Weight) -> Int4Linear:
    linear = Int4Linear(weight.values.shape[1], weight.values.shape[0])
    linear.load_state_dict(dict(weight.tensors()))
    return linear


def test_golden_bytes() -> None:
    # Columns 0 to 7 hold 0 to 7: nibbles, lowest first, 0 2 4 6 1 3 5 7, so the word is 0x75316420.
    assert pack(torch.arange(8)[None]).tolist() == [[0x75316420]]
    assert struct.pack("<i", pack(torch.arange(8)[None]).item()) == bytes([0x20, 0x64, 0x31, 0x75])
    # Column 7 is the highest nibble: the word is negative from 8 on.
    assert pack(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]])).tolist() == [[-0x10000000]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]])).tolist() == [[1, 1 << 16]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_unpack_undoes_pack(n_rows: int, n_words: int, seed: int) -> None:
    values = torch.randint(0, 16, (n_rows, 8 * n_words), generator=torch.Generator().manual_seed(seed))
    words = pack(values)
    assert words.dtype == torch.int32 and words.shape == (n_rows, n_words)
    assert torch.equal(unpack(words).long(), values)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1))
def test_pack_undoes_unpack(word: int) -> None:
    words = torch.tensor([[word]], dtype=torch.int32)
    assert torch.equal(pack(unpack(words)), words)


def test_an_independent_reader_finds_the_same_weight() -> None:
    weight = random_weight(16, 256)
    tensors = weight.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (256, 2)),
        "qzeros": (torch.int32, (2, 2)),
        "scales": (torch.float16, (2, 16)),
    }

    def nibble(words: Tensor, row: int, column: int) -> int:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        word = words[row][column // 8].item() % 2**32
        return word // 16 ** order.index(column % 8) % 16

    exact = weight.dequantize()
    for column in range(16):
        for row in range(0, 256, 7):
            q = nibble(tensors["qweight"], row, column)
            z = nibble(tensors["qzeros"], row // 128, column)
            assert (q - z) * tensors["scales"][row // 128][column].item() == exact[column][row].item()


def test_a_stored_weight_reads_back_whole() -> None:
    weight = random_weight(24, 384)
    again = Int4Weight.read(**weight.tensors())
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.scales, weight.scales)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1e9, allow_nan=False))
def test_scales_are_the_same_in_both_half_types(value: float) -> None:
    scale = representable(torch.tensor(value))
    assert scale > 0 and torch.isfinite(scale)
    assert scale.half().float() == scale == scale.bfloat16().float()
    if 2**-16 <= value <= 65280:
        assert math.isclose(scale.item(), value, rel_tol=2**-8)


SHAPES = [(16, 128), (48, 256), (24, 384), (384, 1024), (256, 3072)]


@pytest.fixture(params=["numba", "no numba"])
def with_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether numba is there: the same is wanted without it."""
    if request.param == "no numba":
        monkeypatch.setattr(int4, "compiled", lambda: None)
    elif int4.compiled() is None:
        pytest.skip("numba is not installed")
    return request.param == "numba"


@pytest.mark.usefixtures("with_numba")
@pytest.mark.parametrize("bias", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_error_is_at_most_twice_that_of_a_plain_product(n_out: int, n_in: int, dtype: torch.dtype, bias: float) -> None:
    weight = random_weight(n_out, n_in)
    linear = stored_linear(weight)
    reference = stored_linear(weight)
    linear.prepare(dtype)
    for n_rows in (1, 3, 40):
        x = (torch.randn(2, n_rows, n_in, generator=torch.Generator().manual_seed(1)) + bias).to(dtype)
        exact = x.double() @ weight.dequantize().double().T
        plain = F.linear(x, weight.dequantize().to(dtype))
        for y in (linear(x), reference(x)):
            assert y.dtype == dtype and y.shape == exact.shape
            assert rms(y - exact) <= 2 * rms(plain - exact) + 1e-7 * rms(exact)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_without_numba_bfloat16_goes_through_the_operator_and_float32_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "compiled", lambda: None)
    calls = []
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu

    def spy(x: Tensor, packed: Tensor, group: int, steps: Tensor) -> Tensor:
        calls.append(x.dtype)
        return operator(x, packed, group, steps)

    linears = {dtype: stored_linear(random_weight(16, 128)) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, linear in linears.items():
        linear.prepare(dtype)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", spy)
    for dtype, linear in linears.items():
        linear(torch.ones(1, 128, dtype=dtype))
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_layer_keeps_its_weight_once(dtype: torch.dtype, with_numba: bool) -> None:
    weight = random_weight(256, 512)
    linear = stored_linear(weight)
    stored_bytes = linear.weight_bytes
    assert stored_bytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    linear.prepare(dtype)
    assert linear.weight_bytes <= 256 * 512 // 2 + 4 * 256 * 4
    assert not linear.state_dict()
    # Preparing again is harmless.
    linear.prepare(dtype)
    wanted = weight.dequantize()
    tolerance = 0 if with_numba or dtype == torch.float32 else 2.0**-7
    assert (linear.dequantize() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_float32_tiles_join_without_a_seam() -> None:
    # 1,072 rows of 1,024 inputs take three tiles, the last of them short.
    weight = random_weight(1072, 1024)
    linear = stored_linear(weight)
    linear.prepare(torch.float32)
    assert torch.equal(linear.dequantize(), weight.dequantize())


def test_a_bias_is_added() -> None:
    linear = Int4Linear(128, 16, bias=True)
    bias = torch.randn(16)
    linear.load_state_dict({**random_weight(16, 128).tensors(), "bias": bias})
    assert torch.equal(linear(torch.zeros(3, 128)), bias.expand(3, 16))
    linear.prepare(torch.float32)
    assert torch.equal(linear(torch.zeros(3, 128)), bias.expand(3, 16))


@pytest.mark.parametrize(("n_out", "n_in"), [(16, 192), (12, 128)])
def test_a_shape_that_does_not_fit_is_named(n_out: int, n_in: int) -> None:
    with pytest.raises(CheckpointError, match=rf"layers\.0\.weight has shape \({n_out}, {n_in}\)"):
        require_shape("layers.0.weight", n_out, n_in)
