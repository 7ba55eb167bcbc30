"""A frame of other engines on a model's folder: the official code, faster-qwen3-tts. Run by a Python that has them.

    python bench/others.py FOLDER official|faster [--device cuda] [--dtype bfloat16] [--frames 100]

Prints one line of JSON: the median and the 95th percentile of a frame's milliseconds, and the peak of the device's
memory. Both speak with a voice vector, sampled as they sample by default; the folder's model had better never stop.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import itertools
import json
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT = "This is what it takes to be heard."
Row = dict[str, Any]


def official(folder: Path, device: str, dtype: torch.dtype, n_frames: int, note: Callable[[], None]) -> None:
    """Speaks by the official code, loaded as it loads itself; ``note`` is called as each frame begins."""
    if importlib.util.find_spec("torchaudio") is None:
        # It imports torchaudio for a codec that is not used here.
        for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
            sys.modules[name] = stand_in
    warnings.simplefilter("ignore")
    from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSForConditionalGeneration
    from transformers import Qwen2TokenizerFast

    model = Qwen3TTSForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
    spoken = f"<|im_start|>assistant\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([Qwen2TokenizerFast.from_pretrained(folder)(spoken)["input_ids"]], device=device)
    # The talker runs once for the prompt and once a frame; every code is looked at, so the device is done by then.
    begun = itertools.count()
    model.talker.register_forward_pre_hook(lambda *_: note() if next(begun) else None)
    model.generate(
        input_ids=[ids], instruct_ids=[None], ref_ids=[None], languages=["english"], non_streaming_mode=False,
        voice_clone_prompt=voice(model.config.talker_config.hidden_size, device, dtype), max_new_tokens=n_frames + 1,
    )  # fmt: skip


def faster(folder: Path, device: str, dtype: torch.dtype, n_frames: int, note: Callable[[], None]) -> None:
    """The same by faster-qwen3-tts; its graphs are captured, and woken by two frames, before."""
    from faster_qwen3_tts import FasterQwen3TTS

    model = FasterQwen3TTS.from_pretrained(str(folder), device=device, dtype=dtype)
    model.warmup()
    width = model.model.model.config.talker_config.hidden_size
    run = model.predictor_graph.run

    def noted(*args: Any, **named: Any) -> Any:
        note()
        return run(*args, **named)

    prompt = voice(width, device, dtype)
    model.generate_voice_clone(TEXT, "english", voice_clone_prompt=prompt, max_new_tokens=2)
    model.predictor_graph.run = noted
    model.generate_voice_clone(TEXT, "english", voice_clone_prompt=prompt, max_new_tokens=n_frames + 1)


def voice(width: int, device: str, dtype: torch.dtype) -> Row:
    """A voice vector, as both take it."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    return {"ref_spk_embedding": [vector], "ref_code": [None], "x_vector_only_mode": [True], "icl_mode": [False]}


def spent(moments: list[float]) -> Row:
    """The figures of frames that began at ``moments``, in seconds."""
    # The first frames hold the prompt, and what is done once.
    times = sorted(1e3 * (after - before) for before, after in itertools.pairwise(moments[2:]))
    return {
        "ms_per_frame": statistics.median(times),
        "p95_ms": times[int(0.95 * (len(times) - 1))],
        "n_frames": len(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("which", choices=("official", "faster"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--frames", type=int, default=100)
    asked = parser.parse_args()
    run = official if asked.which == "official" else faster
    moments: list[float] = []
    with torch.inference_mode():
        run(
            asked.folder, asked.device, getattr(torch, asked.dtype), asked.frames,
            lambda: moments.append(time.perf_counter()),
        )  # fmt: skip
    print(json.dumps(spent(moments)))


if __name__ == "__main__":
    main()
