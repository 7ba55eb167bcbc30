"""A model held against its own provenance, byte for byte, and its parents against what it says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quaver.checkpoint import resolve
from quaver.corpus import Progress
from quaver.errors import CheckpointError, Damaged
from quaver.provenance import (
    PROVENANCE,
    File,
    Origin,
    Provenance,
    check_file,
    check_size,
    check_sum,
    model_name,
    reading,
    sums,
    walk,
)


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found as recorded."""

    model: str
    seal: str
    n_files: int
    n_tensors: int
    n_bytes: int
    steps: tuple[str, ...]
    parents: tuple[str, ...]
    verdict: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"intact": True, **asdict(self)}

    def summary(self) -> str:
        """One line for a person."""
        parts = [
            f"{self.model} is intact: {self.n_files} files, {self.n_tensors} tensors, {self.n_bytes:,} bytes",
            f"made by {', '.join(self.steps) or 'no step'}",
            *(f"parent {name} is as recorded" for name in self.parents),
            f"verdict: {self.verdict}" if self.verdict else "no verdict is recorded",
            f"seal {self.seal}",
        ]
        return "; ".join(parts)


def verify(source: str | Path, parents: Sequence[str | Path] = (), progress: Progress | None = None) -> Verified:
    """What was checked of the model ``source``, when all of it is as its provenance says; ``parents`` too.

    The model need not be one that opens. Every file's name, size and SHA-256, every tensor's SHA-256 and both seals are
    computed anew. Raises Damaged that names the first file or tensor that differs, CheckpointError for a model without
    provenance.
    """
    folder = resolve(source)
    provenance = Provenance.read(folder)
    if not provenance.files:
        raise CheckpointError(
            f"{folder / PROVENANCE} is missing, so there is nothing to hold {folder.name} against: only what quaver "
            "wrote can be verified"
        )
    for name in provenance.check_names(folder):
        with reading(folder / name):
            _check(folder / name, name, provenance, progress)
    return Verified(
        model=model_name(folder),
        seal=provenance.seal,
        n_files=len(provenance.files),
        n_tensors=sum(len(found) - 1 for found in provenance.tensors.values()),
        n_bytes=sum(file.n_bytes for file in provenance.files.values()),
        steps=tuple(f"{step.tool} {step.version}" for step in provenance.steps),
        parents=tuple(_check_parent(folder, provenance, resolve(parent), progress) for parent in parents),
        verdict=None if provenance.validation is None else str(provenance.validation["verdict"]),
    )


def _check(path: Path, name: str, provenance: Provenance, progress: Progress | None) -> None:
    """Holds one file against what is recorded of it: its tensors first, so that the one that differs is named."""
    expected, recorded = provenance.files[name], provenance.tensors.get(name, {})
    check_size(path, expected)
    if recorded:
        for done, (tensor, found) in enumerate(sums(path), 1):
            check_sum(path, tensor, found, recorded.get(tensor))
            if progress and done < len(recorded):
                progress(f"checking {name}", done, len(recorded))
    check_file(path, expected)
    if progress:
        progress(f"checking {name}", len(recorded) or 1, len(recorded) or 1)


def _check_parent(folder: Path, provenance: Provenance, parent: Path, progress: Progress | None) -> str:
    """The name of the recorded model that ``parent`` is, every file that was read of it being as it was then."""
    origins = [origin for step in provenance.steps for origin in step.parents]
    paths, found = walk(parent), dict[str, File]()
    for done, (name, path) in enumerate(paths.items(), 1):
        with reading(path):
            found[name] = File.of(path)
        if progress:
            progress(f"checking parent {model_name(parent)}", done, len(paths))

    def likeness(origin: Origin) -> tuple[float, float]:
        """The share of its files that are there, and of those as long: a damaged parent is found all the same."""
        pairs = [(found[name], file) for name, file in origin.files.items() if name in found]
        n_alike, n_as_long = sum(a == b for a, b in pairs), sum(a.n_bytes == b.n_bytes for a, b in pairs)
        return n_alike / len(origin.files), n_as_long / len(origin.files)

    closest = max(origins, key=likeness, default=None)
    if closest is None or likeness(closest) == (0, 0):
        names = ", ".join(dict.fromkeys(origin.name for origin in origins)) or "none"
        raise Damaged(f"{parent} is no parent of {folder}: it records {names}", parent)
    for name, file in sorted(closest.files.items()):
        if name not in found:
            raise Damaged(f"{parent / name} is missing, though {folder.name} was made from it", parent / name)
        if found[name] != file:
            check_file(paths[name], file)
    return closest.name
