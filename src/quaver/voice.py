"""A voice as a value and as a small file.

The file is a safetensors file: ``speaker`` [D] float32 and ``codes`` [T, Q] int16, each optional, and one metadata
entry, ``quaver-voice``, a JSON object with version, name, text and preset. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from quaver.errors import VoiceError
from quaver.files import write_file

_KEY = "quaver-voice"
_VERSION = 1
_MAX_CODE = 2**15 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """What to speak as: an x-vector, a reference (its codes and what it says), or a preset speaker's name.

    ``speaker`` [D] float; ``codes`` [T, Q] int with ``text``, both or neither; ``preset`` names a speaker of a
    CustomVoice model. Raises VoiceError for a voice that holds nothing or does not hold together.
    """

    name: str
    speaker: Tensor | None = None
    codes: Tensor | None = None
    text: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        where = f"voice {self.name!r}"
        if not self.name.strip():
            raise VoiceError("a voice needs a name")
        if self.speaker is None and self.codes is None and self.preset is None:
            raise VoiceError(f"{where} holds neither speaker vector nor codes nor preset: enrol a recording")
        if (self.codes is None) != (self.text is None):
            raise VoiceError(f"{where} needs codes and text together: the text is what the codes say")
        if self.text is not None and not self.text.strip():
            raise VoiceError(f"{where} has an empty text: write what its recording says")
        if self.speaker is not None:
            _check_speaker(self.speaker, where)
        if self.codes is not None:
            _check_codes(self.codes, where)

    def save(self, path: Path | str) -> None:
        """Writes the voice file, a few KB, whole or not at all. Raises RecipeError or BudgetError."""
        described = {"version": _VERSION, "name": self.name, "text": self.text, "preset": self.preset}
        tensors: dict[str, Tensor] = {}
        if self.speaker is not None:
            tensors["speaker"] = self.speaker.detach().cpu().float().contiguous()
        if self.codes is not None:
            tensors["codes"] = self.codes.cpu().to(torch.int16).contiguous()
        # One metadata entry only: several would be written in random order, and the same voice as different bytes.
        write_file(path, to_safetensors(tensors, {_KEY: json.dumps(described, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: Path | str) -> Voice:
        """The voice in a file. Raises VoiceError for anything missing, left over, mistyped or damaged."""
        path = Path(path)
        if not path.is_file():
            raise VoiceError(
                f"{path} does not exist: make a voice file with 'quaver voice MODEL RECORDING -o {path.name}'"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise VoiceError(f"{path} is no voice file, or a damaged one: {error}") from error
        described = _described(metadata, path)
        left_over = sorted(set(tensors) - {"speaker", "codes"})
        if left_over:
            raise VoiceError(
                f"{path} holds the unknown tensor {left_over[0]}: it is no voice file of version {_VERSION}"
            )
        for name, dtype in (("speaker", torch.float32), ("codes", torch.int16)):
            if name in tensors and tensors[name].dtype != dtype:
                raise VoiceError(f"{path}: {name} is {tensors[name].dtype}, {dtype} was expected")
        codes = tensors.get("codes")
        try:
            return cls(
                name=described["name"],
                speaker=tensors.get("speaker"),
                codes=None if codes is None else codes.long(),
                text=described["text"],
                preset=described["preset"],
            )
        except VoiceError as error:
            raise VoiceError(f"{path}: {error}") from None


def _described(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The JSON object in a voice file's metadata. Raises VoiceError."""
    if set(metadata) != {_KEY}:
        raise VoiceError(f"{path} is a safetensors file but no voice: its metadata should be {_KEY!r} alone")
    try:
        described = json.loads(metadata[_KEY])
    except ValueError as error:
        raise VoiceError(f"{path}: its {_KEY} metadata is not JSON: {error}") from None
    if not isinstance(described, dict) or set(described) != {"version", "name", "text", "preset"}:
        raise VoiceError(f"{path}: its {_KEY} metadata should hold version, name, text and preset")
    if described["version"] != _VERSION:
        raise VoiceError(f"{path} is of version {described['version']!r}; this quaver reads version {_VERSION}")
    if not isinstance(described["name"], str):
        raise VoiceError(f"{path}: its name is {described['name']!r}, not a text")
    for key in ("text", "preset"):
        if not isinstance(described[key], str | None):
            raise VoiceError(f"{path}: its {key} is {described[key]!r}, not a text")
    return described


def _check_speaker(speaker: Tensor, where: str) -> None:
    if speaker.ndim != 1 or not speaker.is_floating_point() or speaker.numel() == 0:
        raise VoiceError(f"{where}: the speaker vector is {speaker.dtype} {list(speaker.shape)}, not [D] of floats")
    if not bool(speaker.isfinite().all()):
        raise VoiceError(f"{where}: the speaker vector holds NaN or infinite values: enrol the recording again")


def _check_codes(codes: Tensor, where: str) -> None:
    if codes.ndim != 2 or codes.is_floating_point() or codes.dtype == torch.bool or codes.numel() == 0:
        raise VoiceError(f"{where}: the codes are {codes.dtype} {list(codes.shape)}, not [T, Q] of integers")
    if int(codes.min()) < 0 or int(codes.max()) > _MAX_CODE:
        raise VoiceError(f"{where}: the codes lie outside 0 to {_MAX_CODE}")
