"""What each way of storing a part of a model saves and costs, on the same held-out speech.

    python bench/storage.py MODEL [--out FOLDER] [-n 24] [--calibration-samples 32] [--budgets 38MB 34MB] [--json]

Each choice alone, the profile compact, and what budgets choose are written to OUT, which is kept; then all are asked
about the same speech of the original, texts that calibration never saw. The original is computed in float32 where it is
small, the others in bfloat16: the first row is that alone. Last, how much rounding the codec's decoder to bfloat16
changes the sound of that speech. Intervals are 95 % bootstrap intervals over utterances.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from quality import answers, differences, interval
from quaver import awq, budget, corpus, ledger, mixed
from quaver.checkpoint import Checkpoint
from quaver.cli import Progress
from quaver.corpus import Item
from quaver.files import write_file
from quaver.model.tts import TTS
from quaver.recipe import COMPACT, Recipe

_SEED = 1729
_KEEP = Recipe(talker="keep")
CHOICES: Mapping[str, Recipe] = {
    "talker INT4 (the default)": Recipe(),
    "talker INT8": Recipe(talker="int8"),
    "predictor INT8": replace(_KEEP, predictor="int8"),
    "predictor INT4": replace(_KEEP, predictor="int4"),
    "text embedding INT8": replace(_KEEP, text_embedding="int8"),
    "text embedding INT8, English alone": replace(_KEEP, text_embedding="int8", languages=("english",)),
    "compact": COMPACT,
    "compact, predictor INT4": replace(COMPACT, predictor="int4"),
}
"""What is written of the model, by name."""


@dataclass(frozen=True, slots=True)
class Row:
    """One choice: its bytes on disk, divergences with their intervals, and agreement on codebook 0 in per cent."""

    n_bytes: int
    first_kl: tuple[float, float, float]
    first_agreement: float
    residual_kl: tuple[float, float, float]


def made(
    source: Checkpoint, names: Mapping[str, Recipe], budgets: Sequence[str], out: Path, items: Sequence[Item],
    progress: Progress,
) -> dict[str, Path]:  # fmt: skip
    """The folders, by name, of every choice and budget; what is there already is kept."""
    folders: dict[str, Path] = {}
    for name, recipe in names.items():
        folders[name] = out / name.replace(" ", "-").replace(",", "")
        if not folders[name].exists():
            mixed.quantize(source, folders[name], recipe, calibration=items, progress=progress)
    for asked in budgets:
        folders[f"budget {asked}"] = folder = out / f"budget-{asked}"
        if not folder.exists():
            recipe, _ = budget.choose(source, budget.size(asked), Recipe(), calibration=items, progress=progress)
            mixed.quantize(source, folder, recipe, calibration=items, progress=progress)
    return folders


def sound_errors(tts: TTS, items: Sequence[Item]) -> dict[str, float]:
    """How far, in dB below the sound, its change is when the codec's decoder is rounded to bfloat16: all of it, and
    all but the codebooks."""
    found = {}
    for name, kept in (("all of it", "nothing"), ("all but the codebooks", ".quantizer.")):
        decoder = copy.deepcopy(tts.decoder)
        for key, value in decoder.state_dict().items():
            if kept not in f".{key}":
                value.copy_(value.bfloat16())
        power = error = 0.0
        for item in items:
            codes = item.codes.T[None]
            before, after = tts.decoder(codes), decoder(codes)
            power += float(before.square().sum())
            error += float((after - before).square().sum())
        found[name] = 10 * float(np.log10(power / error))
    return found


def main() -> int:
    """Writes, asks, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, a hub id, or tiny")
    parser.add_argument("--out", type=Path, default=Path("storage"), help="a folder, kept from run to run")
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("-n", type=int, default=24, help="held-out utterances")
    parser.add_argument("--budgets", nargs="*", default=[], help="sizes, such as 34MB")
    parser.add_argument("--json", action="store_true", help="print results.json")
    asked = parser.parse_args()
    progress, source = Progress(), Checkpoint.open(asked.model)
    asked.out.mkdir(parents=True, exist_ok=True)
    tts = TTS.load(source)
    calibration = corpus.builtin(tts, asked.calibration_samples, seed=awq.Recipe().seed, progress=progress)
    folders = made(source, CHOICES, asked.budgets, asked.out, calibration, progress)
    items = corpus.builtin(tts, asked.n, seed=_SEED, split="held-out", progress=progress)
    with torch.inference_mode():
        original = list(answers(tts, items, progress))
        models = {"as it is, in bfloat16": source, **{name: Checkpoint.open(path) for name, path in folders.items()}}
        table: dict[str, Row] = {}
        for name, checkpoint in models.items():
            small = TTS.load(checkpoint, dtype=torch.bfloat16)
            pairs = zip(original, answers(small, items, progress), strict=True)
            sums, counts = (np.stack(x) for x in zip(*(differences(*pair) for pair in pairs), strict=True))
            low, high = interval(sums, counts)
            values = sums.sum(0) / counts.sum(0)
            first, residual = ((float(values[i]), float(low[i]), float(high[i])) for i in (0, 2))
            table[name] = Row(ledger.weigh(checkpoint).total.disk_bytes, first, float(values[1]), residual)
        sound = sound_errors(tts, items)
    choices = {name: asdict(row) for name, row in table.items()}
    result = {
        "model": source.path.name,
        "held_out_sha256": corpus.fingerprint(items),
        "choices": choices,
        "sound": sound,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_file(asked.out / "results.json", text.encode())
    print(text if asked.json else markdown(table, sound))
    return 0


def markdown(table: Mapping[str, Row], sound: Mapping[str, float]) -> str:
    """The table, a row a choice, and a line on the sound."""
    heads = ("bytes on disk", "KL of codebook 0, nats", "same likeliest, %", "KL of codebooks 1 to 15, nats")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in table.items():
        first, residual = (f"{v:.2g} ({low:.2g} to {high:.2g})" for v, low, high in (row.first_kl, row.residual_kl))
        lines.append(f"| {name} | {row.n_bytes:,} | {first} | {row.first_agreement:.1f} | {residual} |")
    told = ", ".join(f"{name} {decibels:.1f} dB below the sound" for name, decibels in sound.items())
    return "\n".join([*lines, "", f"The codec's decoder rounded to bfloat16 changes the sound by: {told}."])


if __name__ == "__main__":
    sys.exit(main())
