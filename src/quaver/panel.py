"""What the judges say of two models' free speech, utterance by utterance, and of the two as pairs.

Every figure is a mean over utterances of the same text, voice and seed, and every difference one of pairs, with its
interval. What is no speech counts as the worst there is, so that breaking off is no way to better figures. Shapes: E
values of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from quaver import audio as audio_files
from quaver import judge
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.config import LANGUAGES
from quaver.corpus import Item, Progress
from quaver.judge import Judges
from quaver.limits import JudgedLimits
from quaver.model.encoders import load_speaker_encoder
from quaver.model.tts import references
from quaver.plots import Plot, Series
from quaver.report import Cell, Gate, Metric, Section, Table, gate

Figure = Literal["cer", "wer", "own_similarity", "similarity", "quality"]
"""Named as in Heard, and as the limit in JudgedLimits."""

UNJUDGED = "Speech was not judged: whether it is understood, whose voice it is and how it sounds was not asked."

_STRANGERS = 0.0
"""The similarity of a sound without a voice to any."""

_ERRORS: tuple[Figure, ...] = ("cer", "wer")
_PLOTTED: tuple[Figure, ...] = ("cer", "quality", "similarity", "own_similarity")


@dataclass(frozen=True, slots=True)
class Heard:
    """What the judges say of one utterance; ``voice`` [E] is a unit vector, None for a sound without a voice.

    Similarities are to the voice that was asked for; None where no recording of it, or no encoder, is there. Word
    errors are None in a language without words between spaces.
    """

    text: str
    cer: float
    wer: float | None
    own_similarity: float | None
    similarity: float | None
    quality: float
    voice: np.ndarray | None

    def figure(self, which: Figure) -> float | None:
        """The figure of that name."""
        value: float | None = getattr(self, which)
        return value


@dataclass(frozen=True, slots=True)
class Pairs:
    """What was heard of both sides, utterance by utterance; ``ran_away``: where either side did."""

    items: Sequence[Item]
    original: Sequence[Heard]
    candidate: Sequence[Heard]
    ran_away: Sequence[bool]
    seed: int

    @property
    def sides(self) -> tuple[tuple[str, Sequence[Heard]], ...]:
        """Both, with their names."""
        return ("original", self.original), ("candidate", self.candidate)

    @property
    def calm(self) -> Pairs:
        """Those in which neither side ran away."""
        kept = [index for index, away in enumerate(self.ran_away) if not away]
        return self._only(kept)

    def having(self, which: Figure) -> Pairs:
        """Those of which both sides have the figure."""
        each = enumerate(zip(self.original, self.candidate, strict=True))
        return self._only([i for i, pair in each if all(heard.figure(which) is not None for heard in pair)])

    def of(self, language: str) -> Pairs:
        """Those in one language."""
        return self._only([i for i, item in enumerate(self.items) if item.utterance.language.lower() == language])

    def _only(self, kept: Sequence[int]) -> Pairs:
        return Pairs(
            items=[self.items[i] for i in kept],
            original=[self.original[i] for i in kept],
            candidate=[self.candidate[i] for i in kept],
            ran_away=[self.ran_away[i] for i in kept],
            seed=self.seed,
        )

    def values(self, which: Figure) -> tuple[np.ndarray, np.ndarray]:
        """The figure of the original and of the candidate, of all pairs that have it."""
        kept = self.having(which)
        before, after = (np.array([heard.figure(which) for heard in side], float) for _, side in kept.sides)
        return before, after

    @property
    def likeness(self) -> list[float]:
        """How like the two sides' voices are, -1..1."""
        return [
            _STRANGERS if ours.voice is None or theirs.voice is None else float(ours.voice @ theirs.voice)
            for ours, theirs in zip(self.original, self.candidate, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A figure's name, what a change for the worse is called, and its direction."""

    name: str
    worse: str
    sign: Literal[1, -1]


_KINDS: dict[Figure, _Kind] = {
    "cer": _Kind("character error rate", "character errors added", 1),
    "wer": _Kind("word error rate", "word errors added", 1),
    "own_similarity": _Kind("similarity to the reference, own encoder", "similarity lost, own encoder", -1),
    "similarity": _Kind("similarity to the reference, WeSpeaker", "similarity lost, WeSpeaker", -1),
    "quality": _Kind("sound quality, DNSMOS", "sound quality lost, DNSMOS", -1),
}


class Panel:
    """The judges at work: Whisper, WeSpeaker, DNSMOS, and the speaker encoder of the original where it has one.

    Raises what loading them raises.
    """

    def __init__(self, judges: Judges, original: Checkpoint) -> None:
        n_threads = torch.get_num_threads()
        self._ears = judge.Whisper(judges.whisper, n_threads)
        self._voices = judge.Voices(judges.voices, n_threads)
        self._quality = judge.Quality(judges.quality, n_threads)
        self._encoder = load_speaker_encoder(original)
        self._references: dict[str, np.ndarray] = {}

    def listen(self, spoken: Sequence[Item], sounds: Sequence[Audio], tell: Progress) -> list[Heard]:
        """What is heard of ``spoken`` in ``sounds``."""
        found = list[Heard]()
        for item, sound in zip(spoken, sounds, strict=True):
            found.append(self._hear(item, sound))
            tell("", len(found), len(spoken))
        return found

    def _hear(self, item: Item, sound: Audio) -> Heard:
        said, language = item.utterance.text, item.utterance.language.lower()
        speaks = sound.seconds > judge.MIN_VOICE_S
        text = self._ears.hear(sound, LANGUAGES.get(language)) if speaks else ""
        voice = self._voices.embed(sound) if speaks else None
        return Heard(
            text=text,
            cer=judge.cer(text, said, language),
            wer=judge.wer(text, said, language),
            own_similarity=self._own_similarity(item, sound if speaks else None),
            similarity=self._similarity(item, voice),
            quality=self._quality.rate(sound) if speaks else judge.WORST_QUALITY,
            voice=voice,
        )

    def _similarity(self, item: Item, voice: np.ndarray | None) -> float | None:
        """To the recording that was cloned, where it ships with quaver."""
        asked, recordings = item.utterance.voice, references()
        if asked is None or asked.speaker is None or asked.name not in recordings:
            return None
        if asked.name not in self._references:
            self._references[asked.name] = self._voices.embed(audio_files.read(recordings[asked.name]))
        return _STRANGERS if voice is None else float(voice @ self._references[asked.name])

    def _own_similarity(self, item: Item, sound: Audio | None) -> float | None:
        asked = item.utterance.voice
        if self._encoder is None or asked is None or asked.speaker is None:
            return None
        if sound is None:
            return _STRANGERS
        ours = self._encoder.vector(sound)
        return float(torch.nn.functional.cosine_similarity(ours, asked.speaker.float(), dim=0))


def figures(pairs: Pairs, limits: JudgedLimits) -> tuple[list[Metric], list[Gate]]:
    """Both sides' means, and how much worse the candidate is, held to ``limits``; runaways included.

    A figure that no utterance has (the section says why) has no gate.
    """
    metrics, gates = list[Metric](), list[Gate]()
    for which, kind in _KINDS.items():
        values = pairs.values(which)
        if not len(values[0]):
            continue
        for (name, _), side in zip(pairs.sides, values, strict=True):
            interval = judge.interval(side.tolist(), pairs.seed)
            metrics.append(Metric(f"{kind.name}, {name}", float(side.mean()), "", interval))
        losses = kind.sign * (values[1] - values[0])
        before, after = pairs.calm.values(which)
        calm = kind.sign * (after - before)
        note = f"{len(losses)} pairs; {f'without runaways {calm.mean():.3g}' if len(calm) else 'each with a runaway'}"
        worse = Metric(kind.worse, float(losses.mean()), "", judge.interval(losses.tolist(), pairs.seed), note)
        gates.append(gate(worse, at_most=getattr(limits, which)))
    alike = pairs.likeness
    interval = judge.interval(alike, pairs.seed)
    metrics.append(Metric("voices of the two sides alike, WeSpeaker", float(np.mean(alike)), "", interval))
    return metrics, gates


def section(pairs: Pairs | None) -> Section:
    """The part of the report about what judges hear; where none was asked, it says so."""
    title = "Heard by judges"
    if pairs is None:
        return Section(title, f"{UNJUDGED} Name judges with --judge.")
    n_away = sum(pairs.ran_away)
    text = [
        "Whisper base writes down what it hears, WeSpeaker ResNet34 and the original's own speaker encoder compare "
        "voices, DNSMOS P.835 rates the sound from 1 to 5. All of them err: hold the candidate's figures against the "
        "original's. A rate is 1 at most; a sound too short to be speech is not understood, nobody's voice, and of "
        f"quality 1. {n_away} of {len(pairs.items)} pairs have a runaway; the gates count them.",
        *_missing(pairs),
    ]
    plots = tuple(_histogram(pairs, which) for which in _PLOTTED if len(pairs.values(which)[0]))
    return Section(title, " ".join(text), (_summary(pairs), *_by_language(pairs), _by_utterance(pairs)), plots)


def _missing(pairs: Pairs) -> Iterator[str]:
    """What could not be asked, and why."""
    if not len(pairs.values("own_similarity")[0]):
        yield "The model clones no voices: there is no similarity to a reference, only of the two sides."
    elif not len(pairs.values("similarity")[0]):
        yield "No recording of the voices is at hand: WeSpeaker compares the two sides alone."
    wordless = sorted({item.utterance.language.lower() for item in pairs.items} & judge.WORDLESS)
    if wordless:
        names = " and ".join(name.capitalize() for name in wordless)
        yield f"Written without spaces: {names}. Word errors mean nothing there and are left out."


def _summary(pairs: Pairs) -> Table:
    """Every figure with the runaways and without them."""
    rows = list[tuple[Cell, ...]]()
    for which, kind in _KINDS.items():
        for name, kept in (("all", pairs), ("without runaways", pairs.calm)):
            before, after = kept.values(which)
            if len(before):
                means = (float(side.mean()) for side in (before, after, after - before))
                ends = judge.interval((after - before).tolist(), pairs.seed)
                rows.append((kind.name, name, len(before), *means, *ends))
    columns = ("figure", "utterances", "pairs", "original", "candidate", "difference", "from", "to")
    return Table("In pairs, 95 % bootstrap intervals of the difference", columns, tuple(rows))


def _by_language(pairs: Pairs) -> Iterator[Table]:
    """One row a language, where there are several."""
    languages = sorted({item.utterance.language.lower() for item in pairs.items})
    if len(languages) < 2:
        return
    rows = []
    for language in languages:
        some = pairs.of(language)
        means = [float(side.mean()) if len(side) else None for which in _ERRORS for side in some.values(which)]
        rows.append((language, len(some.items), *means))
    columns = ("language", "utterances", "CER, original", "CER, candidate", "WER, original", "WER, candidate")
    yield Table("By language", columns, tuple(rows))


def _by_utterance(pairs: Pairs) -> Table:
    both = zip(pairs.items, pairs.original, pairs.candidate, pairs.likeness, strict=True)
    rows = tuple(
        (item.utterance.text, ours.text, theirs.text, ours.cer, theirs.cer, ours.quality, theirs.quality, alike)
        for item, ours, theirs, alike in both
    )
    columns = (
        "text", "original, as heard", "candidate, as heard", "CER, original", "CER, candidate", "quality, original",
        "quality, candidate", "voices alike",
    )  # fmt: skip
    return Table("What was heard, by utterance", columns, rows)


def _histogram(pairs: Pairs, which: Figure) -> Plot:
    values = zip(pairs.sides, pairs.values(which), strict=True)
    series = tuple(Series(name, tuple(side.tolist())) for (name, _), side in values)
    title = _KINDS[which].name
    return Plot("histogram", title[:1].upper() + title[1:], series, title, "utterances")
