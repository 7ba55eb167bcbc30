"""The codec, both ways, against the official code with random weights."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quaver.config import CodecConfig, parse
from quaver.model.codec_encoder import Codec

pytestmark = pytest.mark.oracle

TINY_DECODER = {
    "latent_dim": 24,
    "codebook_dim": 16,
    "codebook_size": 32,
    "decoder_dim": 32,
    "hidden_size": 20,
    "intermediate_size": 28,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_quantizers": 4,
    "sliding_window": 5,
    "upsample_rates": [8, 5, 4, 3],
    "upsampling_ratios": [2, 2],
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
}
# num_quantizers is above what is spoken; the window is short, so that the clips below reach far beyond it.
TINY_ENCODER = {
    "codebook_dim": 12,
    "codebook_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "head_dim": 6,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_filters": 4,
    "num_quantizers": 6,
    "num_residual_layers": 1,
    "num_semantic_quantizers": 1,
    "sliding_window": 5,
    "upsampling_ratios": [8, 6, 5, 4],
    "vector_quantization_hidden_dimension": 12,
    "upsample_groups": 24,
    "use_cache": False,
}
TRUE_DECODER = TINY_DECODER | {
    "latent_dim": 1024,
    "codebook_dim": 512,
    "codebook_size": 2048,
    "decoder_dim": 1536,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
    "num_key_value_heads": 16,
    "num_quantizers": 16,
    "sliding_window": 72,
}
TRUE_ENCODER = TINY_ENCODER | {
    "codebook_dim": 256,
    "codebook_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "num_filters": 64,
    "num_quantizers": 32,
    "sliding_window": 250,
    "vector_quantization_hidden_dimension": 256,
    "upsample_groups": 512,
}


@dataclass(frozen=True)
class Pair:
    ours: Codec
    official: Any


def _pair(decoder: Mapping[str, Any], encoder: Mapping[str, Any]) -> Pair:
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model

    fields = {"encoder_valid_num_quantizers": decoder["num_quantizers"]}
    official = Qwen3TTSTokenizerV2Model(
        Qwen3TTSTokenizerV2Config(decoder_config=dict(decoder), encoder_config=dict(encoder), **fields)
    ).eval()
    _randomize(official)
    own = {name: value for name, value in encoder.items() if name != "use_cache"}
    with torch.device("meta"):
        ours = Codec(parse(CodecConfig, {"decoder_config": dict(decoder), "encoder_config": own, **fields}, "test"))
    ours.load_state_dict(official.state_dict(), strict=True, assign=True)
    return Pair(ours.eval(), official)


def _randomize(model: nn.Module) -> None:
    """Random values everywhere, at a scale that carries the codes through every stage to the samples."""
    generator = torch.Generator().manual_seed(1729)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("_sum"):
                tensor.copy_(noise)
                tensor[0] *= 1e-5
            elif tensor.dim() > 1:
                gain = (
                    0.3 if name.endswith("conv2.conv.weight") else 1.6 if name.startswith("encoder.encoder.") else 1.0
                )
                tensor.copy_(gain * noise * (tensor.shape[0] / tensor.numel()) ** 0.5)
            elif name.endswith("cluster_usage"):
                tensor.copy_(0.5 + noise.abs())
                tensor[0] = 0.0  # a code never used: the floor of the count decides its vector
            elif name.endswith(("scale", "gamma")):
                tensor.copy_(0.5 * noise)
            elif tensor.dim() == 1 and not name.endswith("initialized"):
                tensor.add_(0.1 * noise)


@cache
def tiny() -> Pair:
    torch.manual_seed(0)
    return _pair(TINY_DECODER, TINY_ENCODER)


@cache
def true_widths() -> Pair:
    torch.manual_seed(1)
    return _pair(TRUE_DECODER, TRUE_ENCODER)


def _codes(pair: Pair, batch: int, n_frames: int) -> Tensor:
    config = pair.ours.config.decoder_config
    generator = torch.Generator().manual_seed(n_frames)
    return torch.randint(config.codebook_size, (batch, config.num_quantizers, n_frames), generator=generator)


def _sound(batch: int, n_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_samples)
    t = torch.arange(n_samples) / 24000
    tone = torch.sin(2 * torch.pi * (120 + 300 * t) * t) * (0.5 + 0.5 * torch.sin(2 * torch.pi * 2 * t))
    return 0.4 * tone + 0.1 * torch.randn(batch, n_samples, generator=generator)


@torch.no_grad()
def _check_decode(pair: Pair, batch: int, n_frames: int) -> None:
    codes = _codes(pair, batch, n_frames)
    official = pair.official.decoder(codes).squeeze(1)
    ours = pair.ours.decoder(codes)
    scale = official.abs().max()
    assert (official.abs() == 1).float().mean() < 0.2 and official.std() > 0.1, "the comparison would say nothing"
    assert ours.shape == official.shape == (batch, 1920 * n_frames)
    assert (ours - official).abs().max() <= 1e-4 * scale
    stream = pair.ours.decoder.stream(batch)
    pieces = torch.cat([stream.push(piece) for piece in codes.transpose(1, 2).split((n_frames + 1) // 2, 1)], 1)
    assert (pieces - official).abs().max() <= 1e-4 * scale


@torch.no_grad()
def _check_encode(pair: Pair, batch: int, n_samples: int) -> None:
    samples = _sound(batch, n_samples)
    official = torch.stack(
        pair.official.encode(samples, torch.ones_like(samples, dtype=torch.long)).audio_codes
    ).transpose(1, 2)
    ours = pair.ours.encoder.encode(samples)
    assert ours.shape == (batch, pair.ours.config.decoder_config.num_quantizers, -(-n_samples // 1920))
    assert torch.equal(ours, official)


@pytest.mark.parametrize("n_frames", [1, 2, 5, 6, 23])
def test_decode_at_tiny_widths(n_frames: int) -> None:
    _check_decode(tiny(), 2, n_frames)


def test_decode_at_true_widths() -> None:
    _check_decode(true_widths(), 1, 3)


def test_decode_door_of_up_to_300_frames() -> None:
    codes = _codes(tiny(), 2, 40)
    with torch.no_grad():
        official = tiny().official.decode(codes.transpose(1, 2)).audio_values
        ours = tiny().ours.decoder(codes)
    for row, theirs in zip(ours, official, strict=True):
        assert (row - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("n_samples", [1, 959, 1920, 1921, 2880, 3841, 30000, 48001])
def test_encode_at_tiny_widths(n_samples: int) -> None:
    _check_encode(tiny(), 2, n_samples)


def test_encode_at_true_widths() -> None:
    _check_encode(true_widths(), 1, 24001)


def test_encoder_spreads_over_its_codebooks() -> None:
    codes = tiny().ours.encoder.encode(_sound(2, 48001))
    assert all(len(row.unique()) > 3 for row in codes.unbind(1))


@pytest.mark.parametrize("n_samples", [1, 1921, 48001])
def test_latents_and_their_way_back(n_samples: int) -> None:
    pair, samples = tiny(), _sound(2, n_samples)
    mimi = pair.official.encoder
    with torch.no_grad():
        hidden = mimi.encoder_transformer(mimi.encoder(samples[:, None]).transpose(1, 2)).last_hidden_state
        official = mimi.downsample(hidden.transpose(1, 2))
        ours = pair.ours.encoder.latents(samples)
        assert (ours - official).abs().max() <= 1e-4 * official.abs().max()
        codes = pair.ours.encoder.encode(samples)
        back = mimi.quantizer.decode(codes)
        assert (pair.ours.encoder.quantizer.decode(codes) - back).abs().max() <= 1e-4 * back.abs().max()


def test_brain_float_agrees_as_far_as_it_goes() -> None:
    pair, codes = tiny(), _codes(tiny(), 1, 12)
    with torch.no_grad():
        exact = pair.ours.decoder(codes)
        official = deepcopy(pair.official.decoder).bfloat16()(codes).squeeze(1)
        ours = deepcopy(pair.ours.decoder).bfloat16()(codes)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).square().mean() <= 2 * (official.float() - exact).square().mean() + 1e-6


def test_gradients_agree() -> None:
    pair, codes = tiny(), _codes(tiny(), 1, 7)
    pair.ours.decoder(codes).square().sum().backward()
    pair.official.decoder(codes).square().sum().backward()
    theirs = dict(pair.official.decoder.named_parameters())
    difference, size = 0.0, 0.0
    for name, parameter in pair.ours.decoder.named_parameters():
        if ".input_proj.weight" in name and "quantizer" in name:
            assert parameter.grad is None  # the decoder never projects inwards
            continue
        assert parameter.grad is not None and theirs[name].grad is not None, name
        difference += float((parameter.grad - theirs[name].grad).square().sum())
        size += float(theirs[name].grad.square().sum())
    assert 0 < difference**0.5 <= 1e-4 * size**0.5
