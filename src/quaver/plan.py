"""What a model would take on disk and in memory in each profile, told before anything is written or downloaded.

The configuration says every tensor's name and shape. Types are those of the files where they are there, else the
published ones: bfloat16, and float32 for the codec. What quaver writes it tells to the byte; the rest is an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from quaver import awq, ledger
from quaver.checkpoint import INDEX, Spec, read_specs, resolve
from quaver.config import AwqConfig, CodecConfig, ModelConfig, parse, read_codec_config, read_model_config
from quaver.errors import CheckpointError
from quaver.ledger import Entry, megabytes
from quaver.model.codec_encoder import Codec
from quaver.model.tts import INT4_SUFFIXES, Model, memory_bytes
from quaver.provenance import CODEC, Provenance

Name = Literal["bf16", "int4", "compact"]
PROFILES: tuple[Name, ...] = ("bf16", "int4", "compact")

PREDICTOR, TEXT, DECODER = "talker.code_predictor.", "talker.model.text_embedding.", "decoder."
_SHRUNK = (PREDICTOR, TEXT, DECODER)
_HOW: Mapping[Name, tuple[str, str | None]] = {
    "bf16": ("as published", "quaver blend"),
    "int4": ("the talker's linears in AWQ INT4", "quaver quantize"),
    "compact": ("int4, and code predictor and text embedding in INT8, a scale a row, codec decoder in bfloat16", None),
}


@dataclass(frozen=True, slots=True)
class Profile:
    """A model in one profile: its modules, what is done to them, and the verb that writes it (None: none yet)."""

    name: Name
    how: str
    written_by: str | None
    entries: tuple[Entry, ...]

    @property
    def total(self) -> Entry:
        """The sum of the modules."""
        return ledger.total(self.entries)


@dataclass(frozen=True, slots=True)
class Plan:
    """A model in its profiles; ``types_from`` says where the types come from, ``codec`` whether it is counted."""

    model: str
    kind: str
    types_from: str
    codec: bool
    device: str
    profiles: tuple[Profile, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; ``exact`` is true of the profiles that quaver writes."""
        profiles = [
            {**asdict(one), "exact": one.written_by is not None, "total": asdict(one.total)} for one in self.profiles
        ]
        return {**asdict(self), "profiles": profiles}


def plan(
    source: str | Path, names: tuple[Name, ...] = PROFILES, *, codec: str | Path | None = None,
    device: str = "cpu",
) -> Plan:  # fmt: skip
    """The plan of the model in a folder, of a shipped voice, or of a config.json alone; weights are not read.

    ``codec`` names the speech tokenizer's folder or configuration, where it is not beside the model's; without one it
    is not counted. Memory is that of weights loaded on ``device`` by default. Raises CheckpointError for a
    configuration that is missing, not understood, or of widths that a profile does not fit.
    """
    file = _configuration(source)
    config, beside = read_model_config(file), file.parent
    codec_file = _codec_configuration(beside, codec)
    stored, codec_stored = _stored(beside), {} if codec_file is None else _stored(codec_file.parent)
    codec_specs = {} if codec_file is None else _codec_specs(read_codec_config(codec_file), codec_stored, codec_file)
    profiles = tuple(
        Profile(name, *_HOW[name], _weighed(name, _specs(config, stored, file, name), codec_specs, device))
        for name in names
    )
    return Plan(
        model=beside.resolve().name if stored else file.name,
        kind=f"{config.tts_model_type} {config.tts_model_size}",
        types_from="the files" if stored else "the published models: the configuration does not say them",
        codec=codec_file is not None,
        device=device,
        profiles=profiles,
    )


def _configuration(source: str | Path) -> Path:
    """The config.json that ``source`` names; a hub id is refused rather than downloaded whole."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() and "/" in str(source):
        raise CheckpointError(
            f"{source} is no folder and no config.json here: a plan needs the configuration alone, so download that"
        )
    return resolve(source) / "config.json"


def _codec_configuration(beside: Path, codec: str | Path | None) -> Path | None:
    if codec is None:
        found = beside / CODEC / "config.json"
        return found if found.exists() else None
    path = Path(codec)
    if path.is_file():
        return path
    for found in (path / CODEC / "config.json", path / "config.json"):
        if found.exists():
            return found
    raise CheckpointError(f"{codec} is no speech tokenizer's folder and no configuration of one")


def _stored(folder: Path) -> Mapping[str, Spec]:
    """The headers of the weights in ``folder``, none where it has a configuration alone."""
    there = (folder / INDEX).exists() or any(folder.glob("*.safetensors"))
    return read_specs(folder, Provenance.read(folder)) if there else {}


def _weighed(name: Name, specs: Mapping[str, Spec], codec_specs: Mapping[str, Spec], device: str) -> tuple[Entry, ...]:
    in_memory = memory_bytes(specs, codec_specs, device)
    if name == "compact":
        specs = _int8(specs)
        codec_specs = {key: _bf16(spec) if key.startswith(DECODER) else spec for key, spec in codec_specs.items()}
        # What is made small stays small in memory: else there would be no point in it.
        small = (item for item in (*specs.items(), *codec_specs.items()) if item[0].startswith(_SHRUNK))
        in_memory |= {key: spec.n_bytes for key, spec in small}
    return ledger.entries(specs, codec_specs, in_memory)


def _specs(config: ModelConfig, stored: Mapping[str, Spec], file: Path, name: Name) -> dict[str, Spec]:
    """Every tensor of the model with its talker as profile ``name`` has it, whatever the configuration says of it."""
    quantization = None if name == "bf16" else parse(AwqConfig, awq.settings(), "awq.settings")
    with torch.device("meta"):
        state = Model(replace(config, quantization_config=quantization)).state_dict()
    return {
        key: Spec(
            file,
            value.dtype if key.endswith(INT4_SUFFIXES) else _type(key, stored, torch.bfloat16),
            tuple(value.shape),
        )
        for key, value in state.items()
    }


def _codec_specs(config: CodecConfig, stored: Mapping[str, Spec], file: Path) -> dict[str, Spec]:
    with torch.device("meta"):
        state = Codec(config).state_dict()
    return {name: Spec(file, _type(name, stored, value.dtype), tuple(value.shape)) for name, value in state.items()}


def _type(name: str, stored: Mapping[str, Spec], otherwise: torch.dtype) -> torch.dtype:
    return stored[name].dtype if name in stored else otherwise


def _int8(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """``specs`` with the matrices of the code predictor and the text embedding in INT8, a float16 scale a row."""
    small: dict[str, Spec] = {}
    for name, spec in specs.items():
        if not name.startswith((PREDICTOR, TEXT)) or len(spec.shape) != 2:
            small[name] = spec
            continue
        small[name] = replace(spec, dtype=torch.int8)
        small[f"{name.removesuffix('.weight')}.scales"] = replace(spec, dtype=torch.float16, shape=spec.shape[:1])
    return small


def _bf16(spec: Spec) -> Spec:
    return replace(spec, dtype=torch.bfloat16) if spec.dtype == torch.float32 else spec


def table(plan: Plan) -> Iterator[str]:
    """The plan as lines of text: megabytes on disk and in memory, a pair of columns a profile, then what each is."""
    row = "{:<28}" + " {:>12}" * (2 * len(plan.profiles))
    yield f"{plan.model} ({plan.kind}), types of {plan.types_from}"
    heads = [one.name + ("" if one.written_by else "*") for one in plan.profiles]
    yield row.format("MB", *(f"{head} {what}" for head in heads for what in ("disk", "mem")))
    names = list(dict.fromkeys(entry.name for one in plan.profiles for entry in (*one.entries, one.total)))
    for name in names:
        found = [next(e for e in (*one.entries, one.total) if e.name == name) for one in plan.profiles]
        yield row.format(name, *(megabytes(n) for entry in found for n in (entry.disk_bytes, entry.memory_bytes)))
    for one, head in zip(plan.profiles, heads, strict=True):
        size = f"{one.total.disk_bytes:,} bytes of tensors"
        if one.written_by:
            yield f"{head}: {one.how}; exactly {size}, as {one.written_by} writes them"
        else:
            yield f"{head}: {one.how}; PLANNED, no verb of quaver writes it yet: an estimate, {size}"
    yield f"memory: weights alone, loaded on {plan.device} by default; file headers come on top on disk"
    if not plan.codec:
        yield "the codec is NOT counted: name its folder or configuration with --codec"
