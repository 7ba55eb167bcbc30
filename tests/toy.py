"""Toy checkpoints: the true architecture at tiny widths, random weights, built in well under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from quaver import awq
from quaver.awq_search import nearest
from quaver.checkpoint import Checkpoint, Step
from quaver.model.homes import LAYERS
from quaver.model.layers import GROUPS
from random_model import random_checkpoint

N_CODES = 64
"""Codes in each codebook of a toy."""

_FIRST_CONTROL = N_CODES
STOP_ID = _FIRST_CONTROL + 2


def settings(kind: str = "base", **changes: Any) -> dict[str, Any]:
    """config.json of a toy model of type ``kind``; ``changes`` replace keys of talker_config."""
    control = _FIRST_CONTROL
    languages = {"chinese": control + 20, "english": control + 21, "spanish": control + 22}
    talker: dict[str, Any] = {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": N_CODES + 1024,
        "num_code_groups": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": {"interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default", "type": "default"},
        "text_hidden_size": 64,
        "text_vocab_size": 320,
        "codec_bos_id": control + 1,
        "codec_eos_token_id": control + 2,
        "codec_think_id": control + 3,
        "codec_nothink_id": control + 4,
        "codec_think_bos_id": control + 5,
        "codec_think_eos_id": control + 6,
        "codec_pad_id": control + 7,
        "codec_language_id": languages,
        "spk_id": {},
        "spk_is_dialect": {},
        "code_predictor_config": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": N_CODES,
            "num_code_groups": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
        },
    }
    if kind == "custom_voice":
        talker["codec_language_id"] = {**languages, "beijing_dialect": control + 30}
        talker["spk_id"] = {"anna": control + 40, "dylan": control + 41}
        talker["spk_is_dialect"] = {"anna": False, "dylan": "beijing_dialect"}
    talker |= changes
    value: dict[str, Any] = {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": "toy",
        "tts_model_type": kind,
        "assistant_token_id": 263,
        "im_start_token_id": 272,
        "im_end_token_id": 273,
        "tts_pad_token_id": 274,
        "tts_bos_token_id": 275,
        "tts_eos_token_id": 276,
        "talker_config": talker,
    }
    if kind == "base":
        value["speaker_encoder_config"] = {
            "enc_dim": talker["hidden_size"],
            "sample_rate": 24000,
            "enc_channels": [32, 32, 32, 32, 96],
            "enc_se_channels": 16,
            "enc_attention_channels": 16,
        }
    return value


def never_stop(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """An edit that takes the stop id's row from the head: a random model would stop after a few frames."""
    if name == "talker.codec_head.weight":
        tensor = tensor.clone()
        tensor[STOP_ID] = 0
    return {name: tensor}


def codec_settings() -> dict[str, Any]:
    """speech_tokenizer/config.json of a toy codec: the true rates, tiny widths."""
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": 16,
        "input_sample_rate": 24000,
        "output_sample_rate": 24000,
        "decode_upsample_rate": 1920,
        "encode_downsample_rate": 1920,
        "decoder_config": {
            "latent_dim": 32, "codebook_dim": 32, "codebook_size": N_CODES, "decoder_dim": 32, "hidden_size": 32,
            "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "num_quantizers": 16, "sliding_window": 72, "upsample_rates": [8, 5, 4, 3],
            "upsampling_ratios": [2, 2], "rms_norm_eps": 1e-5, "rope_theta": 10000, "hidden_act": "silu",
            "layer_scale_initial_scale": 0.01, "max_position_embeddings": 8000,
        },
        "encoder_config": {
            "codebook_dim": 16, "codebook_size": N_CODES, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
            "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_filters": 4,
            "num_quantizers": 16, "num_residual_layers": 1, "num_semantic_quantizers": 1, "sliding_window": 250,
            "upsampling_ratios": [8, 6, 5, 4], "vector_quantization_hidden_dimension": 16, "upsample_groups": 32,
            "hidden_act": "gelu", "norm_eps": 1e-5, "max_position_embeddings": 8000,
            "layer_scale_initial_scale": 0.01, "use_causal_conv": True, "pad_mode": "constant",
        },
    }  # fmt: skip


def checkpoint(out: Path, kind: str = "base", seed: int = 0, **changes: Any) -> Path:
    """A toy checkpoint of type ``kind`` in the new folder ``out``; ``changes`` replace keys of talker_config."""
    return random_checkpoint(out, settings(kind, **changes), codec_settings(), seed)


def rounded(source: str | Path, out: Path) -> Checkpoint:
    """``source`` with its talker's linears rounded to INT4, written to the new folder ``out``: quick to make."""
    checkpoint = Checkpoint.open(source)
    linears = {
        f"{LAYERS}.{index}.{linear}"
        for index in range(checkpoint.config.talker_config.num_hidden_layers)
        for group in GROUPS
        for linear in group.linears
    }

    def edit(name: str, tensor: Tensor) -> dict[str, Tensor]:
        module = name.removesuffix(".weight")
        if module not in linears:
            return {name: tensor}
        return {f"{module}.{kind}": value for kind, value in nearest(tensor.float()).tensors().items()}

    return checkpoint.edit(Step("round"), edit, {"quantization_config": awq.settings()}).save(out)
