"""What speaking takes of a GPU's memory: a 1.7B in INT4, random weights of the true shape, text to waveform.

    python bench/memory.py [--shape 1.7b-base] [--memory 1.2GB] [--seconds 30] [--out memory.json]

The weights are made in a folder that is removed again (--model keeps it), with a stop id that is never drawn. A process
of its own opens them as a user would, speaks once and again, and tells the most that PyTorch allocated and reserved,
and what the process took of the GPU beyond an empty context, asked of the driver every few milliseconds: nobody else
should be at work there. Beside it stands what `quaver info --runtime` says beforehand. Without a GPU all of it runs on
the CPU, where nothing is counted. --memory 0 lets the GPU hold everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver import awq, runtime
from quaver.budget import size
from quaver.checkpoint import Checkpoint
from quaver.config import FRAME_RATE_HZ
from quaver.engine import Engine, Knobs
from quaver.model.tts import Utterance
from quaver.provenance import Step
from quaver.sampling import Sampling
from quaver.voice import Voice
from random_model import random_checkpoint

PUBLISHED = Path(__file__).parents[1] / "tests" / "oracle" / "published"
TEXT = "This is what it takes of memory to be heard for as long as this without a pause"


def made(out: Path, shape: str, n_layers: int | None) -> Path:
    """The checkpoint of random INT4 weights in ``out``, made where it is not there yet."""
    settings = json.loads((PUBLISHED / f"config-{shape}.json").read_text())
    codec = json.loads((PUBLISHED / "speech_tokenizer-config.json").read_text())
    settings["quantization_config"] = awq.settings()
    if n_layers is not None:
        settings["talker_config"]["num_hidden_layers"] = n_layers
    return out if out.exists() else random_checkpoint(out, settings, codec)


class Watch(threading.Thread):
    """Asks the driver every 2 ms how much of the GPU is taken beyond what was when it began."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before, self.peak_bytes, self.ended = torch.cuda.mem_get_info()[0], 0, threading.Event()

    def run(self) -> None:
        """Until ``ended``."""
        while not self.ended.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, self.now())

    def now(self) -> int:
        """What is taken at this moment."""
        return self._before - torch.cuda.mem_get_info()[0]


def measure(folder: Path, memory: int | None, seconds: float) -> dict[str, Any]:
    """Opens and speaks, and the figures of it."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if on_gpu else "none", "torch": torch.__version__}
    watch = None
    if on_gpu:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
        watch = Watch()
        watch.start()

    def note(name: str, start: float) -> None:
        row = {"s": round(time.perf_counter() - start, 2)}
        if watch is not None:
            torch.cuda.synchronize()
            row |= {
                "allocated": torch.cuda.memory_allocated(), "peak_allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.memory_reserved(), "peak_reserved": torch.cuda.max_memory_reserved(),
                "process": watch.now(), "peak_process": max(watch.peak_bytes, watch.now()),
            }  # fmt: skip
        found[name] = row
        print(
            f"{name:10} " + ", ".join(f"{k} {v if k == 's' else round(v / 1e6, 1)}" for k, v in row.items()), flush=True
        )

    start = time.perf_counter()
    checkpoint = Checkpoint.open(folder)
    stop_id = checkpoint.config.talker_config.codec_eos_token_id

    def never_stop(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == "talker.codec_head.weight":
            tensor = tensor.clone()
            tensor[stop_id] = 0
        return {name: tensor}

    checkpoint = checkpoint.edit(Step("never stop"), never_stop)
    engine = Engine.load(checkpoint, device=device, memory_bytes=memory, room_s=seconds)
    note("load", start)
    width = checkpoint.config.talker_config.hidden_size
    voice = Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))
    knobs = Knobs(Sampling(), Sampling(penalty=1.0), round(seconds * FRAME_RATE_HZ))
    for name in ("first", "second"):
        start = time.perf_counter()
        # Random weights say nothing, so there is nothing to guard.
        speech = engine.say(Utterance(TEXT, "english", voice), knobs, guard=None)
        note(name, start)
        found[name] |= {"audio_s": round(speech.audio.seconds, 2), "finite": bool(abs(speech.audio.samples).max() <= 1)}
    if watch is not None:
        watch.ended.set()
    request = runtime.Request.seconds(seconds)
    told = runtime.weigh(checkpoint, request, device, engine.tts.placement)
    found["told"] = told.to_json()
    print("\n".join(runtime.table(told, memory)), flush=True)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1.7b-base", "0.6b-base"), default="1.7b-base")
    parser.add_argument("--memory", default="1.2GB", help="what the engine is allowed; 0: everything on the GPU")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--layers", type=int, help="talker layers, if not all: for trying it out")
    parser.add_argument("--model", type=Path, help="keep the weights here, and take them from here")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        found = measure(asked.model, size(asked.memory) or None, asked.seconds)
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model = made(asked.model or Path(folder) / "model", asked.shape, asked.layers)
        print(f"weights after {time.perf_counter() - start:.1f} s", flush=True)
        line = [sys.executable, __file__, "--measure", "--model", str(model), "--memory", asked.memory]
        line += ["--seconds", str(asked.seconds), *(["--out", str(asked.out)] if asked.out else [])]
        sys.exit(subprocess.run(line, check=False).returncode)


if __name__ == "__main__":
    main()
