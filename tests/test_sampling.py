"""Sampling is a pure function: of the right distribution, and of its counters alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quaver.errors import RecipeError
from quaver.sampling import Sampling, distribution, draw, uniforms


def test_uniforms_are_uniform_and_independent():
    """Odds of a false alarm: the bounds are five standard deviations, so below one in a million each."""
    block = torch.stack([uniforms(torch.arange(200), frame, 16) for frame in range(50)])
    n = block.numel()
    assert block.min() > 0
    assert block.max() < 1
    assert abs(block.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    histogram = torch.histc(block, 64, 0, 1)
    assert ((histogram - n / 64) ** 2 / (n / 64)).sum() < 64 + 5 * (2 * 64) ** 0.5
    centred = block - 0.5
    for axis in range(3):
        a, b = centred.narrow(axis, 0, block.shape[axis] - 1), centred.narrow(axis, 1, block.shape[axis] - 1)
        assert abs((a * b).mean() * 12) < 5 / a.numel() ** 0.5
    assert len(block.unique()) > 0.98 * n


def test_golden_uniforms():
    """The numbers are part of what a seed means: a change here changes every user's speech."""
    found = uniforms(torch.tensor([0, 1729, -1, 2**40 + 7]), 3, 2)
    expected = [[0.06462678, 0.9633075], [0.43074408, 0.61368465], [0.91341078, 0.09439936], [0.84830427, 0.8111037]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.2, 2), st.integers(0, 30), st.floats(0.05, 1))
def test_draws_follow_the_distribution(seed, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    probs, ids = distribution(torch.randn(1, 30, generator=generator) * 2, Sampling(temperature, top_k, top_p))
    assert torch.isclose(probs.sum(), torch.tensor(1.0), atol=1e-5)
    assert ids.unique().numel() == ids.numel()
    n = 4000
    points = (torch.arange(n) + 0.5) / n
    drawn = draw(probs.expand(n, -1), ids.expand(n, -1), points)
    counts = torch.zeros(30).scatter_add_(0, drawn, torch.ones(n)) / n
    exact = torch.zeros(30).scatter_(0, ids[0], probs[0])
    assert (counts - exact).abs().max() < 2 / n
    assert (counts[exact == 0] == 0).all()


def test_the_last_candidate_is_not_overrun():
    probs, ids = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[5, 6, 7]])
    assert draw(probs, ids, torch.tensor([1.0 - 2**-25]))[0] == 6


def test_knobs_matter_and_bans_hold():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(1, 20, dtype=torch.bool)
    best = int(logits.argmax())
    seen[0, best] = True
    probs, ids = distribution(logits, Sampling(1, 0, 1, penalty=1.5), seen=seen)
    plain, plain_ids = distribution(logits, Sampling(1, 0, 1, penalty=1.0), seen=seen)
    assert probs[ids == best] < plain[plain_ids == best]
    banned = torch.zeros(20, dtype=torch.bool)
    banned[best] = True
    probs, ids = distribution(logits, Sampling(top_k=0), banned=banned)
    assert probs[ids == best] == 0
    _, greedy = distribution(logits, Sampling(temperature=0), banned=banned)
    assert greedy[0, 0] != best


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"penalty": 0}],
)
def test_knobs_out_of_range(knobs):
    name = next(iter(knobs))
    with pytest.raises(RecipeError, match=f"{name} is"):
        Sampling(**knobs)
