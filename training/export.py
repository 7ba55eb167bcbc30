"""Put the trained parts together as a checkpoint in the official layout.

python -m training.export --codec DECODER/codec --talker TALKER/talker --tokenizer FOLDER --out TINY
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quaver.provenance import PROVENANCE, Provenance, Step
from quaver.text import Tokenizer
from training import data, parts, recipe
from training.talker import settings_of

GENERATION: dict[str, Any] = {
    "do_sample": True,
    "max_new_tokens": 512,
    "repetition_penalty": 1.0,
    "subtalker_dosample": True,
    "subtalker_temperature": 0.1,
    "subtalker_top_k": 50,
    "subtalker_top_p": 1.0,
    "temperature": 0.4,
    "top_k": 50,
    "top_p": 1.0,
}


def write_json(path: Path, value: object) -> None:
    """Writes ``value`` indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def checkpoint(out: Path, tokenizer: Path, model: dict[str, Tensor], codec: dict[str, Tensor]) -> None:
    """Writes the folder ``out`` from state dicts whose tensors have the dtypes to be stored, and their sums."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if (tokenizer / name).resolve() != (out / name).resolve():
            shutil.copyfile(tokenizer / name, out / name)
    write_json(out / "config.json", settings_of(Tokenizer.load(out)))
    write_json(out / "generation_config.json", GENERATION)
    processor = {"padding_side": "left", "padding_value": 0.0, "processor_class": "Qwen3TTSProcessor"}
    write_json(out / "preprocessor_config.json", processor)
    save_file(model, out / "model.safetensors", {"format": "pt"})
    (out / "speech_tokenizer").mkdir(exist_ok=True)
    write_json(out / "speech_tokenizer" / "config.json", recipe.CODEC)
    extractor = {
        "chunk_length_s": None,
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": 1,
        "overlap": None,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": data.RATE_HZ,
    }
    write_json(out / "speech_tokenizer" / "preprocessor_config.json", extractor)
    save_file(codec, out / "speech_tokenizer" / "model.safetensors", {"format": "pt"})
    (out / PROVENANCE).write_text(Provenance.of(out, (Step("training.export"),)).to_json(), "utf-8")


def stored(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``state`` with its floats as ``dtype``. Raises ValueError for one that is not finite there."""
    found = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    for name, value in found.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name} is not finite as {dtype}")
    return found


def references(folder: Path, out: Path) -> None:
    """Copies one longer corpus clip of each voice to ``out``/VOICE.ogg."""
    out.mkdir(parents=True, exist_ok=True)
    clips = data.read_manifest(folder)
    for voice in data.VOICES:
        chosen = min((c for c in clips if c.voice == voice and c.seconds > 3.4), key=lambda c: abs(c.seconds - 4.0))
        shutil.copyfile(folder / chosen.file, out / f"{voice}.ogg")
        print(voice, chosen.file, chosen.seconds, chosen.text)


def main() -> None:
    """Writes the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", type=Path, required=True, help="FOLDER/NAME of the codec's parts")
    parser.add_argument("--talker", type=Path, required=True, help="FOLDER/NAME of the talker's parts")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--references", type=Path, help="where reference recordings of the voices go, from --data")
    parser.add_argument("--data", type=Path, help="the corpus")
    args = parser.parse_args()
    model = stored(parts.read(args.talker.parent, args.talker.name), torch.bfloat16)
    codec = stored(parts.read(args.codec.parent, args.codec.name), torch.float16)
    checkpoint(args.out, args.tokenizer, model, codec)
    if args.references:
        references(args.data, args.references)
    n_bytes = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{n_bytes / 1e6:.3f} MB in {args.out}")


if __name__ == "__main__":
    main()
