"""What a model would take on disk and in memory in each profile, told before anything is written or downloaded.

The configuration says every tensor's name and shape. Types are those of the files where they are there, else the
published ones: bfloat16, and float32 for the codec. What quaver then writes it tells to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from quaver import awq, ledger
from quaver.checkpoint import INDEX, Checkpoint, Spec, read_specs, resolve
from quaver.config import CodecConfig, ModelConfig, read_codec_config, read_model_config
from quaver.errors import CheckpointError
from quaver.ledger import Entry, megabytes
from quaver.mixed import halved_type, stored_as
from quaver.model.codec_encoder import Codec
from quaver.model.homes import memory_bytes
from quaver.provenance import CODEC, Provenance
from quaver.recipe import COMPACT, settings

Name = Literal["bf16", "int4", "compact"]
PROFILES: tuple[Name, ...] = ("bf16", "int4", "compact")

_HOW: Mapping[Name, tuple[str, str]] = {
    "bf16": ("as published", "quaver blend"),
    "int4": ("the talker's linears in AWQ INT4", "quaver quantize"),
    "compact": (
        "int4, and code predictor and text embedding in INT8, codec decoder in bfloat16 (computed in float32)",
        "quaver quantize --profile compact",
    ),
}


@dataclass(frozen=True, slots=True)
class Profile:
    """A model in one profile: its modules, what is done to them, and the verb that writes it."""

    name: Name
    how: str
    written_by: str
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
        """Plain values for ``--json``."""
        profiles = [{**asdict(one), "total": asdict(one.total)} for one in self.profiles]
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
    changed = _changed(config)
    profiles = tuple(
        Profile(name, *_HOW[name], _weighed(name, stored_as(config, changed[name], stored, file), codec_specs, device))
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


def imagined(source: str | Path, name: Name, *, codec: str | Path | None = None) -> Checkpoint:
    """The model of a configuration in the profile ``name``, without weights: for what can be told beforehand alone.

    Raises CheckpointError as ``plan`` does, and where there is no configuration of the codec.
    """
    file = _configuration(source)
    config, beside = read_model_config(file), file.parent
    codec_file = _codec_configuration(beside, codec)
    if codec_file is None:
        raise CheckpointError(f"{source} has no speech tokenizer beside it: name it with --codec")
    codec_config, changed = read_codec_config(codec_file), _changed(config)[name]
    return Checkpoint(
        path=file,
        codec_path=codec_file.parent,
        config=config.with_keys(changed),
        codec_config=codec_config,
        settings={},
        specs=stored_as(config, changed, _stored(beside), file),
        codec_specs=_codec_specs(codec_config, _stored(codec_file.parent), codec_file),
        provenance=Provenance(),
    )


def _changed(config: ModelConfig) -> Mapping[Name, Mapping[str, Any]]:
    """What each profile changes of config.json."""
    return {
        "bf16": {},
        "int4": {"quantization_config": awq.settings()},
        "compact": settings(COMPACT, config),
    }


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


def _weighed(name: Name, model: Mapping[str, Spec], codec_specs: Mapping[str, Spec], device: str) -> tuple[Entry, ...]:
    if name == "compact":
        codec_specs = {key: replace(one, dtype=halved_type(key, one.dtype)) for key, one in codec_specs.items()}
    return ledger.entries(model, codec_specs, memory_bytes(model, codec_specs, device))


def _codec_specs(config: CodecConfig, stored: Mapping[str, Spec], file: Path) -> dict[str, Spec]:
    with torch.device("meta"):
        state = Codec(config).state_dict()
    return {name: Spec(file, _type(name, stored, value.dtype), tuple(value.shape)) for name, value in state.items()}


def _type(name: str, stored: Mapping[str, Spec], otherwise: torch.dtype) -> torch.dtype:
    return stored[name].dtype if name in stored else otherwise


def table(plan: Plan) -> Iterator[str]:
    """The plan as lines of text: megabytes on disk and in memory, a pair of columns a profile, then what each is."""
    row = "{:<28}" + " {:>12}" * (2 * len(plan.profiles))
    yield f"{plan.model} ({plan.kind}), types of {plan.types_from}"
    yield row.format("MB", *(f"{one.name} {what}" for one in plan.profiles for what in ("disk", "mem")))
    names = list(dict.fromkeys(entry.name for one in plan.profiles for entry in (*one.entries, one.total)))
    for name in names:
        found = [next(e for e in (*one.entries, one.total) if e.name == name) for one in plan.profiles]
        yield row.format(name, *(megabytes(n) for entry in found for n in (entry.disk_bytes, entry.memory_bytes)))
    for one in plan.profiles:
        size = f"{one.total.disk_bytes:,} bytes of tensors"
        yield f"{one.name}: {one.how}; exactly {size}, as {one.written_by} writes them"
    yield f"memory: weights alone, loaded on {plan.device} by default; file headers come on top on disk"
    if not plan.codec:
        yield "the codec is NOT counted: name its folder or configuration with --codec"
