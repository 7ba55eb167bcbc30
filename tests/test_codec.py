"""The codec: a stream equals the whole, shapes follow from the configuration, both ways train."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quaver.config import CodecConfig, CodecDecoderConfig, CodecEncoderConfig, read_codec_config
from quaver.errors import CheckpointError
from quaver.model.codec import CodecDecoder
from quaver.model.codec_encoder import Codec, CodecEncoder
from quaver.model.snake import SnakeBeta

PUBLISHED = Path(__file__).parent / "oracle" / "published"
WINDOW = 72
# The float64 law is the sharp one; in float32 the sums of a short and of a long convolution are rounded differently.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}
DECODER = CodecDecoderConfig(
    latent_dim=16,
    codebook_dim=16,
    codebook_size=32,
    decoder_dim=32,
    hidden_size=24,
    intermediate_size=32,
    head_dim=8,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    num_quantizers=4,
    sliding_window=WINDOW,
    upsample_rates=(3, 2),
    upsampling_ratios=(2,),
    layer_scale_initial_scale=0.5,
)
ENCODER = CodecEncoderConfig(
    codebook_dim=8,
    codebook_size=32,
    hidden_size=16,
    intermediate_size=32,
    head_dim=4,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=4,
    num_filters=4,
    num_quantizers=6,
    num_residual_layers=1,
    num_semantic_quantizers=1,
    sliding_window=250,
    upsampling_ratios=(3, 2),
    vector_quantization_hidden_dimension=8,
)
CODEC = CodecConfig(DECODER, ENCODER, 4, decode_upsample_rate=12, encode_downsample_rate=12)


def _decoder(config: CodecDecoderConfig = DECODER) -> CodecDecoder:
    torch.manual_seed(0)
    decoder = CodecDecoder(config).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)  # starts at 1e-6, which would hide the block
            if "_proj" in name:
                parameter.mul_(3.0)  # attention that prefers some frames to others
    return decoder


def _codes(batch: int, n_frames: int, config: CodecDecoderConfig = DECODER) -> Tensor:
    generator = torch.Generator().manual_seed(n_frames)
    return torch.randint(config.codebook_size, (batch, config.num_quantizers, n_frames), generator=generator)


def _cuts(n_frames: int, seed: int) -> list[int]:
    """Random lengths that sum to ``n_frames``: single frames, empty pushes, and pieces beyond the window."""
    draw, cuts = random.Random(seed), []
    while (left := n_frames - sum(cuts)) > 0:
        cuts.append(min(left, draw.choice([0, 1, 1, 2, 3, 7, 20, WINDOW - 1, WINDOW, WINDOW + 1, 100])))
    return cuts


@pytest.mark.parametrize(("dtype", "atol"), TOLERANCES.items(), ids=["float64", "float32"])
@pytest.mark.parametrize("seed", [None, *range(8)])
def test_any_chunking_of_the_stream_is_the_whole(seed: int | None, dtype: torch.dtype, atol: float) -> None:
    cuts = [1] * 80 if seed is None else _cuts(200, seed)
    decoder, codes = _decoder().to(dtype), _codes(1, sum(cuts))
    with torch.no_grad():
        whole = decoder(codes)[0]
    assert whole.std() > 0.05 and (whole.abs() == 1).float().mean() < 0.1, "the comparison would say nothing"
    stream = decoder.stream(recorded=seed in (None, 0))
    pieces = [stream.push(piece) for piece in codes[0].T.split(cuts)]
    assert [len(piece) for piece in pieces] == [12 * n for n in cuts]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=atol)


@pytest.mark.parametrize(("dtype", "atol"), TOLERANCES.items(), ids=["float64", "float32"])
def test_the_stream_is_exact_at_the_published_rates(dtype: torch.dtype, atol: float) -> None:
    config = dataclasses.replace(DECODER, upsample_rates=(8, 5, 4, 3), upsampling_ratios=(2, 2), sliding_window=5)
    decoder, codes = _decoder(config).to(dtype), _codes(1, 17, config)
    with torch.no_grad():
        whole = decoder(codes)[0]
    stream = decoder.stream()
    pieces = torch.cat([stream.push(piece) for piece in codes[0].T.split([1, 4, 6, 1, 5])])
    assert len(pieces) == 1920 * 17
    torch.testing.assert_close(pieces, whole, rtol=0, atol=atol)


def test_a_frame_is_heard_as_long_as_windows_and_convolutions_reach() -> None:
    # In float32 the last that moves is below rounding on some processors and above on others.
    decoder, codes = _decoder().double(), _codes(1, 190)
    other = codes.clone()
    other[:, :, 0] = (codes[:, :, 0] + 1) % DECODER.codebook_size
    with torch.no_grad():
        moved = (decoder(codes) - decoder(other)).abs().flatten()
    attention = DECODER.num_hidden_layers * (WINDOW - 1)
    convolutions = 2 + 6 / 2 + 6 / 2 + 1 / 2 + 78 / 6 + 1 / 6 + 78 / 12 + 6 / 12
    reach = round(12 * (1 + attention + convolutions))
    assert moved[: 12 * (attention + 2)].min() > 0
    assert moved[reach - 1] > 0 and moved[reach:].max() == 0


def test_a_batched_stream_is_its_rows() -> None:
    decoder, codes = _decoder(), _codes(3, 90)
    batched = decoder.stream(batch=3)
    together = torch.cat([batched.push(piece) for piece in codes.transpose(1, 2).split([40, 1, 49], 1)], 1)
    for row, samples in zip(codes, together, strict=True):
        torch.testing.assert_close(samples, decoder.stream().push(row.T), rtol=0, atol=TOLERANCES[torch.float32])


def test_reset_forgets() -> None:
    stream, codes = _decoder().stream(), _codes(1, 80)[0].T
    first = stream.push(codes)
    assert not torch.equal(stream.push(codes), first)
    stream.reset()
    assert torch.equal(stream.push(codes), first)


def test_decoding_does_not_look_ahead() -> None:
    decoder, codes = _decoder(), _codes(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(
            decoder(codes[..., :11]), decoder(codes)[:, : 11 * 12], rtol=0, atol=TOLERANCES[torch.float32]
        )


@pytest.mark.parametrize("n_samples", [1, 5, 6, 11, 12, 13, 24, 25, 1000])
def test_encoder_gives_a_frame_for_every_begun_twelve_samples(n_samples: int) -> None:
    encoder = CodecEncoder(ENCODER, n_codebooks=4)
    samples = torch.randn(2, n_samples)
    codes = encoder.encode(samples)
    assert codes.shape == (2, 4, -(-n_samples // encoder.samples_per_frame)) and codes.dtype == torch.long
    assert codes.min() >= 0 and codes.max() < ENCODER.codebook_size
    assert encoder.latents(samples).shape == (2, ENCODER.hidden_size, codes.shape[2])


def test_encoding_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    encoder, samples = CodecEncoder(ENCODER, n_codebooks=4), torch.randn(1, 240)
    torch.testing.assert_close(encoder.latents(samples[:, :120]), encoder.latents(samples)[..., :10])


def test_each_acoustic_code_is_the_nearest_to_what_is_left() -> None:
    torch.manual_seed(0)
    quantizer = CodecEncoder(ENCODER, n_codebooks=6).quantizer
    latents = torch.randn(2, ENCODER.hidden_size, 9)
    codes = quantizer.encode(latents, 6)
    semantic = quantizer.semantic.input_proj(latents).transpose(1, 2)
    left = quantizer.acoustic.input_proj(latents).transpose(1, 2)
    books = [*quantizer.semantic.codebooks, *quantizer.acoustic.codebooks]
    for i, book in enumerate(books):
        target = semantic if i == 0 else left
        distances = (target[:, :, None] - book.embedding).square().sum(-1)
        assert torch.equal(codes[:, i], distances.argmin(-1))
        if i:
            left = left - book.embedding[codes[:, i]]
    both = quantizer.semantic.decode(codes[:, :1]) + quantizer.acoustic.decode(codes[:, 1:])
    assert torch.equal(quantizer.decode(codes), both)


def test_decoder_latents_are_what_its_codebooks_hold() -> None:
    decoder, codes = _decoder(), _codes(2, 5)
    with torch.no_grad():
        for book in decoder.quantizer.rvq_rest.vq.codebooks:
            book.cluster_usage.uniform_(0, 3)
        latents = decoder.quantizer.decode(codes)
        first, rest = decoder.quantizer.rvq_first, decoder.quantizer.rvq_rest
        summed = sum(book.embedding[codes[:, i + 1]] for i, book in enumerate(rest.vq.codebooks))
        semantic = first.output_proj(first.vq.codebooks[0].embedding[codes[:, 0]].transpose(1, 2))
        torch.testing.assert_close(latents, semantic + rest.output_proj(summed.transpose(1, 2)))
        torch.testing.assert_close(decoder.from_latents(latents), decoder(codes))


def test_both_ways_train() -> None:
    torch.manual_seed(0)
    codec, samples = Codec(CODEC), torch.randn(2, 240)
    latents = codec.encoder.latents(samples)
    assert latents.shape[1] == DECODER.codebook_dim
    codec.decoder.from_latents(latents).square().sum().backward()
    silent = [name for name, parameter in codec.named_parameters() if parameter.grad is None]
    assert all("quantizer" in name for name in silent)  # bypassed here
    assert codec.encoder.encoder.layers[0].conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    codec, exact = Codec(CODEC).eval(), None
    codes, samples = _codes(1, 80), 0.3 * torch.randn(1, 500)
    with torch.no_grad():
        exact, latents = codec.decoder(codes), codec.encoder.latents(samples)
        codec.to(dtype)
        near = codec.decoder(codes)
        assert near.dtype == dtype and (near - exact).abs().max() <= 0.05
        assert (codec.encoder.latents(samples.to(dtype)) - latents).abs().max() <= 0.1 * latents.abs().max()
        assert codec.encoder.encode(samples.to(dtype)).shape == (1, 4, 42)
        stream = codec.decoder.stream()
        streamed = torch.cat([stream.push(piece) for piece in codes[0].T.split(33)])
        assert streamed.dtype == dtype and (streamed - exact[0]).abs().max() <= 0.05


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        codec = Codec(read_codec_config(PUBLISHED / "speech_tokenizer-config.json"))
    stored = json.loads((PUBLISHED / "tensors-speech-tokenizer.json").read_text())
    assert len(stored) == 496
    assert {name: list(tensor.shape) for name, tensor in codec.state_dict().items()} == {
        name: shape for name, (_, shape) in stored.items()
    }
    assert sum(tensor.numel() for tensor in codec.state_dict().values()) == 170_557_441


def test_autocast_training_step() -> None:
    torch.manual_seed(0)
    codec, samples = Codec(CODEC), 0.3 * torch.randn(2, 240)
    with torch.autocast("cpu", torch.bfloat16):
        latents = codec.encoder.latents(samples)
        quantized = latents + (codec.encoder.quantizer.decode(codec.encoder.encode(samples)) - latents).detach()
        loss = codec.decoder.from_latents(quantized).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in codec.parameters() if p.grad is not None)


def test_meta_build_takes_any_width_at_once() -> None:
    with torch.device("meta"):
        codec = Codec(CODEC)
    stored = codec.state_dict()
    assert all(tensor.is_meta for tensor in stored.values())
    assert set(stored) == {*dict(codec.named_parameters()), *dict(codec.named_buffers())}, "a buffer would stay on meta"
    ready = Codec(CODEC)
    codec.load_state_dict(ready.state_dict(), assign=True)
    assert torch.equal(codec.decoder(_codes(1, 3)), ready.decoder(_codes(1, 3)))


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        (None, {"decode_upsample_rate": 1920}, "decode_upsample_rate"),
        (None, {"encode_downsample_rate": 1920}, "encode_downsample_rate"),
        (None, {"encoder_valid_num_quantizers": 5}, "encoder_valid_num_quantizers"),
        (None, {"encoder_valid_num_quantizers": 7}, "num_quantizers"),
        ("encoder_config", {"codebook_size": 64}, "codebook_size"),
        ("encoder_config", {"codebook_dim": 4}, "codebook_dim"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(part: str | None, changes: Any, said: str) -> None:
    inner = {part: dataclasses.replace(getattr(CODEC, part), **changes)} if part else changes
    with pytest.raises(CheckpointError, match=said), torch.device("meta"):
        Codec(dataclasses.replace(CODEC, **inner))


def test_what_a_snake_keeps_follows_its_weights():
    snake, x = SnakeBeta(3).requires_grad_(False), torch.randn(1, 3, 5)

    def expected():
        return x + torch.sin(snake.alpha.exp()[:, None] * x) ** 2 / snake.beta.exp()[:, None]

    with torch.inference_mode():
        assert torch.allclose(snake(x), expected())
    snake.load_state_dict({"alpha": torch.randn(3), "beta": torch.randn(3)})
    assert torch.allclose(snake(x), expected())
    snake.double()
    x = x.double()
    assert torch.allclose(snake(x), expected())
    snake.requires_grad_(True)
    snake(x).sum().backward()
    assert snake.alpha.grad is not None
    assert snake.beta.grad is not None
