"""Holds ways of making a talker INT4 against each other: the same model, calibration, format and held-out speech.

    python bench/quality.py MODEL [--out FOLDER] [--methods quaver awq ...] [--judges FOLDER] [--json]

Rounding to nearest, HQQ, GPTQ, AWQ (bench/rivals.py) and quaver's own each write a checkpoint to OUT, which is kept;
then all are asked about the same speech of the original, texts that calibration never saw. With --judges they also
speak the sentences of bench/voice.py, and Whisper and WeSpeaker judge. Intervals are 95 % bootstrap intervals over
utterances.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import voice
from quaver import awq, corpus, validate
from quaver.checkpoint import Checkpoint
from quaver.cli import Progress
from quaver.corpus import Item
from quaver.errors import QuaverError
from quaver.files import write_file
from quaver.model.tts import TTS
from quaver.provenance import Step
from rivals import SEARCHES

_SEED = 1729


FIGURES = (
    "KL of codebook 0, nats",
    "same likeliest, %",
    "KL of codebooks 1 to 15, nats",
    "predictor's input, %",
    "stop, %",
)
"""Divergence and agreement with the original; the error of what the code predictor is handed, as a share of its power;
that of the probability to stop at the true end."""

Answer = tuple[validate.Opinion, Tensor]
"""What a model thinks of an utterance of T frames, and what it hands to its code predictor [T + 1, D]."""


def answers(tts: TTS, items: Sequence[Item], progress: Progress) -> Iterator[Answer]:
    """What ``tts`` makes of ``items``."""
    for found in validate.force(tts, items, progress):
        yield validate.opinion(tts, found, "cpu"), found.hidden.float().cpu()


def differences(ours: Answer, theirs: Answer) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts, [5] each, of the figures of one utterance, in the order of FIGURES."""
    found, (hidden, moved) = validate.difference(ours[0], theirs[0]), (ours[1], theirs[1])
    stop = abs(found.stops[0][-1] - found.stops[1][-1])
    apart, power = float((moved - hidden).square().sum()), float(hidden.square().sum())
    first, rest = found.n_frames[0], found.n_frames[1:].sum()
    sums = [found.kl[0], 100 * found.agreed[0], found.kl[1:].sum(), 100 * apart, 100 * stop]
    return np.array(sums, float), np.array([first, first, rest, power, 1], float)


def interval(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % intervals [5] each of the ratios of ``sums`` to ``counts`` [N, 5] over utterances drawn anew."""
    picks = np.random.default_rng(_SEED).integers(0, len(sums), (1000, len(sums)))
    low, high = np.percentile(sums[picks].sum(1) / counts[picks].sum(1), (2.5, 97.5), axis=0)
    return low, high


def quantized(source: Checkpoint, methods: Sequence[str], out: Path, n_samples: int, progress: Progress) -> list[Path]:
    """The checkpoints OUT/method; what is there already, of this original and this many utterances, is kept: remove it
    when a method has changed."""
    recipe, items = awq.Recipe(n_samples=n_samples), list[Item]()
    folders = [out / method for method in methods]
    for method, folder in zip(methods, folders, strict=True):
        if folder.exists():
            (made,) = Checkpoint.open(folder).provenance.steps[-1:] or (Step("nothing"),)
            same = [parent.files for parent in made.parents] == [origin.files for origin in source.origins()]
            if made.tool != "quantize" or made.recipe.get("n_samples") != n_samples or not same:
                raise QuaverError(f"{folder} was not made of {source.path} on {n_samples} utterances: remove it")
            continue
        if not items:
            items = list(corpus.builtin(TTS.load(source), n_samples, seed=recipe.seed, progress=progress))
        awq.quantize(source, folder, recipe, calibration=items, search=SEARCHES[method], progress=progress)
    return folders


def main() -> int:
    """Quantizes, asks, judges, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, a hub id, or tiny")
    parser.add_argument("--methods", nargs="+", choices=list(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--out", type=Path, default=Path("quality"), help="a folder, kept from run to run")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("-n", type=int, default=32, help="held-out utterances")
    parser.add_argument("--judges", type=Path, help="also speak, and judge with these (see bench/voice.py)")
    parser.add_argument("--json", action="store_true", help="print results.json")
    asked = parser.parse_args()
    progress, source = Progress(), Checkpoint.open(asked.model)
    asked.out.mkdir(parents=True, exist_ok=True)
    folders = quantized(source, asked.methods, asked.out, asked.calibration_samples, progress)
    tts = TTS.load(source)
    items = corpus.builtin(tts, asked.n, seed=_SEED, split="held-out", progress=progress)
    with torch.inference_mode():
        original = list(answers(tts, items, progress))
        table: dict[str, dict[str, list[float]]] = {}
        for method, folder in zip(asked.methods, folders, strict=True):
            pairs = zip(original, answers(TTS.load(folder), items, progress), strict=True)
            sums, counts = (np.stack(x) for x in zip(*(differences(*pair) for pair in pairs), strict=True))
            low, high = interval(sums, counts)
            values = sums.sum(0) / counts.sum(0)
            table[method] = {name: [float(values[i]), float(low[i]), float(high[i])] for i, name in enumerate(FIGURES)}
            progress("methods", len(table), len(folders))
    lineage = {"model": source.path.name, "held_out_sha256": corpus.fingerprint(items), "utterances": len(items)}
    text = json.dumps({**lineage, "forced": table}, indent=1) + "\n"
    write_file(asked.out / "results.json", text.encode())
    print(text if asked.json else markdown(table))
    if asked.judges:
        speaking = ["--judges", str(asked.judges), "--out", str(asked.out / "judged")]
        return voice.run(voice.parse([asked.model, *speaking, "--int4", *map(str, folders)]))
    return 0


def markdown(forced: dict[str, dict[str, list[float]]]) -> str:
    """The table, a row a method."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for method, row in forced.items():
        cells = (f"{value:.3g} ({low:.3g} to {high:.3g})" for value, low, high in row.values())
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
