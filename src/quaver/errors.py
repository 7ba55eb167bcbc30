"""What can go wrong, as one tree.

    QuaverError
    ├── CheckpointError   a model directory, its configuration or one of its tensors
    │   └── Damaged       a file or tensor that is not what provenance.json records; names it
    ├── RecipeError       what was asked for: a text, a language, a knob, an output place
    ├── VoiceError        a voice file, a preset, or a voice this model cannot take
    ├── AudioError        an audio file or its samples
    ├── BudgetError       memory or disk that does not suffice
    ├── GateFailed        a validation gate; carries the report
    └── MissingExtra      an optional package; carries the pip line

Every message says what, where, and what to do.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quaver.report import Report


class QuaverError(Exception):
    """Any failure that quaver explains; the command line prints it on one line and exits with 2."""


class CheckpointError(QuaverError):
    """A model directory, configuration or tensor that is not what it should be."""


class Damaged(CheckpointError):
    """A model that is not what its provenance records; ``file`` and, where it is one, ``tensor`` tell what differs."""

    def __init__(self, message: str, file: Path, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file, self.tensor = file, tensor


class RecipeError(QuaverError):
    """A request that cannot be carried out as asked."""


class VoiceError(QuaverError):
    """A voice that cannot be read or that this model cannot take."""


class AudioError(QuaverError):
    """Audio that cannot be read, or that holds no usable speech."""


class BudgetError(QuaverError):
    """Memory or disk that does not suffice."""


class GateFailed(QuaverError):
    """A validation gate that failed; ``report`` holds every figure."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class MissingExtra(QuaverError):
    """An optional package that is not installed; the message is the pip line that brings it."""


def need(module: str, *, extra: str) -> ModuleType:
    """The imported ``module`` of the optional dependencies ``extra``.

    Raises MissingExtra with the pip line when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{module} is not installed: pip install 'quaver[{extra}]'") from error
