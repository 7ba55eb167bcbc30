"""How far a candidate may be from its original: the gates of a release, and the small TOML file that changes them.

The file holds what differs from the defaults here, under the names of the fields: those of :class:`Limits` at its
top, those of :class:`JudgedLimits` in the table ``[judged]``. A limit of ``inf`` never fails.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from quaver.errors import RecipeError

_JUDGED = "judged"


@dataclass(frozen=True, slots=True)
class JudgedLimits:
    """How much worse judges may find a candidate's speech, runaways included; means over utterances, in pairs.

    Error rates and similarities 0..1, quality in points of 1 to 5.
    """

    cer: float = 0.03
    wer: float = 0.05
    own_similarity: float = 0.05
    similarity: float = 0.05
    quality: float = 0.10


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a candidate may be from its original.

    Divergences in nats a frame, agreement in per cent of the frames, stop changes as probabilities, runaways and early
    stops in per cent of the utterances more than the original's, durations as the largest ratio either way, leading
    silence in seconds more than the original's, disk as a ratio.
    """

    first_kl: float = 0.10
    residual_kl: float = 0.10
    first_agreement: float = 85.0
    residual_agreement: float = 80.0
    stop_change: float = 0.05
    runaways: float = 2.0
    early_stops: float = 2.0
    duration: float = 1.10
    leading_silence: float = 0.10
    disk: float = 1.0
    judged: JudgedLimits | None = None
    """None where no judge is asked."""

    @classmethod
    def read(cls, path: Path) -> Limits:
        """The limits that the TOML file ``path`` asks for, defaults where it is silent.

        ``judged`` is None where it has no table of that name. Raises RecipeError for a file that cannot be read, a name
        that is no limit, and a value that is no number from 0 on.
        """
        try:
            told = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path} cannot be read as a TOML file of gates: {error}") from error
        table = told.pop(_JUDGED, None)
        if table is not None and not isinstance(table, dict):
            raise RecipeError(f"{path}: {_JUDGED} is {table!r}: write a table [{_JUDGED}] with limits in it")
        top = replace(cls(), **_numbers(told, cls, str(path)))
        if table is None:
            return top
        return replace(top, judged=JudgedLimits(**_numbers(table, JudgedLimits, f"{path}, table [{_JUDGED}]")))


def _numbers(told: Mapping[str, Any], kind: type, where: str) -> dict[str, Any]:
    names = [field.name for field in fields(kind) if field.name != _JUDGED]
    for name, value in told.items():
        if name not in names:
            raise RecipeError(f"{where}: {name} is no limit: there are {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
            raise RecipeError(f"{where}: {name} is {value!r}: a limit is a number from 0 on, inf where none is wanted")
    return {name: float(value) for name, value in told.items()}
