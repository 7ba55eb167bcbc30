"""A model's card, README.md, written from its provenance and configuration: every figure in it is recorded there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quaver import ledger
from quaver.checkpoint import Checkpoint
from quaver.config import LANGUAGES
from quaver.errors import CheckpointError, RecipeError
from quaver.files import check_output
from quaver.provenance import CARD, CODEC, PROVENANCE, UNKNOWN, Origin, Step, licences, model_name
from quaver.recipe import RECIPE, readers, told
from quaver.report import Cell, Gate, Metric, Report, Section, Table, number

_RELATIONS = {"quantize": "quantized", "blend": "merge"}
_KINDS = {
    "base": "clones the voice of a recording",
    "custom_voice": "speaks in preset voices",
    "voice_design": "speaks in a voice that is described in words",
}
_DEEDS = {
    "quantize": "The talker's linears were made AWQ INT4 (group 128, zero points, GEMM layout); all else is bit-equal "
    "but the norms that absorbed scales.",
    "blend": "The talker's feed-forward weights moved a share of the way to those of a language model; all else is "
    "bit-equal.",
}


def check_place(out: Path, checkpoint: Checkpoint) -> None:
    """Raises RecipeError unless a card of ``checkpoint`` can be written to the file ``out``.

    In the model's own folder it is README.md and nothing else: what the provenance names must stay as it is.
    """
    check_output(out)
    place, folder = out.resolve(), checkpoint.path.resolve()
    if place.is_relative_to(folder) and place != folder / CARD:
        raise RecipeError(f"{out} is inside the model: a card there is {checkpoint.path / CARD}")


def card(checkpoint: Checkpoint) -> str:
    """The card as Markdown with YAML front matter. Raises CheckpointError for a model without provenance."""
    if not checkpoint.provenance.files:
        raise CheckpointError(
            f"{checkpoint.path / PROVENANCE} is missing: a card is written from it, for what quaver wrote alone"
        )
    return "\n".join([*_front(checkpoint), "", _body(checkpoint).to_markdown()])


def _origins(checkpoint: Checkpoint) -> list[Origin]:
    """Every model that this one comes from, each once, the nearest last."""
    found = [origin for step in checkpoint.provenance.steps for origin in step.parents]
    return list({json.dumps([one.name, {n: f.sha256 for n, f in one.files.items()}]): one for one in found}.values())


def _front(checkpoint: Checkpoint) -> Iterator[str]:
    """The YAML lines."""
    provenance, config = checkpoint.provenance, checkpoint.config
    # What quaver trained itself comes from no other model: its licence is its own card's.
    known = provenance.licences or licences(checkpoint.path)
    yield "---"
    if len(known) == 1 and known[0] != UNKNOWN:
        yield f"license: {_yaml(known[0])}"
    elif known and UNKNOWN not in known:
        yield "license: other"
        yield f"license_name: {_yaml(' and '.join(known))}"
    else:
        yield f"license: {UNKNOWN}"
    names = list(dict.fromkeys(origin.name for origin in _origins(checkpoint)))
    if names:
        yield "base_model:"
        yield from (f"- {_yaml(name)}" for name in names)
    relation = _RELATIONS.get(provenance.steps[-1].tool) if provenance.steps else None
    if relation:
        yield f"base_model_relation: {relation}"
    languages = [LANGUAGES[name] for name in config.languages if name in LANGUAGES]
    if languages:
        yield "language:"
        yield from (f"- {_yaml(code)}" for code in languages)
    yield "pipeline_tag: text-to-speech"
    yield "tags:"
    tags = ["quaver", "qwen3-tts", config.tts_model_type.replace("_", "-")]
    tags += ["awq", "int4"] if config.quantization_config is not None else []
    tags += ["int8"] if config.quaver is not None else []
    yield from (f"- {_yaml(tag)}" for tag in tags)
    yield "---"


def _yaml(text: str) -> str:
    """``text`` as a YAML string: JSON's form is one in every version of YAML."""
    return json.dumps(text, ensure_ascii=False)


def _body(checkpoint: Checkpoint) -> Report:
    config, provenance = checkpoint.config, checkpoint.provenance
    total = ledger.weigh(checkpoint).total
    return Report(
        title=model_name(checkpoint.path),
        summary=f"A Qwen3-TTS {config.tts_model_type} model, which {_KINDS[config.tts_model_type]}: "
        f"{total.n_parameters:,} parameters, {total.disk_bytes:,} bytes of tensors. Languages: "
        f"{', '.join(config.languages[1:])}. Written by `quaver card` from `{PROVENANCE}`.",
        metrics=tuple(map(_metric, _recorded(checkpoint, "metrics"))),
        gates=tuple(map(_gate, _recorded(checkpoint, "gates"))),
        sections=(
            Section("Validation", _verdict(checkpoint)),
            Section("What was done", _deeds(checkpoint), tuple(map(_step, _numbered(provenance.steps)))),
            Section("Made from", _lineage(checkpoint), (_sizes(checkpoint),)),
            Section("Run it", _commands(checkpoint)),
            Section("Verify it", _verifying(checkpoint)),
            Section("Limits", "\n".join(f"- {line}" for line in _limits(checkpoint))),
        ),
    )


def _recorded(checkpoint: Checkpoint, what: str) -> list[dict[str, Any]]:
    validation = checkpoint.provenance.validation
    return [] if validation is None else list(validation[what])


def _metric(row: Mapping[str, Any]) -> Metric:
    low, high = (_float(end) for end in row["interval"] or (None, None))
    interval = None if row["interval"] is None else (low, high)
    return Metric(row["name"], _float(row["value"]), row["unit"], interval, row["note"])


def _gate(row: Mapping[str, Any]) -> Gate:
    return Gate(_metric(row), row["limit"], row["direction"], row["passed"])


def _float(value: float | None) -> float:
    """A recorded number; JSON has none for what is not a number."""
    return math.nan if value is None else value


def _verdict(checkpoint: Checkpoint) -> str:
    validation = checkpoint.provenance.validation
    if validation is None:
        return (
            "No verdict is recorded. To record one: "
            f"`quaver validate {model_name(checkpoint.path)} --against ORIGINAL --record`."
        )
    names = " and ".join(origin["name"] for origin in validation["against"])
    asked = "; ".join(f"{key}: {value}" for key, value in validation["asked"].items())
    return f"Held against {names}. {validation['summary']} {asked[:1].upper()}{asked[1:]}."


def _numbered(steps: tuple[Step, ...]) -> list[tuple[int, Step]]:
    return list(enumerate(steps, 1))


def _deeds(checkpoint: Checkpoint) -> str:
    deeds = dict.fromkeys(_deed(step) for step in checkpoint.provenance.steps if step.tool in _DEEDS)
    return "\n\n".join(deeds) or "No step of quaver's own changed the weights."


def _deed(step: Step) -> str:
    return told(step.recipe) if step.recipe.get("method") == RECIPE else _DEEDS[step.tool]


def _step(numbered: tuple[int, Step]) -> Table:
    place, step = numbered
    rows = [(key, _told(value)) for part in (step.recipe, step.result) for key, value in part.items()]
    return Table(f"{place}. {step.tool}, quaver {step.version}", ("setting or result", "value"), tuple(rows))


def _told(value: Any) -> Cell:
    """A recorded setting or result for people; ranges by name as how many, and from where to where."""
    if isinstance(value, Mapping) and value and all(isinstance(one, list) and len(one) == 2 for one in value.values()):
        low, high = min(one[0] for one in value.values()), max(one[1] for one in value.values())
        return f"{len(value)} tensors, by {number(low)} to {number(high)}"
    if isinstance(value, str):
        return value
    return number(value) if isinstance(value, float) else json.dumps(value)


def _lineage(checkpoint: Checkpoint) -> str:
    lines = [f"- {one.name}: licence {' and '.join(one.licences)}" for one in _origins(checkpoint)]
    return "\n".join(lines) or "No other model is recorded."


def _sizes(checkpoint: Checkpoint) -> Table:
    """Every file's bytes, before the last step and now."""
    steps = checkpoint.provenance.steps
    before: dict[str, int] = {}
    for place, origin in enumerate(steps[-1].parents if steps else ()):
        # A donor's files are none of the model's.
        mine = {name: one.n_bytes for name, one in origin.files.items() if place == 0 or name.startswith(f"{CODEC}/")}
        before = {**mine, **before}
    now = {name: file.n_bytes for name, file in checkpoint.provenance.files.items()}
    rows = [(name, before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())]
    rows.append(("all", sum(before.values()) if before else None, sum(now.values())))
    return Table("Sizes", ("file", "bytes before", "bytes now"), tuple(rows))


def _commands(checkpoint: Checkpoint) -> str:
    config, name = checkpoint.config, model_name(checkpoint.path)
    how = {
        "base": "--voice me.wav",
        "custom_voice": f"--voice {min(config.talker_config.spk_id, default='NAME')}",
        "voice_design": '--instruct "A calm, low voice."',
    }[config.tts_model_type]
    return f'```console\nquaver say {name} "The ferry leaves at six." {how} -o out.wav\nquaver info {name}\n```'


def _verifying(checkpoint: Checkpoint) -> str:
    provenance, name = checkpoint.provenance, model_name(checkpoint.path)
    parents = "".join(f" --parent {one}" for one in dict.fromkeys(origin.name for origin in _origins(checkpoint)))
    return (
        f"```console\nquaver verify {name}{parents}\n```\n\nIt computes the SHA-256 of every file and tensor anew and "
        "names the first that differs; loading does the same for what it reads. The seal of how this model was made is "
        f"`{provenance.seal}`."
    )


def _limits(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.provenance.validation is None:
        yield "How far it is from the model that it was made from is not recorded."
    else:
        yield "The figures are those of the run named above: with other texts, voices and languages they differ."
        yield "They compare it with its original; how good that one is they do not tell."
    if note := readers(checkpoint.config):
        yield f"{note[0].upper()}{note[1:]}."
    for origin in _origins(checkpoint):
        if origin.licences == (UNKNOWN,):
            yield f"The licence of {origin.name} is not recorded: find it out before you share this model."
    if checkpoint.config.has_speaker_encoder:
        yield "A cloned voice is somebody's: use your own, or one whose owner has agreed, and say that it is synthetic."
