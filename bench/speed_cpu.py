"""What a frame costs on a CPU, beside the official code: milliseconds, times real time, memory.

    python bench/speed_cpu.py CONFIG.json CODEC_CONFIG.json [--official PYTHON] [--frames 24] [--rounds 3] [--out FILE]

Random weights of the configured shapes, INT4 by rounding to nearest, so nothing here says how it sounds. One voice, one
sentence, the default sampling; a model never stops. Every row loads its model in a process of its own, and the rows
take turns, so that a busy machine is as busy for all of them. ``--official`` is a Python that has qwen-tts 0.1.1 (the
one of `make test` will do): it is measured in float32, its default, and in bfloat16. CPU time is that of all threads;
on a busy machine it says more than the clock does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import others

FRAME_MS = 80
Row = dict[str, Any]
OURS = {
    "float32": ("plain", "float32"),
    "bfloat16": ("plain", "bfloat16"),
    "INT4, PyTorch's operators": ("int4", "operators"),
    "INT4": ("int4", "stored"),
    "INT4, predictor INT8": ("compact", "stored"),
    "INT4, predictor INT4, PyTorch's operators": ("both", "operators"),
    "INT4, predictor INT4": ("both", "stored"),
}
"""Rows of ours: the model, and what is computed with."""


def ours(folder: Path, how: str, n_frames: int) -> Row:
    """The frames of our engine."""
    from quaver import int4
    from quaver.engine import Engine, Knobs
    from quaver.model import stepper
    from quaver.model.tts import TTS, Utterance
    from quaver.sampling import Sampling
    from quaver.voice import Voice

    if how == "operators":
        int4.compiled.cache_clear()
        for module in (int4, stepper):
            module.compiled = lambda: None  # type: ignore[attr-defined]
    tts = TTS.load(folder, dtype=None if how in ("stored", "operators") else getattr(torch, how))
    width = tts.config.talker_config.hidden_size
    voice = Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))
    prompt, knobs = (
        tts.prompt(Utterance(others.TEXT, "english", voice)),
        Knobs(Sampling(), Sampling(penalty=1.0), n_frames),
    )
    # What is compiled is compiled, or read from its cache, before it is timed.
    for _ in Engine(tts).frames([prompt], [0], Knobs(knobs.sampling, knobs.residual, 2)):
        pass
    wall, cpu = [], []
    for _ in Engine(tts).frames([prompt], [0], knobs):
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
    return spent(wall, cpu)


def official(folder: Path, dtype: str, n_frames: int) -> Row:
    """The frames of the official code (see others.py)."""
    wall, cpu = [], []

    def note() -> None:
        wall.append(time.perf_counter())
        cpu.append(time.process_time())

    others.official(folder, "cpu", getattr(torch, dtype), n_frames, note)
    return spent(wall, cpu)


def models(folder: Path, config: Path, codec_config: Path) -> dict[str, Path]:
    """The random model, with its talker in INT4, and with its code predictor in INT8 or INT4 too."""
    from torch import Tensor

    from quaver import awq
    from quaver.awq_search import nearest
    from quaver.checkpoint import Checkpoint
    from quaver.int8 import Int8Weight
    from quaver.provenance import Step
    from quaver.recipe import PREDICTOR
    from random_model import random_checkpoint

    settings, codec = json.loads(config.read_text()), json.loads(codec_config.read_text())
    stop_id = settings["talker_config"]["codec_eos_token_id"]

    def never_stop(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == "talker.codec_head.weight":
            tensor = tensor.clone()
            tensor[stop_id] = 0
        return {name: tensor}

    raw = Checkpoint.open(random_checkpoint(folder / "raw", settings, codec))
    found = {"plain": raw.edit(Step("never stop"), never_stop).save(folder / "plain").path}
    shutil.rmtree(folder / "raw")
    kept = ("talker.codec_head", "talker.text_projection", "speaker_encoder", "lm_head", "small_to_mtp_projection")
    for name, kept_parts in (("int4", awq.KEPT), ("both", kept)):

        def rounded(name: str, tensor: Tensor, parts: Sequence[str] = kept_parts) -> dict[str, Tensor]:
            module = name.removesuffix(".weight")
            if "proj.weight" not in name or any(part in name for part in parts):
                return {name: tensor}
            return {f"{module}.{kind}": value for kind, value in nearest(tensor.float()).tensors().items()}

        changes = {"quantization_config": awq.settings(kept_parts)}
        found[name] = Checkpoint.open(found["plain"]).edit(Step("round"), rounded, changes).save(folder / name).path

    def eighth(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.startswith(f"{PREDICTOR}.") or tensor.dim() != 2:
            return {name: tensor}
        module = name.removesuffix(".weight")
        return {f"{module}.{kind}": value for kind, value in Int8Weight.nearest(tensor).tensors().items()}

    changes = {"quaver": {"version": 1, "int8": [PREDICTOR]}}
    found["compact"] = Checkpoint.open(found["int4"]).edit(Step("round"), eighth, changes).save(folder / "compact").path
    return found


def measure(asked: argparse.Namespace) -> Row:
    """Every row, in turns; figures are medians over all frames of all turns."""
    with tempfile.TemporaryDirectory() as folder:
        made = models(Path(folder), asked.config, asked.codec_config)
        runs = {name: (sys.executable, made[model], how) for name, (model, how) in OURS.items()}
        if asked.official is not None:
            runs |= {f"official, {how}": (asked.official, made["plain"], how) for how in ("float32", "bfloat16")}
        taken: dict[str, list[Row]] = {name: [] for name in runs}
        for turn in range(asked.rounds):
            for name, (python, model, how) in runs.items():
                what = "official" if name.startswith("official") else "ours"
                command = [str(python), __file__, "--row", what, str(model), how, str(asked.frames), str(asked.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
                taken[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{turn + 1}/{asked.rounds} {name}: {figures(taken[name][-1:])}", flush=True)
    rows = {name: figures(found) for name, found in taken.items() if found}
    theirs = {unit: min((row[unit] for name, row in rows.items() if "official" in name), default=None)
              for unit in ("ms", "cpu_ms")}  # fmt: skip
    for row in rows.values():
        row["ratio"], row["cpu_ratio"] = (
            None if theirs[unit] is None else round(theirs[unit] / row[unit], 2) for unit in ("ms", "cpu_ms")
        )
    return {"machine": machine(asked.threads), "config": asked.config.name, "frames": asked.frames, "rows": rows}


def spent(wall: Sequence[float], cpu: Sequence[float]) -> Row:
    """What one process found: milliseconds between frames, and its peak memory."""
    found: Row = {name: [1e3 * (b - a) for a, b in pairwise(at)] for name, at in (("wall", wall), ("cpu", cpu))}
    return {**found, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def figures(found: Sequence[Row]) -> Row:
    """The median and the least of the clock, the median of the processors' time, and the most memory."""
    wall, cpu = ([ms for row in found for ms in row[name]] for name in ("wall", "cpu"))
    middle = statistics.median(wall)
    return {
        "ms": round(middle, 1), "least_ms": round(min(wall), 1), "cpu_ms": round(statistics.median(cpu), 1),
        "x_real_time": round(FRAME_MS / middle, 2), "peak_gb": round(max(row["peak_gb"] for row in found), 2),
    }  # fmt: skip


def machine(n_threads: int) -> Row:
    """What this was measured on and with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    names = [line for line in (info.read_text().splitlines() if info.exists() else ()) if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(), "cores": os.cpu_count(),
        "threads": n_threads, "load": os.getloadavg()[0], "torch": torch.__version__, "commit": commit.stdout.strip(),
    }  # fmt: skip


def table(found: Row) -> str:
    """The rows as a table; ratios are to the faster of the official rows."""
    lines = [f"{'':44}{'ms/frame':>9}{'least':>8}{'CPU ms':>8}{'x real':>8}{'peak GB':>9}{'ratio':>7}{'of CPU':>8}"]
    for name, row in found["rows"].items():
        ratios = "".join(
            f"{'' if row[key] is None else row[key]:>{width}}" for key, width in (("ratio", 7), ("cpu_ratio", 8))
        )
        lines.append(
            f"{name:44}{row['ms']:9.1f}{row['least_ms']:8.1f}{row['cpu_ms']:8.1f}{row['x_real_time']:8.2f}"
            f"{row['peak_gb']:9.2f}{ratios}"
        )
    return "\n".join((json.dumps(found["machine"]), *lines))


def main() -> None:
    """The command line; ``--row`` is what a row's own process is asked."""
    if sys.argv[1:2] == ["--row"]:
        what, folder, how, n_frames, n_threads = sys.argv[2:]
        torch.set_num_threads(int(n_threads))
        row: Callable[[Path, str, int], Row] = {"ours": ours, "official": official}[what]
        print(json.dumps(row(Path(folder), how, int(n_frames))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("codec_config", type=Path)
    parser.add_argument("--official", type=Path, metavar="PYTHON")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = measure(asked)
    print(table(found))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
