"""The file of gates: what it says holds, and what it cannot mean is named."""

import math
from pathlib import Path

import pytest

from quaver.errors import RecipeError
from quaver.limits import JudgedLimits, Limits


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gates.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_the_file_says_holds_and_defaults_where_it_is_silent(tmp_path: Path) -> None:
    assert Limits.read(_file(tmp_path, "")) == Limits()
    found = Limits.read(_file(tmp_path, "first_kl = 0.2\ndisk = inf\nrunaways = 5\n[judged]\ncer = 0.1\n"))
    assert found == Limits(first_kl=0.2, disk=math.inf, runaways=5.0, judged=JudgedLimits(cer=0.1))
    assert Limits.read(_file(tmp_path, "[judged]\n")).judged == JudgedLimits()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first_lk = 0.1", "first_lk is no limit: there are first_kl, residual_kl"),
        ("cer = 0.1", "cer is no limit"),
        ("[judged]\nfirst_kl = 0.1", r"table \[judged\]: first_kl is no limit: there are cer, wer"),
        ("first_kl = -1", "first_kl is -1: a limit is a number from 0 on"),
        ("first_kl = nan", "first_kl is nan"),
        ("first_kl = true", "first_kl is True"),
        ("first_kl = '0.1'", "first_kl is '0.1'"),
        ("judged = 3", r"judged is 3: write a table \[judged\]"),
        ("first_kl", "cannot be read as a TOML file"),
    ],
)
def test_what_it_cannot_mean_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as failure:
        Limits.read(_file(tmp_path, text))
    assert "gates.toml" in str(failure.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml cannot be read"):
        Limits.read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"bytes\.toml cannot be read"):
        Limits.read(tmp_path / "bytes.toml")
