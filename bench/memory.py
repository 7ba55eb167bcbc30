"""What speaking takes of a GPU's memory: a 1.7B in INT4, random weights of the true shape, text to waveform.

    python bench/memory.py [--shape 1.7b-base] [--memory 1.2GB] [--seconds 30] [--out memory.json]

The weights are made in a folder that is removed again (--model keeps it), with a stop id that is never drawn. A process
of its own opens them as a user would, speaks once and again, and tells the most that PyTorch allocated and reserved,
and what the process took of the GPU beyond an empty context, asked of the driver every few milliseconds: nobody else
should be at work there. A line tells each step of the way when it was first taken; "outside" is what of the process is
not PyTorch's: code of kernels and libraries, what libraries keep, captured graphs. At the end stand the segments that
PyTorch holds and the gaps in them, and what `quaver info --runtime` says beforehand. Without a GPU all of it runs on
the CPU, where nothing is counted. --memory 0 lets the GPU hold everything. --no-cudnn makes sound without cuDNN, which
tells what that library takes; PYTORCH_CUDA_ALLOC_CONF and CUBLAS_WORKSPACE_CONFIG have their say as anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver import awq, meter, runtime
from quaver.budget import size
from quaver.checkpoint import Checkpoint
from quaver.config import FRAME_RATE_HZ
from quaver.engine import Engine, Knobs
from quaver.model.codec import CodecStream
from quaver.model.tts import TTS, Utterance
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
        self._before, total = torch.cuda.mem_get_info()
        self._reserved = torch.cuda.memory_reserved()
        self.context_bytes = total - self._before - self._reserved
        self.peak_bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        """Until ``ended``."""
        while not self.ended.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, self.now())

    def now(self) -> int:
        """What is taken at this moment."""
        return self._before - torch.cuda.mem_get_info()[0]

    def outside(self) -> int:
        """What of it PyTorch's allocator knows nothing of."""
        return self.now() - (torch.cuda.memory_reserved() - self._reserved)


def at_first(owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Calls ``before`` and ``after`` around the first call of a function of ``owner``."""
    plain = getattr(owner, name)

    def noted(*given: Any, **more: Any) -> Any:
        setattr(owner, name, plain)
        before()
        made = plain(*given, **more)
        after()
        return made

    setattr(owner, name, noted)


def segments() -> dict[str, Any]:
    """What PyTorch holds of the GPU by kind of segment, and the largest gaps between what is in use."""
    kinds: dict[str, dict[str, int]] = {}
    gaps = []
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        private = " of a graph" if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) else ""
        stream = " of another stream" if segment["stream"] else ""
        row = kinds.setdefault(f"{segment['segment_type']}{private}{stream}", {"n": 0, "bytes": 0, "unused": 0})
        row["n"] += 1
        row["bytes"] += segment["total_size"]
        row["unused"] += segment["total_size"] - segment["active_size"]
        free = (block["size"] for block in segment["blocks"] if block["state"] == "inactive")
        gaps += [{"bytes": size, "in a segment of": segment["total_size"]} for size in free]
    gaps.sort(key=lambda gap: -gap["bytes"])
    return {"kinds": kinds, "gaps": gaps[:12]}


class Notes:
    """What there is of memory, noted step by step."""

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        self.found: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name() if on_gpu else "none", "torch": torch.__version__,
        }  # fmt: skip
        self.watch: Watch | None = None
        self._most = {"allocated": 0, "reserved": 0, "process": 0}
        if on_gpu:
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
            self.watch = Watch()
            self.watch.start()
            self.found["empty context"] = self.watch.context_bytes
            print(f"empty context, and whoever else is there: {self.watch.context_bytes / 1e6:.1f}", flush=True)
            self._steps()
        self.start = time.perf_counter()

    def __call__(self, name: str) -> None:
        """Notes how it is at ``name``, and the peaks since the last note; seconds count from ``start``."""
        row: dict[str, float] = {"s": round(time.perf_counter() - self.start, 2)}
        if self.watch is not None:
            torch.cuda.synchronize()
            row |= {
                "allocated": torch.cuda.memory_allocated(), "peak_allocated": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.memory_reserved(), "peak_reserved": torch.cuda.max_memory_reserved(),
                "process": self.watch.now(), "peak_process": max(self.watch.peak_bytes, self.watch.now()),
                "outside": self.watch.outside(),
            }  # fmt: skip
            self._most = {of: max(most, int(row[f"peak_{of}"])) for of, most in self._most.items()}
            torch.cuda.reset_peak_memory_stats()
            self.watch.peak_bytes = 0
        self.found[name] = row
        figures = ", ".join(f"{k} {v if k == 's' else round(v / 1e6, 1)}" for k, v in row.items())
        print(f"{name:20} {figures}", flush=True)

    def _steps(self) -> None:
        """From now on, each step of the way notes itself when it is first taken."""

        def step(owner: Any, function: str, after: str, before: str | None = None) -> None:
            at_first(owner, function, lambda: self(before) if before else None, lambda: self(after))

        step(meter, "repack", "laid out anew", "not laid out yet")
        step(TTS, "prompt", "prompt made")
        step(CodecStream, "push", "sound of 12 frames", "before the sound")
        if find_spec("triton"):
            from quaver.frame import FrameGraph, Weights

            step(Weights, "__init__", "fused", "loaded")
            step(FrameGraph, "__init__", "slots and cache")
            step(FrameGraph, "join", "prompt heard")
            step(FrameGraph, "step", "first frame")

    def end(self) -> None:
        """Notes the segments, and what is left when all that is unused has been given back."""
        if self.watch is None:
            return
        self.found["segments"] = segments()
        for kind, row in self.found["segments"]["kinds"].items():
            print(f"{row['n']:4} segments, {kind}: {row['bytes'] / 1e6:.1f}, of it unused {row['unused'] / 1e6:.1f}")
        for gap in self.found["segments"]["gaps"]:
            print(f"     gap of {gap['bytes'] / 1e6:.1f} in a segment of {gap['in a segment of'] / 1e6:.1f}")
        torch.cuda.empty_cache()
        self("unused given back")
        self.watch.ended.set()
        self.found["most"] = self._most
        print("at most: " + ", ".join(f"{of} {most / 1e6:.1f}" for of, most in self._most.items()), flush=True)


def measure(folder: Path, memory: int | None, seconds: float) -> dict[str, Any]:
    """Opens and speaks, and the figures of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    note = Notes()
    checkpoint = Checkpoint.open(folder)
    stop_id = checkpoint.config.talker_config.codec_eos_token_id

    def never_stop(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == "talker.codec_head.weight":
            tensor = tensor.clone()
            tensor[stop_id] = 0
        return {name: tensor}

    checkpoint = checkpoint.edit(Step("never stop"), never_stop)
    engine = Engine.load(checkpoint, device=device, memory_bytes=memory, room_s=seconds)
    note("ready")
    width = checkpoint.config.talker_config.hidden_size
    voice = Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))
    knobs = Knobs(Sampling(), Sampling(penalty=1.0), round(seconds * FRAME_RATE_HZ))
    for name in ("first", "second"):
        note.start = time.perf_counter()
        # Random weights say nothing, so there is nothing to guard.
        speech = engine.say(Utterance(TEXT, "english", voice), knobs, guard=None)
        note(name)
        note.found[name] |= {
            "audio_s": round(speech.audio.seconds, 2), "finite": bool(abs(speech.audio.samples).max() <= 1),
        }  # fmt: skip
    note.end()
    request = runtime.Request.seconds(seconds)
    told = runtime.weigh(checkpoint, request, device, engine.tts.placement, limited=memory is not None)
    note.found["told"] = told.to_json()
    print("\n".join(runtime.table(told, memory)), flush=True)
    return note.found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1.7b-base", "0.6b-base"), default="1.7b-base")
    parser.add_argument("--memory", default="1.2GB", help="what the engine is allowed; 0: everything on the GPU")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--layers", type=int, help="talker layers, if not all: for trying it out")
    parser.add_argument("--no-cudnn", action="store_true", help="convolutions by PyTorch's own kernels")
    parser.add_argument("--model", type=Path, help="keep the weights here, and take them from here")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        torch.backends.cudnn.enabled = not asked.no_cudnn
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
        line += ["--no-cudnn"] if asked.no_cudnn else []
        sys.exit(subprocess.run(line, check=False).returncode)


if __name__ == "__main__":
    main()
