"""A checkpoint of any configuration with random weights: for measuring speed, memory and sizes, never for listening.

    python bench/random_model.py CONFIG.json CODEC_CONFIG.json -o OUT [--seed 0] [--int4]

The layout is the official one, byte-level tokenizer included, so that every verb opens it. With --int4 the talker's
linears are random integers of 4 bits, which takes seconds where quantizing takes minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver import awq
from quaver.checkpoint import WEIGHTS, write_tensors
from quaver.config import CodecConfig, ModelConfig, parse
from quaver.files import check_new
from quaver.int4 import GROUP
from quaver.model.codec_encoder import Codec
from quaver.model.tts import shapes
from quaver.provenance import CODEC

MERGED_WORDS = ("assistant", "user", "system")
"""The role words must be one token each: the official prompt cuts ids at fixed places."""


def random_checkpoint(out: Path, settings: Mapping[str, Any], codec_settings: Mapping[str, Any], seed: int = 0) -> Path:
    """Writes a random checkpoint of the configurations to the new folder ``out`` and returns it.

    What ``settings`` say is quantized is random integers.
    """
    out = check_new(out)
    config = parse(ModelConfig, dict(settings), "settings")
    codec_config = parse(CodecConfig, dict(codec_settings), "codec_settings")
    aside = out.with_name(f".{out.name}.partial")
    (aside / CODEC).mkdir(parents=True)
    try:
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16
        write_tensors(aside / WEIGHTS, _random(shapes(config), dtype, generator), len(shapes(config)))
        with torch.device("meta"):
            codec = dict(Codec(codec_config).state_dict())
        write_tensors(aside / CODEC / WEIGHTS, _random_codec(codec, generator), len(codec))
        _write_json(aside / "config.json", settings)
        _write_json(aside / CODEC / "config.json", codec_settings)
        rate = codec_config.input_sample_rate
        _write_json(
            aside / CODEC / "preprocessor_config.json",
            {
                "chunk_length_s": None, "feature_extractor_type": "EncodecFeatureExtractor", "feature_size": 1,
                "overlap": None, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True,
                "sampling_rate": rate,
            },
        )  # fmt: skip
        _write_json(aside / "generation_config.json", {"do_sample": True, "temperature": 0.9, "max_new_tokens": 2048})
        write_tokenizer(aside, config)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Writes a byte-level Qwen2 tokenizer that merges the role words alone, special tokens at their configured ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in MERGED_WORDS:
        for end in range(2, len(word) + 1):
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            vocabulary.setdefault(word[:end], len(vocabulary))
    special = {
        config.im_start_token_id: "<|im_start|>",
        config.im_end_token_id: "<|im_end|>",
        config.tts_pad_token_id: "<tts_pad>",
        config.tts_bos_token_id: "<tts_text_bos>",
        config.tts_eos_token_id: "<tts_text_eod>",
    }
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {
        str(index): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for index, token in sorted(special.items())
    }  # fmt: skip
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "pad_token": "<|im_end|>",
         "eos_token": "<|im_end|>", "unk_token": None, "bos_token": None, "add_prefix_space": False},
    )  # fmt: skip


def _random(
    wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in wanted.items():
        if name.endswith(".qweight"):
            yield name, torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        elif name.endswith(".qzeros"):
            # Every zero point is 8, in the middle of the levels.
            yield name, torch.full(shape, -0x77777778, dtype=torch.int32)
        elif name.endswith(".scales"):
            # 16 levels spread evenly have a deviation of 4.6 steps.
            yield name, torch.full(shape, (GROUP * shape[0]) ** -0.5 / 4.6, dtype=torch.float16)
        elif len(shape) == 1 and "norm" in name:
            yield name, torch.ones(shape, dtype=dtype)
        else:
            fan_in = max(1, int(torch.Size(shape[1:]).numel()))
            scale = 0.5 if "embedding" in name else fan_in**-0.5
            yield name, (torch.randn(shape, generator=generator) * scale).to(dtype)


def _random_codec(wanted: Mapping[str, Tensor], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, like in wanted.items():
        if name.endswith("initialized"):
            yield name, torch.ones(like.shape)
        elif name.endswith("cluster_usage"):
            yield name, torch.rand(like.shape, generator=generator) + 0.5
        elif like.dim() == 1 and "norm" in name and name.endswith("weight"):
            yield name, torch.ones(like.shape)
        elif name.endswith("gamma") or "layer_scale" in name:
            yield name, torch.full(like.shape, 0.1)
        else:
            # A little under unit gain: at unit gain the samples overshoot a thousandfold, and with them every rounding.
            fan_in = max(1, int(torch.Size(like.shape[1:]).numel()))
            scale = 0.1 if like.dim() == 1 else 0.7 * fan_in**-0.5
            yield name, torch.randn(like.shape, generator=generator) * scale


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("codec_config", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int4", action="store_true", help="the talker's linears in INT4")
    asked = parser.parse_args()
    settings, codec = json.loads(asked.config.read_text()), json.loads(asked.codec_config.read_text())
    if asked.int4:
        settings["quantization_config"] = awq.settings()
    print(random_checkpoint(asked.out, settings, codec, asked.seed))


if __name__ == "__main__":
    main()
