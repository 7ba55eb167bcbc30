"""Exports hold the INT4 checkpoint's weights bit for bit, read back here by unpackers of their own."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from quaver import cli, export
from quaver.checkpoint import Checkpoint, Step
from quaver.errors import CheckpointError, RecipeError
from quaver.int4 import Int4Linear, Int4Weight
from quaver.model.homes import LAYERS
from quaver.model.layers import GROUPS
from quaver.model.tts import TTS
from quaver.provenance import walk
from quaver.verify import verify


@pytest.fixture(scope="module", params=["toy", "tiny"])
def int4(request, toy_folder, tmp_path_factory):
    """The toy, and the voice that ships, in INT4."""
    return toy.rounded(
        toy_folder if request.param == "toy" else "tiny", tmp_path_factory.mktemp("int4") / request.param
    )


@pytest.fixture(scope="module")
def qwen3(int4, tmp_path_factory):
    out = tmp_path_factory.mktemp("qwen3") / "out"
    return out, export.export(int4, out, "qwen3")


@pytest.fixture(scope="module")
def compressed(int4, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "out"
    return out, export.export(int4, out, "compressed-tensors")


def nibbles(words):
    """Eight values of each int32 [..., n], lowest nibble first, by shifts of unsigned numbers [..., 8 n]."""
    wide = words.numpy().view(np.uint32)
    return np.stack([(wide >> np.uint32(4 * i)) & 15 for i in range(8)], axis=-1).reshape(*words.shape[:-1], -1)


def awq_values(words):
    """Columns in their order, from AWQ's interleaved nibbles: word w, nibble i is column 8 w + [0,2,4,6,1,3,5,7][i]."""
    stored = nibbles(words)
    found = np.empty_like(stored)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        found[..., column::8] = stored[..., i::8]
    return found


def test_compressed_tensors_hold_the_same_integers_and_scales(int4, compressed):
    out, report = compressed
    before, after = load_file(int4.path / "model.safetensors"), load_file(out / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in before if name.endswith(".qweight")]
    assert len(modules) == report.n_linears == 7 * int4.config.talker_config.num_hidden_layers
    for module in modules:
        n_in, n_out = before[f"{module}.qweight"].shape[0], 8 * before[f"{module}.qweight"].shape[1]
        packed, zeros = after[f"{module}.weight_packed"], after[f"{module}.weight_zero_point"]
        assert after[f"{module}.weight_shape"].tolist() == [n_out, n_in]
        assert packed.dtype == zeros.dtype == torch.int32
        assert packed.shape == (n_out, n_in // 8)
        assert zeros.shape == (n_out // 8, n_in // 128)
        assert (nibbles(packed) == awq_values(before[f"{module}.qweight"]).T).all()
        assert (nibbles(zeros.T.contiguous()).T == awq_values(before[f"{module}.qzeros"]).T).all()
        assert torch.equal(after[f"{module}.weight_scale"], before[f"{module}.scales"].T)
        q, z = nibbles(packed).astype(np.float64), nibbles(zeros.T.contiguous()).T.astype(np.float64)
        weight = (q - z.repeat(128, 1)) * after[f"{module}.weight_scale"].double().numpy().repeat(128, 1)
        stored = Int4Weight.read(*(before[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales")))
        assert (weight == stored.dequantize().double().numpy()).all()
    kept = {name for name in before if not name.endswith((".qweight", ".qzeros", ".scales"))}
    assert kept | {
        f"{module}.weight_{kind}" for module in modules for kind in ("packed", "shape", "scale", "zero_point")
    } == (after.keys())
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_golden_words_of_compressed_tensors():
    # Inputs 0..7 of one output, and zero points 0..7 of eight outputs, lie in a word from the lowest nibble up.
    weight = Int4Weight(
        torch.arange(8, dtype=torch.uint8).repeat(8, 16), torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(8, 1)
    )
    made = {k: v for kind, t in weight.tensors().items() for k, v in export.compressed(f"m.{kind}", t).items()}
    assert set(made["m.weight_packed"].flatten().tolist()) == {0x76543210}
    assert made["m.weight_zero_point"].tolist() == [[0x76543210]]
    assert struct.pack("<i", made["m.weight_zero_point"].item()).hex() == "10325476"


def test_the_compressed_model_travels_whole(int4, compressed):
    out, _ = compressed
    settings = json.loads((out / "config.json").read_text())
    config = settings.pop("quantization_config")
    assert settings == {k: v for k, v in int4.settings.items() if k != "quantization_config"}
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128,
    }  # fmt: skip
    for name in ("vocab.json", "merges.txt", "generation_config.json", "speech_tokenizer/model.safetensors"):
        assert (out / name).read_bytes() == (int4.path / name).read_bytes()
    made = json.loads((out / "provenance.json").read_text())["made"]
    assert [step["tool"] for step in made["steps"][-2:]] == ["round", "export"]
    assert made["steps"][-1]["parents"][0]["files"].keys() == walk(int4.path).keys()
    verify(out)
    # What quaver cannot run it refuses, by the name of the method.
    with pytest.raises(CheckpointError, match="quant_method is 'compressed-tensors'; quaver implements 'awq' only"):
        Checkpoint.open(out)


@pytest.mark.parametrize("form", ["awq", "compressed-tensors"])
def test_the_patterns_keep_every_linear_but_the_talkers(int4, form):
    linears = {name for name, module in TTS.load(int4).model.named_modules() if isinstance(module, torch.nn.Linear)}
    talkers = {name for name, module in TTS.load(int4).model.named_modules() if isinstance(module, Int4Linear)}
    if form == "awq":
        # Transformers' rule: a pattern that matches from the start up to a module's boundary.
        patterns = [f"{prefix}(?:[.]|$)" for prefix in int4.config.quantization_config.modules_to_not_convert]
    else:
        ignored = export.compressed_settings()["ignore"]
        patterns = [p.removeprefix("re:") if p.startswith("re:") else f"{p}$" for p in ignored]
    kept = {name for name in linears | talkers if any(re.match(pattern, name) for pattern in patterns)}
    assert kept == linears
    assert talkers == {
        f"{LAYERS}.{index}.{linear}"
        for index in range(int4.config.talker_config.num_hidden_layers)
        for group in GROUPS
        for linear in group.linears
    }


def test_the_text_model_is_the_talkers_decoder(int4, qwen3):
    out, report = qwen3
    before, after = load_file(int4.path / "model.safetensors"), load_file(out / "model.safetensors")
    layers = {name.removeprefix("talker.") for name in before if name.startswith("talker.model.layers.")}
    assert after.keys() == layers | {"model.norm.weight", "model.embed_tokens.weight"}
    for name in after.keys() - {"model.embed_tokens.weight"}:
        assert torch.equal(after[name], before[f"talker.{name}"]), name
    assert report.n_linears == sum(name.endswith(".qweight") for name in after)
    assert report.tensor_bytes == sum(tensor.nbytes for tensor in after.values())
    assert not (out / "speech_tokenizer").exists()
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    made = json.loads((out / "provenance.json").read_text())["made"]
    assert [step["tool"] for step in made["steps"][-2:]] == ["round", "export"]
    assert made["files"].keys() >= {"model.safetensors", "config.json", "vocab.json"}
    verify(out)


def test_each_row_of_the_embedding_is_the_projected_text_embedding(int4, qwen3):
    made = load_file(qwen3[0] / "model.safetensors")["model.embed_tokens.weight"]
    stored = {name: tensor.double() for name, tensor in load_file(int4.path / "model.safetensors").items()}
    fc = "talker.text_projection.linear_fc"
    rows = stored["talker.model.text_embedding.weight"]
    hidden = rows @ stored[f"{fc}1.weight"].T + stored[f"{fc}1.bias"]
    wanted = (hidden * hidden.sigmoid()) @ stored[f"{fc}2.weight"].T + stored[f"{fc}2.bias"]
    assert made.dtype == torch.bfloat16
    assert made.shape == (int4.config.talker_config.text_vocab_size, int4.config.talker_config.hidden_size)
    # One rounding to 8 bits, and float32's own errors where a sum nearly cancels.
    assert bool(((made.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5 * wanted.abs().max()).all())


def test_the_card_and_the_configuration_say_what_the_head_is(int4, qwen3):
    out, report = qwen3
    settings, talker = json.loads((out / "config.json").read_text()), int4.config.talker_config
    assert settings["architectures"] == ["Qwen3ForCausalLM"]
    assert settings["tie_word_embeddings"] is True
    assert settings["vocab_size"] == talker.text_vocab_size
    assert settings["rope_scaling"] is None
    assert settings["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert settings["quantization_config"]["quant_method"] == "awq"
    card = (out / "README.md").read_text()
    for words in ("never trained", "text_projection(text_embedding)", "float32", "rotary"):
        assert words in card
    assert report.warning is not None
    assert "never trained to predict text" in report.warning


def test_what_is_refused_leaves_nothing_behind(toy_folder, tmp_path):
    for form in ("qwen3", "compressed-tensors"):
        with pytest.raises(CheckpointError, match="is not quantized.*quaver quantize"):
            export.export(toy_folder, tmp_path / "out", form)
    small = toy.rounded(toy_folder, tmp_path / "int4")
    with pytest.raises(RecipeError, match="exists already"):
        export.export(small, tmp_path / "int4", "qwen3")
    with pytest.raises(RecipeError, match="edits are not saved"):
        export.export(small.edit(Step("x"), lambda name, tensor: {name: tensor}), tmp_path / "out", "qwen3")
    tensors = load_file(small.path / "model.safetensors")
    # Of a model without sums the tensors themselves must tell.
    (small.path / "provenance.json").unlink()
    for change, message in (
        ("drop", "text_projection.linear_fc1.bias is missing"),
        ("add", "extra.weight is left over"),
        ("shape", "text_projection.linear_fc1.bias has shape"),
    ):
        name = "talker.text_projection.linear_fc1.bias"
        changed = {k: v for k, v in tensors.items() if not (change == "drop" and k == name)}
        changed |= {"add": {"extra.weight": torch.zeros(8)}, "shape": {name: torch.zeros(8)}}.get(change, {})
        save_file(changed, small.path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            export.export(small.path, tmp_path / "out", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]


def test_the_verb(capsys, toy_folder, tmp_path):
    small = toy.rounded(toy_folder, tmp_path / "int4").path
    assert cli.run(["export", str(toy_folder), "-o", str(tmp_path / "x"), "--as", "qwen3"]) == 2
    assert "is not quantized" in capsys.readouterr().err
    assert cli.run(["export", str(small), "-o", str(tmp_path / "q"), "--as", "qwen3", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["format"] == "qwen3"
    assert "warning: the head is the text embedding" in printed.err
    assert cli.run(["export", str(small), "-o", str(tmp_path / "c"), "--as", "compressed-tensors"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "14 linears in INT4" in printed.err
    assert "warning" not in printed.err
    assert cli.run(["export", str(small), "-o", str(tmp_path / "c"), "--as", "gguf"]) == 2
