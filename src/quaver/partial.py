"""Finished pieces of long work, kept beside its output until that is whole: work that was killed goes on from them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from quaver.errors import BudgetError, CheckpointError, RecipeError
from quaver.files import check_new, disk_error, sha256, write_file

_KEY = "key.json"
_LOCK = "lock"
_PIECE = re.compile(r"(?P<name>[\w-]+)\.(?P<sha256>[0-9a-f]{64})\.safetensors")


class Partial:
    """The folder ``.OUT.partial`` with the pieces that are finished, each some tensors and a note in JSON's values.

    A piece is there whole or not at all, and its file's name holds the SHA-256 of what is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces = {match["name"]: path for path, match in _pieces(folder)}

    @classmethod
    @contextmanager
    def towards(cls, out: Path, key: Mapping[str, Any]) -> Iterator[Partial]:
        """The unfinished work towards the new folder ``out``; while open, nobody else is at it.

        ``key`` holds, in JSON's values, all that the pieces depend on. Work under another key is an error that names
        what differs: it may have taken hours. Whatever ends the work, finished pieces stay, and a folder without any
        goes. Raises RecipeError when ``out`` exists, its parent does not or cannot be written to, or another run is at
        work; CheckpointError for a damaged piece; BudgetError when the disk is full.
        """
        folder = partial_folder(check_new(out))
        try:
            folder.mkdir(exist_ok=True)
            lock = (folder / _LOCK).open("wb")
        except OSError as error:
            raise disk_error(error, folder) from error
        with lock:
            _lock(lock, folder)
            _agree(folder, key, out)
            _clear(folder)
            partial = cls(folder)
            try:
                yield partial
            except BudgetError as error:
                if not partial._pieces:
                    raise
                kept = f"what is finished is kept in {folder}: make room, and the same command goes on from there"
                raise BudgetError(f"{error}; {kept}") from error
            finally:
                if not partial._pieces:
                    shutil.rmtree(folder, ignore_errors=True)

    def note(self, name: str) -> Any:
        """What was noted with the piece ``name``, None without one. Raises CheckpointError when it is damaged."""
        path = self._pieces.get(name)
        if path is None:
            return None
        match = _PIECE.fullmatch(path.name)
        if match is None or sha256(path) != match["sha256"]:
            raise CheckpointError(f"{path} is damaged: remove it, and the same command makes it again")
        with safe_open(path, framework="pt") as piece:
            return json.loads(piece.metadata()["note"])

    def tensors(self, name: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors ``names`` (all, by default) of the finished piece ``name``."""
        with safe_open(self._pieces[name], framework="pt") as piece:
            return {key: piece.get_tensor(key) for key in (piece.keys() if names is None else names)}

    def keep(self, name: str, tensors: Mapping[str, Tensor], note: Any) -> None:
        """Keeps the piece ``name``, which is then finished. Raises BudgetError when the disk is full."""
        whole = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        content = save(whole, {"note": json.dumps(note)})
        path = self.folder / f"{name}.{hashlib.sha256(content).hexdigest()}.safetensors"
        write_file(path, content)
        self._pieces[name] = path

    def deliver(self, made: Path, out: Path) -> None:
        """Makes the folder ``made``, which stands in this one, the output ``out``; nothing else is left."""
        made.rename(out)
        self._pieces.clear()


def partial_folder(out: Path) -> Path:
    """Where unfinished work towards ``out`` is kept."""
    return out.with_name(f".{out.name}.partial")


def _pieces(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in sorted(folder.iterdir()):
        match = _PIECE.fullmatch(path.name)
        if match:
            yield path, match


def _lock(lock: IO[bytes], folder: Path) -> None:
    """Locks the open file ``lock`` for as long as it is open, even through a kill. Windows has no such lock."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(f"another run is at work in {folder}: wait for it, or name another output") from None


def _agree(folder: Path, key: Mapping[str, Any], out: Path) -> None:
    """Notes ``key`` in a folder without pieces; raises RecipeError when the pieces there were made under another."""
    path, text = folder / _KEY, json.dumps(key, indent=1, sort_keys=True) + "\n"
    if not any(_pieces(folder)):
        write_file(path, text.encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            name for name in sorted(key.keys() | found.keys()) if found.get(name) != json.loads(text).get(name)
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: remove {folder}, and the work starts anew") from error
    if differing:
        raise RecipeError(
            f"{folder} holds unfinished work towards {out} of another {' and '.join(differing)}: go on with that one, "
            "name another output, or remove the folder"
        )


def _clear(folder: Path) -> None:
    """Removes what a kill left half-written."""
    whole = {_KEY, _LOCK, *(path.name for path, _ in _pieces(folder))}
    for path in folder.iterdir():
        if path.name not in whole:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
