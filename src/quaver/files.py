"""Output that is written whole or not at all, and the sums of what is there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quaver.errors import BudgetError, RecipeError


def check_new(out: str | Path) -> Path:
    """``out`` as the path of a folder that can be made. Raises RecipeError when it exists or its parent does not."""
    out = Path(out)
    if out.exists():
        raise RecipeError(f"{out} exists already: name a new folder, or remove it first")
    _check_parent(out)
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


def check_output(path: Path | str) -> Path:
    """``path`` as that of a file that can be written. Raises RecipeError when its folder is missing or it is a folder.

    Callers ask before they compute, so that a slip costs no minutes.
    """
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: name a file in it")
    _check_parent(path)
    return path


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise RecipeError(
            f"the folder {path.parent} does not exist: make it first, or name another place for {path.name}"
        )


def write_file(path: Path | str, content: bytes) -> None:
    """Writes ``content`` to ``path``, aside first and then renamed over what was there.

    Raises RecipeError when the place cannot be written to, BudgetError when the disk is full; nothing is left behind.
    """
    path = check_output(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when the file at ``path`` is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def disk_error(error: OSError, out: Path) -> BudgetError | RecipeError:
    """What a failed write to ``out`` means to the user."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(out.parent).free
        return BudgetError(f"no space left for {out}: {free / 1e6:.0f} MB are free; nothing half-written was left")
    return RecipeError(f"{out} cannot be written: {error.strerror or error}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
