"""Law 12: what the README shows runs as it stands, in a fresh folder: ``sh`` line by line, ``python`` as a whole."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from quaver import cli
from quaver.model.tts import references

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(next(iter(references().values())), "me.ogg")
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [None]
            if program is None:
                continue
            assert program == "quaver", f"only quaver's own verbs stand in sh blocks: {line}"
            code = cli.run(arguments)
            assert code == 0, f"{line}: {capsys.readouterr().err}"


def test_every_verb_is_in_the_readme():
    for verb in cli.cli.commands:
        assert f"quaver {verb}" in README.read_text(), verb


def test_figures_name_their_command():
    """Each table of results stands under a line that names the command, the machine and the commit."""
    for table in re.findall(r"((?:^.*\n){2})^\|.*\|\n\|[-| :]+\|\n", README.read_text(), re.MULTILINE):
        assert "`" in table
