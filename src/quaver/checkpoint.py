"""A model directory as an immutable value, and the only writer of one.

The layout is the official one: ``config.json``, ``model.safetensors`` (or shards with an index), tokenizer files,
``generation_config.json`` and ``speech_tokenizer/``. Edits are functions of one tensor; saving streams them, so that no
more than a few tensors are in memory. Weights are read from safetensors alone: never from pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quaver.config import CodecConfig, ModelConfig, parse, read_codec_config, read_json
from quaver.errors import CheckpointError
from quaver.files import new_folder, sync, write_file
from quaver.provenance import CODEC, PROVENANCE, Origin, Provenance, Step, check_file, check_sum, walk

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_N_AHEAD = min(4, os.cpu_count() or 1)
_RUN_BYTES = 1 << 27
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Edit = Callable[[str, Tensor], Mapping[str, Tensor]]
"""A tensor's name and value to what stands in its place: itself, changed, several, or none."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Where a tensor lies and what it is; ``sha256`` of its bytes where that is recorded."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str | None = None

    @property
    def n_bytes(self) -> int:
        """Its size on disk."""
        return self.n_elements * self.dtype.itemsize

    @property
    def n_elements(self) -> int:
        """Its number of values."""
        return int(torch.Size(self.shape).numel())


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
    codec_edits: tuple[Edit, ...] = ()

    @classmethod
    def open(cls, source: str | Path, *, codec: str | Path | None = None) -> Checkpoint:
        """The checkpoint in a folder, of a hub id, or of a voice that ships with quaver (``tiny``).

        ``codec`` names a folder or hub id that holds the speech tokenizer, for a model that comes without.
        Raises CheckpointError for anything missing, unreadable, truncated or not understood, Damaged for a file that is
        not what provenance.json says, where there is one; each tensor is held against it as it is read.
        """
        path = resolve(source)
        provenance = Provenance.read(path)
        provenance.check(path)
        settings = read_json(path / "config.json")
        config = parse(ModelConfig, settings, str(path / "config.json"))
        codec_path = _codec_folder(path, codec)
        codec_provenance = Provenance.beside(codec_path)
        if codec_path != path / CODEC:
            codec_provenance.check(codec_path)
        return cls(
            path=path,
            codec_path=codec_path,
            config=config,
            codec_config=read_codec_config(codec_path / "config.json"),
            settings=settings,
            specs=read_specs(path, provenance),
            codec_specs=read_specs(codec_path, codec_provenance),
            provenance=provenance,
        )

    def edit(
        self, step: Step, fn: Edit, settings: Mapping[str, Any] | None = None, *, codec: Edit | None = None
    ) -> Checkpoint:
        """This checkpoint with ``fn`` applied to each tensor; ``settings`` replaces top-level keys of config.json.

        ``codec`` is applied to each tensor of the speech tokenizer, whose files are else copied as they are.
        """
        merged = {**self.settings, **(settings or {})}
        config = parse(ModelConfig, merged, f"{self.path}: edited by {step.tool}: config.json")
        codec_edits = self.codec_edits if codec is None else (*self.codec_edits, codec)
        edits = (*self.edits, (step, fn))
        return replace(self, settings=merged, config=config, edits=edits, codec_edits=codec_edits)

    def read(self, name: str) -> Tensor:
        """The stored tensor ``name``, before any edit. Raises CheckpointError when there is none."""
        if name not in self.specs:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return read_tensor(self.specs[name], name)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor's name and value after the edits, in the order of the files, few in memory at a time.

        With ``prefix`` only those whose stored names begin with it are read.
        """
        specs = {name: spec for name, spec in self.specs.items() if name.startswith(prefix)}
        return _edited(_stream(specs), [fn for _, fn in self.edits])

    def codec_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor's name and value of the speech tokenizer after the edits, likewise."""
        specs = {name: spec for name, spec in self.codec_specs.items() if name.startswith(prefix)}
        return _edited(_stream(specs), self.codec_edits)

    def save(self, out: str | Path) -> Checkpoint:
        """Writes the edited model (see `write`) and opens it."""
        self.write(out)
        return Checkpoint.open(out)

    def write(self, out: str | Path) -> None:
        """Writes the edited model with all its side files to the new folder ``out``.

        The folder appears whole or not at all. Raises RecipeError when ``out`` exists or its parent does not,
        BudgetError when the disk is full, Damaged when the model read is not what its provenance says.
        """
        # Summing what is read takes as long as writing, and waits for nothing of it; nor does summing what is written
        # wait until that has reached the disk.
        with new_folder(out) as aside, ThreadPoolExecutor() as pool:
            origins = pool.submit(self.origins) if self.edits else None
            write_tensors(aside / WEIGHTS, self.tensors(), len(self.specs))
            synced = [pool.submit(sync, aside / WEIGHTS)]
            self._copy_side_files(aside)
            if self.codec_edits:
                write_tensors(aside / CODEC / WEIGHTS, self.codec_tensors(), len(self.codec_specs))
                synced.append(pool.submit(sync, aside / CODEC / WEIGHTS))
            if self.settings == read_json(self.path / "config.json"):
                shutil.copyfile(self.path / "config.json", aside / "config.json")
            else:
                (aside / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
            steps = self.provenance.steps
            if origins is not None:
                parents = origins.result()
                steps += tuple(replace(step, parents=(*parents, *step.parents)) for step, _ in self.edits)
            (aside / PROVENANCE).write_text(Provenance.of(aside, steps).to_json(), encoding="utf-8")
            for one in synced:
                one.result()

    def origins(self) -> tuple[Origin, ...]:
        """What this model is, as a parent of another: itself, and where its speech tokenizer is elsewhere, that.

        Every file is read and summed.
        """
        own = walk(self.path)
        if self.codec_path == self.path / CODEC:
            return (Origin.of(self.path, own),)
        lender = self.codec_path.parent if self.codec_path.name == CODEC else self.codec_path
        lent = {path.relative_to(lender).as_posix(): path for path in walk(self.codec_path).values()}
        own = {name: path for name, path in own.items() if not name.startswith(f"{CODEC}/")}
        return Origin.of(self.path, own), Origin.of(lender, lent)

    def record(self, validation: Mapping[str, Any]) -> Checkpoint:
        """This checkpoint with the verdict ``validation``, JSON's values, which is written into its provenance.json.

        Nothing else changes; an earlier verdict is replaced. Raises CheckpointError for a model without provenance,
        RecipeError when the file cannot be written.
        """
        self.check_recordable()
        recorded = replace(self.provenance, validation=dict(validation))
        write_file(self.path / PROVENANCE, recorded.to_json().encode())
        return replace(self, provenance=Provenance.read(self.path))

    def check_recordable(self) -> None:
        """Raises CheckpointError unless this is a model with provenance as it was written: only it takes a verdict."""
        if not self.provenance.files or self.edits:
            raise CheckpointError(f"{self.path} has no {PROVENANCE}: a verdict is kept only with what quaver wrote")

    def _copy_side_files(self, aside: Path) -> None:
        """Copies all files but the model's own weights and settings, each held against its sum where one is known."""
        own = {"config.json", INDEX, *(f.name for f in _files(self.specs))}
        rewritten = {INDEX, *(f.name for f in _files(self.codec_specs))} if self.codec_edits else set()
        codec = {f"{CODEC}/{name}": path for name, path in walk(self.codec_path).items() if name not in rewritten}
        model = {name: path for name, path in walk(self.path).items() if name not in own}
        found = {name: path for name, path in model.items() if not name.startswith(f"{CODEC}/")} | codec
        lent = Provenance.beside(self.codec_path).files
        known = {**self.provenance.files, **{f"{CODEC}/{name}": file for name, file in lent.items()}}
        for name, path in found.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / name)
            if name in known:
                check_file(path, known[name])


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

    try:
        return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in _PICKLES]))
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


def read_specs(folder: Path, provenance: Provenance) -> dict[str, Spec]:
    """Where every tensor of a folder's safetensors files lies, held against the index where there is one.

    ``provenance`` is what is known of the folder: of the tensors it names, each gets its sum.
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
        pickles = [f.name for f in folder.glob("*") if f.suffix in _PICKLES]
        hint = f"; {pickles[0]} is a pickle, which quaver never loads: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder / WEIGHTS} is missing{hint}")
    specs: dict[str, Spec] = {}
    for file in files:
        known = provenance.tensors.get(file.name, {})
        with _open(file) as weights:
            for name in weights.offset_keys():
                if name in specs:
                    raise CheckpointError(f"{file}: tensor {name} is in {specs[name].file.name} as well")
                part = weights.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor {name} has type {part.get_dtype()}, which quaver does not read"
                    )
                specs[name] = Spec(file, DTYPES[part.get_dtype()], tuple(part.get_shape()), known.get(name))
    if index is not None and index.keys() != specs.keys():
        name = min(index.keys() ^ specs.keys())
        where = "in the index but in no file" if name in index else "in a file but not in the index"
        raise CheckpointError(f"{folder / INDEX}: tensor {name} is {where}")
    return specs


def read_tensor(spec: Spec, name: str) -> Tensor:
    """The tensor ``name`` where ``spec`` says it lies.

    Raises CheckpointError for a file that cannot be read, Damaged for a tensor that differs from its recorded sum.
    """
    with _open(spec.file) as weights:
        tensor: Tensor = weights.get_tensor(name)
    return _checked(spec, name, tensor)


def mapped(specs: Mapping[str, Spec]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``specs`` as their files are mapped: none is in memory, or held against its sum, until it is read.

    Raises CheckpointError for a file that cannot be mapped.
    """
    for file in _files(specs):
        with _open(file) as weights:
            for name, spec in specs.items():
                if spec.file == file:
                    yield name, weights.get_tensor(name)


def _stream(specs: Mapping[str, Spec]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the order of the files; while one is at work, the next are held against their sums."""
    with ThreadPoolExecutor(_N_AHEAD) as pool:
        for file in _files(specs):
            coming = ((name, pool.submit(_checked, specs[name], name, tensor)) for name, tensor in _mapped(file, specs))
            ahead = deque(islice(coming, _N_AHEAD))
            while ahead:
                name, tensor = ahead.popleft()
                ahead.extend(islice(coming, 1))
                yield name, tensor.result()


def _mapped(file: Path, specs: Mapping[str, Spec]) -> Iterator[tuple[str, Tensor]]:
    """A file's tensors of those in ``specs``, mapped anew after each run: what nobody keeps does not stay in memory."""
    with _open(file) as weights:
        names = deque(name for name in weights.offset_keys() if name in specs)
    while names:
        with _open(file) as weights:
            n_bytes = 0
            while names and n_bytes < _RUN_BYTES:
                name = names.popleft()
                n_bytes += specs[name].n_bytes
                yield name, weights.get_tensor(name)


def _edited(tensors: Iterator[tuple[str, Tensor]], edits: Sequence[Edit]) -> Iterator[tuple[str, Tensor]]:
    """What the ``edits``, one after the other, make of each of the ``tensors``."""
    for name, tensor in tensors:
        if not edits:
            yield name, tensor
            continue
        yield from _edited(iter(edits[0](name, tensor).items()), edits[1:])


def _checked(spec: Spec, name: str, tensor: Tensor) -> Tensor:
    if spec.sha256 is not None:
        check_sum(spec.file, name, hashlib.sha256(_bytes(tensor)).hexdigest(), spec.sha256)
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they are stored."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def write_tensors(path: Path, tensors: Iterator[tuple[str, Tensor]], n_expected: int) -> None:
    """Writes a safetensors file tensor by tensor; whoever needs it on the disk sees to that (see files.sync).

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


def _append(out: IO[bytes], header: dict[str, Any], name: str, tensor: Tensor, position: int) -> int:
    end = position + tensor.nbytes
    header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
    out.write(_bytes(tensor))
    return end
