"""What bench/quantize.py promises: the verb's own figures, a kill that changes no byte, no model taken for another."""

from __future__ import annotations

import json
import sys

import pytest

import quantize as bench
import toy
from quaver.errors import QuaverError


def test_a_killed_run_is_measured_and_compared(monkeypatch, capsys, toy_folder, tmp_path):
    monkeypatch.setattr(bench, "made", lambda *_: toy_folder)
    asked = ["--out", str(tmp_path), "--samples", "2", "--positions", "40", "--kill", "--json"]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *asked])
    assert bench.main() == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["n_layers"], result["killed_after"], result["resumed"]["n_resumed"]) == (2, 1, 1)
    assert result["report"]["process_s"] > sum(result["report"]["seconds"].values()) > 0
    assert "2 layers, 2 utterances, 80 positions on CPU" in printed.err
    assert "gone on in" in printed.err


def test_a_run_that_takes_too_long_says_where_it_was(monkeypatch, capfd, toy_folder, tmp_path):
    asked = bench.argparse.Namespace(device="cpu", samples=500, positions=500)
    line = bench.command(toy_folder, tmp_path / "out", asked)
    with pytest.raises(QuaverError, match="stopped after 6 s"):
        bench.quantized(line, 6)
    said = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in said
    assert "most recent call first" in said


def test_another_model_in_its_place_is_refused(tmp_path):
    toy.checkpoint(tmp_path / "model")
    with pytest.raises(QuaverError, match="holds another model"):
        bench.made(tmp_path / "model", "0.6b-base", None)


def test_what_the_verb_says_is_not_swallowed(capfd, toy_folder):
    with pytest.raises(QuaverError, match="ended with 2"):
        bench.quantized([sys.executable, "-m", "quaver", "quantize", str(toy_folder), "-o", "/no/such/place"])
    assert "/no/such does not exist" in capfd.readouterr().err
