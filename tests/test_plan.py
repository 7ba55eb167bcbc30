"""A plan says beforehand, to the byte, what quaver then writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import toy
from quaver import awq, cli, ledger, mixed, plan, recipe
from quaver.checkpoint import CODEC, Checkpoint
from quaver.errors import CheckpointError

PUBLISHED = Path(__file__).parent / "oracle" / "published"


def data_bytes(folder):
    """The bytes of the weight files after their headers, by the files' own first eight bytes."""
    n_bytes = 0
    for file in (folder / "model.safetensors", folder / CODEC / "model.safetensors"):
        with file.open("rb") as weights:
            n_bytes += file.stat().st_size - 8 - int.from_bytes(weights.read(8), "little")
    return n_bytes


def bare(source, out):
    """The configurations alone of the model in ``source``, in the new folder ``out``."""
    (out / CODEC).mkdir(parents=True)
    for name in ("config.json", f"{CODEC}/config.json"):
        shutil.copyfile(source / name, out / name)
    return out


@pytest.fixture(scope="module", params=["toy", "tiny"])
def written(request, toy_folder, tmp_path_factory):
    """A model's source, and the folders that quaver writes of it in each profile."""
    folder = tmp_path_factory.mktemp(request.param)
    source = toy_folder if request.param == "toy" else Checkpoint.open("tiny").path
    Checkpoint.open(source).save(folder / "bf16")
    if request.param == "toy":
        toy.rounded(source, folder / "int4")
    else:
        awq.quantize(source, folder / "int4", awq.Recipe(n_samples=1, n_positions=64))
    compact = replace(recipe.COMPACT, calibration=awq.Recipe(n_samples=1, n_positions=64))
    mixed.quantize(source, folder / "compact", compact)
    return source, {name: folder / name for name in plan.PROFILES}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_disk_and_memory_are_those_of_the_files_that_are_written(written, device):
    source, folders = written
    made = plan.plan(source, device=device)
    assert made.types_from == "the files"
    for profile in made.profiles:
        folder = folders[profile.name]
        assert profile.total.disk_bytes == data_bytes(folder)
        assert profile.entries == ledger.weigh(Checkpoint.open(folder), device=device).entries


def test_either_version_of_a_model_has_the_same_plan(written):
    source, folders = written
    wanted = plan.plan(source).profiles
    for name in ("bf16", "int4"):
        assert plan.plan(folders[name]).profiles == wanted
    # What the codec's decoder was before it became bfloat16, nobody can tell from the compact version.
    assert plan.plan(folders["compact"]).profiles[2] == wanted[2]


def test_a_configuration_alone_suffices(toy_folder, tmp_path):
    # A toy has the types of the published models: bfloat16, and float32 for its codec.
    folder = bare(toy_folder, tmp_path / "bare")
    made, wanted = plan.plan(folder), plan.plan(toy_folder)
    assert made.profiles == wanted.profiles
    assert made.types_from.startswith("the published models")
    assert plan.plan(folder / "config.json").profiles == wanted.profiles
    shutil.move(folder / CODEC, tmp_path / "codec")
    without = plan.plan(folder / "config.json")
    assert not without.codec
    assert "the codec is NOT counted" in "\n".join(plan.table(without))
    codec = {"codec decoder", "codec encoder"}
    wanted_entries = [entry for entry in wanted.profiles[0].entries if entry.name not in codec]
    assert list(without.profiles[0].entries) == wanted_entries
    for named in (tmp_path / "codec", tmp_path / "codec" / "config.json", toy_folder):
        assert plan.plan(folder, codec=named).profiles == wanted.profiles


def test_the_published_models():
    codec = PUBLISHED / "speech_tokenizer-config.json"
    listed = [
        json.loads((PUBLISHED / f"tensors-{name}.json").read_text()) for name in ("0.6b-base", "speech-tokenizer")
    ]
    sizes = {"bfloat16": 2, "float32": 4}
    wanted = 0
    for dtype, shape in (value for tensors in listed for value in tensors.values()):
        n_values = 1
        for size in shape:
            n_values *= size
        wanted += sizes[dtype] * n_values
    small = plan.plan(PUBLISHED / "config-0.6b-base.json", codec=codec)
    assert small.profiles[0].total.disk_bytes == wanted
    large = plan.plan(PUBLISHED / "config-1.7b-base.json", codec=codec)
    assert large.profiles[0].total.disk_bytes == 4_539_584_644
    # 28 layers of 352.3 M and 1,057 M weights: half a byte each, and 2.5 bytes a group of 128.
    n_weights = 28 * (2048 * (2048 + 1024 + 1024 + 2048) + 3 * 2048 * 6144)
    norms = 28 * 2 * (2 * 2048 + 2 * 128)
    layers = {entry.name: entry for entry in large.profiles[1].entries}["talker layers"]
    assert layers.disk_bytes == n_weights // 2 + n_weights // 128 * 5 // 2 + norms
    assert layers.n_parameters == n_weights + norms // 2


def test_what_compact_saves(toy_folder):
    int4, compact = plan.plan(toy_folder).profiles[1:]
    before, after = ({entry.name: entry for entry in one.entries} for one in (int4, compact))
    assert after["text embedding"].disk_bytes == after["text embedding"].memory_bytes == 320 * 64 + 2 * 320
    assert after["predictor heads"].disk_bytes == 15 * (64 * 128 + 2 * 64)
    assert 2 * after["codec decoder"].disk_bytes == before["codec decoder"].disk_bytes
    # Sound is computed in float32.
    assert after["codec decoder"].memory_bytes == before["codec decoder"].memory_bytes
    for name in before:
        assert after[name].n_parameters == before[name].n_parameters
    untouched = ("talker layers", "codec encoder", "speaker encoder", "text projection", "codec embedding")
    assert all(after[name] == before[name] for name in untouched)


@pytest.mark.parametrize(
    ("source", "codec", "message"),
    [
        ("nowhere", None, "nowhere is no folder"),
        ("Qwen/Qwen3-TTS", None, "a plan needs the configuration alone"),
        ("empty", None, "config.json is missing"),
        ("MODEL", "empty", "is no speech tokenizer's folder"),
        ("notes.json", None, "is not JSON"),
    ],
)
def test_what_is_refused(toy_folder, tmp_path, monkeypatch, source, codec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.json").write_text("notes")
    with pytest.raises(CheckpointError, match=message):
        plan.plan(toy_folder if source == "MODEL" else source, codec=codec)


def test_widths_that_int4_does_not_fit(toy_folder, tmp_path):
    folder = bare(toy_folder, tmp_path / "bare")
    settings = json.loads((folder / "config.json").read_text())
    settings["talker_config"]["intermediate_size"] = 200
    (folder / "config.json").write_text(json.dumps(settings))
    assert plan.plan(folder, ("bf16",)).profiles[0].total.disk_bytes > 0
    with pytest.raises(CheckpointError, match="INT4 needs inputs in multiples of 128"):
        plan.plan(folder, ("int4",))


def test_the_verb(capsys, toy_folder):
    assert cli.run(["plan", str(toy_folder), "--json", "--profile", "int4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [profile["name"] for profile in told["profiles"]] == ["int4"]
    assert told["profiles"][0]["total"]["disk_bytes"] == plan.plan(toy_folder).profiles[1].total.disk_bytes
    assert cli.run(["plan", str(toy_folder)]) == 0
    text = capsys.readouterr().out
    assert "compact disk" in text
    assert "talker layers" in text
    assert cli.run(["plan", "nowhere"]) == 2
    assert cli.run(["plan", str(toy_folder), "--profile", "tiny"]) == 2
