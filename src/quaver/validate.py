"""A candidate model held against its original on held-out speech.

The original speaks texts that calibration never sees; then both models are asked about that speech frame by frame
(teacher forcing), and the candidate speaks the same texts with the same seeds. The original runs first and what it
answered stays in host memory, so that the two are never loaded together; judges, where they are asked, listen when
both are gone. Shapes: T frames, Q codebooks, V ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata

import numpy as np
import torch
from torch import Tensor

from quaver import corpus, ledger
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.comparison import Comparison, Difference, Side, figures, sections
from quaver.corpus import Item, Progress
from quaver.errors import RecipeError
from quaver.judge import Judges
from quaver.limits import Limits
from quaver.model.tts import TTS, Logits
from quaver.panel import UNJUDGED, Panel
from quaver.report import Report

_BATCH = 8
_ASKED = ("utterances", "computed on", "judges", "versions")
"""What a report's provenance tells of how it was made; the rest tells of the two models."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How much to compare: held-out utterances, their seed, sentences to listen to, the limits, and who judges them.

    Raises RecipeError for nothing to compare, and for limits on what judges hear where none is asked.
    """

    n_samples: int = 32
    seed: int = 1729
    n_clips: int = 4
    limits: Limits = field(default_factory=Limits)
    judges: Judges | None = None

    def __post_init__(self) -> None:
        if self.n_samples < 1 or self.n_clips < 0:
            raise RecipeError(f"{self.n_samples} utterances, {self.n_clips} clips: at least 1 and 0 are needed")
        if self.limits.judged is not None and self.judges is None:
            raise RecipeError(
                "there are gates on what judges hear, and no judge: name some (--judge), or leave them out"
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where models run, and who is told how far they are."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    progress: Progress | None = None

    def tell(self, what: str) -> Progress:
        """The progress under one name, whatever the teller calls it."""
        progress = self.progress
        return lambda _, done, total: progress(what, done, total) if progress else None


@dataclass(frozen=True, slots=True)
class Opinion:
    """Log-probabilities on one utterance: codebook 0 [T + 1, V], the stop id last, and the others [T, Q - 1, V'].

    Codebook 0 is over the ids that may be sampled: what a model thinks of control ids changes no speech.
    """

    first: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True)
class Answers:
    """What an original answered: its opinions on its own speech, and that speech. It need not stay in memory itself."""

    source: Checkpoint
    opinions: Sequence[Opinion]
    side: Side


def validate(
    candidate: Checkpoint,
    source: Checkpoint,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Report:
    """The report on ``candidate`` against ``source``; its ``require`` raises GateFailed when a gate failed.

    Host memory: 4 bytes a frame and id, about 130 KB a frame for the published models. Raises RecipeError for models
    that cannot be compared, and what loading, prompting and judging raise.
    """
    recipe, place = recipe or Recipe(), Place(device, dtype, progress)
    check_comparable(candidate, source)
    answers = ask(source, recipe, place)
    (found,) = listen(answers, {"the candidate": compare(candidate, answers, recipe, place)}, recipe, place)
    metrics, gates = figures(found, recipe.limits)
    return Report(
        title=f"{candidate.path.name} against {source.path.name}",
        summary=summary(answers, recipe),
        metrics=metrics,
        gates=gates,
        sections=sections(found, recipe.limits),
        provenance={**lineage("candidate", candidate), **lineage("original", source), **asked(answers, recipe, place)},
    )


def summary(answers: Answers, recipe: Recipe) -> str:
    """What was compared, in a line; that nobody listened, where nobody did."""
    n_frames = sum(len(item.codes) for item in answers.side.spoken)
    name = answers.source.path.name
    told = f"{recipe.n_samples} held-out utterances, {n_frames:,} frames, spoken by {name}."
    return told if recipe.judges else f"{told} {UNJUDGED}"


def asked(answers: Answers, recipe: Recipe, place: Place) -> dict[str, str]:
    """The circumstances, for a report's provenance."""
    sums = {} if recipe.judges is None else recipe.judges.sums()
    types = "default types" if place.dtype is None else str(place.dtype).removeprefix("torch.")
    return {
        "utterances": f"seed {recipe.seed}, SHA-256 {corpus.fingerprint(answers.side.spoken)}",
        "computed on": f"{place.device}, {types}",
        "judges": ", ".join(f"{name} SHA-256 {total}" for name, total in sums.items()) or "none",
        "versions": f"quaver {metadata.version('quaver')}, torch {torch.__version__}",
    }


def record(candidate: Checkpoint, source: Checkpoint, report: Report) -> Checkpoint:
    """``candidate`` with the verdict and figures of ``report``, which compared it with ``source``, in its provenance.

    The sealed part about how it was made stays as it is. Raises what Checkpoint.record raises.
    """
    told = json.loads(report.to_json())
    return candidate.record(
        {
            "verdict": report.verdict,
            "against": [asdict(origin) for origin in source.origins()],
            **{key: told[key] for key in ("passed", "summary", "gates", "metrics")},
            "asked": {key: value for key, value in report.provenance.items() if key in _ASKED},
        }
    )


def check_comparable(candidate: Checkpoint, source: Checkpoint) -> None:
    """Raises RecipeError unless both models answer the same questions in the same ids."""
    settings = [
        {
            "tts_model_type": checkpoint.config.tts_model_type,
            "hidden_size": checkpoint.config.talker_config.hidden_size,
            "vocab_size": checkpoint.config.talker_config.vocab_size,
            "codebooks": checkpoint.config.talker_config.num_code_groups,
            "residual vocab_size": checkpoint.config.talker_config.code_predictor_config.vocab_size,
            "codec_eos_token_id": checkpoint.config.talker_config.codec_eos_token_id,
        }
        for checkpoint in (candidate, source)
    ]
    for name, value in settings[0].items():
        if value != settings[1][name]:
            raise RecipeError(
                f"{candidate.path} and {source.path} cannot be compared: {name} is {value} and {settings[1][name]}"
            )


def ask(source: Checkpoint, recipe: Recipe, place: Place) -> Answers:
    """What ``source`` says and thinks of it. Raises RecipeError when it says nothing for one of the texts."""
    tts = TTS.load(source, device=place.device, dtype=place.dtype)
    telling = place.tell("the original speaks")
    spoken = corpus.builtin(tts, recipe.n_samples, seed=recipe.seed, split="held-out", progress=telling)
    if not all(len(item.codes) for item in spoken):
        raise RecipeError(f"{source.path} says nothing for one of its texts: there is nothing to compare with")
    judged = force(tts, spoken, place.tell("the original judges its speech"))
    opinions = [opinion(tts, logits, "cpu") for logits in judged]
    return Answers(source, opinions, _side("original", tts, spoken))


def compare(
    candidate: Checkpoint, answers: Answers, recipe: Recipe, place: Place, who: str = "the candidate"
) -> Comparison:
    """What ``candidate`` thinks of the original's speech, and says itself; nobody has listened yet."""
    tts = TTS.load(candidate, device=place.device, dtype=place.dtype)
    spoken = answers.side.spoken
    judged = force(tts, spoken, place.tell(f"{who} judges it"))
    pairs = zip(answers.opinions, judged, strict=True)
    differences = [difference(before, opinion(tts, logits, place.device)) for before, logits in pairs]
    said = corpus.speak(tts, [item.utterance for item in spoken], place.tell(f"{who} speaks"))
    return Comparison(differences, answers.side, _side("candidate", tts, said), recipe.seed, recipe.n_clips)


def listen(answers: Answers, found: Mapping[str, Comparison], recipe: Recipe, place: Place) -> list[Comparison]:
    """The comparisons in ``found``, by who is compared, with what the recipe's judges hear; as they are without judges.

    The original is heard once. To be called when the models are gone: the judges are loaded here.
    """
    if recipe.judges is None:
        return list(found.values())
    panel = Panel(recipe.judges, answers.source)

    def heard(side: Side, who: str) -> Side:
        return replace(side, heard=panel.listen(side.spoken, side.sounds, place.tell(f"judges hear {who}")))

    original = heard(answers.side, "the original")
    return [replace(one, original=original, candidate=heard(one.candidate, who)) for who, one in found.items()]


def force(tts: TTS, items: Sequence[Item], tell: Progress) -> Iterator[Logits]:
    """What ``tts`` thinks of the speech of ``items``, one after the other."""
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        yield from tts.force([tts.prompt(item.utterance) for item in batch], [item.codes for item in batch])
        tell("", start + len(batch), len(items))


def opinion(tts: TTS, logits: Logits, device: str) -> Opinion:
    """The log-probabilities of ``logits``, on ``device``."""
    stop_id = tts.config.talker_config.codec_eos_token_id
    first = torch.cat((logits.talker[:, ~tts.suppressed(stop_too=True)], logits.talker[:, stop_id, None]), dim=1)
    return Opinion(first.log_softmax(-1).to(device), logits.residual.log_softmax(-1).to(device))


def difference(before: Opinion, after: Opinion) -> Difference:
    """How far the second opinion of an utterance is from the first."""
    first, residual = before.first.to(after.first.device), before.residual.to(after.residual.device)
    pairs = [(first, after.first), *zip(residual.unbind(1), after.residual.unbind(1), strict=True)]
    return Difference(
        n_frames=np.array([len(ours) for ours, _ in pairs]),
        kl=np.array([float((ours.exp() * (ours - theirs)).sum(-1).double().sum()) for ours, theirs in pairs]),
        agreed=np.array([int((ours.argmax(-1) == theirs.argmax(-1)).sum()) for ours, theirs in pairs]),
        stops=(first[:, -1].exp().cpu().numpy(), after.first[:, -1].exp().cpu().numpy()),
    )


@torch.inference_mode()
def _side(name: str, tts: TTS, spoken: Sequence[Item]) -> Side:
    rate_hz = tts.checkpoint.codec_config.output_sample_rate
    sounds = []
    for item in spoken:
        samples = tts.decoder(item.codes.T[None].to(tts.device))[0] if len(item.codes) else torch.zeros(0)
        sounds.append(Audio(samples.float().cpu().numpy(), rate_hz))
    total = ledger.weigh(tts.checkpoint, device=str(tts.device)).total
    return Side(name, spoken, sounds, total.disk_bytes, total.memory_bytes)


def lineage(name: str, checkpoint: Checkpoint) -> dict[str, str]:
    """Which files ``checkpoint`` is, and what made it, as far as it says so itself."""
    made = [f"{step.tool} {step.version}" for step in checkpoint.provenance.steps]
    weights = {file: checkpoint.provenance.files[file] for file in checkpoint.provenance.tensors}
    sums = {f"{name} {file}": f"SHA-256 {one.sha256}" for file, one in weights.items()}
    return {name: ", ".join([checkpoint.path.name, *made]), **sums}
