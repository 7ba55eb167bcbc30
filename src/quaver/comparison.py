"""Two models' answers about the same speech as figures, gates and sections of a report.

Shapes: T frames, Q codebooks. Intervals are 95 % bootstrap intervals over utterances, not over frames: the frames of
one utterance are no independent witnesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quaver import corpus, judge, panel
from quaver.audio import Audio
from quaver.config import FRAME_RATE_HZ
from quaver.corpus import Item
from quaver.limits import JudgedLimits, Limits
from quaver.panel import Heard, Pairs
from quaver.plots import Plot, Series
from quaver.report import Clip, Gate, Metric, Section, Table, Take, gate
from quaver.sampling import MIN_FRAMES

_N_BOOTSTRAP = 1000
_N_LAST = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """Two models on one utterance: frames, divergence and agreement summed over them, by codebook [Q].

    ``stops``: the original's and the candidate's probability of the stop id, before each frame and at the end [T + 1].
    """

    n_frames: np.ndarray
    kl: np.ndarray
    agreed: np.ndarray
    stops: tuple[np.ndarray, np.ndarray]

    @property
    def first_kl(self) -> float:
        """Mean divergence of codebook 0."""
        return float(self.kl[0] / self.n_frames[0])


@dataclass(frozen=True, slots=True)
class Side:
    """One model's free-running speech, as codes and as sound, what its weights take, and what judges heard."""

    name: str
    spoken: Sequence[Item]
    sounds: Sequence[Audio]
    disk_bytes: int
    memory_bytes: int
    heard: Sequence[Heard] | None = None
    """None where no judge was asked."""

    @property
    def runaways(self) -> float:
        """Per cent of the utterances that ran away."""
        return 100 * sum(map(ran_away, self.spoken)) / len(self.spoken)

    @property
    def early_stops(self) -> float:
        """Per cent of the utterances that stopped before their text can have been said."""
        return 100 * sum(map(stopped_early, self.spoken)) / len(self.spoken)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that two models answered about the same utterances."""

    differences: Sequence[Difference]
    original: Side
    candidate: Side
    seed: int
    n_clips: int = 4

    @property
    def pairs(self) -> Pairs | None:
        """What judges heard of both sides; None where none was asked."""
        if self.original.heard is None or self.candidate.heard is None:
            return None
        away = [any(map(ran_away, pair)) for pair in zip(self.original.spoken, self.candidate.spoken, strict=True)]
        return Pairs(self.original.spoken, self.original.heard, self.candidate.heard, away, self.seed)

    @property
    def sides(self) -> tuple[Side, Side]:
        """The original, then the candidate."""
        return self.original, self.candidate

    @property
    def ended(self) -> list[Difference]:
        """The utterances that the original ended by itself, so that their true end is known."""
        pairs = zip(self.differences, self.original.spoken, strict=True)
        return [difference for difference, item in pairs if not ran_away(item)]

    def mean(self, parts: Callable[[Difference], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Sum over sum, over all utterances, of the (sum, count) that ``parts`` gives for one."""
        pairs = [parts(difference) for difference in self.differences]
        ratio: np.ndarray = np.sum([a for a, _ in pairs], axis=0) / np.sum([b for _, b in pairs], axis=0)
        return ratio

    def interval(self, above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
        """The 95 % interval of sum(above) / sum(below) over utterances drawn with replacement."""
        picks = np.random.default_rng(self.seed).integers(0, len(above), (_N_BOOTSTRAP, len(above)))
        low, high = np.percentile(np.array(above)[picks].sum(1) / np.array(below)[picks].sum(1), (2.5, 97.5))
        return float(low), float(high)


def ran_away(item: Item) -> bool:
    """Whether speech is longer than its text can be: it never stopped, or was cut."""
    return len(item.codes) >= corpus.most_frames(item.utterance.text)


def stopped_early(item: Item) -> bool:
    """Whether speech is shorter than its text can be."""
    return len(item.codes) < corpus.least_frames(item.utterance.text)


def figures(found: Comparison, limits: Limits) -> tuple[tuple[Metric, ...], tuple[Gate, ...]]:
    """The figures of a comparison that no gate holds, and those that gates hold to ``limits``.

    A limit that is infinite holds nothing: its figure has no gate.
    """
    every = [*_forced_gates(found, limits), *_stop_gates(found, limits), *_free_gates(found, limits)]
    judged = list[Metric]()
    if found.pairs is not None:
        judged, judged_gates = panel.figures(found.pairs, limits.judged or JudgedLimits())
        every += judged_gates
    free = [one.metric for one in every if math.isinf(one.limit)]
    sizes = [
        Metric(f"{side.name} {where}", n_bytes, "bytes", None, note)
        for side in found.sides
        for where, n_bytes, note in (
            ("on disk", side.disk_bytes, ""),
            ("in memory", side.memory_bytes, "weights as loaded here"),
        )
    ]
    durations = []
    for name, with_runaways in (("duration ratio", False), ("duration ratio, runaways included", True)):
        ratio, interval = _duration_ratio(found, with_runaways=with_runaways)
        durations.append(Metric(name, ratio, "", interval, "free-running, same seeds"))
    return (*durations, *judged, *free, *sizes), tuple(one for one in every if not math.isinf(one.limit))


def _forced_gates(found: Comparison, limits: Limits) -> list[Gate]:
    parts = (("codebook 0", slice(0, 1), limits.first_kl, limits.first_agreement),
             ("other codebooks", slice(1, None), limits.residual_kl, limits.residual_agreement))  # fmt: skip
    gates = []
    for name, part, most_kl, least_agreement in parts:
        n_frames = [d.n_frames[part].sum() for d in found.differences]
        kl = [d.kl[part].sum() for d in found.differences]
        agreed = [100 * d.agreed[part].sum() for d in found.differences]
        for what, unit, sums, limit in (
            ("KL divergence", "nats", kl, most_kl),
            ("same likeliest code", "%", agreed, None),
        ):
            value = float(np.sum(sums) / np.sum(n_frames))
            metric = Metric(f"{what}, {name}", value, unit, found.interval(sums, n_frames), "on the same speech")
            gates.append(gate(metric, at_least=least_agreement) if limit is None else gate(metric, at_most=limit))
    return gates


def _stop_gates(found: Comparison, limits: Limits) -> list[Gate]:
    at_end = [d.stops[0][-1] - d.stops[1][-1] for d in found.ended]
    early = [_chance_before(d.stops[1]) - _chance_before(d.stops[0]) for d in found.ended]
    lost = float(np.mean(at_end)) if at_end else math.nan
    gained = float(np.mean(early)) if early else math.nan
    note = "mean change of probability"
    return [
        gate(Metric("lost chance to stop at the true end", lost, "", None, note), at_most=limits.stop_change),
        gate(Metric("gained chance to stop before it", gained, "", None, note), at_most=limits.stop_change),
    ]


def _free_gates(found: Comparison, limits: Limits) -> list[Gate]:
    before, after = found.sides
    ratio, _ = _duration_ratio(found)
    either_way = max(ratio, 1 / ratio) if ratio else math.inf
    disk = found.candidate.disk_bytes / found.original.disk_bytes
    return [
        gate(_more("runaways", before.runaways, after.runaways), at_most=limits.runaways),
        gate(_more("early stops", before.early_stops, after.early_stops), at_most=limits.early_stops),
        gate(Metric("duration ratio, longer by shorter", either_way), at_most=limits.duration),
        gate(_added_silence(found), at_most=limits.leading_silence),
        gate(Metric("disk, candidate by original", disk), at_most=limits.disk),
    ]


def _more(what: str, before: float, after: float) -> Metric:
    return Metric(f"{what} more than the original's", after - before, "%", None, _both(before, after, "%"))


def _added_silence(found: Comparison) -> Metric:
    before, after = ([judge.leading_silence(sound) for sound in side.sounds] for side in found.sides)
    added = [b - a for a, b in zip(before, after, strict=True)]
    note = _both(float(np.mean(before)), float(np.mean(after)), "s")
    return Metric("leading silence added", float(np.mean(added)), "s", judge.interval(added, found.seed), note)


def _both(before: float, after: float, unit: str) -> str:
    return f"original {before:.3g} {unit}, candidate {after:.3g} {unit}"


def _duration_ratio(found: Comparison, *, with_runaways: bool = False) -> tuple[float, tuple[float, float] | None]:
    """The candidate's frames over the original's and the interval; as a rule where both ended by themselves."""
    pairs = [
        (len(theirs.codes), len(ours.codes))
        for ours, theirs in zip(found.original.spoken, found.candidate.spoken, strict=True)
        if with_runaways or not (ran_away(ours) or ran_away(theirs))
    ]
    if not pairs:
        return math.nan, None
    above, below = zip(*pairs, strict=True)
    return sum(above) / sum(below), found.interval(above, below)


def _chance_before(stops: np.ndarray) -> float:
    """The chance that speech sampled along this utterance ends before its end."""
    return 1 - float(np.prod(1 - stops[MIN_FRAMES:-1].astype(np.float64)))


def sections(found: Comparison, limits: Limits) -> tuple[Section, ...]:
    """The parts of the report: what to listen to, what judges hear, known speech, stopping, and free speech."""
    return (
        _listen_section(found),
        panel.section(found.pairs),
        _forced_section(found, limits),
        _stop_section(found),
        _free_section(found),
    )


def _forced_section(found: Comparison, limits: Limits) -> Section:
    kl = tuple(map(float, found.mean(lambda d: (d.kl, d.n_frames))))
    agreed = tuple(map(float, 100 * found.mean(lambda d: (d.agreed, d.n_frames))))
    codebooks = tuple(str(codebook) for codebook in range(len(kl)))
    by_utterance = Series("utterances", tuple(d.first_kl for d in found.differences))
    rows = tuple(zip(range(len(kl)), kl, agreed, strict=True))
    return Section(
        "The same speech, frame by frame",
        "Both models see the same past. How far the candidate's probabilities are from the original's, and how often "
        "both find the same code likeliest.",
        (Table("By codebook", ("codebook", "KL divergence, nats", "same likeliest code, %"), rows),),
        (
            Plot("bar", "KL divergence", (Series("mean", kl),), "codebook", "nats", codebooks, limits.first_kl),
            Plot("line", "Same likeliest code", (Series("share", agreed),), "codebook", "% of frames", codebooks),
            Plot("histogram", "KL divergence of codebook 0, by utterance", (by_utterance,), "nats", "utterances"),
        ),
    )


def _stop_section(found: Comparison) -> Section:
    title, ended = "Knowing when to stop", found.ended
    if not ended:
        return Section(title, "The original ended none of its utterances by itself: there is no true end to ask about.")
    n_last = min(_N_LAST, *(len(d.stops[0]) for d in ended))
    chances = [tuple(map(float, np.mean([d.stops[i][-n_last:] for d in ended], axis=0))) for i in (0, 1)]
    early = [float(np.mean([_chance_before(d.stops[i]) for d in ended])) for i in (0, 1)]
    names = [side.name for side in found.sides]
    rows = tuple((name, chance[-1], before) for name, chance, before in zip(names, chances, early, strict=True))
    labels = tuple(str(place - n_last + 1) for place in range(n_last))
    lines = tuple(Series(name, chance) for name, chance in zip(names, chances, strict=True))
    return Section(
        title,
        f"The probability of the stop id along the {len(ended)} utterances that the original ended by itself: at their "
        "true end, and of stopping anywhere before it. Sampling knobs left out.",
        (Table("", ("model", "at the true end", "before it"), rows),),
        (Plot("line", "Chance to stop around the true end", lines, "frames from the end", "probability", labels),),
    )


def _free_section(found: Comparison) -> Section:
    rows, ratios = [], []
    for difference, ours, theirs in zip(found.differences, found.original.spoken, found.candidate.spoken, strict=True):
        ends = [
            f"{side.name} {end}" for side, item in zip(found.sides, (ours, theirs), strict=True) if (end := _end(item))
        ]
        said = ours.utterance
        rows.append((said.text, _who(ours), _seconds(ours), _seconds(theirs), difference.first_kl, ", ".join(ends)))
        ratios.append(len(theirs.codes) / len(ours.codes))
    lengths = tuple(Series(side.name, tuple(map(_seconds, side.spoken))) for side in found.sides)
    columns = ("text", "voice", "original, s", "candidate, s", "KL of codebook 0, nats", "ended badly")
    return Section(
        "Speaking freely",
        "Each model speaks the same texts with the same seeds. Once one code differs the two go their own ways: single "
        "lengths differ, their sum should not. Speech that is longer than its text can be has run away, speech that is "
        "shorter stopped early.",
        (Table("By utterance", columns, tuple(rows)),),
        (
            Plot("histogram", "Length", lengths, "seconds", "utterances"),
            Plot(
                "histogram", "Candidate's length by the original's", (Series("", tuple(ratios)),), "ratio", "utterances"
            ),
        ),
    )


def _listen_section(found: Comparison) -> Section:
    clips = []
    heard = list(zip(found.original.sounds, found.candidate.sounds, strict=True))
    for index, sounds in enumerate(heard[: found.n_clips]):
        said = [side.spoken[index] for side in found.sides]
        takes = tuple(
            Take(side.name, sound, _end(item)) for side, sound, item in zip(found.sides, sounds, said, strict=True)
        )
        clips.append(Clip(f"{said[0].utterance.text} ({_who(said[0])})", takes))
    return Section("Listen", "Spoken freely: the same text, voice and seed.", clips=tuple(clips))


def _end(item: Item) -> str:
    """What is wrong with how speech ended, if anything."""
    return "ran away" if ran_away(item) else "stopped early" if stopped_early(item) else ""


def _seconds(item: Item) -> float:
    return len(item.codes) / FRAME_RATE_HZ


def _who(item: Item) -> str:
    voice = item.utterance.voice
    return voice.name if voice else item.utterance.instruct or ""
