"""Draw the loss curves of docs/VOICE.md from what the training runs logged.

    python -m training.curves docs/voice

reads what there is of talker.jsonl (OUT/curve.jsonl of `training.talker`), encoder.log and decoder.log (what these
printed), and codec.log and polish.log of earlier runs, and writes one SVG each.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from quaver.plots import Plot, Series, svg

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_STYLE = (
    "<style>text{font-family:system-ui,sans-serif;fill:#555;font-size:12px}.grid{stroke:#ddd}"
    ".line{fill:none;stroke-width:2}.limit{stroke:#b00;stroke-dasharray:5 4}"
    + "".join(f".s{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(_COLOURS))
    + "</style>"
)
_LINE = re.compile(r"^(?:\w+ \d+ s \| )?(\d+) s, step (\d+): (\w.*? \d\.\d+)(?:, bits.*|, \d+ not finite)?$")


LOGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "codec": ("Codec", ("mel", "r2", "r2-coded")),
    "polish": ("Decoder alone", ("mel",)),
    "encoder": ("Encoder: missed of how it sounds", ("missed",)),
    "decoder": ("Decoder", ("mel", "low", "sketch", "heard", "voice")),
}


def picture(plot: Plot) -> str:
    """``plot`` as a file of its own, its series named inside."""
    drawn = svg(plot).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = drawn.index(">") + 1
    names = "".join(
        f'<text x="{60 + 150 * i}" y="14" style="fill:{_COLOURS[i]};font-weight:600">{series.name}</text>'
        for i, series in enumerate(plot.series)
    )
    return f'{drawn[:start]}{_STYLE}<rect width="100%" height="100%" fill="#fff"/>{names}{drawn[start:]}\n'


def codec_plot(log: str, title: str, fields: tuple[str, ...]) -> Plot:
    """Those of the ``fields`` that are in the lines that a run printed, from where the first of them is not 0."""
    found = [(m[2], m[3].replace(",", "").split()) for m in map(_LINE.match, log.splitlines()) if m]
    found = [(step, words) for step, words in found if float(words[words.index(fields[0]) + 1])]

    def known(field: str) -> bool:
        return bool(found) and all(field in words for _, words in found)

    series = tuple(Series(f, tuple(float(words[words.index(f) + 1]) for _, words in found)) for f in fields if known(f))
    return Plot("line", title, series, "step", "", tuple(step for step, _ in found))


def talker_plot(rows: list[dict[str, float | str]], title: str, names: dict[str, str], kind: str) -> Plot:
    """The fields ``names`` (shown as) of the rows of ``kind`` in curve.jsonl."""
    kept = [row for row in rows if row["kind"] == kind]
    series = tuple(Series(shown, tuple(float(row[name]) for row in kept)) for name, shown in names.items())
    return Plot("line", title, series, "step", "nats", tuple(str(row["step"]) for row in kept))


def main() -> None:
    """Writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    plots = {
        name: codec_plot((folder / f"{name}.log").read_text("utf-8"), title, fields)
        for name, (title, fields) in LOGS.items()
        if (folder / f"{name}.log").exists()
    }
    if (folder / "talker.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "talker.jsonl").read_text("utf-8").splitlines()]
        held = {"stream true": "codebook 0", "stream deaf": "no true history", "stream true rest": "codebooks 1 to 15"}
        plots["talker"] = talker_plot(rows, "Talker, held-out sentences", held, "held out")
    for name, plot in plots.items():
        (folder / f"{name}.svg").write_text(picture(plot), "utf-8")


if __name__ == "__main__":
    main()
