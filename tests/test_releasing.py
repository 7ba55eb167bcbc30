"""docs/RELEASING.md: its commands run (with fewer samples, without judges), the gates it shows are the defaults."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import quaver
import random_model
from quaver import cli
from quaver.limits import JudgedLimits, Limits

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "RELEASING.md").read_text(encoding="utf-8")


def _commands(kind: str) -> list[list[str]]:
    """The commands in the blocks of one kind, && taken apart."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [found for found in words if found]


def _run(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    if program == "quaver":
        return cli.run(arguments)
    assert (program, arguments[0]) == ("python", "bench/random_model.py")
    monkeypatch.setattr(sys, "argv", arguments)
    random_model.main()
    return 0


@pytest.mark.timeout(600)
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src" / "quaver").mkdir(parents=True)
    shutil.copytree(Path(quaver.__file__).parent / "voices", tmp_path / "src" / "quaver" / "voices")
    monkeypatch.chdir(tmp_path)
    commands = _commands("sh")
    assert [arguments[0] for program, *arguments in commands if program == "quaver"] == [
        "blend", "quantize", "validate", "export", "verify"
    ]  # fmt: skip
    for program, *arguments in commands:
        asked = list(arguments)
        if asked[0] == "validate":
            place = asked.index("--judge")
            del asked[place : place + 2]
        if asked[0] in ("quantize", "validate"):
            asked += ["--samples", "6"]
        assert _run(program, asked, monkeypatch) == 0, f"{shlex.join(asked)}: {capsys.readouterr().err}"
    assert "tiny-release is intact" in capsys.readouterr().out
    kept = json.loads(Path("tiny-blend-int4/provenance.json").read_text())
    assert [step["tool"] for step in kept["made"]["steps"]][-2:] == ["blend", "quantize"]
    assert kept["validation"]["passed"]


def test_all_its_commands_are_understood() -> None:
    every = _commands("sh") + _commands("console")
    assert any("--sweep" in words for words in every)
    for program, verb, *arguments in every:
        if program == "quaver":
            command = cli.cli.commands[verb]
            command.make_context(verb, list(arguments))


def test_the_gates_it_shows_are_the_defaults(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "gates.toml").write_text(block, encoding="utf-8")
    assert Limits.read(tmp_path / "gates.toml") == Limits(judged=JudgedLimits())
    for limits in (Limits(), JudgedLimits()):
        for name in type(limits).__slots__:
            assert re.search(rf"^\[?{name}\b", block, re.MULTILINE), name
