"""What bench/quality.py promises: every rival does what it is known for, and figures are sums over sums."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import quality
import rivals
from quaver import validate
from quaver.awq_search import Moment, nearest, row_errors
from quaver.int4 import GROUP
from quaver.model.layers import GROUPS, DecoderLayer
from quaver.model.tts import TTS


@pytest.fixture
def layer(toy_tts: TTS) -> DecoderLayer:
    found = toy_tts.talker.model.layers[0]
    assert isinstance(found, DecoderLayer)
    return found


def _moments(layer: DecoderLayer) -> dict[str, Moment]:
    torch.manual_seed(0)
    found = {}
    for group in GROUPS:
        n = layer.get_parameter(f"{group.linears[0]}.weight").shape[1]
        x = torch.randn(2000, n) @ torch.randn(n, n) * torch.linspace(0.1, 4.0, n)
        found[group.name] = Moment(x.T @ x / len(x), x.abs().mean(0))
    return found


@pytest.mark.parametrize("method", [m for m in rivals.SEARCHES if m != "quaver"])
def test_rivals_keep_what_the_layer_computes_but_for_rounding(layer: DecoderLayer, method: str) -> None:
    moments, errors = _moments(layer), {}
    for name in ("nearest", method):
        with torch.no_grad():
            found = rivals.SEARCHES[name](copy.deepcopy(layer).float(), moments, torch.float32)
            total = 0.0
            for group in GROUPS:
                second = moments[group.name].second
                for linear in group.linears:
                    folded = found.layer.get_parameter(f"{linear}.weight")
                    inputs = _scale(layer, found.layer, group.before, len(second))
                    wrong = (found.weights[linear].dequantize() - folded) / inputs
                    whole = row_errors(folded / inputs, second).sum()
                    total += float(row_errors(wrong, second).sum() / whole)
            errors[name] = total
    assert errors[method] < {"nearest": 1.01, "hqq": 1.3, "gptq": 0.8, "awq": 0.95}[method] * errors["nearest"]


def _scale(before: DecoderLayer, after: DecoderLayer, name: str, n_inputs: int) -> torch.Tensor:
    """By what the inputs after the module ``name`` were multiplied."""
    old, new = (one.get_parameter(f"{name}.weight").float() for one in (before, after))
    if len(old) != n_inputs:
        return torch.ones(n_inputs)
    return old / new if old.dim() == 1 else (old / new).nanmedian(1).values


def test_half_quadratic_zero_points_cost_nothing_when_rounded() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 2 * GROUP)
    weight[:, 5] += 9.0
    error, plain = ((f(weight).dequantize() - weight).abs().mean() for f in (rivals.half_quadratic, nearest))
    assert error < 1.02 * plain


def test_figures_of_the_same_opinion_are_nothing_and_grow_with_the_distance() -> None:
    torch.manual_seed(0)

    def answer(noise: float) -> quality.Answer:
        torch.manual_seed(1)
        first, rest, hidden = torch.randn(6, 9), torch.randn(5, 3, 8), torch.randn(6, 4)
        torch.manual_seed(2)
        moved = (x + noise * torch.randn_like(x) for x in (first, rest))
        opinion = validate.Opinion(*(x.log_softmax(-1) for x in moved))
        return opinion, hidden + noise * torch.randn(6, 4)

    sums, counts = quality.differences(answer(0.0), answer(0.0))
    np.testing.assert_allclose((sums / counts)[[0, 1, 2, 3, 4]], [0.0, 100.0, 0.0, 0.0, 0.0], atol=1e-5)
    near, far = (np.divide(*quality.differences(answer(0.0), answer(noise))) for noise in (0.1, 1.0))
    assert (near[[0, 2, 3]] < far[[0, 2, 3]]).all()
    low, high = quality.interval(np.stack([sums, sums]), np.stack([counts, counts]))
    np.testing.assert_allclose(low, high)
    table = quality.markdown({"ours": {name: [1.0, 0.5, 2.0] for name in quality.FIGURES}})
    assert "| ours | 1 (0.5 to 2) |" in table
