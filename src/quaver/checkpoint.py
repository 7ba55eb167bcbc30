"""A model directory as an immutable value, and the only writer of one.

The layout is the official one: ``config.json``, ``model.safetensors`` (or shards with an index), tokenizer files,
``generation_config.json`` and ``speech_tokenizer/``. Edits are functions of one tensor; saving streams them, so that no
more than a tensor is in memory. Weights are read from safetensors alone: never from pickles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, resources
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quaver.config import CodecConfig, ModelConfig, parse, read_codec_config, read_json
from quaver.errors import BudgetError, CheckpointError, RecipeError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROVENANCE = "provenance.json"
CODEC = "speech_tokenizer"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Edit = Callable[[str, Tensor], Mapping[str, Tensor]]
"""A tensor's name and value to what stands in its place: itself, changed, several, or none."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size on disk."""
        return self.n_elements * self.dtype.itemsize

    @property
    def n_elements(self) -> int:
        """Its number of values."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to a model: by which tool, with which recipe, and what it reported."""

    tool: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    version: str = field(default_factory=lambda: metadata.version("quaver"))
    parents: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a checkpoint came to be: its steps, first to last, and the SHA-256 of its weight files. No time stamps."""

    steps: tuple[Step, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Provenance:
        """The provenance in ``path``, an empty one where the file is missing. Raises CheckpointError."""
        if not path.exists():
            return cls()
        value = read_json(path)
        try:
            return cls(tuple(Step(**step) for step in value["steps"]), dict(value["files"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a provenance file: {error}") from error

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory, with edits that are applied as it is read."""

    path: Path
    codec_path: Path
    config: ModelConfig
    codec_config: CodecConfig
    settings: Mapping[str, Any]
    specs: Mapping[str, Spec]
    codec_specs: Mapping[str, Spec]
    provenance: Provenance
    edits: tuple[tuple[Step, Edit], ...] = ()

    @classmethod
    def open(cls, source: str | Path, *, codec: str | Path | None = None) -> Checkpoint:
        """The checkpoint in a folder, of a hub id, or of a voice that ships with quaver (``tiny``).

        ``codec`` names a folder or hub id that holds the speech tokenizer, for a model that comes without.
        Raises CheckpointError for anything missing, unreadable, truncated or not understood.
        """
        path = resolve(source)
        settings = read_json(path / "config.json")
        config = parse(ModelConfig, settings, str(path / "config.json"))
        codec_path = _codec_folder(path, codec)
        return cls(
            path=path,
            codec_path=codec_path,
            config=config,
            codec_config=read_codec_config(codec_path / "config.json"),
            settings=settings,
            specs=read_specs(path),
            codec_specs=read_specs(codec_path),
            provenance=Provenance.read(path / PROVENANCE),
        )

    def edit(self, step: Step, fn: Edit, settings: Mapping[str, Any] | None = None) -> Checkpoint:
        """This checkpoint with ``fn`` applied to each tensor; ``settings`` replaces top-level keys of config.json."""
        merged = {**self.settings, **(settings or {})}
        config = parse(ModelConfig, merged, f"{self.path}: edited by {step.tool}: config.json")
        return replace(self, settings=merged, config=config, edits=(*self.edits, (step, fn)))

    def read(self, name: str) -> Tensor:
        """The stored tensor ``name``, before any edit. Raises CheckpointError when there is none."""
        if name not in self.specs:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return read_tensor(self.specs[name], name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor's name and value after the edits, in the order of the files, one in memory at a time."""
        for name, tensor in _stream(self.specs):
            yield from self._edited(name, tensor, 0)

    def codec_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor's name and value of the speech tokenizer."""
        return _stream(self.codec_specs)

    def _edited(self, name: str, tensor: Tensor, index: int) -> Iterator[tuple[str, Tensor]]:
        if index == len(self.edits):
            yield name, tensor
            return
        for new_name, new in self.edits[index][1](name, tensor).items():
            yield from self._edited(new_name, new, index + 1)

    def save(self, out: str | Path) -> Checkpoint:
        """Writes the edited model (see `write`) and opens it."""
        self.write(out)
        return Checkpoint.open(out)

    def write(self, out: str | Path) -> None:
        """Writes the edited model with all its side files to the new folder ``out``.

        The folder appears whole or not at all. Raises RecipeError when ``out`` exists or its parent does not,
        BudgetError when the disk is full.
        """
        with new_folder(out) as aside:
            files = {WEIGHTS: write_tensors(aside / WEIGHTS, self.tensors(), len(self.specs))}
            self._copy_side_files(aside)
            steps = self.provenance.steps
            if self.edits:
                parents = {str(file.relative_to(self.path)): sha256(file) for file in _files(self.specs)}
                steps += tuple(replace(step, parents=parents) for step, _ in self.edits)
            files |= {f"{CODEC}/{f.name}": sha256(aside / CODEC / f.name) for f in _files(self.codec_specs)}
            if self.settings == read_json(self.path / "config.json"):
                shutil.copyfile(self.path / "config.json", aside / "config.json")
            else:
                (aside / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
            (aside / PROVENANCE).write_text(Provenance(steps, files).to_json(), encoding="utf-8")

    def _copy_side_files(self, aside: Path) -> None:
        own = {"config.json", PROVENANCE, INDEX, *(f.name for f in _files(self.specs))}
        for source in sorted(self.path.iterdir()):
            if source.name in own or source.name == CODEC or source.name.startswith("."):
                continue
            if source.is_dir():
                shutil.copytree(source, aside / source.name)
            else:
                shutil.copyfile(source, aside / source.name)
        (aside / CODEC).mkdir()
        for source in sorted(f for f in self.codec_path.iterdir() if f.is_file() and not f.name.startswith(".")):
            shutil.copyfile(source, aside / CODEC / source.name)

    def verify(self) -> None:
        """Checks every weight file against the SHA-256 in the provenance.

        Raises CheckpointError that names the first file that differs, or says that no sums are recorded.
        """
        if not self.provenance.files:
            raise CheckpointError(f"{self.path / PROVENANCE} records no sums: only what quaver wrote can be verified")
        for name, expected in self.provenance.files.items():
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path / name} is missing, though provenance.json lists it")
            if sha256(self.path / name) != expected:
                raise CheckpointError(
                    f"{self.path / name} differs from the SHA-256 in provenance.json: changed or damaged"
                )


def resolve(source: str | Path) -> Path:
    """The local folder of a checkpoint: a folder, a voice that ships with quaver, or a hub id (downloaded once).

    Raises CheckpointError when there is no such thing.
    """
    path = Path(source)
    if path.is_dir():
        return path
    shipped = Path(str(resources.files("quaver"))) / "voices" / str(source)
    if re.fullmatch(r"[a-z]+", str(source)) and (shipped / "config.json").exists():
        return shipped
    if path.exists():
        raise CheckpointError(f"{source} is a file: name the model's folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise CheckpointError(f"{source} is no folder, no hub id (owner/name) and no voice that ships with quaver")
    from huggingface_hub import errors, snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.md", f"{CODEC}/*"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source} is no folder here and could not be downloaded from the hub: {first}"
        ) from error


def _codec_folder(path: Path, codec: str | Path | None) -> Path:
    """The speech tokenizer's folder: inside the model, or where ``codec`` says."""
    if codec is not None:
        given = resolve(codec)
        return given / CODEC if (given / CODEC / "config.json").exists() else given
    if not (path / CODEC / "config.json").exists():
        raise CheckpointError(
            f"{path} has no {CODEC}/ folder, so it cannot make sound: name one with --codec PATH_OR_ID "
            "(any Qwen3-TTS model of the 12 Hz tokenizer has it)"
        )
    return path / CODEC


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _files(specs: Mapping[str, Spec]) -> list[Path]:
    return sorted({spec.file for spec in specs.values()})


def read_specs(folder: Path) -> dict[str, Spec]:
    """Where every tensor of a folder's safetensors files lies, held against the index where there is one.

    Raises CheckpointError for a folder without weights, and for files that are damaged or do not fit their index.
    """
    index: dict[str, str] | None = None
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        files = [folder / name for name in sorted(set(index.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [f.name for f in folder.glob("*") if f.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        hint = f"; {pickles[0]} is a pickle, which quaver never loads: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder / WEIGHTS} is missing{hint}")
    specs: dict[str, Spec] = {}
    for file in files:
        with _open(file) as weights:
            for name in weights.offset_keys():
                if name in specs:
                    raise CheckpointError(f"{file}: tensor {name} is in {specs[name].file.name} as well")
                part = weights.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor {name} has type {part.get_dtype()}, which quaver does not read"
                    )
                specs[name] = Spec(file, DTYPES[part.get_dtype()], tuple(part.get_shape()))
    if index is not None and index.keys() != specs.keys():
        name = min(index.keys() ^ specs.keys())
        where = "in the index but in no file" if name in index else "in a file but not in the index"
        raise CheckpointError(f"{folder / INDEX}: tensor {name} is {where}")
    return specs


def read_tensor(spec: Spec, name: str) -> Tensor:
    """The tensor ``name`` where ``spec`` says it lies. Raises CheckpointError for a file that cannot be read."""
    with _open(spec.file) as weights:
        tensor: Tensor = weights.get_tensor(name)
    return tensor


def _stream(specs: Mapping[str, Spec]) -> Iterator[tuple[str, Tensor]]:
    for file in _files(specs):
        with _open(file) as weights:
            for name in weights.offset_keys():
                yield name, weights.get_tensor(name)


def write_tensors(path: Path, tensors: Iterator[tuple[str, Tensor]], n_expected: int) -> str:
    """Writes a safetensors file tensor by tensor and returns its SHA-256.

    The header stands before the data but is known after it: room is kept and filled with spaces, as the format
    allows.
    """
    room = 8 + 256 * (4 * n_expected + 64)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, odd = 0, []
    with path.open("wb") as out:
        out.write(b" " * room)
        for name, tensor in tensors:
            if name in header:
                raise CheckpointError(f"two edits write the tensor {name}")
            if tensor.nbytes % 8:
                # Written last, so that every tensor starts at a multiple of its item size.
                header[name] = {}
                odd.append((name, tensor.clone()))
                continue
            position = _append(out, header, name, tensor, position)
        for name, tensor in sorted(odd, key=lambda item: -item[1].element_size()):
            position = _append(out, header, name, tensor, position)
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > room - 8:
            raise CheckpointError(f"{path}: {len(header)} tensors came from {n_expected}: more than an edit may add")
        out.seek(0)
        out.write((room - 8).to_bytes(8, "little") + text)
        out.flush()
        os.fsync(out.fileno())
    return sha256(path)


def _append(out: IO[bytes], header: dict[str, Any], name: str, tensor: Tensor, position: int) -> int:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    end = position + flat.nbytes
    header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
    out.write(flat.view(torch.uint8).numpy().data)
    return end


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new(out: str | Path) -> Path:
    """``out`` as the path of a folder that can be made. Raises RecipeError when it exists or its parent does not."""
    out = Path(out)
    if out.exists():
        raise RecipeError(f"{out} exists already: name a new folder, or remove it first")
    if not out.parent.is_dir():
        raise RecipeError(
            f"the folder {out.parent} does not exist: make it first, or name another place for {out.name}"
        )
    return out


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside ``out`` to be filled: renamed to ``out`` at the end, gone if anything fails.

    Raises RecipeError when ``out`` exists or its parent does not, BudgetError when the disk is full.
    """
    out = check_new(out)
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise RecipeError(f"{out.parent} cannot be written to: {error.strerror}") from error
    try:
        yield aside
        aside.chmod(0o755)
        aside.rename(out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def disk_error(error: OSError, out: Path) -> BudgetError | RecipeError:
    """What a failed write to ``out`` means to the user."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(out.parent).free
        return BudgetError(f"no space left for {out}: {free / 1e6:.0f} MB are free; nothing was left behind")
    return RecipeError(f"{out} cannot be written: {error.strerror or error}")
