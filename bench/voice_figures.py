"""What was heard, as figures by group, gates, a report, and a table for a model card.

Intervals are 95 % bootstrap intervals over utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quaver import audio as audio_files
from quaver import judge
from quaver.plots import Plot, Series
from quaver.report import Cell, Clip, Gate, Metric, Report, Section, Table, Take, gate, number

GROUPS = {
    "trained voices": ("seen",),
    "new synthetic voices": ("unseen",),
    "real recordings": ("recording",),
    "never trained on": ("unseen", "recording"),
    "all": ("seen", "unseen", "recording"),
}
"""What the figures are given for; "trained" and "never trained on" are told of the voice that ships."""

_EARLY = 0.5
_N_LISTEN = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a good small voice keeps; rates 0..1, runaways in per cent, cosines."""

    cer: float = 0.15
    runaways: float = 2.0
    similarity: float = 0.35
    margin: float = 0.2
    int4_cer: float = 0.03
    codec_cer: float = 0.05
    codec_similarity: float = 0.5
    stream: float = 1e-4


@dataclass(frozen=True, slots=True)
class Reference:
    """A recording to clone: its group, what it says, and how alike another recording of its speaker sounds."""

    name: str
    group: str
    path: Path
    text: str
    same_speaker: float


@dataclass(frozen=True, slots=True)
class Sentence:
    """What to say in which voice, and the seconds from first to last sound that Kokoro takes for it."""

    index: int
    text: str
    reference: Reference
    seconds: float


@dataclass(frozen=True, slots=True)
class Spoken:
    """A sentence as one model said it and as the judges took it; ``similarities`` are those to every reference."""

    sentence: Sentence
    wav: Path
    finish: str
    heard: str
    cer: float
    seconds: float
    speech_s: float
    similarities: dict[str, float]

    @property
    def similarity(self) -> float:
        """To the reference it should be like."""
        return self.similarities[self.sentence.reference.name]

    @property
    def others(self) -> float:
        """The mean similarity to all other references."""
        own = self.sentence.reference.name
        return float(np.mean([value for name, value in self.similarities.items() if name != own]))

    @property
    def margin(self) -> float:
        """How much nearer it is to its own reference than to the others."""
        return self.similarity - self.others

    @property
    def ratio(self) -> float:
        """Its length by the natural one, silence around both left out."""
        return self.speech_s / self.sentence.seconds

    @property
    def ran_away(self) -> bool:
        """Whether it is longer than any speech of its text."""
        return self.seconds > judge.most_seconds(self.sentence.text)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A clip through the codec alone: character error rates before and after, likeness, and stream against whole."""

    group: str
    text: str
    original_cer: float
    cer: float
    similarity: float
    stream_error: float


def figures(spoken: Sequence[Spoken], seed: int = 1729) -> dict[str, dict[str, Metric]]:
    """The figures of each group that has utterances, by name; intervals are bootstraps over utterances."""
    found = {}
    for name, kinds in GROUPS.items():
        group = [s for s in spoken if s.sentence.reference.group in kinds]
        if group:
            found[name] = _group_figures(group, seed)
    return found


def _group_figures(group: Sequence[Spoken], seed: int) -> dict[str, Metric]:
    def mean(name: str, value: Callable[[Spoken], float], unit: str = "") -> Metric:
        values = [value(s) for s in group]
        return Metric(name, float(np.mean(values)), unit, judge.interval(values, seed))

    n_early = sum(s.ratio < _EARLY for s in group)
    made = (
        mean("mean CER", lambda s: s.cer),
        Metric("median CER", float(np.median([s.cer for s in group]))),
        Metric("runaways", 100 * sum(s.ran_away for s in group) / len(group), "%"),
        Metric("early stops", 100 * n_early / len(group), "%", None, "under half the natural length"),
        Metric("did not stop", 100 * sum(s.finish != "stop" for s in group) / len(group), "%"),
        mean("similarity to the reference", lambda s: s.similarity),
        mean("similarity to other voices", lambda s: s.others),
        mean("margin", lambda s: s.margin),
        mean("duration ratio", lambda s: s.ratio),
    )
    return {metric.name: metric for metric in made}


def gates(spoken: Sequence[Spoken], limits: Limits, name: str) -> list[Gate]:
    """The gates of one model."""
    found = figures(spoken)
    everyone, new = found["all"], found.get("never trained on", {})
    checks: list[tuple[Metric, float | None, float | None]]
    checks = [(everyone["mean CER"], limits.cer, None), (everyone["runaways"], limits.runaways, None)]
    if new:
        checks += [(new["similarity to the reference"], None, limits.similarity), (new["margin"], None, limits.margin)]
    return [
        gate(replace(metric, name=f"{name}: {metric.name}", note=note), at_most=most, at_least=least)
        for (metric, most, least), note in zip(
            checks, ("", "", "voices never trained on", "own reference over the others, voices never trained on"),
            strict=False,
        )
    ]  # fmt: skip


def paired(before: Sequence[Spoken], after: Sequence[Spoken]) -> list[Metric]:
    """The mean change from ``before`` to ``after`` over the same sentences, with intervals of the pairs."""
    pairs = list(zip(before, after, strict=True))
    found = []
    values: dict[str, Callable[[Spoken], float]] = {
        "CER": lambda s: s.cer,
        "similarity": lambda s: s.similarity,
        "margin": lambda s: s.margin,
        "duration ratio": lambda s: s.ratio,
    }
    for name, value in values.items():
        changes = [value(b) - value(a) for a, b in pairs]
        found.append(Metric(f"change of {name}", float(np.mean(changes)), "", judge.interval(changes)))
    return found


def codec_gates(decoded: Sequence[Decoded], limits: Limits, name: str) -> list[Gate]:
    """The gates of one codec."""
    lost = [d.cer - d.original_cer for d in decoded]
    alike = [d.similarity for d in decoded]
    originals = number(float(np.mean([d.original_cer for d in decoded])))
    mean = number(float(np.mean([d.cer for d in decoded])))
    return [
        gate(
            Metric(f"{name}: CER added by the codec", float(np.mean(lost)), "", judge.interval(lost),
                   f"{mean}, originals {originals}"),
            at_most=limits.codec_cer,
        ),
        gate(
            Metric(f"{name}: similarity through the codec", float(np.mean(alike)), "", judge.interval(alike)),
            at_least=limits.codec_similarity,
        ),
        gate(
            Metric(f"{name}: stream against whole", max(d.stream_error for d in decoded), "", None, "of full scale"),
            at_most=limits.stream,
        ),
    ]  # fmt: skip


def report(
    models: dict[str, list[Spoken]], codecs: dict[str, list[Decoded]], provenance: dict[str, str], limits: Limits
) -> Report:
    """The report on all models: the first is the original, the others are held against it."""
    found: list[Gate] = []
    metrics: list[Metric] = []
    first = next(iter(models), None)
    for name, spoken in models.items():
        found += gates(spoken, limits, name)
        if first is not None and name != first:
            changes = [replace(m, name=f"{name}: {m.name}") for m in paired(models[first], spoken)]
            found.append(gate(replace(changes[0], note=f"by utterance, against {first}"), at_most=limits.int4_cer))
            metrics += changes[1:]
    for name, decoded in codecs.items():
        found += codec_gates(decoded, limits, name)
    sections = [_listen(models), *(_model_section(name, spoken) for name, spoken in models.items())]
    sections += [_codec_section(name, decoded) for name, decoded in codecs.items()]
    n = len(next(iter(models.values()), ()))
    return Report(
        title=f"{' and '.join(models or codecs)} judged",
        summary=f"{n} sentences that were in no training text, each in a cloned voice; 95 % intervals over utterances.",
        metrics=tuple(metrics),
        gates=tuple(found),
        sections=tuple(section for section in sections if section is not None),
        provenance=provenance,
    )


def card(models: dict[str, list[Spoken]]) -> str:
    """The figures as a Markdown table for a model card: a figure a row, a model and group a column."""
    columns = ["never trained on", "trained voices", "all"]
    found = {name: figures(spoken) for name, spoken in models.items()}
    heads = [(name, group) for name, by_group in found.items() for group in columns if group in by_group]
    lines = [
        "| | " + " | ".join(f"{name}, {group}" for name, group in heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for figure in next(iter(found.values()))["all"]:
        cells = []
        for name, group in heads:
            metric = found[name][group][figure]
            between = f" ({metric.interval[0]:.2f} to {metric.interval[1]:.2f})" if metric.interval else ""
            digits = 1 if metric.unit == "%" else 3
            cells.append(f"{metric.value:.{digits}f}{f' {metric.unit}' if metric.unit else ''}{between}")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _listen(models: dict[str, list[Spoken]]) -> Section | None:
    """The first sentences of each group, the reference and every model side by side."""
    if not models:
        return None
    clips, counts = [], dict.fromkeys(("seen", "unseen", "recording"), 0)
    for takes in zip(*models.values(), strict=True):
        sentence = takes[0].sentence
        reference = sentence.reference
        counts[reference.group] += 1
        if counts[reference.group] > _N_LISTEN:
            continue
        sounds = [Take("reference", audio_files.read(reference.path), reference.name)]
        sounds += [
            Take(name, audio_files.read(take.wav), f"CER {take.cer:.2f}, similarity {take.similarity:.2f}")
            for name, take in zip(models, takes, strict=True)
        ]
        clips.append(Clip(f"{sentence.text} ({reference.name})", tuple(sounds)))
    return Section("Listen", "The reference to clone, then the sentence in its voice.", clips=tuple(clips))


def _model_section(name: str, spoken: Sequence[Spoken]) -> Section:
    voices = {s.sentence.reference.name: s.sentence.reference for s in spoken}
    by_voice = [(voices[v], [s for s in spoken if s.sentence.reference.name == v]) for v in sorted(voices)]
    alike = [
        [float(np.mean(column)) for column in zip(*((s.cer, s.similarity, s.others) for s in own), strict=True)]
        for _, own in by_voice
    ]
    bars = tuple(
        Series(label, tuple(row[column] for row in alike))
        for column, label in ((1, "own reference"), (2, "other voices"))
    )
    labels = tuple(reference.name.removeprefix("librispeech-") for reference, _ in by_voice)
    lengths = Series("", tuple(s.ratio for s in spoken))
    voice_rows: tuple[tuple[Cell, ...], ...] = tuple(
        (reference.name, reference.group, *row, reference.same_speaker)
        for (reference, _), row in zip(by_voice, alike, strict=True)
    )
    return Section(
        name,
        "The last column by voice is the ceiling: how alike another recording of the same speaker sounds.",
        (
            _group_table(spoken),
            Table("By voice", ("voice", "group", "CER", "similarity", "to others", "same speaker"), voice_rows),
            _sentence_table(spoken),
        ),
        (
            Plot("histogram", "Character error rate", (Series("", tuple(s.cer for s in spoken)),), "CER", "sentences"),
            Plot("histogram", "Length by the natural one", (lengths,), "ratio", "sentences"),
            Plot("bar", "Similarity by voice", bars, "voice", "cosine", labels),
        ),
    )


def _group_table(spoken: Sequence[Spoken]) -> Table:
    by_group = figures(spoken)
    sizes = {group: sum(s.sentence.reference.group in GROUPS[group] for s in spoken) for group in by_group}
    rows = tuple((name, *(_cell(found[name]) for found in by_group.values())) for name in by_group["all"])
    return Table("By group", ("figure", *(f"{group} ({n})" for group, n in sizes.items())), rows)


def _sentence_table(spoken: Sequence[Spoken]) -> Table:
    rows = tuple(
        (s.sentence.text, s.sentence.reference.name, s.heard, s.cer, s.similarity, s.ratio, _end(s))
        for s in sorted(spoken, key=lambda s: -s.cer)
    )
    columns = ("text", "voice", "heard", "CER", "similarity", "duration ratio", "end")
    return Table("By sentence, worst first", columns, rows)


def _end(spoken: Spoken) -> str:
    return "ran away" if spoken.ran_away else "early" if spoken.ratio < _EARLY else spoken.finish


def _cell(metric: Metric) -> str:
    between = f" ({metric.interval[0]:.2f} to {metric.interval[1]:.2f})" if metric.interval else ""
    return f"{metric.value:.3g}{f' {metric.unit}' if metric.unit else ''}{between}"


def _codec_section(name: str, decoded: Sequence[Decoded]) -> Section:
    rows = tuple((d.text, d.group, d.original_cer, d.cer, d.similarity) for d in sorted(decoded, key=lambda d: -d.cer))
    groups = tuple(
        (group, len(own), *(float(np.mean([getattr(d, field) for d in own])) for field in
                            ("original_cer", "cer", "similarity")))
        for group in ("seen", "unseen") if (own := [d for d in decoded if d.group == group])
    )  # fmt: skip
    columns = ("originals' CER", "CER", "similarity")
    return Section(
        f"{name}: the codec alone",
        "Held-out recordings encoded and decoded.",
        (Table("By group", ("group", "clips", *columns), groups), Table("By clip", ("text", "group", *columns), rows)),
    )
