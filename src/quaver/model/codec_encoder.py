"""The 12.5 Hz codec's encoder, samples to codes, and the codec as a whole.

Shapes: B batch, T frames, Q codebooks, C channels, L steps, N samples. Weights keep their checkpoint names.
Architecture: Mimi's encoder (Défossez et al. 2024): strided convolutions to 25 Hz, a transformer, a last halving to
12.5 Hz, a semantic codebook and residual acoustic ones, as in the official code.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import CodecConfig, CodecEncoderConfig
from quaver.errors import CheckpointError
from quaver.model.codec import CausalConv, CodecAttention, CodecDecoder, LayerScale, quotient
from quaver.model.layers import Rotary


class StridedConv(nn.Module):
    """A causal downsampling by ``stride`` with kernel ``2 * stride``: [B, C, L] -> [B, C', ceil(L / stride)].

    The end is filled up to a whole step, each stage for itself, so that no sample is dropped.
    """

    def __init__(
        self, channels: int, out: int, stride: int, *, fill: Literal["constant", "replicate"], bias: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, 2 * stride, stride, bias=bias)
        self.stride = stride
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (self.stride, -x.shape[-1] % self.stride), mode=self.fill))
        return out


class ResidualBlock(nn.Module):
    """Two ELU-activated convolutions through a bottleneck, added to the input: [B, C, L] -> [B, C, L]."""

    def __init__(self, config: CodecEncoderConfig, channels: int, dilation: int) -> None:
        super().__init__()
        narrow = channels // config.compress
        wide = CausalConv(channels, narrow, config.residual_kernel_size, dilation)
        self.block = nn.ModuleList([nn.ELU(), wide, nn.ELU(), CausalConv(narrow, channels, 1)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for module in self.block:
            y = module(y)
        return x + y


class ConvEncoder(nn.Module):
    """The convolutions: samples [B, 1, N] to [B, hidden, L] at 25 Hz."""

    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        channels = config.num_filters
        layers: list[nn.Module] = [CausalConv(1, channels, config.kernel_size)]
        for ratio in reversed(config.upsampling_ratios):
            for i in range(config.num_residual_layers):
                layers.append(ResidualBlock(config, channels, config.dilation_growth_rate**i))
            layers += [nn.ELU(), StridedConv(channels, 2 * channels, ratio, fill="constant", bias=True)]
            channels *= 2
        layers += [nn.ELU(), CausalConv(channels, config.hidden_size, config.last_kernel_size)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class GeluMLP(nn.Module):
    """Two linears around an exact GELU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate, bias=False)
        self.fc2 = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class EncoderLayer(nn.Module):
    """Attention and MLP, each after its layer norm, scaled and added to the stream."""

    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        hidden, scale = config.hidden_size, config.layer_scale_initial_scale
        self.input_layernorm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.self_attn = CodecAttention(hidden, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.self_attn_layer_scale = LayerScale(hidden, scale)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.mlp = GeluMLP(hidden, config.intermediate_size)
        self.mlp_layer_scale = LayerScale(hidden, scale)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rotary, None))
        out: Tensor = x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))
        return out


class EncoderTransformer(nn.Module):
    """The causal transformer at 25 Hz: [B, L, hidden] -> [B, L, hidden].

    Every step sees all steps before it. Of the official attention implementations only the optional flash attention
    reads the configuration's ``sliding_window`` (10 s); the default one looks back without a limit, and so do we.
    """

    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = Rotary.at(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary)
        return x


class SearchedCodebook(nn.Module):
    """A codebook that is searched: running sums and counts, whose quotient is the vector of each code."""

    cluster_usage: Tensor
    embed_sum: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("embed_sum", torch.randn(size, dim))

    @property
    def embedding(self) -> Tensor:
        """The vectors [size, dim], in float32 at least."""
        return quotient(self.embed_sum, self.cluster_usage)

    def nearest(self, x: Tensor) -> Tensor:
        """The codes [...] of the vectors nearest to ``x`` [..., dim]."""
        embedding = self.embedding
        distances = torch.cdist(x.reshape(-1, x.shape[-1]).to(embedding.dtype), embedding)
        return distances.argmin(-1).view(x.shape[:-1])

    def forward(self, codes: Tensor) -> Tensor:
        """The vectors of ``codes`` [...], as [..., dim]."""
        sums = F.embedding(codes, self.embed_sum)
        return quotient(sums, self.cluster_usage[codes]).to(sums.dtype)


class SearchedLayer(nn.Module):
    """One step of the residual quantizer, a codebook."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codebook = SearchedCodebook(size, dim)


class ResidualQuantizer(nn.Module):
    """Residual codebooks between an input and an output projection; without projections where the widths agree."""

    def __init__(self, config: CodecEncoderConfig, n_codebooks: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.vector_quantization_hidden_dimension
        self.layers = nn.ModuleList(SearchedLayer(config.codebook_size, dim) for _ in range(n_codebooks))
        self.input_proj: nn.Module = nn.Identity()
        self.output_proj: nn.Module = nn.Identity()
        if hidden != dim:
            self.input_proj = nn.Conv1d(hidden, dim, 1, bias=False)
            self.output_proj = nn.Conv1d(dim, hidden, 1, bias=False)

    @property
    def codebooks(self) -> list[SearchedCodebook]:
        """The codebooks, first to last."""
        return [layer.codebook for layer in self.layers if isinstance(layer, SearchedLayer)]

    def encode(self, latents: Tensor, n_codebooks: int) -> Tensor:
        """The first ``n_codebooks`` codes [B, Q, T] of ``latents`` [B, hidden, T]."""
        residual = self.input_proj(latents).transpose(1, 2)
        codes = []
        for codebook in self.codebooks[:n_codebooks]:
            codes.append(codebook.nearest(residual))
            residual = residual - codebook(codes[-1])
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The latents [B, hidden, T] of ``codes`` [B, Q, T], Q any number of the first codebooks."""
        vectors = [codebook(row) for codebook, row in zip(self.codebooks, codes.unbind(1), strict=False)]
        out: Tensor = self.output_proj(reduce(torch.add, vectors).transpose(1, 2))
        return out


class SplitQuantizer(nn.Module):
    """The semantic codebook and the residual acoustic ones, side by side on the same latents."""

    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        n_semantic = config.num_semantic_quantizers
        self.semantic_residual_vector_quantizer = ResidualQuantizer(config, n_semantic)
        self.acoustic_residual_vector_quantizer = ResidualQuantizer(config, config.num_quantizers - n_semantic)

    @property
    def semantic(self) -> ResidualQuantizer:
        """The quantizer of codebook 0."""
        return self.semantic_residual_vector_quantizer

    @property
    def acoustic(self) -> ResidualQuantizer:
        """The quantizer of the codebooks from 1 on."""
        return self.acoustic_residual_vector_quantizer

    def encode(self, latents: Tensor, n_codebooks: int) -> Tensor:
        """The first ``n_codebooks`` codes [B, Q, T] of ``latents`` [B, hidden, T]."""
        n_semantic = len(self.semantic.layers)
        codes = self.semantic.encode(latents, n_semantic)
        if n_codebooks == n_semantic:
            return codes
        return torch.cat((codes, self.acoustic.encode(latents, n_codebooks - n_semantic)), 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The latents [B, hidden, T] of ``codes`` [B, Q, T], Q any number of the first codebooks."""
        n_semantic = len(self.semantic.layers)
        latents = self.semantic.decode(codes[:, :n_semantic])
        return latents if codes.shape[1] == n_semantic else latents + self.acoustic.decode(codes[:, n_semantic:])


class CodecEncoder(nn.Module):
    """24 kHz samples to codes; names and shapes are the checkpoint's ``encoder.*``.

    ``n_codebooks`` is how many of the codebooks ``encode`` gives: the published model stores 32 and speaks 16.
    Raises CheckpointError when there are fewer, or when the widths of the quantizer disagree.
    """

    def __init__(self, config: CodecEncoderConfig, n_codebooks: int = 16) -> None:
        super().__init__()
        if not config.num_semantic_quantizers < n_codebooks <= config.num_quantizers:
            raise CheckpointError(
                f"codec encoder: {n_codebooks} codebooks are asked of {config.num_quantizers} (num_quantizers)"
            )
        if config.codebook_dim != config.vector_quantization_hidden_dimension:
            raise CheckpointError(
                f"codec encoder: codebook_dim {config.codebook_dim} and vector_quantization_hidden_dimension "
                f"{config.vector_quantization_hidden_dimension} must agree"
            )
        self.config = config
        self.n_codebooks = n_codebooks
        self.encoder = ConvEncoder(config)
        self.encoder_transformer = EncoderTransformer(config)
        self.downsample = StridedConv(config.hidden_size, config.hidden_size, 2, fill="replicate", bias=False)
        self.quantizer = SplitQuantizer(config)

    @property
    def samples_per_frame(self) -> int:
        """How many samples one frame of codes holds: 1,920 in the published model."""
        return 2 * math.prod(self.config.upsampling_ratios)

    def latents(self, samples: Tensor) -> Tensor:
        """The latents [B, hidden, T] of ``samples`` [B, N] before quantization; differentiable, T = ceil(N / 1920)."""
        x = self.encoder(samples[:, None])
        x = self.encoder_transformer(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.downsample(x)
        return out

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """The codes [B, Q, T] of ``samples`` [B, N], N at least 1, T = ceil(N / samples_per_frame).

        Rows must be equally long: a row filled up with silence gets other codes at its end than the row alone.
        """
        assert samples.dim() == 2 and samples.shape[1] > 0, tuple(samples.shape)
        return self.quantizer.encode(self.latents(samples), self.n_codebooks)


class Codec(nn.Module):
    """The speech tokenizer both ways; names and shapes are those of ``speech_tokenizer/model.safetensors``.

    Raises CheckpointError when the two ways, or the rates that the configuration states, do not fit together.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = CodecDecoder(config.decoder_config)
        self.encoder = CodecEncoder(config.encoder_config, config.encoder_valid_num_quantizers)
        for name, stated, built in (
            ("decode_upsample_rate", config.decode_upsample_rate, self.decoder.samples_per_frame),
            ("encode_downsample_rate", config.encode_downsample_rate, self.encoder.samples_per_frame),
            ("encoder_valid_num_quantizers", config.encoder_valid_num_quantizers, config.decoder_config.num_quantizers),
            ("codebook_size", config.encoder_config.codebook_size, config.decoder_config.codebook_size),
        ):
            if stated != built:
                raise CheckpointError(
                    f"codec configuration: {name} is {stated}, but the decoder or encoder has {built}"
                )
