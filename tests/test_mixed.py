"""A model stored by a recipe computes what is stored, loads whole, says what it is, and nothing else of it changes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from quaver import awq, cli, export, ledger, mixed
from quaver.card import card
from quaver.checkpoint import CODEC, WEIGHTS, Checkpoint
from quaver.corpus import Item
from quaver.engine import Engine
from quaver.errors import CheckpointError, RecipeError
from quaver.int4 import Int4Linear
from quaver.int8 import Int8Embedding, Int8Linear
from quaver.model.homes import TEXT_EMBEDDING
from quaver.model.layers import GROUPS
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.recipe import COMPACT, Recipe
from quaver.stream import Stream
from quaver.verify import verify
from quaver.voice import Voice

observe = Stream.observe
LINEARS = [linear for group in GROUPS for linear in group.linears]
FULL = Recipe(
    layers={1: "int8"}, predictor="int4", text_embedding="int8", languages=("english",), codec_decoder="bfloat16"
)


@pytest.fixture(scope="module")
def items():
    generator = torch.Generator().manual_seed(0)
    voice = Voice("v", torch.randn(128, generator=generator))
    return [
        Item(Utterance(text, "english", voice), torch.randint(0, toy.N_CODES, (20, 16), generator=generator))
        for text in ("one small boat", "the rain has stopped", "who is there")
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A toy whose tokenizer has one Cyrillic letter as a token, 300, so that there is a row to prune."""
    folder = toy.checkpoint(tmp_path_factory.mktemp("mixed") / "base")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    first, second = "Ð", "¸"
    vocabulary[first + second] = 300
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    with (folder / "merges.txt").open("a") as merges:
        merges.write(f"{first} {second}\n")
    return folder


@pytest.fixture(scope="module")
def made(source, items, tmp_path_factory):
    """That toy by every kind of storage at once, and the report."""
    out = tmp_path_factory.mktemp("mixed") / "full"
    return out, mixed.quantize(source, out, FULL, calibration=items)


@pytest.fixture(scope="module")
def compact(source, items, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "compact"
    return out, mixed.quantize(source, out, COMPACT, calibration=items)


def test_the_toy_spells_the_letter_as_one_token(source):
    assert TTS.load(source).tokenizer.encode("ж")[-1:] != [300]
    assert TTS.load(source).tokenizer.encode("и") == [300]


def test_each_module_is_what_the_recipe_says(made):
    modules = dict(TTS.load(made[0]).model.named_modules())
    kinds = {
        name: type(module)
        for name, module in modules.items()
        if isinstance(module, Int4Linear | Int8Linear | Int8Embedding)
    }
    predictor = "talker.code_predictor"
    assert kinds == {
        **{f"talker.model.layers.0.{linear}": Int4Linear for linear in LINEARS},
        **{f"talker.model.layers.1.{linear}": Int8Linear for linear in LINEARS},
        **{f"{predictor}.model.layers.{i}.{linear}": Int4Linear for i in range(2) for linear in LINEARS},
        **{f"{predictor}.lm_head.{i}": Int8Linear for i in range(15)},
        **{f"{predictor}.model.codec_embedding.{i}": Int8Embedding for i in range(15)},
        TEXT_EMBEDDING: Int8Embedding,
    }


def test_the_loaded_model_computes_what_is_stored(source, made, items):
    # The stored weights, made whole in the original model, against the model as loaded.
    small, plain = TTS.load(made[0], dtype=torch.float32), TTS.load(source, dtype=torch.float32)
    stored = dict(Checkpoint.open(made[0]).tensors())
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if name in stored:
                parameter.copy_(stored[name])
        for name, module in small.model.named_modules():
            if isinstance(module, Int4Linear):
                plain.model.get_parameter(f"{name}.weight").copy_(module.dequantize())
            elif isinstance(module, Int8Linear | Int8Embedding):
                weight = stored[f"{name}.weight_int8"].float() * stored[f"{name}.weight_scale"].float()[:, None]
                rows = stored.get(f"{name}.kept_ids", torch.arange(len(weight)))
                plain.model.get_parameter(f"{name}.weight")[rows.long()] = weight
    prompts = [small.prompt(item.utterance) for item in items]
    for prompt, item in zip(prompts, items, strict=True):
        assert torch.allclose(prompt.embeds, plain.prompt(item.utterance).embeds, atol=1e-6)
    codes = [item.codes for item in items]
    for ours, theirs in zip(small.force(prompts, codes), plain.force(prompts, codes), strict=True):
        for one, other in ((ours.talker, theirs.talker), (ours.residual, theirs.residual)):
            assert (one - other).abs().max() <= 2e-5 * other.abs().max()


def test_it_is_near_the_original(source, compact, items):
    first, second = (TTS.load(folder, dtype=torch.float32) for folder in (source, compact[0]))
    codes = [item.codes for item in items]
    before, after = (tts.force([tts.prompt(i.utterance) for i in items], codes) for tts in (first, second))
    for ours, theirs in zip(after, before, strict=True):
        # Measured: 0.0006 of the power.
        for one, other in ((ours.talker, theirs.talker), (ours.residual, theirs.residual)):
            assert (one - other).square().mean() <= 0.002 * other.square().mean()


def test_what_the_recipe_keeps_is_bit_equal(source, made):
    before, after = dict(Checkpoint.open(source).tensors()), dict(Checkpoint.open(made[0]).tensors())
    for name in before.keys() & after.keys():
        int4 = name.startswith(("talker.model.layers.0", "talker.code_predictor.model.layers"))
        if not (int4 and name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight"))):
            assert torch.equal(before[name], after[name]), name
    for name in before.keys() - after.keys():
        assert f"{name}_int8" in after or f"{name.removesuffix('weight')}qweight" in after


def test_the_codecs_decoder_is_bfloat16_and_its_encoder_as_it_was(source, made):
    before, after = (dict(Checkpoint.open(folder).codec_tensors()) for folder in (source, made[0]))
    assert before.keys() == after.keys()
    for name, value in before.items():
        wanted = value.bfloat16() if name.startswith("decoder.") else value
        assert after[name].dtype == wanted.dtype and torch.equal(after[name], wanted)
    assert after["decoder.pre_conv.conv.weight"].dtype == torch.bfloat16
    assert (made[0] / CODEC / "config.json").read_bytes() == (source / CODEC / "config.json").read_bytes()
    sound = TTS.load(made[0]).decoder(torch.zeros(1, 16, 3, dtype=torch.long))
    assert sound.dtype == torch.float32 and bool(sound.isfinite().all())


def test_a_codec_without_float32_is_told_and_copied_as_it_is(made, source, tmp_path):
    halved = Checkpoint.open(source).edit(Step("half"), lambda n, t: {n: t}, codec=lambda n, t: {n: t.half()})
    halved.save(tmp_path / "half")
    report = mixed.quantize(tmp_path / "half", tmp_path / "out", Recipe(talker="int8", codec_decoder="bfloat16"))
    assert any("no float32 to store in bfloat16 (torch.float16)" in note for note in report.notes)
    files = [tmp_path / name / CODEC / WEIGHTS for name in ("half", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_text_that_needs_a_pruned_row_is_refused_with_its_spelling(made, items):
    tts = TTS.load(made[0])
    voice = items[0].utterance.voice
    assert made[1].text_rows == len(tts.talker.model.text_embedding.kept_ids) < 320
    assert 300 not in tts.talker.model.text_embedding.kept_ids.tolist()
    with pytest.raises(RecipeError, match="lost its text embedding of 'и'.*take a model that was not pruned"):
        tts.prompt(Utterance("one и two", "english", voice))
    # Its bytes alone are kept: a letter without a token of its own can still be spelled.
    tts.prompt(Utterance("one ж two, naïve", "english", voice))


def test_it_speaks(made, items):
    tts = TTS.load(made[0])
    frames = Engine(tts).frames([tts.prompt(items[0].utterance)], [0])
    assert next(frames).codes.shape == (1, 16)


def test_the_files_are_intact_and_the_report_is_true(made):
    out, report = made
    verify(out)
    weighed = ledger.weigh(Checkpoint.open(out))
    assert report.tensor_bytes[1] == weighed.total.disk_bytes < report.tensor_bytes[0]
    assert {part.name for part in report.parts} == {
        "predictor layers", "predictor embeddings", "predictor heads", "talker layers", "text embedding",
        "codec decoder",
    }  # fmt: skip
    told = json.loads(json.dumps(report.to_json()))
    assert told["recipe"]["layers"] == {"1": "int8"}
    text = report.summary()
    assert "loads in quaver alone" in text and f"{report.text_rows} rows are left" in text
    (talker,) = [entry for entry in weighed.entries if entry.name == "talker layers"]
    n_weights = sum(p.numel() for n, p in TTS.load(toy_of(out)).talker.model.layers.named_parameters() if p.dim() == 2)
    assert talker.quantized == f"INT4 g128 ({n_weights // 2:,} weights), INT8 rows ({n_weights // 2:,} weights)"


def toy_of(out):
    """The plain toy of the same shapes."""
    folder = out.parent / "plain"
    return folder if folder.exists() else toy.checkpoint(folder)


def test_the_configuration_and_the_provenance_say_what_was_done(source, made):
    settings, before = (json.loads((folder / "config.json").read_text()) for folder in (made[0], source))
    awq_settings, own = settings.pop("quantization_config"), settings.pop("quaver")
    assert settings == before
    assert own["text_rows"] == made[1].text_rows
    assert awq_settings["bits"] == 4
    step = Checkpoint.open(made[0]).provenance.steps[-1]
    assert step.recipe == {"method": "recipe", **FULL.to_json()}
    assert step.result["text_rows"] == made[1].text_rows
    assert step.result["calibration_sha256"] == made[1].calibration_sha256
    assert 0 < step.result["predictor_loss"] <= step.result["predictor_loss_nearest"]


def test_the_card_says_so(made):
    text = card(Checkpoint.open(made[0]))
    assert "stored by a recipe" in text and "english cannot need were pruned" in text
    assert "It loads in quaver alone" in text
    assert '"int8"' in text


def test_the_same_bytes_twice(source, items, made, tmp_path):
    mixed.quantize(source, tmp_path / "again", FULL, calibration=items)
    for name in ("model.safetensors", "provenance.json", f"{CODEC}/{WEIGHTS}"):
        assert (tmp_path / "again" / name).read_bytes() == (made[0] / name).read_bytes()


def test_int8_alone_needs_no_calibration(source, tmp_path):
    told = []
    report = mixed.quantize(
        source, tmp_path / "out", Recipe(talker="int8", predictor="int8"), progress=lambda *event: told.append(event)
    )
    assert (report.n_utterances, report.calibration_sha256, told) == (0, None, [])
    assert Checkpoint.open(tmp_path / "out").config.quantization_config is None


def test_a_plain_recipe_gives_the_weights_of_the_default(toy_folder, items, tmp_path):
    mixed.quantize(toy_folder, tmp_path / "mixed", Recipe(), calibration=items)
    awq.quantize(toy_folder, tmp_path / "awq", calibration=items)
    ours, theirs = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("mixed", "awq"))
    assert ours == theirs


def test_what_cannot_be_exported_or_quantized_again_is_refused(made, compact, items, source, tmp_path):
    for folder, _ in (made, compact):
        with pytest.raises(CheckpointError, match="is stored by a recipe"):
            export.export(folder, tmp_path / "out", "compressed-tensors")
        for verb in (
            lambda f: awq.quantize(f, tmp_path / "out"),
            lambda f: mixed.quantize(f, tmp_path / "out", COMPACT),
        ):
            with pytest.raises(CheckpointError, match="is quantized already"):
                verb(folder)
    mixed.quantize(source, tmp_path / "some", Recipe(layers={0: "keep"}), calibration=items)
    with pytest.raises(CheckpointError, match="is stored by a recipe"):
        export.export(tmp_path / "some", tmp_path / "out", "qwen3")
    assert not (tmp_path / "out").exists()


def test_a_predictor_is_not_calibrated_on_silence(source, items, tmp_path):
    silent = [Item(items[0].utterance, items[0].codes[:0])]
    with pytest.raises(RecipeError, match="no frame of speech"):
        mixed.quantize(source, tmp_path / "out", Recipe(predictor="int4"), calibration=silent)
    assert not list(tmp_path.iterdir())


def test_no_more_frames_than_needed_are_kept_in_memory(source, items, monkeypatch):
    tts = TTS.load(source)
    every = mixed.predictor_inputs(tts, items, 512)
    assert len(every) == sum(len(item.codes) for item in items) and every[0].shape == (16, 128)
    monkeypatch.setattr(mixed, "_FRAMES", 25)
    some = mixed.predictor_inputs(tts, items, 512)
    assert len(some) <= 25 and torch.equal(some[1], every[3])
    assert len(mixed.predictor_inputs(tts, items, 4)) == 4 * len(items)


def interrupted(when, *work, **more):
    """Carries out ``work`` until progress tells ``when``."""

    def interrupt(what, done, total):
        if f"{what} {done}" == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixed.quantize(*work, **more, progress=interrupt)


@pytest.mark.parametrize(
    ("when", "kept"),
    [
        ("quantizing layers 1", {"layer-000"}),
        ("quantizing predictor layers 1", {"layer-000", "predictor-layer-000"}),
        ("quantizing predictor layers 2", {"layer-000", "predictor-layer-000", "predictor-layer-001"}),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(source, items, made, tmp_path, when, kept):
    interrupted(when, source, tmp_path / "out", FULL, calibration=items)
    (partial,) = tmp_path.iterdir()
    assert {path.name.partition(".")[0] for path in partial.iterdir()} == {"calibration", "key", "lock"} | kept
    report = mixed.quantize(source, tmp_path / "out", FULL, calibration=items)
    assert report.n_resumed == len(kept) and f"{len(kept)} of these layers finished earlier" in report.summary()
    assert contents(tmp_path / "out") == contents(made[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unfinished_work_of_another_recipe_is_refused(source, items, tmp_path):
    interrupted("quantizing layers 1", source, tmp_path / "out", FULL, calibration=items)
    for other in (
        lambda out: mixed.quantize(source, out, replace(FULL, layers={1: "keep"}), calibration=items),
        lambda out: awq.quantize(source, out, calibration=items),
    ):
        with pytest.raises(RecipeError, match="of another recipe: go on with that one"):
            other(tmp_path / "out")
    # What no layer depends on may differ.
    mixed.quantize(source, tmp_path / "out", replace(FULL, codec_decoder="keep"), calibration=items)


def test_int4_layers_are_searched_on_what_the_layers_before_give_as_stored(source, items, made, monkeypatch, tmp_path):
    # The stream is fed the stored model's own hidden states: layer 1 in INT4 after layer 0 in INT8.
    recipe, seen = Recipe(layers={0: "int8"}), []
    monkeypatch.setattr(Stream, "observe", lambda self, layer: seen.append(self.batches[0]) or observe(self, layer))
    mixed.quantize(source, tmp_path / "out", recipe, calibration=items)
    (batch,) = seen
    small = TTS.load(tmp_path / "out", dtype=torch.float32)
    rows = awq.talker_inputs(small, items, 512)
    decoder = small.talker.model
    for row, x, mask in zip(sorted(rows, key=len), batch.x, batch.mask, strict=True):
        positions = torch.arange(len(row))[None]
        wanted = decoder.layers[0](row[None], decoder.rotary(positions, torch.float32))[0]
        assert torch.allclose(x[mask], wanted, atol=1e-4)


def test_a_large_models_layers_visit_and_it_comes_to_the_same_bytes(source, items, made, monkeypatch, tmp_path):
    monkeypatch.setattr(awq, "_ROOM_BYTES", 0)
    mixed.quantize(source, tmp_path / "out", FULL, calibration=items)
    assert contents(tmp_path / "out") == contents(made[0])


def test_nan_weights_are_named_where_nothing_is_calibrated(source, tmp_path):
    bad = "talker.model.layers.1.mlp.up_proj.weight"
    spoil = Checkpoint.open(source).edit(Step("spoil"), lambda n, t: {n: t * torch.nan if n == bad else t})
    spoil.save(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=bad):
        mixed.quantize(tmp_path / "bad", tmp_path / "out", Recipe(talker="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def spoiled(folder, out, change):
    """A copy of the model in ``folder`` without provenance, its tensors changed by ``change``."""
    Checkpoint.open(folder).save(out)
    (out / "provenance.json").unlink()
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{TEXT_EMBEDDING}.kept_ids"].neg_(), "must hold ids below 320 in order"),
        (lambda t: t[f"{TEXT_EMBEDDING}.kept_ids"].copy_(t[f"{TEXT_EMBEDDING}.kept_ids"].flip(0)), "in order"),
        (lambda t: t[f"{TEXT_EMBEDDING}.kept_ids"][-1].fill_(320), "below 320"),
        (lambda t: t.pop(f"{TEXT_EMBEDDING}.kept_ids"), "kept_ids is missing"),
        (lambda t: t[f"{TEXT_EMBEDDING}.weight_scale"][3].fill_(torch.nan), "weight_scale has 1 values that are NaN"),
        (
            lambda t: t.update({f"{TEXT_EMBEDDING}.weight_int8": t[f"{TEXT_EMBEDDING}.weight_int8"].float()}),
            "weight_int8 has type torch.float32, it must have torch.int8",
        ),
    ],
)
def test_damaged_int8_is_named(made, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        TTS.load(spoiled(made[0], tmp_path / "bad", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["int8"].append("talker.model.layers.0"), r"layers\.0\.self_attn\.q_proj is in quaver\.int8"),
        (
            lambda own: own["int8"].append("talker.model.layers.7"),
            r"names talker\.model\.layers\.7, where this model has",
        ),
        (lambda own: own["int8"].remove(TEXT_EMBEDDING), "text_rows is .*: rows of a text embedding in INT8"),
        (lambda own: own.update(text_rows=0), "text_rows is 0"),
        (lambda own: own.update(text_rows=5), "has shape .*the configuration says"),
        (lambda own: own.pop("text_rows"), "kept_ids is left over|has shape"),
        (lambda own: own.update(version=2), "version is 2; quaver implements 1 only"),
        (lambda own: own.update(int4=[]), "unknown key 'int4'"),
    ],
)
def test_a_configuration_that_lies_is_named(made, tmp_path, change, message):
    Checkpoint.open(made[0]).save(tmp_path / "bad")
    (tmp_path / "bad" / "provenance.json").unlink()
    settings = json.loads((tmp_path / "bad" / "config.json").read_text())
    change(settings["quaver"])
    (tmp_path / "bad" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        TTS.load(tmp_path / "bad")


def test_the_verb(source, tmp_path, capsys):
    file = tmp_path / "recipe.toml"
    file.write_text("[talker]\nbits = 8\n[calibration]\nsamples = 3\n")
    assert cli.run(["quantize", str(source), "-o", str(tmp_path / "a"), "--recipe", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"]["talker"] == "int8"
    assert told["recipe"]["calibration"]["n_samples"] == 3
    # An option says more than the file.
    small = ["--samples", "1", "--positions", "16"]
    assert cli.run(["quantize", str(source), "-o", str(tmp_path / "b"), "--profile", "compact", *small]) == 0
    assert "loads in quaver alone" in capsys.readouterr().err
    step = Checkpoint.open(tmp_path / "b").provenance.steps[-1]
    assert step.recipe["calibration"]["n_samples"] == 1
    for more in (["--recipe", str(file)], ["--budget", "1MB"]):
        assert cli.run(["quantize", str(source), "-o", str(tmp_path / "c"), "--profile", "compact", *more]) == 2
        assert "--profile says all" in capsys.readouterr().err
    assert cli.run(["quantize", str(source), "-o", str(tmp_path / "c"), "--budget", "few"]) == 2
    assert "is no size" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
