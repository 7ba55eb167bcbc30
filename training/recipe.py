"""The sizes of the small voice, in the published configuration files' own terms, and how its parts were trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quaver.config import CodecConfig, SpeakerConfig, parse

N_CODEBOOKS = 16
N_CODES = 384
SAMPLES_PER_FRAME = 1920
N_STEADY = 6
"""How many codebooks, from codebook 1 on, tell nothing of the phase of the voice."""
OWN_TEMPERATURES = 0.05, 0.4
"""At which the code predictor says what the decoder learns to read (`training.own`), least and most: speech has 0.1."""


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
class EncoderRecipe:
    """How the codec's encoder is trained; seconds are of wall clock, since GPU time is what is scarce."""

    batch: int = 32
    n_frames: int = 30
    changed: float = 0.4
    """The share of crops that are slower or faster, and so higher or lower, than the recording."""
    roomy: float = 0.5
    """The share of crops that are heard in rooms and noise, and are to be told as if they were clean."""
    lr: float = 8e-4
    said_weight: float = 0.7
    """The weight of what codebook 0 misses of what is said, against what the others miss of how it sounds."""
    ema_decay: float = 0.998
    total_s: float = 240.0
    seed: int = 1729


@dataclass(frozen=True, slots=True)
class DecoderRecipe:
    """How the codec's decoder is trained, first its first half alone."""

    batch: int = 10
    n_own: int = 4
    """Of them with the talker's own codes, once there are any."""
    n_frames: int = 30
    changed: float = 0.3
    drawn_batch: int = 64
    """Crops in a step while the decoder only draws, and makes no sound."""
    drawn_s: float = 40.0
    drawn_lr: float = 1e-3
    lr: float = 5e-4
    discriminator_lr: float = 4e-4
    adversarial_start_s: float = 5.0
    adversarial_ramp_s: float = 20.0
    total_s: float = 1200.0
    mel_weight: float = 15.0
    low_weight: float = 6.0
    """The weight of the complex spectrum below 500 Hz, where the codes tell the phase."""
    adversarial_weight: float = 2.0
    matching_weight: float = 6.0
    sketch_weight: float = 4.0
    """The weight of what the middle of the decoder misses of what the codes tell."""
    heard_weight: float = 10.0
    """The weight of what is said in a recording and not heard in its copy, as a share of its power."""
    voice_weight: float = 5.0
    """The weight of what is lost of a voice, as one minus a cosine."""
    ema_decay: float = 0.999
    seed: int = 1729


FIRST_CONTROL = N_CODES
"""The last 1,024 talker ids are never sampled but for the stop id: the control ids live there."""

PREDICTOR: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 65536,
    "model_type": "qwen3_tts_talker_code_predictor",
    "num_attention_heads": 4,
    "num_code_groups": N_CODEBOOKS,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": N_CODES,
}


SPEAKER_ENCODER: dict[str, Any] = {
    "enc_attention_channels": 64,
    "enc_channels": [64, 64, 64, 64, 192],
    "enc_dim": 256,
    "enc_res2net_scale": 4,
    "enc_se_channels": 32,
    "sample_rate": 24000,
}


def speaker_config() -> SpeakerConfig:
    """The small speaker encoder's configuration."""
    return parse(SpeakerConfig, SPEAKER_ENCODER, "training/recipe.py: SPEAKER_ENCODER")


def model_settings(special: dict[str, int], assistant: int) -> dict[str, Any]:
    """config.json of the small voice: ``special`` are the tokenizer's control ids, ``assistant`` its role token."""
    base = FIRST_CONTROL
    talker = {
        "attention_bias": False,
        "attention_dropout": 0,
        "code_predictor_config": PREDICTOR,
        "codec_bos_id": base + 101,
        "codec_eos_token_id": base + 102,
        "codec_language_id": {"english": base + 2},
        "codec_nothink_id": base + 107,
        "codec_pad_id": base + 100,
        "codec_think_bos_id": base + 108,
        "codec_think_eos_id": base + 109,
        "codec_think_id": base + 106,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 32768,
        "model_type": "qwen3_tts_talker",
        "num_attention_heads": 4,
        "num_code_groups": N_CODEBOOKS,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "position_id_per_seconds": 13,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000,
        "sliding_window": None,
        "spk_id": {},
        "spk_is_dialect": {},
        "text_hidden_size": 128,
        "text_vocab_size": 1024,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": N_CODES + 1024,
    }
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "assistant_token_id": assistant,
        "im_end_token_id": special["<|im_end|>"],
        "im_start_token_id": special["<|im_start|>"],
        "model_type": "qwen3_tts",
        "speaker_encoder_config": SPEAKER_ENCODER,
        "talker_config": talker,
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "transformers_version": "4.57.3",
        "tts_bos_token_id": special["<tts_text_bos>"],
        "tts_eos_token_id": special["<tts_text_eod>"],
        "tts_model_size": "tiny",
        "tts_model_type": "base",
        "tts_pad_token_id": special["<tts_pad>"],
    }


@dataclass(frozen=True, slots=True)
class VoicesRecipe:
    """How the speaker encoder is trained; seconds are of wall clock."""

    n_classes: int = 24
    """Of sounds, in each of which a voice has its own manner."""
    relevance: float = 16.0
    """So many frames of a class count as said like everybody's."""
    n_axes: int = 64
    loudness: float = 0.5
    """The power of the principal axes' sizes that is left: 1 is as measured, 0 all alike."""
    batch: int = 384
    seconds: float = 3.0
    """Of speech that a voice is told from."""
    lr: float = 1e-3
    warmup_s: float = 3.0
    ema_decay: float = 0.998
    total_s: float = 80.0
    seed: int = 1729


@dataclass(frozen=True, slots=True)
class TalkerRecipe:
    """How talker and code predictor are trained together; seconds are of wall clock."""

    lengths: tuple[int, ...] = (48, 64, 80, 96, 112, 128, 160, 192, 256, 352)
    """To how many positions examples are filled up, prompt and frames together."""
    budget: int = 40_000
    """Positions in a step, padding included."""
    n_rows: int = 384
    """The most examples in a step."""
    n_frames: int = 8192
    """How many frames the code predictor sees in a step."""
    settled: float = 0.75
    """The share of the time after which talker and speaker encoder stay as they are: text is read long before the code
    predictor fits (docs/VOICE.md)."""
    n_frames_settled: int = 16_384
    """How many frames the code predictor sees in a step from then on."""
    lr: float = 2e-3
    vector_noise: float = 0.3
    """On speaker vectors, as a share of them: voices whose vectors are alike are to sound alike."""
    unheard: float = 0.4
    """The share of examples with a reference in context that have no speaker vector."""
    warmup_s: float = 12.0
    weight_decay: float = 0.05
    dropout: float = 0.1
    """Of what each block of the talker adds to the stream."""
    total_s: float = 780.0
    elapsed_s: float = 0.0
    """How much of that an earlier run took that is gone on with."""
    ema_decay: float = 0.999
    weight_noise: float = 0.06
    """Noise on the linears, in their standard deviations: somewhat less than INT4 rounding adds."""
    streamed: float = 0.58
    """The share of examples whose text comes with the speech; in the others it comes first."""
    in_context: float = 0.25
    """The share of examples that begin with another clip of the speaker."""
    unnamed: float = 0.15
    """The share of examples whose prompt leaves the language open."""
    joined: float = 0.25
    """Clips of one speaker are joined to longer ones, this share as many as there are clips."""
    n_joined: int = 150
    """The most frames of joined clips."""
    n_reference: int = 100
    """The most frames of a clip cloned in context."""
    deaf: float = 0.2
    """The share of utterances that hear random codes alone and must be read from the text."""
    coarse: float = 0.3
    """The share of utterances that hear codebook 0 alone, the others random."""
    least_harsh: float = 0.25
    """What is left of the two shares above at the end; they fall in the second half."""
    replaced: float = 0.4
    """The largest share of heard codes that are replaced by any others, in the rest."""
    stop_weight: float = 2.0
    guidance: float = 0.4
    """The weight, falling to none at half time, of two heads' duty to follow the text as the speech goes on."""
    guided_layers: tuple[int, ...] = (1, 2)
    guided_width: float = 0.12
    """How far from the even pace a guided head may look, as a share of the text."""
    eveness: float = 0.4
    """Clips of a speaker with n of them are drawn in proportion to n to the power of minus this."""
    seed: int = 1729
