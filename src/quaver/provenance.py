"""How a model came to be and what each of its bytes must be: ``provenance.json``.

Its part ``made`` holds the steps and the sums of every file and tensor; nothing in it looks at a clock, so that the
same inputs give the same bytes. A verdict of ``quaver validate`` may join it later in the part ``validation``. Each
part has a seal, and the file is read only in the form in which it is written: one changed byte anywhere is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any

from quaver.config import parse
from quaver.errors import CheckpointError, Damaged
from quaver.files import sha256

PROVENANCE = "provenance.json"
CODEC = "speech_tokenizer"
CARD = "README.md"
"""For people: no program reads it, it may change at any time, and it speaks of one model, so it stays with that one."""
UNKNOWN = "unknown"
HEADER = "__header__"
"""Under this name, beside the tensors, stands the sum of all that comes before them in a weight file."""
_READ_BYTES = 1 << 20
_DIFFERS = f"differs from its SHA-256 in {PROVENANCE}: it was changed or damaged; get the file again"


@dataclass(frozen=True, slots=True)
class File:
    """What a file is: its bytes, and their SHA-256."""

    n_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        """That of the file at ``path``."""
        return cls(path.stat().st_size, sha256(path))


@dataclass(frozen=True, slots=True)
class Origin:
    """A model that another was made from or held against; ``files`` are those that were read, by name."""

    name: str
    licences: tuple[str, ...]
    files: Mapping[str, File]

    @classmethod
    def of(cls, folder: Path, files: Mapping[str, Path]) -> Origin:
        """That of the model in ``folder``, of which ``files`` were read."""
        with ThreadPoolExecutor() as pool:
            found = dict(zip(files, pool.map(File.of, files.values()), strict=True))
        return cls(model_name(folder), licences(folder), found)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to a model: by which tool, what was asked, what came out, and from which models."""

    tool: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    version: str = field(default_factory=lambda: metadata.version("quaver"))
    result: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Origin, ...] = ()


@dataclass(frozen=True, slots=True)
class Provenance:
    """A model's steps, first to last, the sums of its files, and of its weight files' headers and tensors, by file."""

    steps: tuple[Step, ...] = ()
    files: Mapping[str, File] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    validation: Mapping[str, Any] | None = None
    """The verdict on this very model, in JSON's values."""

    @classmethod
    def of(cls, folder: Path, steps: tuple[Step, ...]) -> Provenance:
        """That of the model in ``folder``, which ``steps`` made: every file and tensor is summed."""
        found = walk(folder)
        weights = {name: path for name, path in found.items() if path.suffix == ".safetensors"}
        with ThreadPoolExecutor() as pool:
            tensors = pool.map(lambda path: dict(sums(path)), weights.values())
            files = pool.map(File.of, found.values())
            return cls(steps, dict(zip(found, files, strict=True)), dict(zip(weights, tensors, strict=True)))

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """That which stands in ``folder``, an empty one where none does. Raises Damaged."""
        path = folder / PROVENANCE
        if not path.exists():
            return cls()
        try:
            data = path.read_bytes()
            value = json.loads(data)
            found = parse(cls, {**value["made"], "validation": value["validation"]}, "made")
        except (CheckpointError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise Damaged(f"{path} is not a provenance file: {error}", path) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if found.to_json().encode() != data:
            raise Damaged(f"{path} differs from its own seal: it was changed or damaged", path)
        return found

    @classmethod
    def beside(cls, folder: Path) -> Provenance:
        """That which tells of ``folder``: its own, or where it is a speech tokenizer, the part of the model around."""
        if folder.name != CODEC or (folder / PROVENANCE).exists():
            return cls.read(folder)
        return cls.read(folder.parent).part(CODEC)

    def part(self, name: str) -> Provenance:
        """What this tells of the folder ``name`` inside the model."""
        start = f"{name}/"
        return Provenance(
            self.steps,
            {file.removeprefix(start): one for file, one in self.files.items() if file.startswith(start)},
            {file.removeprefix(start): sums for file, sums in self.tensors.items() if file.startswith(start)},
        )

    @property
    def seal(self) -> str:
        """The SHA-256 of the part ``made``: the identity of the model."""
        return _seal(self._made())

    @property
    def licences(self) -> tuple[str, ...]:
        """The licences of all models that this one comes from, each once, in the order of the steps."""
        found = (one for step in self.steps for parent in step.parents for one in parent.licences)
        return tuple(dict.fromkeys(found))

    def check(self, folder: Path) -> None:
        """Holds all of ``folder`` but its tensors against this. Raises Damaged that names the first file that differs.

        Without sums there is nothing to hold it against. Tensors are held against theirs as they are read.
        """
        if not self.files:
            return
        for name in self.check_names(folder):
            path = folder / name
            with reading(path):
                if name in self.tensors:
                    check_size(path, self.files[name])
                    check_sum(path, *next(sums(path)), self.tensors[name].get(HEADER))
                else:
                    check_file(path, self.files[name])

    def check_names(self, folder: Path) -> list[str]:
        """The names of the recorded files, all of them in ``folder`` and no other. Raises Damaged."""
        found = walk(folder)
        for name in sorted(found.keys() ^ self.files.keys()):
            if name not in found:
                raise Damaged(f"{folder / name} is missing, though {PROVENANCE} lists it: get it again", folder / name)
            raise Damaged(f"{folder / name} is not in {PROVENANCE}: it was added; keep it elsewhere", folder / name)
        return sorted(found)

    def to_json(self) -> str:
        """The file's text."""
        made = self._made()
        # A verdict is sealed together with the model that it is about: it fits no other.
        verdict = None if self.validation is None else _seal([made, self.validation])
        seals = {"made": _seal(made), "validation": verdict}
        return _text({"made": made, "seals": seals, "validation": self.validation}, 1) + "\n"

    def _made(self) -> dict[str, Any]:
        made = asdict(self)
        del made["validation"]
        return made


def _text(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True)


def _seal(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()


def walk(folder: Path) -> dict[str, Path]:
    """Every file that makes up the model in ``folder``, by its name there, in order.

    Hidden files, provenance and the card are left out.
    """
    found = {}
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(here) / name
            if not name.startswith(".") and path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return {name: found[name] for name in sorted(found.keys() - {PROVENANCE, CARD})}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While open, a failure to read the file at ``path`` is a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def sums(path: Path) -> Iterator[tuple[str, str]]:
    """The SHA-256 of a safetensors file's header (as HEADER), then of each tensor's bytes, in the order of the file.

    Together they cover every byte. Whoever knows the header's sum compares it before asking on: the places of the
    tensors stand in it.
    """
    # Read, not mapped: what is mapped counts as this process's memory.
    with path.open("rb", buffering=0) as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        yield HEADER, _sum(file, start)
        file.seek(8)
        header: dict[str, Any] = json.loads(file.read(min(start, path.stat().st_size) - 8))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            file.seek(start + first)
            yield name, _sum(file, last - first)


def _sum(file: FileIO, n_bytes: int) -> str:
    """The SHA-256 of the next ``n_bytes`` of ``file``, or of those that there are."""
    total, room = hashlib.sha256(), memoryview(bytearray(min(n_bytes, _READ_BYTES)))
    while n_bytes and (n_read := file.readinto(room[: min(n_bytes, len(room))])):
        total.update(room[:n_read])
        n_bytes -= n_read
    return total.hexdigest()


def check_size(path: Path, expected: File) -> None:
    """Raises Damaged unless the file is as long as ``expected``."""
    n_bytes = path.stat().st_size
    if n_bytes != expected.n_bytes:
        what = "it was cut short" if n_bytes < expected.n_bytes else "something was added"
        told = f"{path} has {n_bytes:,} bytes, {PROVENANCE} says {expected.n_bytes:,}: {what}; get the file again"
        raise Damaged(told, path)


def check_file(path: Path, expected: File) -> None:
    """Raises Damaged unless the file is ``expected``, byte for byte."""
    check_size(path, expected)
    if sha256(path) != expected.sha256:
        raise Damaged(f"{path} {_DIFFERS}", path)


def check_sum(path: Path, tensor: str, found: str, expected: str | None) -> None:
    """Raises Damaged unless the sum ``found`` of the file's tensor, or of its HEADER, is ``expected``."""
    if found != expected:
        what = "the header" if tensor == HEADER else f"tensor {tensor}"
        raise Damaged(f"{path}: {what} {_DIFFERS}", path, tensor)


def model_name(folder: Path) -> str:
    """What a model is called: its hub id where it came from the hub, else its folder's name."""
    store = folder.parent.parent.name
    if folder.parent.name == "snapshots" and store.startswith("models--"):
        return store.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def licences(folder: Path) -> tuple[str, ...]:
    """The licence of the model in ``folder`` as its card's front matter says; else those that its provenance knows.

    UNKNOWN stands for one that is told nowhere.
    """
    card = folder / CARD
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        found = re.finditer(r"^(license(?:_name)?):[ \t]*['\"]?([^'\"#\n]+)", front[1] if front else "", re.MULTILINE)
        keys = {match[1]: match[2].strip() for match in found}
        given = keys.get("license", "")
        if given:
            return (keys.get("license_name", given) if given == "other" else given,)
    return Provenance.read(folder).licences or (UNKNOWN,)
