"""Pieces of unfinished work: kept whole, known by what they were made of, and one run at a time."""

from __future__ import annotations

import json

import pytest
import torch

from quaver import meter
from quaver.errors import CheckpointError, RecipeError
from quaver.partial import Partial, partial_folder


def test_pieces_come_back_as_they_were_kept(tmp_path):
    made = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.tensor([1.5], dtype=torch.bfloat16)}
    with Partial.towards(tmp_path / "out", {"model": 1}) as partial:
        assert partial.note("one") is None
        partial.keep("one", made, {"loss": 0.1})
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    with Partial.towards(tmp_path / "out", {"model": 1}) as partial:
        assert partial.note("one") == {"loss": 0.1}
        found = partial.tensors("one")
        assert found.keys() == made.keys() and all(torch.equal(found[name], made[name]) for name in made)
        assert list(partial.tensors("one", ["b"])) == ["b"]
        (partial.folder / "made").mkdir()
        partial.deliver(partial.folder / "made", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_work_without_a_piece_leaves_nothing_and_binds_nobody(tmp_path):
    with pytest.raises(ValueError, match="bad"), Partial.towards(tmp_path / "out", {"model": 1}):
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())
    # As a kill leaves it: a key, a lock, half a piece and half a model, but no piece.
    folder = partial_folder(tmp_path / "out")
    (folder / "made").mkdir(parents=True)
    (folder / "key.json").write_text('{"model": 1}')
    (folder / ".one.7.part").write_text("half")
    with Partial.towards(tmp_path / "out", {"model": 2}) as partial:
        assert {path.name for path in folder.iterdir()} == {"key.json", "lock"}
        partial.keep("one", {}, None)
    assert json.loads((folder / "key.json").read_text()) == {"model": 2}


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    with Partial.towards(tmp_path / "out", {"model": 1}) as partial:
        partial.keep("one", {}, 1)
        with (
            pytest.raises(RecipeError, match="another run is at work"),
            Partial.towards(tmp_path / "out", {"model": 1}),
        ):
            pass
        assert partial.note("one") == 1


def test_a_damaged_key_is_named(tmp_path):
    with Partial.towards(tmp_path / "out", {"model": 1}) as partial:
        partial.keep("one", {}, 1)
    (partial.folder / "key.json").write_text("{")
    with (
        pytest.raises(CheckpointError, match=r"key\.json is damaged: remove"),
        Partial.towards(tmp_path / "out", {"model": 1}),
    ):
        pass


def test_stages_add_up():
    found = meter.Meter(torch.device("cpu"))
    for _ in range(2):
        with found.stage("one"):
            pass
    found.add("two", 3.0)
    assert list(found.seconds) == ["one", "two"] and 0 < found.seconds["one"] < 1 and found.seconds["two"] == 3
    parts = meter.Clock(torch.device("cpu"))
    parts.add("one", 0.5)
    parts.add("three", 1.0)
    found.within("two", parts)
    assert found.seconds["two"] == 1.5 and found.seconds["three"] == 1
    assert meter.split({"one": 1.234, "none": 0.01, "two": 0.05}) == "one 1.2, two 0.1"
    assert found.device_bytes is None
    before = meter.host_bytes()
    block = torch.ones(50_000_000)
    assert meter.host_bytes() >= before + 0.5 * block.nbytes or meter.host_bytes() > 2 * block.nbytes
