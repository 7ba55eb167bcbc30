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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import voice
from quaver import awq, corpus
from quaver.checkpoint import Checkpoint
from quaver.cli import Progress
from quaver.corpus import Item
from quaver.errors import QuaverError
from quaver.files import write_file
from quaver.model.tts import TTS
from rivals import SEARCHES

_SEED = 1729
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a model thinks of one utterance of T frames: log-probabilities of codebook 0 over the ids that may be
    sampled, the stop id last [T + 1, V], of the others [T, Q - 1, V'], and what its predictor is handed [T + 1, D]."""

    first: Tensor
    residual: Tensor
    hidden: Tensor


FIGURES = {
    "KL of codebook 0, nats": "how far codebook 0 is from the original's",
    "same likeliest, %": "how often both find the same code of codebook 0 likeliest",
    "KL of codebooks 1 to 15, nats": "the mean of them, on the same speech",
    "predictor's input, %": "error of what the code predictor is handed, as a share of its power",
    "stop, %": "mean error of the probability to stop, at the true end",
}
"""The forced figures and what they say."""


def opinions(tts: TTS, items: Sequence[Item]) -> Iterator[Opinion]:
    """What ``tts`` thinks of ``items``."""
    stop = tts.config.talker_config.codec_eos_token_id
    sampled = ~tts.suppressed(stop_too=True)
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        for found in tts.force([tts.prompt(item.utterance) for item in batch], [item.codes for item in batch]):
            first = torch.cat((found.talker[:, sampled], found.talker[:, stop, None]), dim=1)
            yield Opinion(first.log_softmax(-1), found.residual.log_softmax(-1), found.hidden.float())


def differences(ours: Opinion, theirs: Opinion) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts, [5] each, of the figures of one utterance, in the order of FIGURES."""
    kl = (ours.first.exp() * (ours.first - theirs.first)).sum(-1)
    same = (ours.first.argmax(-1) == theirs.first.argmax(-1)).float()
    rest = (ours.residual.exp() * (ours.residual - theirs.residual)).sum(-1)
    apart = (ours.hidden - theirs.hidden).square().sum()
    stop = (ours.first[-1, -1].exp() - theirs.first[-1, -1].exp()).abs()
    sums = (kl.sum(), 100 * same.sum(), rest.sum(), 100 * apart, 100 * stop)
    counts = (kl.numel(), same.numel(), rest.numel(), ours.hidden.square().sum(), 1)
    return np.array([float(x) for x in sums]), np.array([float(x) for x in counts])


def interval(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % intervals [5] each of the ratios of ``sums`` to ``counts`` [N, 5] over utterances drawn anew."""
    picks = np.random.default_rng(_SEED).integers(0, len(sums), (1000, len(sums)))
    low, high = np.percentile(sums[picks].sum(1) / counts[picks].sum(1), (2.5, 97.5), axis=0)
    return low, high


def quantized(source: Checkpoint, methods: Sequence[str], out: Path, n_samples: int, progress: Progress) -> list[Path]:
    """The checkpoints OUT/method; what is there already, of this original and this many utterances, is kept."""
    recipe, items = awq.Recipe(n_samples=n_samples), list[Item]()
    folders = [out / method for method in methods]
    for method, folder in zip(methods, folders, strict=True):
        if folder.exists():
            made = Checkpoint.open(folder).provenance
            used = [step.recipe.get("n_samples") for step in made.steps if step.tool == "quantize"]
            if used[-1:] != [n_samples]:
                raise QuaverError(f"{folder} was quantized on {used[-1:]} utterances, not {n_samples}: remove it")
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
        original = list(opinions(tts, items))
        table: dict[str, dict[str, list[float]]] = {}
        for method, folder in zip(asked.methods, folders, strict=True):
            pairs = zip(original, opinions(TTS.load(folder), items), strict=True)
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
