"""Recipes: what a file says, and every way it can be wrong; what config.json then says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import toy
from quaver import awq, recipe
from quaver.checkpoint import Checkpoint
from quaver.config import ModelConfig, parse
from quaver.errors import CheckpointError, RecipeError
from quaver.recipe import COMPACT, Recipe

DOCS = Path(__file__).parents[1] / "docs" / "RECIPES.md"
CONFIG = parse(ModelConfig, toy.settings(), "toy")


def written(folder, text):
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


def test_the_example_of_the_documentation_says_every_key(tmp_path):
    (example,) = re.findall(r"^```toml\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert recipe.read(written(tmp_path, example)) == Recipe(
        talker="int4",
        layers={0: "keep", 1: "keep", 5: "int8"},
        predictor="int8",
        text_embedding="int8",
        languages=("english",),
        codec_decoder="bfloat16",
        calibration=awq.Recipe(n_samples=64, n_positions=512, seed=1729),
    )


def test_an_empty_recipe_is_the_default(tmp_path):
    assert recipe.read(written(tmp_path, "")) == Recipe()
    assert recipe.settings(Recipe(), CONFIG) == {"quantization_config": awq.settings()}
    assert recipe.readers(CONFIG.with_keys(recipe.settings(Recipe(), CONFIG))) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[speaker]\nbits = 4", "unknown key speaker: known are talker, predictor"),
        ("[talker]\nbitz = 4", "unknown key talker.bitz: known are talker.bits, talker.layers"),
        ("[talker]\nbits = 3", "talker.bits is 3: it can be 'keep' or 8 or 4"),
        ("[talker]\nbits = true", "talker.bits is True"),
        ("[talker]\nbits = [4]", r"talker.bits is \[4\]"),
        ("talker = 4", "talker is 4: it must be a table"),
        ("[talker]\nlayers = 4", "talker.layers is 4: it must be a table"),
        ("[talker.layers]\n'3' = 5", "talker.layers.3 is 5"),
        ("[talker.layers]\n'first' = 8", "talker.layers.first: name layers as 3 or 3-5"),
        ("[talker.layers]\n'5-3' = 8", "talker.layers.5-3: name layers as 3 or 3-5"),
        ("[talker.layers]\n'1-3' = 8\n'2' = 4", "talker.layers.2: layer 2 is named twice"),
        ("[predictor]\nbits = 2", "predictor.bits is 2"),
        ("[text_embedding]\nbits = 4", "text_embedding.bits is 4: it can be 'keep' or 8"),
        ("[text_embedding]\nlanguages = ['english']", "rows are pruned in INT8 alone: set text_embedding.bits to 8"),
        ("[text_embedding]\nbits = 8\nlanguages = 'english'", "languages is 'english': it must be a list of names"),
        ("[text_embedding]\nbits = 8\nlanguages = ['klingon']", "'klingon' is none of english"),
        ("[codec]\ndecoder = 'int8'", "codec.decoder is 'int8': it can be 'keep' or 'bfloat16'"),
        ("[calibration]\nsamples = 'all'", "calibration.samples is 'all': it must be a whole number"),
        ("[calibration]\nsamples = 0", "both must be 1 or more"),
        ("[talker", "is no recipe"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    file = written(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.read(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="is no recipe"):
        recipe.read(tmp_path / "nowhere.toml")
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is no recipe"):
        recipe.read(tmp_path / "odd.toml")


def test_a_recipe_that_does_not_fit_the_model_is_refused(toy_folder, tmp_path):
    checkpoint = Checkpoint.open(toy_folder)
    with pytest.raises(RecipeError, match="talker.layers: 2 is none of this model's 2 layers"):
        Recipe(layers={2: "int8"}).check(checkpoint)
    with pytest.raises(RecipeError, match="this model does not speak russian, but chinese, english, spanish"):
        Recipe(text_embedding="int8", languages=("russian",)).check(checkpoint)
    with pytest.raises(RecipeError, match="there is nothing to quantize"):
        Recipe(talker="keep").check(checkpoint)
    with pytest.raises(RecipeError, match="there is nothing to quantize"):
        Recipe(layers={0: "keep", 1: "keep"}).check(checkpoint)
    Recipe(talker="keep", codec_decoder="bfloat16").check(checkpoint)
    with pytest.raises(CheckpointError, match="is quantized already"):
        COMPACT.check(toy.rounded(toy_folder, tmp_path / "int4"))


def test_the_configuration_names_linears_whole_and_says_what_int8_is():
    stored = Recipe(layers={0: "keep", 1: "int8"}, predictor="int4", text_embedding="int8")
    settings = recipe.settings(stored, CONFIG, text_rows=300)
    assert settings["quaver"] == {
        "version": 1,
        "int8": [
            "talker.model.layers.1",
            "talker.code_predictor.lm_head",
            "talker.code_predictor.model.codec_embedding",
            "talker.model.text_embedding",
        ],
        "text_rows": 300,
    }
    kept = settings["quantization_config"]["modules_to_not_convert"]
    assert "talker.code_predictor" not in kept and "talker.code_predictor.lm_head" in kept
    assert {"talker.model.layers.0.self_attn.q_proj", "talker.model.layers.1.mlp.down_proj"} <= set(kept)
    # No name may be the start of another linear's: readers match starts.
    assert not any(name.endswith(("layers.0", "layers.1")) for name in kept)


def test_nothing_in_int4_leaves_no_awq_configuration():
    settings = recipe.settings(Recipe(talker="int8"), CONFIG)
    assert settings == {"quaver": {"version": 1, "int8": ["talker.model.layers.0", "talker.model.layers.1"]}}


def test_who_reads_the_result_is_told():
    for stored, words in (
        (COMPACT, "loads in quaver alone"),
        (Recipe(talker="int8"), "loads in quaver alone"),
        (Recipe(layers={0: "keep"}), "was not tried"),
    ):
        assert words in recipe.readers(CONFIG.with_keys(recipe.settings(stored, CONFIG)))


def test_the_words_of_a_card():
    stored = Recipe(layers={1: "int8"}, predictor="int4", text_embedding="int8", languages=("english",))
    text = recipe.told(stored.to_json())
    for words in (
        "talker layers AWQ INT4 (layer 1 INT8)",
        "code predictor AWQ INT4, its heads, embeddings and projection INT8",
        "text embedding INT8",
        "codec decoder as it was",
        "english cannot need were pruned",
    ):
        assert words in text
