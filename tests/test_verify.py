"""One changed byte anywhere is caught by `verify` and by loading; what is recorded of a model; and its card."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

import toy
from quaver import blend, cli, validate
from quaver.card import card, check_place
from quaver.checkpoint import Checkpoint
from quaver.errors import CheckpointError, Damaged, RecipeError
from quaver.model.tts import TTS
from quaver.provenance import HEADER, File, Provenance, Step, licences, model_name, sums
from quaver.report import Metric, Report, gate
from quaver.verify import verify

CODEC_WEIGHTS = "speech_tokenizer/model.safetensors"


def double(name, tensor):
    return {name: tensor * 2 if name.endswith("codec_head.weight") else tensor}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A toy with a licence, a nested side file and an edit behind it."""
    place = tmp_path_factory.mktemp("made")
    source = toy.checkpoint(place / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A toy\n")
    (source / "LICENSE").write_text("a licence")
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("deep")
    step = Step("double", {"by": 2}, result={"n_tensors": 1})
    return Checkpoint.open(source).edit(step, double).save(place / "made").path


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(made, tmp_path / "model")


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path, offset, mask=1):
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def refused(folder):
    """What verifying says and names, where loading refuses the model too."""
    with pytest.raises(CheckpointError):
        TTS.load(folder)
    with pytest.raises(Damaged) as told:
        verify(folder)
    return told.value


def test_what_was_saved_is_intact(made):
    told = []
    found = verify(made, progress=lambda *event: told.append(event))
    assert (found.model, found.n_files, found.verdict) == ("made", len(files_of(made)) - 1, None)
    checkpoint = Checkpoint.open(made)
    assert found.n_tensors == len(checkpoint.specs) + len(checkpoint.codec_specs)
    assert found.n_bytes == sum((made / name).stat().st_size for name in files_of(made)) - (
        (made / "provenance.json").stat().st_size
    )
    assert {what.removeprefix("checking ") for what, done, total in told if done == total} == (
        set(files_of(made)) - {"provenance.json"}
    )
    assert TTS.load(made).checkpoint.provenance == checkpoint.provenance


def test_a_flipped_byte_anywhere_is_caught_by_verify_and_by_loading(folder):
    """A dozen places in each file, the ends among them, and every bit of one byte of each; seeded."""
    draw = random.Random(0)
    for name in files_of(folder):
        path = folder / name
        whole = path.read_bytes()
        offsets = {0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(10))}
        flips = [(offset, 1 << draw.randrange(8)) for offset in offsets]
        flips += [(len(whole) // 2, 1 << bit) for bit in range(8)]
        for offset, mask in flips:
            flip(path, offset, mask)
            assert refused(folder).file == path, (name, offset, mask)
            path.write_bytes(whole)
    verify(folder)


@pytest.mark.parametrize("old", ["\n", " "])
def test_white_space_of_provenance_counts(folder, old):
    # Such bytes mean the same to a reader of JSON.
    path = folder / "provenance.json"
    for new in {"\n", " ", "\t", "\r"} - {old}:
        whole = path.read_text()
        path.write_bytes(whole.replace(old, new, 1).encode())
        assert refused(folder).file == path
        path.write_text(whole)


@pytest.mark.parametrize("weights", ["model.safetensors", CODEC_WEIGHTS])
def test_the_first_tensor_that_differs_is_named(folder, weights):
    path = folder / weights
    checkpoint = Checkpoint.open(folder)
    specs = checkpoint.specs if weights == "model.safetensors" else checkpoint.codec_specs
    names = [name for name, _ in sums(path)]
    assert names[0] == HEADER
    assert sorted(names[1:]) == sorted(specs)
    n_bytes = path.stat().st_size
    starts = {name: n_bytes - sum(specs[later].n_bytes for later in names[i:]) for i, name in enumerate(names) if i}
    for index in (1, len(names) // 2, len(names) - 1):
        whole = path.read_bytes()
        for name in names[index:][::-1][-2:]:
            flip(path, starts[name])
        error = refused(folder)
        assert (error.file, error.tensor) == (path, names[index])
        with pytest.raises(CheckpointError, match=re.escape(names[index])):
            TTS.load(folder)
        path.write_bytes(whole)


def test_missing_added_and_cut_files(folder):
    for name in files_of(folder):
        path, whole = folder / name, (folder / name).read_bytes()
        if name == "provenance.json":
            continue
        path.unlink()
        assert refused(folder).file == path
        for keep in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:keep])
            assert refused(folder).file == path
        path.write_bytes(whole + b" ")
        error = refused(folder)
        assert error.file == path
        assert "something was added" in str(error)
        path.write_bytes(whole)
    for name in ("sentences.jsonl", "more.safetensors", "speech_tokenizer/more.json", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
        error = refused(folder)
        assert error.file == folder / name
        assert "keep it elsewhere" in str(error)
        (folder / name).unlink()
    for name in ("vocab.json", "model.safetensors"):
        # As a download that lost its store: a link to nothing.
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / "gone")
        assert refused(folder).file == folder / name
        (folder / name).unlink()
        (folder.parent / name).rename(folder / name)
    whole = (folder / "provenance.json").read_bytes()
    for keep in (0, 1, len(whole) // 2, len(whole) - 1):
        (folder / "provenance.json").write_bytes(whole[:keep])
        assert refused(folder).file == folder / "provenance.json"


def test_card_and_hidden_files_are_no_part_of_the_model(folder):
    (folder / "README.md").write_text("about it")
    (folder / ".gitattributes").write_text("*.safetensors lfs")
    verify(folder)
    again = Checkpoint.open(folder).save(folder.parent / "again").path
    assert set(files_of(folder)) - set(files_of(again)) == {"README.md", ".gitattributes"}


def test_a_model_without_provenance_says_so(toy_folder):
    with pytest.raises(CheckpointError, match="provenance.json is missing.*only what quaver wrote") as told:
        verify(toy_folder)
    assert not isinstance(told.value, Damaged)
    with pytest.raises(CheckpointError, match="provenance.json is missing"):
        card(Checkpoint.open(toy_folder))
    with pytest.raises(CheckpointError, match="has no provenance.json"):
        Checkpoint.open(toy_folder).record({})


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("seals"),
        lambda value: value.pop("made"),
        lambda value: value["made"].update(steps=[{"tool": 1}]),
        lambda value: value["made"].update(files={"a": 1}),
        lambda value: value["made"]["steps"][0].update(tool="quantize"),
        lambda value: value["made"]["files"]["LICENSE"].update(n_bytes=10),
        lambda value: value.update(validation={"verdict": "all 9 gates passed"}),
        lambda value: value.update(more=1),
        lambda value: value["made"].update(dtype=1),
    ],
)
def test_provenance_that_somebody_edited(folder, change):
    path = folder / "provenance.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    assert refused(folder).file == path


def test_provenance_that_nests_without_end(folder):
    (folder / "provenance.json").write_text('{"made": ' + "[" * 100_000)
    assert refused(folder).file == folder / "provenance.json"


def test_damage_is_not_sealed_anew_by_another_step(folder, tmp_path):
    """Weights of the codec are copied, not looked at, when a model is saved: they are held against their sums too."""
    for name in ("model.safetensors", CODEC_WEIGHTS, "merges.txt"):
        checkpoint, whole = Checkpoint.open(folder), (folder / name).read_bytes()
        flip(folder / name, -5)
        with pytest.raises(Damaged):
            checkpoint.edit(Step("same"), double).save(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
        (folder / name).write_bytes(whole)


def test_a_lent_codec_is_held_against_the_lenders_provenance(folder, toy_folder, tmp_path):
    bare = shutil.copytree(toy_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("speech_tokenizer"))
    saved = Checkpoint.open(bare, codec=folder).edit(Step("same"), double).save(tmp_path / "whole")
    ours, lender = saved.provenance.steps[-1].parents
    assert (ours.name, lender.name, lender.licences) == ("bare", "model", ("apache-2.0",))
    assert set(lender.files) == {name for name in files_of(folder) if name.startswith("speech_tokenizer/")}
    assert verify(saved.path, [bare, folder]).parents == ("bare", "model")
    flip(folder / CODEC_WEIGHTS, -5)
    with pytest.raises(Damaged, match="tensor"):
        TTS.load(bare, codec=folder)
    flip(folder / CODEC_WEIGHTS, 20)
    with pytest.raises(Damaged, match="the header differs"):
        Checkpoint.open(bare, codec=folder)


def test_parents_are_checked_where_they_are_given(made, tmp_path):
    source = shutil.copytree(made.parent / "source", tmp_path / "source")
    (origin,) = Checkpoint.open(made).provenance.steps[-1].parents
    assert (origin.name, origin.licences) == ("source", ("apache-2.0",))
    assert origin.files == {name: File.of(source / name) for name in files_of(source) if name != "README.md"}
    assert verify(made, [source]).parents == ("source",)
    flip(source / "vocab.json", 9)
    with pytest.raises(Damaged, match="source/vocab.json differs"):
        verify(made, [source])
    (source / "LICENSE").unlink()
    with pytest.raises(Damaged, match="source/LICENSE is missing"):
        verify(made, [source])
    (tmp_path / "other").mkdir()
    with pytest.raises(Damaged, match="is no parent of .*made: it records source"):
        verify(made, [tmp_path / "other"])


def test_steps_and_licences_are_kept_along_the_chain(made, tmp_path):
    bare = toy.checkpoint(tmp_path / "llm", seed=3)
    between = Checkpoint.open(made)
    donor = blend.Donor.open(bare)
    blend.blend(between, donor, tmp_path / "blended")
    found = Checkpoint.open(tmp_path / "blended").provenance
    assert [step.tool for step in found.steps] == ["double", "blend"]
    assert [[one.name for one in step.parents] for step in found.steps] == [["source"], ["made", "llm"]]
    assert found.licences == ("apache-2.0", "unknown")
    assert licences(tmp_path / "blended") == ("apache-2.0", "unknown")
    on = Checkpoint.open(tmp_path / "blended").edit(Step("same"), double).save(tmp_path / "on")
    assert on.provenance.licences == ("apache-2.0", "unknown")
    # A donor that quaver wrote is held against its sums as it is read.
    damaged = shutil.copytree(made, tmp_path / "damaged")
    flip(damaged / "extra" / "note.txt", 0)
    with pytest.raises(Damaged, match=r"note\.txt differs"):
        blend.Donor.open(damaged)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlanguage: en\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: 'cc-by-4.0'  # all of it\r\n---\r\n", "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: house rules\n---\n", "house rules"),
        ("---\nlicense:\n- mit\n---\n", "unknown"),
        ("# license: mit\n", "unknown"),
        ("no front\n---\nlicense: mit\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_licence_is_read_from_the_cards_front_matter(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert licences(tmp_path) == (expected,)


def test_a_model_from_the_hub_has_its_hub_name(tmp_path):
    assert model_name(tmp_path / "models--Qwen--Qwen3-TTS-12Hz-0.6B-Base" / "snapshots" / "0a1b") == (
        "Qwen/Qwen3-TTS-12Hz-0.6B-Base"
    )
    assert model_name(tmp_path / "mine") == "mine"


def report_of(value):
    held = gate(Metric("KL divergence, codebook 0", value, "nats", (0.001, 0.0123)), at_most=0.1)
    asked = {"utterances": "seed 1", "computed on": "cpu", "versions": "quaver 0"}
    return Report("a against b", "4 utterances.", (Metric("duration ratio", float("nan")),), (held,), provenance=asked)


def test_a_verdict_joins_later_and_belongs_to_this_model_alone(folder, made, tmp_path):
    source = Checkpoint.open(made.parent / "source")
    before = Checkpoint.open(folder)
    sealed = before.provenance.seal
    recorded = validate.record(before, source, report_of(0.0123))
    assert recorded.provenance.seal == sealed
    assert Provenance.read(folder) == recorded.provenance
    assert verify(folder).verdict == "all 1 gates passed"
    validate.record(Checkpoint.open(folder), source, report_of(0.2))
    assert verify(folder).verdict == "1 of 1 gates failed"
    validation = Provenance.read(folder).validation
    assert validation["against"][0]["files"]["LICENSE"]["sha256"] == File.of(source.path / "LICENSE").sha256
    # It does not travel to what is made of this model, and fits no other.
    again = Checkpoint.open(folder).edit(Step("same"), double).save(tmp_path / "again")
    assert again.provenance.validation is None
    mine, other = (json.loads((one / "provenance.json").read_text()) for one in (folder, again.path))
    other["validation"], other["seals"]["validation"] = mine["validation"], mine["seals"]["validation"]
    (again.path / "provenance.json").write_text(json.dumps(other, indent=1, sort_keys=True) + "\n")
    with pytest.raises(Damaged, match="differs from its own seal"):
        Checkpoint.open(again.path)
    with pytest.raises(CheckpointError, match="a verdict is kept only"):
        before.edit(Step("same"), double).record({})


def front_of(text):
    front = text.split("---\n")[1]
    return {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in front.splitlines() if ": " in line}, front


def test_the_card_says_what_is_recorded_and_no_more(folder, made):
    text = card(Checkpoint.open(folder))
    keys, front = front_of(text)
    assert keys["license"] == '"apache-2.0"'
    assert 'base_model:\n- "source"\n' in front
    assert 'language:\n- "zh"\n- "en"\n- "es"\n' in front
    provenance = Provenance.read(folder)
    for wanted in (
        "| by ",
        "| n_tensors ",
        "1. double, quaver",
        "licence apache-2.0",
        provenance.seal,
        "quaver verify",
    ):
        assert wanted in text
    for name, file in provenance.files.items():
        assert re.search(rf"\| {re.escape(name)} +\| +[\d,]+ \| +{file.n_bytes:,} \|", text), name
    assert "No verdict is recorded" in text
    assert "nats" not in text and "gate" not in text
    validate.record(Checkpoint.open(folder), Checkpoint.open(made.parent / "source"), report_of(0.0123))
    text = card(Checkpoint.open(folder))
    assert "**all 1 gates passed**" in text
    assert "0.0123 nats" in text and "at most 0.1 nats" in text and "not a number" in text
    assert "Held against source. 4 utterances. Computed on: cpu; utterances: seed 1; versions: quaver 0.\n" in text


def test_licences_that_are_several_or_unknown(tmp_path, made):
    cards = {}
    for name, front in (("mit", "license: mit"), ("none", "language: en")):
        source = toy.checkpoint(tmp_path / name, "custom_voice")
        (source / "README.md").write_text(f"---\n{front}\n---\n")
        one = Checkpoint.open(source, codec=made).edit(Step("double"), double).save(tmp_path / f"{name}-made")
        cards[name] = card(one)
    assert 'license: other\nlicense_name: "mit and apache-2.0"\n' in cards["mit"]
    assert "license: unknown\n" in cards["none"]
    assert "The licence of none is not recorded" in cards["none"]
    assert "--voice anna" in cards["none"]


def test_a_card_lies_beside_the_model_or_elsewhere(folder, tmp_path):
    checkpoint = Checkpoint.open(folder)
    check_place(folder / "README.md", checkpoint)
    check_place(tmp_path / "card.md", checkpoint)
    for inside in (folder / "config.json", folder / "extra" / "README.md"):
        with pytest.raises(RecipeError, match="is inside the model"):
            check_place(inside, checkpoint)


def run(capsys, *arguments):
    code = cli.run([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_verbs(capsys, folder, made, toy_folder, tmp_path):
    code, text, told = run(capsys, "verify", folder, "--parent", made.parent / "source")
    assert code == 0
    assert "model is intact" in text and "parent source is as recorded" in text
    assert "checking model.safetensors" in told and "checking parent source" in told
    assert run(capsys, "card", folder, "-o", folder / "config.json")[0] == 2
    assert run(capsys, "card", folder, "-o", folder / "README.md")[0] == 0
    assert (folder / "README.md").read_text() == run(capsys, "card", folder)[1]
    told = json.loads(run(capsys, "verify", folder, "--json")[1])
    assert told["intact"] and told["seal"] == Provenance.read(folder).seal
    flip(folder / "model.safetensors", -1)
    code, text, error = run(capsys, "verify", folder, "--json")
    assert code == 1
    told = json.loads(text)
    assert not told["intact"] and told["file"].endswith("model.safetensors") and told["tensor"] in error
    code, _, error = run(capsys, "say", folder, "Hi", "--voice", "x.wav", "-o", tmp_path / "x.wav")
    assert code == 1 and told["tensor"] in error
    code, _, error = run(capsys, "verify", toy_folder)
    assert code == 2 and "provenance.json is missing" in error


def test_shards_and_empty_tensors(tmp_path):
    tensors = {"a": torch.ones(3), "none": torch.zeros(0, 4), "b": torch.arange(5, dtype=torch.int8)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = dict(sums(tmp_path / "x.safetensors"))
    assert set(found) == {HEADER, *tensors}
    assert len(set(found.values())) == 4
