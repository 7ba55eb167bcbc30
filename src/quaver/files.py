"""One output file, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from quaver.checkpoint import disk_error
from quaver.errors import RecipeError


def check_output(path: Path | str) -> Path:
    """``path`` as that of a file that can be written. Raises RecipeError when its folder is missing or it is a folder.

    Callers ask before they compute, so that a slip costs no minutes.
    """
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise RecipeError(
            f"the folder {path.parent} does not exist: make it first, or name another place for {path.name}"
        )
    return path


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
