"""What `quaver quantize` takes in time and memory, on random weights of a published model's true shape.

    python bench/quantize.py [--shape 1.7b-base] [--device cuda] [--out FOLDER] [--kill] [--json] [--limit-s 300]

The weights are made in OUT/model and kept; the verb then runs in a process of its own, as a user would start it, so
that its peaks are its own. Random weights seldom stop: every calibration text is spoken up to twice its natural length,
the most that is ever asked for. With --kill it runs again, is killed when half of the layers are finished, goes on, and
must come to the same bytes. --layers makes the talker shallower, for machines that are slow. The verb tells where its
time goes as it goes; one that --limit-s stops also tells where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quaver.errors import QuaverError
from quaver.meter import split
from quaver.partial import partial_folder
from quaver.provenance import Provenance
from random_model import random_checkpoint

PUBLISHED = Path(__file__).parents[1] / "tests" / "oracle" / "published"
SHAPES = ("1.7b-base", "0.6b-base")


def made(out: Path, shape: str, n_layers: int | None) -> Path:
    """The checkpoint of random weights in ``out``, made where it is not there yet."""
    settings = json.loads((PUBLISHED / f"config-{shape}.json").read_text())
    codec = json.loads((PUBLISHED / "speech_tokenizer-config.json").read_text())
    if n_layers is not None:
        settings["talker_config"]["num_hidden_layers"] = n_layers
    if out.exists():
        if json.loads((out / "config.json").read_text()) != settings:
            raise QuaverError(f"{out} holds another model: remove it, or name another folder")
        return out
    return random_checkpoint(out, settings, codec)


def command(model: Path, out: Path, asked: argparse.Namespace) -> list[str]:
    """The command line that quantizes ``model`` to ``out``."""
    size = ("--samples", asked.samples, "--positions", asked.positions)
    told = ("quantize", model, "-o", out, "--device", asked.device, *size, "--json")
    return [sys.executable, "-X", "faulthandler", "-m", "quaver", *map(str, told)]


def quantized(line: Sequence[str], limit_s: float | None = None) -> dict[str, Any]:
    """The verb's own report, and the seconds that the whole process took.

    Raises QuaverError where it fails, or has not ended after ``limit_s``: then it says on stderr where it was.
    """
    start = time.perf_counter()
    with subprocess.Popen(line, stdout=subprocess.PIPE) as running:
        try:
            printed, _ = running.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # Python's fault handler takes it: every thread's stack, then the end.
            running.send_signal(signal.SIGABRT)
            running.wait()
            raise QuaverError(f"stopped after {limit_s:.0f} s: how far it came, and where it was, is above") from None
    if running.returncode:
        raise QuaverError(f"{' '.join(line)} ended with {running.returncode}: what it says is above")
    report: dict[str, Any] = json.loads(printed)
    return {**report, "process_s": time.perf_counter() - start}


def killed(line: Sequence[str], out: Path, n_layers: int) -> int:
    """Starts the verb, kills it as soon as ``n_layers`` layers are finished, and returns how many are."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as running:
        while len(finished(out)) < n_layers:
            if running.poll() is not None:
                raise QuaverError(f"the run ended with {running.returncode} before it could be killed")
            time.sleep(0.02)
        running.kill()
    return len(finished(out))


def finished(out: Path) -> list[Path]:
    """The files of the layers that are finished on the way to ``out``."""
    return list(partial_folder(out).glob("layer-*.safetensors"))


def machine(device: str) -> str:
    """What this runs on, in words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    return f"CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, Python {platform.python_version()}"


def summary(result: dict[str, Any]) -> str:
    """The figures as one line."""
    report = result["report"]
    gpu = "" if report["device_bytes"] is None else f"GPU {report['device_bytes'] / 1e9:.2f} GB, "
    total_s = sum(report["seconds"].values())
    line = (
        f"{result['shape']}, {result['n_layers']} layers, {report['n_utterances']} utterances, "
        f"{report['n_positions']} positions on {result['machine']}: {total_s:.1f} s ({split(report['seconds'])}), "
        f"the process {report['process_s']:.1f} s; at most {gpu}host {report['host_bytes'] / 1e9:.2f} GB; "
        f"weights made in {result['making_s']:.1f} s"
    )
    if "resumed" in result:
        line += f"; killed after {result['killed_after']} layers, gone on in {result['resumed']['process_s']:.1f} s: "
        line += "the same bytes"
    return line


def main() -> int:
    """Makes the weights, quantizes them, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path("quantize-bench"), help="a folder; 8 GB for the 1.7B")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--layers", type=int, help="talker layers, if not all")
    parser.add_argument("--kill", action="store_true", help="also kill a run half-way and compare the bytes")
    parser.add_argument("--limit-s", type=float, help="stop a run after so many seconds, and say where it was")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and the line on stderr")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model = made(asked.out / "model", asked.shape, asked.layers)
    making_s = time.perf_counter() - start
    out = asked.out / "int4"
    for old in (out, partial_folder(out)):
        shutil.rmtree(old, ignore_errors=True)
    report = quantized(command(model, out, asked), asked.limit_s)
    result: dict[str, Any] = {
        "shape": asked.shape, "n_layers": len(report["layers"]), "machine": machine(asked.device),
        "making_s": making_s, "report": report, "seal": Provenance.read(out).seal,
    }  # fmt: skip
    if asked.kill:
        shutil.rmtree(out)
        result["killed_after"] = killed(command(model, out, asked), out, max(1, result["n_layers"] // 2))
        result["resumed"] = quantized(command(model, out, asked), asked.limit_s)
        if Provenance.read(out).seal != result["seal"]:
            raise QuaverError(f"{out}: the run that was killed came to other bytes than the one that was not")
    if asked.json:
        print(json.dumps(result))
    print(summary(result), file=sys.stderr if asked.json else sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
