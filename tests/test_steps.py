"""Recorded steps come to what a decoder comes to, however unevenly the rows stand; on a GPU too where there is one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import toy
from quaver.model.layers import KVCache, attend_once
from quaver.model.steps import RecordedSteps
from quaver.model.tts import TTS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTHS = {"uneven": [3, 7, 1, 5], "even": [4, 4, 4, 4]}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return toy.checkpoint(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=5)


def begun(decoder, lengths, capacity):
    """A cache of rows that have heard prompts of ``lengths``, and what the model goes on with."""
    torch.manual_seed(0)
    like = decoder.norm.weight
    x = torch.randn(len(lengths), max(lengths), decoder.config.hidden_size).to(like)
    cache = KVCache(decoder.config, len(lengths), capacity, x)
    decoder(x, cache, torch.tensor(lengths, device=x.device))
    return cache, torch.randn(6, len(lengths), 1, decoder.config.hidden_size).to(like)


def away(found, expected):
    return float((found - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@torch.inference_mode()
def test_recorded_steps_come_to_what_the_decoder_comes_to(deep, lengths, dtype, device):
    plain, visits = (TTS.load(deep, device=device, dtype=dtype, room_bytes=room).talker.model for room in (1 << 40, 0))
    near = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for decoder in (plain, visits):
        cache, steps = begun(plain, lengths, 19)
        other, _ = begun(decoder, lengths, 19)
        recorded = RecordedSteps(decoder, other)
        for x in steps:
            assert away(recorded(x), plain(x, cache)) < near
        assert other.lengths.tolist() == cache.lengths.tolist() == [len(steps) + length for length in lengths]
        # The decoder itself can go on from there.
        assert away(decoder(steps[0], other), plain(steps[0], cache)) < near


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_cache_goes_with_its_steps_before_garbage_is_collected(deep, device):
    decoder = TTS.load(deep, device=device, dtype=torch.bfloat16, room_bytes=0).talker.model
    gc.disable()
    try:
        cache, steps = begun(decoder, LENGTHS["uneven"], 19)
        recorded = RecordedSteps(decoder, cache)
        for x in steps:
            recorded(x)
        gone = weakref.ref(cache)
        del cache, recorded
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("device", DEVICES)
def test_heads_that_share_keys_attend_as_if_they_were_repeated(device):
    torch.manual_seed(0)
    q = torch.randn(3, 6, 1, 8, device=device)
    keys, values = torch.randn(2, 3, 2, 21, 8, device=device)
    mask = (torch.arange(21, device=device) < torch.tensor([21, 4, 1], device=device)[:, None])[:, None, None]
    repeated = [one.repeat_interleave(3, dim=1) for one in (keys, values)]
    scores = (q @ repeated[0].transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    assert torch.allclose(attend_once(q, keys, values, mask), scores.softmax(-1) @ repeated[1], atol=1e-5)
