"""The sizes of the small voice, in the published configuration files' own terms, and how its parts were trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quaver.config import CodecConfig, parse

N_CODEBOOKS = 16
N_CODES = 512
SAMPLES_PER_FRAME = 1920

CODEC: dict[str, Any] = {
    "architectures": ["Qwen3TTSTokenizerV2Model"],
    "model_type": "qwen3_tts_tokenizer_12hz",
    "encoder_valid_num_quantizers": N_CODEBOOKS,
    "input_sample_rate": 24000,
    "output_sample_rate": 24000,
    "decode_upsample_rate": SAMPLES_PER_FRAME,
    "encode_downsample_rate": SAMPLES_PER_FRAME,
    "decoder_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "codebook_dim": 128,
        "codebook_size": N_CODES,
        "decoder_dim": 384,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 512,
        "latent_dim": 256,
        "layer_scale_initial_scale": 0.1,
        "max_position_embeddings": 8000,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_quantizers": N_CODEBOOKS,
        "num_semantic_quantizers": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000,
        "semantic_codebook_size": N_CODES,
        "sliding_window": 72,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
        "vector_quantization_hidden_dimension": 64,
    },
    "encoder_config": {
        "_frame_rate": 12.5,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "audio_channels": 1,
        "codebook_dim": 64,
        "codebook_size": N_CODES,
        "compress": 2,
        "dilation_growth_rate": 2,
        "dtype": "float32",
        "head_dim": 64,
        "hidden_act": "gelu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "kernel_size": 7,
        "last_kernel_size": 3,
        "layer_scale_initial_scale": 0.1,
        "max_position_embeddings": 8000,
        "norm_eps": 1e-05,
        "normalize": False,
        "num_attention_heads": 4,
        "num_filters": 24,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "num_quantizers": N_CODEBOOKS,
        "num_residual_layers": 1,
        "num_semantic_quantizers": 1,
        "pad_mode": "constant",
        "residual_kernel_size": 3,
        "rope_theta": 10000.0,
        "sampling_rate": 24000,
        "sliding_window": 250,
        "trim_right_ratio": 1.0,
        "upsample_groups": 256,
        "upsampling_ratios": [8, 6, 5, 4],
        "use_cache": False,
        "use_causal_conv": True,
        "use_conv_shortcut": False,
        "use_streaming": False,
        "vector_quantization_hidden_dimension": 64,
    },
    "transformers_version": "4.57.3",
}


def codec_config() -> CodecConfig:
    """The small codec's configuration."""
    return parse(CodecConfig, CODEC, "training/recipe.py: CODEC")


@dataclass(frozen=True, slots=True)
class CodecRecipe:
    """How the codec is trained; seconds are of wall clock, since GPU time is what is scarce."""

    batch: int = 6
    n_frames: int = 40
    lr: float = 6e-4
    discriminator_lr: float = 4e-4
    warmup_s: float = 45.0
    adversarial_ramp_s: float = 20.0
    total_s: float = 540.0
    mel_weight: float = 15.0
    adversarial_weight: float = 2.0
    matching_weight: float = 6.0
    commitment_weight: float = 4.0
    ema_decay: float = 0.9995
    seed: int = 1729
