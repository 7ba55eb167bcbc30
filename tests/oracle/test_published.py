"""A model built from each published configuration has exactly the published tensors, by name and shape."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import official
import pytest
import torch

from quaver.config import ModelConfig, parse
from quaver.model.tts import shapes

PUBLISHED = Path(__file__).parent / "published"
N_TENSORS = {"0.6b-base": 478, "1.7b-base": 480, "0.6b-customvoice": 478 - 76}


def settings(name):
    return json.loads((PUBLISHED / f"config-{name}.json").read_text())


@pytest.mark.parametrize("name", N_TENSORS)
def test_names_and_shapes_equal_those_of_the_official_model(name):
    ours = shapes(parse(ModelConfig, settings(name), name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            theirs = official.module().Qwen3TTSForConditionalGeneration(official.config(settings(name)))
    assert ours == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert len(ours) == N_TENSORS[name]


def test_names_and_shapes_equal_those_of_the_published_file():
    listed = json.loads((PUBLISHED / "tensors-0.6b-base.json").read_text())
    ours = shapes(parse(ModelConfig, settings("0.6b-base"), "0.6b"))
    assert ours == {name: tuple(shape) for name, (_, shape) in listed.items()}


def test_the_largest_model_has_the_published_number_of_parameters():
    ours = shapes(parse(ModelConfig, settings("1.7b-base"), "1.7b"))
    assert sum(int(torch.Size(shape).numel()) for shape in ours.values()) == 1_928_677_440
