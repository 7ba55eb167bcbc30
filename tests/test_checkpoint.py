"""Law 1 and the faults of a model directory: whatever is wrong is named, and nothing half-written stays."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import toy
from quaver import checkpoint as module
from quaver import ledger
from quaver.checkpoint import CODEC, Checkpoint, write_tensors
from quaver.config import CodecConfig, ModelConfig, parse
from quaver.errors import BudgetError, CheckpointError, RecipeError
from quaver.model.tts import TTS
from quaver.provenance import Step

SAME = Step("identity")


def same(name, tensor):
    return {name: tensor}


@pytest.fixture
def folder(toy_folder, tmp_path):
    """A copy of the toy that a test may break."""
    return shutil.copytree(toy_folder, tmp_path / "model")


def tensors_of(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}


def rewrite(folder, change):
    """Saves the folder's weights again after ``change`` has worked on the dictionary of tensors."""
    found = tensors_of(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


def test_identity_edit_is_bit_equal_and_side_files_survive(folder, tmp_path):
    (folder / "LICENSE").write_text("a licence")
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("deep")
    source = Checkpoint.open(folder)
    saved = source.edit(SAME, same).save(tmp_path / "out")
    before, after = dict(source.tensors()), dict(saved.tensors())
    assert list(before) == list(after)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "model.safetensors":
            assert (tmp_path / "out" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert [step.tool for step in saved.provenance.steps] == ["identity"]
    files = {p.relative_to(saved.path).as_posix() for p in saved.path.rglob("*") if p.is_file()}
    assert set(saved.provenance.files) == files - {"provenance.json"}


def test_two_saves_are_byte_equal(folder, tmp_path):
    edited = Checkpoint.open(folder).edit(SAME, same)
    edited.save(tmp_path / "a")
    edited.save(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_edits_chain_rename_drop_and_add(folder, tmp_path):
    def rename(name, tensor):
        return {} if name.endswith("k_norm.weight") else {f"new.{name}": tensor, f"twice.{name}": tensor * 2}

    def halve(name, tensor):
        return {name: tensor / 2} if name.startswith("twice") else {name: tensor}

    found = dict(Checkpoint.open(folder).edit(SAME, rename).edit(SAME, halve).tensors())
    original = dict(Checkpoint.open(folder).tensors())
    assert len(found) == 2 * (len(original) - sum(name.endswith("k_norm.weight") for name in original))
    name = "talker.codec_head.weight"
    assert torch.equal(found[f"twice.{name}"], original[name])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(module.DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)), max_size=8
    )
)
def test_written_tensors_are_read_back(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    made = {f"t{i}": torch.ones(shape).to(dtype) * (i + 1) for i, (dtype, shape) in enumerate(wanted)}
    write_tensors(path, iter(made.items()), len(made))
    read = tensors_of(path)
    assert read.keys() == made.keys()
    assert all(torch.equal(read[name], made[name]) and read[name].dtype == made[name].dtype for name in made)


def test_golden_header(tmp_path):
    write_tensors(tmp_path / "x.safetensors", iter({"a": torch.tensor([1, -2], dtype=torch.int32)}.items()), 1)
    data = (tmp_path / "x.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'
    assert data[8 : 8 + n].rstrip(b" ") == header
    assert n % 8 == 0
    assert data[8 + n :] == bytes([1, 0, 0, 0, 254, 255, 255, 255])


def test_shards_with_an_index(folder):
    found = tensors_of(folder / "model.safetensors")
    names = sorted(found)
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: found[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert TTS.load(folder).checkpoint.specs.keys() == found.keys()
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost is in the index but in no file"):
        Checkpoint.open(folder)


def break_missing(found):
    del found["talker.model.layers.1.mlp.up_proj.weight"]


def break_left_over(found):
    found["talker.surprise.weight"] = torch.zeros(2)


def break_shape(found):
    found["talker.codec_head.weight"] = found["talker.codec_head.weight"][:-1].contiguous()


def break_nan(found):
    found["talker.text_projection.linear_fc1.bias"][3] = torch.nan


def break_infinite(found):
    found["talker.model.codec_embedding.weight"][0, 0] = torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_missing, r"tensor talker\.model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (break_left_over, r"tensor talker\.surprise\.weight is left over"),
        (
            break_shape,
            r"tensor talker\.codec_head\.weight has shape \(1087, 128\), the configuration says \(1088, 128\)",
        ),
        (break_nan, r"tensor talker\.text_projection\.linear_fc1\.bias has 1 values that are NaN"),
        (break_infinite, r"tensor talker\.model\.codec_embedding\.weight has 1 values that are NaN or infinite"),
    ],
)
def test_a_bad_tensor_is_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        TTS.load(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1000, -1])
@pytest.mark.parametrize("file", ["model.safetensors", "speech_tokenizer/model.safetensors"])
def test_truncated_files(folder, file, keep):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        TTS.load(folder)


def test_hostile_headers(folder):
    for data in (b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}", b"\x80\x02}q\x00." * 20):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            Checkpoint.open(folder)


def test_pickles_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle"):
        Checkpoint.open(folder)


def test_a_missing_codec_says_so(folder, toy_folder, tmp_path):
    shutil.move(folder / "speech_tokenizer", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no speech_tokenizer/ folder.*--codec PATH_OR_ID"):
        Checkpoint.open(folder)
    for codec in (tmp_path / "elsewhere", toy_folder):
        opened = Checkpoint.open(folder, codec=codec)
        saved = opened.save(tmp_path / f"with-{codec.name}")
        assert (saved.path / "speech_tokenizer" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["no/such/model", "nobody-here", "./gone", "../gone"])
def test_an_unknown_source(name, tmp_path, monkeypatch):
    # Whatever lies beside the folder that the tests run in.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is no folder, no hub id"):
        Checkpoint.open(name)


def test_a_hub_id_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded from the hub"):
        Checkpoint.open("nobody/nothing")


def edited_settings(path, keys, value):
    found = json.loads(path.read_text())
    inner = found
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["talker_config", "hiden_size"], 3, "talker_config: unknown key 'hiden_size'"),
        (["brand_new"], 1, "unknown key 'brand_new'"),
        (["talker_config", "hidden_size"], ..., "talker_config: key 'hidden_size' is missing"),
        (["talker_config", "hidden_size"], "128", "hidden_size: '128' is not an int"),
        (["talker_config", "hidden_size"], True, "hidden_size: True is not an int"),
        (["talker_config", "hidden_act"], "gelu", "hidden_act is 'gelu'; quaver implements 'silu' only"),
        (["talker_config", "attention_bias"], True, "attention_bias is True"),
        (["talker_config", "code_predictor_config", "sliding_window"], 9, "code_predictor_config: sliding_window is 9"),
        (["talker_config", "rope_scaling", "rope_type"], "yarn", "rope_type is 'yarn'"),
        (["tts_model_type"], "singer", "tts_model_type is 'singer'"),
        (["tokenizer_type"], "qwen3_tts_tokenizer_25hz", "tokenizer_type is 'qwen3_tts_tokenizer_25hz'"),
        (["speaker_encoder_config"], None, "a base model needs speaker_encoder_config"),
    ],
)
def test_config_faults(folder, keys, value, message):
    edited_settings(folder / "config.json", keys, value)
    with pytest.raises(CheckpointError, match=message):
        TTS.load(folder)


def test_codec_config_faults(folder):
    edited_settings(folder / "speech_tokenizer" / "config.json", ["decoder_config", "windows"], 7)
    with pytest.raises(CheckpointError, match="decoder_config: unknown key 'windows'"):
        Checkpoint.open(folder)


def test_a_broken_config_file(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["config-0.6b-base", "config-0.6b-customvoice", "config-1.7b-base"])
def test_published_configurations_are_understood(name):
    path = Path(__file__).parent / "oracle" / "published" / f"{name}.json"
    config = parse(ModelConfig, json.loads(path.read_text()), name)
    assert config.languages[0] == "auto"
    assert len(config.languages) == 11
    codec = path.with_name("speech_tokenizer-config.json")
    assert parse(CodecConfig, json.loads(codec.read_text()), "codec").decoder_config.num_quantizers == 16


def test_output_places(folder, tmp_path):
    with pytest.raises(RecipeError, match="exists already"):
        Checkpoint.open(folder).save(tmp_path)
    with pytest.raises(RecipeError, match="the folder .*nowhere does not exist"):
        Checkpoint.open(folder).save(tmp_path / "nowhere" / "out")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failure_half_way_leaves_nothing(folder, tmp_path, error):
    left = tmp_path / "target"
    left.mkdir()

    def fail(name, tensor):
        if "layers.1" in name:
            raise error
        return {name: tensor}

    expected = BudgetError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        Checkpoint.open(folder).edit(SAME, fail).save(left / "out")
    assert list(left.iterdir()) == []


def test_a_full_disk_is_told(folder, tmp_path):
    """A real file-size limit stands in for the disk: the write itself fails, half-way through the weights."""
    script = f"""
        import resource, signal, sys
        from quaver.checkpoint import Checkpoint
        from quaver.provenance import Step
        from quaver.errors import QuaverError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            Checkpoint.open({str(folder)!r}).edit(Step("same"), lambda n, t: {{n: t}}).save({str(tmp_path / "out")!r})
        except QuaverError as error:
            print(error)
            sys.exit(2)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "out" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_loading_the_largest_model_stays_small(tmp_path):
    """The 1.7B opens in its size plus 1 GB of resident memory at most, and in 2.4 GB where its layers visit.

    Sparse files of zeros stand in for weights.
    """
    from quaver.model.codec_encoder import Codec
    from quaver.model.tts import shapes
    from random_model import write_tokenizer

    published = Path(__file__).parent / "oracle" / "published"
    settings = json.loads((published / "config-1.7b-base.json").read_text())
    codec_settings = json.loads((published / "speech_tokenizer-config.json").read_text())
    folder = tmp_path / "big"
    (folder / "speech_tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "speech_tokenizer" / "config.json").write_text(json.dumps(codec_settings))
    config = parse(ModelConfig, settings, "1.7b")
    write_tokenizer(folder, config)
    with torch.device("meta"):
        codec = {
            name: tuple(v.shape) for name, v in Codec(parse(CodecConfig, codec_settings, "c")).state_dict().items()
        }
    size = sparse(folder / "model.safetensors", shapes(config), "BF16", 2)
    assert size == 3_857_354_880
    codec_size = sparse(folder / "speech_tokenizer" / "model.safetensors", codec, "F32", 4)
    weighed = ledger.weigh(Checkpoint.open(folder))
    assert weighed.total.n_parameters == 1_928_677_440 + 170_557_441
    assert weighed.total.disk_bytes == size + codec_size
    assert "2,099,234,881      4,539.6" in "\n".join(ledger.table(weighed))
    script = f"""
        import resource, torch
        torch.set_num_threads(2)
        from quaver.model.tts import TTS
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tts = TTS.load({str(folder)!r}, room_bytes=ROOM)
        with torch.inference_mode():
            tts.talker.hidden(torch.zeros(1, 1, 2048, dtype=tts.dtype))
        print(tts.dtype, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    for room, most in (("None", size + 1_000_000_000), ("250_000_000", 2_400_000_000)):
        asked = textwrap.dedent(script).replace("ROOM", room)
        done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        dtype, kilobytes = done.stdout.split()
        assert dtype == "torch.bfloat16"
        assert int(kilobytes) * 1024 <= most


def sparse(path, wanted, dtype, item_bytes):
    """A safetensors file of zeros that takes no disk."""
    header, position = {}, 0
    for name, shape in wanted.items():
        end = position + item_bytes * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return position


def test_umask_is_kept_readable(folder, tmp_path):
    saved = Checkpoint.open(folder).save(tmp_path / "out")
    assert saved.path.stat().st_mode & 0o777 == 0o755


def test_toy_kinds_load(tmp_path):
    for kind in ("custom_voice", "voice_design"):
        tts = TTS.load(toy.checkpoint(tmp_path / kind, kind))
        assert tts.model.speaker_encoder is None


def test_an_edit_of_the_codec_changes_its_weights_alone_and_is_sealed(toy_folder, tmp_path):
    def halve(name, tensor):
        return {name: tensor.half() if name.startswith("encoder.") else tensor}

    edited = Checkpoint.open(toy_folder).edit(Step("halve"), lambda name, tensor: {name: tensor}, codec=halve)
    before = dict(Checkpoint.open(toy_folder).codec_tensors())
    # Edits show before anything is saved, and one after the other.
    assert dict(edited.codec_tensors())["encoder.downsample.conv.weight"].dtype == torch.float16
    twice = edited.edit(
        Step("again"), lambda name, tensor: {name: tensor}, codec=lambda name, tensor: {name: tensor + 1}
    )
    bias = "decoder.pre_conv.conv.bias"
    assert torch.equal(dict(twice.codec_tensors())[bias], before[bias] + 1)
    made = edited.save(tmp_path / "out")
    after = dict(made.codec_tensors())
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.half() if name.startswith("encoder.") else value)
    assert (tmp_path / "out" / CODEC / "config.json").read_bytes() == (toy_folder / CODEC / "config.json").read_bytes()
    recorded = made.provenance.files[f"{CODEC}/model.safetensors"].sha256
    assert recorded == hashlib.sha256((tmp_path / "out" / CODEC / "model.safetensors").read_bytes()).hexdigest()


def test_an_edit_of_a_codec_in_shards_leaves_one_file(toy_folder, tmp_path):
    lender = tmp_path / "lender"
    shutil.copytree(toy_folder / CODEC, lender)
    tensors = load_file(lender / "model.safetensors")
    (lender / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, lender / file)
    index = {name: file for file, part in parts.items() for name in part}
    (lender / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    opened = Checkpoint.open(toy_folder, codec=lender)
    opened.edit(Step("same"), lambda n, t: {n: t}, codec=lambda n, t: {n: t}).save(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out" / CODEC).glob("*.safetensors*")] == ["model.safetensors"]
    found = load_file(tmp_path / "out" / CODEC / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in names)
