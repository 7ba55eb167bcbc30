"""A blend at several shares, each validated against the model as it was: where speech begins to suffer.

The blends are made in memory as they are loaded, one at a time, and never written; the original is asked once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from quaver import blend, validate
from quaver.blend import Donor
from quaver.checkpoint import Checkpoint
from quaver.comparison import Comparison, Side, figures
from quaver.errors import RecipeError
from quaver.panel import UNJUDGED
from quaver.plots import Plot, Series
from quaver.provenance import Origin
from quaver.report import Cell, Clip, Gate, Metric, Report, Section, Table, Take, number
from quaver.validate import Place


def shares(text: str) -> tuple[float, ...]:
    """The shares in ``text``, numbers joined by commas, in rising order. Raises RecipeError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d*\.?\d+", part) for part in parts):
        raise RecipeError(f"{text!r} names no shares: write numbers from 0 to 1 joined by commas, such as 0,0.01,0.03")
    found = tuple(sorted(map(float, parts)))
    if len(set(found)) < len(found):
        raise RecipeError(f"{text!r} names a share twice")
    return found


@dataclass(frozen=True, slots=True)
class _Point:
    """One share, and how the blend holds up."""

    alpha: float
    found: Comparison
    metrics: tuple[Metric, ...]
    gates: tuple[Gate, ...]

    @property
    def failed(self) -> list[str]:
        """The names of the gates that failed."""
        return [gate.metric.name for gate in self.gates if not gate.passed]

    @property
    def values(self) -> dict[str, float]:
        """Every figure by its name."""
        return {metric.name: metric.value for metric in (*self.metrics, *(gate.metric for gate in self.gates))}


def sweep(
    source: Checkpoint,
    donor: Donor,
    alphas: Sequence[float],
    recipe: blend.Recipe,
    how: validate.Recipe,
    place: Place | None = None,
) -> Report:
    """The report on ``source`` blended with ``donor`` at each of ``alphas``, otherwise as ``recipe`` says.

    Each share is held to the limits of ``how``; the report has no gates of its own, as it looks for the limit. Raises
    what validating raises, and before anything is spoken what `blend.Recipe` and `blend.blended` raise.
    """
    place = place or Place()
    blends = {alpha: blend.blended(source, donor, replace(recipe, alpha=alpha)) for alpha in alphas}
    answers = validate.ask(source, how, place)
    compared = {
        f"alpha {alpha:g}": validate.compare(one, answers, how, place, f"alpha {alpha:g}")
        for alpha, one in blends.items()
    }
    every = zip(blends, validate.listen(answers, compared, how, place), strict=True)
    points = [_Point(alpha, found, *figures(found, how.limits)) for alpha, found in every]
    (step, _) = next(iter(blends.values())).edits[-1]
    return Report(
        title=f"{source.path.name} with {donor.path.name} blended in",
        summary=f"{validate.summary(answers, how)} {_verdict(points)}",
        sections=(_listen(points), _shares(points), _gates(points)),
        provenance={
            **validate.lineage("original", source),
            **_donor(step.parents[-1]),
            "blend": f"{recipe.method}, tensors {recipe.tensors}, shares {', '.join(f'{p.alpha:g}' for p in points)}",
            **validate.asked(answers, how, place),
        },
    )


def _donor(origin: Origin) -> dict[str, str]:
    return {"donor": origin.name, **{f"donor {name}": f"SHA-256 {file.sha256}" for name, file in origin.files.items()}}


def _verdict(points: Sequence[_Point]) -> str:
    """Up to which share all gates hold."""
    kept = None
    for point in points:
        if point.failed:
            break
        kept = point.alpha
    if kept is None:
        return f"Already alpha {points[0].alpha:g} fails a gate."
    return "All gates hold at every share." if kept == points[-1].alpha else f"All gates hold up to alpha {kept:g}."


@dataclass(frozen=True, slots=True)
class _Column:
    """A figure that is followed over the shares: what it is called in a comparison, here, and of the original."""

    name: str
    title: str
    original: str | None = None


_COLUMNS = (
    _Column("KL divergence, codebook 0", "KL of codebook 0, nats"),
    _Column("KL divergence, other codebooks", "KL of the others, nats"),
    _Column("duration ratio", "duration ratio"),
    _Column("duration ratio, runaways included", "duration ratio, all"),
    *(
        _Column(f"{name}, candidate", title, f"{name}, original")
        for name, title in (
            ("character error rate", "CER"),
            ("word error rate", "WER"),
            ("similarity to the reference, own encoder", "similarity, own encoder"),
            ("similarity to the reference, WeSpeaker", "similarity, WeSpeaker"),
            ("sound quality, DNSMOS", "sound quality"),
        )
    ),
)


def _shares(points: Sequence[_Point]) -> Section:
    known = [column for column in _COLUMNS if column.name in points[0].values]
    judged = points[0].found.pairs is not None
    first = points[0].values
    original = [None if column.original is None else first[column.original] for column in known]
    rows: list[tuple[Cell, ...]] = [("original", *_ends(points[0].found.original), *original, "")]
    rows += [
        (
            f"{point.alpha:g}",
            *_ends(point.found.candidate),
            *(point.values[column.name] for column in known),
            ", ".join(point.failed) or "none",
        )
        for point in points
    ]
    columns = ("share", "stop rate, %", "early stops, %", *(column.title for column in known), "gates that failed")
    return Section(
        "Share by share",
        "The stop rate is the share of utterances that did not run away. Durations leave runaways out but where they "
        f"are all counted; what judges hear counts them.{'' if judged else f' {UNJUDGED}'}",
        (Table("", columns, tuple(rows)),),
        tuple(_plots(points, known)),
    )


def _ends(side: Side) -> tuple[float, float]:
    return 100 - side.runaways, side.early_stops


def _plots(points: Sequence[_Point], known: Sequence[_Column]) -> Iterator[Plot]:
    labels = tuple(f"{point.alpha:g}" for point in points)
    first = points[0]

    def plot(title: str, values: Sequence[float], original: float | None, limit: float | None = None) -> Plot:
        lines = [Series("blend", tuple(values))]
        if original is not None:
            lines.append(Series("original", (original,) * len(values)))
        return Plot("line", title, tuple(lines), "the donor's share", "", labels, limit)

    before = _ends(first.found.original)
    for place, title in enumerate(("Stop rate, %", "Early stops, %")):
        yield plot(title, [_ends(point.found.candidate)[place] for point in points], before[place])
    limits = {gate.metric.name: gate.limit for gate in first.gates}
    for column in known:
        values = [point.values[column.name] for point in points]
        original = None if column.original is None else first.values[column.original]
        yield plot(column.title[:1].upper() + column.title[1:], values, original, limits.get(column.name))


def _gates(points: Sequence[_Point]) -> Section:
    rows = []
    for several in zip(*(point.gates for point in points), strict=True):
        gate = several[0]
        limit = f"{gate.direction} {number(gate.limit, gate.metric.unit)}"
        rows.append((gate.metric.name, limit, *map(_held, several)))
    columns = ("figure", "limit", *(f"{point.alpha:g}" for point in points))
    return Section(
        "Gates by share",
        "As quaver validate would hold each blend to them; 95 % bootstrap intervals.",
        (Table("", columns, tuple(rows)),),
    )


def _held(gate: Gate) -> str:
    metric = gate.metric
    between = f" ({number(metric.interval[0])} to {number(metric.interval[1])})" if metric.interval else ""
    return f"{number(metric.value, metric.unit)}{between}{'' if gate.passed else ' FAIL'}"


def _listen(points: Sequence[_Point]) -> Section:
    first = points[0].found
    sides = [("original", first.original), *((f"{point.alpha:g}", point.found.candidate) for point in points)]
    clips = tuple(
        Clip(item.utterance.text, tuple(Take(name, side.sounds[index]) for name, side in sides))
        for index, item in enumerate(first.original.spoken[: first.n_clips])
    )
    return Section("Listen", "Spoken freely: the same text, voice and seed, at each share.", clips=clips)
