"""The voice file: a round trip, its bytes, and every file that is not one."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from quaver.errors import BudgetError, RecipeError, VoiceError
from quaver.voice import Voice

DESCRIBED = {"version": 1, "name": "anna", "text": "Hello.", "preset": None}
TENSORS = {"speaker": torch.linspace(-1, 1, 8), "codes": torch.arange(32, dtype=torch.int16).view(2, 16)}


def anna() -> Voice:
    return Voice("anna", TENSORS["speaker"], TENSORS["codes"].long(), "Hello.")


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is second if first is None or second is None else torch.equal(first, second)


@pytest.mark.parametrize(
    "voice",
    [
        anna(),
        Voice("x", torch.ones(1024)),
        Voice("in context only", codes=torch.zeros(3, 16, dtype=torch.long), text="你好"),
        Voice("preset", preset="vivian"),
    ],
    ids=["both", "x-vector", "codes", "preset"],
)
def test_a_saved_voice_loads_as_it_was(tmp_path: Path, voice: Voice) -> None:
    voice.save(tmp_path / "v.safetensors")
    back = Voice.load(tmp_path / "v.safetensors")
    assert (back.name, back.text, back.preset) == (voice.name, voice.text, voice.preset)
    assert _same(back.speaker, voice.speaker) and _same(back.codes, voice.codes)
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


def test_the_bytes_of_a_voice_file(tmp_path: Path) -> None:
    Voice("a", torch.tensor([1.0]), torch.tensor([[258]]), "b").save(tmp_path / "v.safetensors")
    content = (tmp_path / "v.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"quaver-voice": '{"version": 1, "name": "a", "text": "b", "preset": null}'},
        "speaker": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "codes": {"dtype": "I16", "shape": [1, 1], "data_offsets": [4, 6]},
    }
    assert content[8 + length :] == b"\x00\x00\x80\x3f\x02\x01"


def test_ten_seconds_of_reference_take_a_few_kb(tmp_path: Path) -> None:
    Voice("a", torch.ones(1024), torch.zeros(125, 16, dtype=torch.long), "Some words.").save(tmp_path / "v.safetensors")
    assert (tmp_path / "v.safetensors").stat().st_size < 8500


def test_a_bfloat16_vector_is_stored_as_float32(tmp_path: Path) -> None:
    Voice("a", torch.ones(8, dtype=torch.bfloat16)).save(tmp_path / "v.safetensors")
    assert Voice.load(tmp_path / "v.safetensors").speaker.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": " ", "preset": "x"}, "needs a name"),
        ({"name": "a"}, "holds neither"),
        ({"name": "a", "codes": TENSORS["codes"]}, "codes and text together"),
        ({"name": "a", "speaker": TENSORS["speaker"], "text": "b"}, "codes and text together"),
        ({"name": "a", "codes": TENSORS["codes"], "text": " "}, "empty text"),
        ({"name": "a", "speaker": torch.ones(2, 2)}, "not .D. of floats"),
        ({"name": "a", "speaker": torch.ones(2, dtype=torch.int64)}, "not .D. of floats"),
        ({"name": "a", "speaker": torch.tensor([1.0, float("nan")])}, "NaN"),
        ({"name": "a", "codes": torch.ones(2, 2), "text": "b"}, "not .T, Q. of integers"),
        ({"name": "a", "codes": torch.zeros(0, 16, dtype=torch.int64), "text": "b"}, "not .T, Q. of integers"),
        ({"name": "a", "codes": torch.tensor([[-1]]), "text": "b"}, "outside"),
        ({"name": "a", "codes": torch.tensor([[40000]]), "text": "b"}, "outside"),
    ],
)
def test_voices_that_do_not_hold_together(fields: dict, words: str) -> None:
    with pytest.raises(VoiceError, match=words):
        Voice(**fields)


def _file(tensors: dict | None = None, metadata: dict | None = None, **described: object) -> bytes:
    if metadata is None:
        metadata = {"quaver-voice": json.dumps(DESCRIBED | described)}
    return save(TENSORS if tensors is None else tensors, metadata)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 a pickle, zipped", "damaged"),
        (_file()[:-1], "damaged"),
        (_file()[:40], "damaged"),
        (_file(metadata={}), "no voice"),
        (_file(metadata={"quaver-voice": "{}", "more": "x"}), "no voice"),
        (_file(metadata={"quaver-voice": "{"}), "not JSON"),
        (_file(metadata={"quaver-voice": "[]"}), "should hold"),
        (_file(metadata={"quaver-voice": '{"version": 1, "name": "a"}'}), "should hold"),
        (_file(more=1), "should hold"),
        (_file(version=2), "version 2"),
        (_file(name=7), "its name is 7"),
        (_file(preset=["a"]), "its preset is"),
        (_file(TENSORS | {"weights": torch.ones(1)}), "unknown tensor weights"),
        (_file({}), "holds neither"),
        (_file({"speaker": TENSORS["speaker"]}), "codes and text together"),
        (_file({"speaker": TENSORS["speaker"].double(), "codes": TENSORS["codes"]}), "speaker is torch.float64"),
        (_file({"codes": TENSORS["codes"].float()}), "codes is torch.float32"),
        (_file({"codes": TENSORS["codes"], "speaker": torch.full((8,), torch.inf)}), "NaN or infinite"),
        (_file({"codes": TENSORS["codes"].view(-1)}), "not .T, Q. of integers"),
    ],
)
def test_files_that_are_no_voice_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes(content)
    with pytest.raises(VoiceError, match=words) as failure:
        Voice.load(path)
    assert str(path) in str(failure.value)


def test_a_missing_file_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(VoiceError, match="quaver voice"):
        Voice.load(tmp_path / "v.safetensors")


def test_a_full_disk_and_a_missing_folder_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        anna().save(tmp_path / "no" / "v.safetensors")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BudgetError, match="no space left"):
        anna().save(tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []
