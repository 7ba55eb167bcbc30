"""Layers that visit compute what layers that stay compute, leave no thread behind them, and name their faults."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch

import toy
from quaver import checkpoint as checkpoints
from quaver import corpus
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine
from quaver.errors import CheckpointError
from quaver.model import visiting
from quaver.model.homes import LAYERS, TEXT_EMBEDDING
from quaver.model.tts import TTS, Utterance
from quaver.model.visiting import Visiting
from quaver.provenance import Step
from quaver.voice import Voice

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VOICE = Voice("v", torch.randn(128, generator=torch.Generator().manual_seed(0)))
ASKED = [Utterance(text, "english", VOICE, seed=seed) for seed, text in enumerate(("One boat.", "Two small boats."))]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A toy of five layers, which is no multiple of the layers in memory."""
    return toy.checkpoint(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_visiting_layers_speak_the_same_codes(deep, dtype, device):
    stays, visits, small = (TTS.load(deep, device=device, dtype=dtype, room_bytes=n) for n in (1 << 40, 0, 1 << 30))
    assert isinstance(visits.talker.model.layers, Visiting)
    assert not isinstance(small.talker.model.layers, Visiting)
    # What a calibration speaks is PyTorch's, so that it does not depend on what else is installed.
    assert stays.talker.model.stepper is None and stays.talker.code_predictor.model.stepper is None
    said, again = (corpus.speak(tts, ASKED) for tts in (stays, visits))
    # On a GPU what stays may speak by kernels of its own, and in 16 bits codes part there at near ties; tests/gpu has
    # both in plain PyTorch.
    if device == "cpu" or stays.dtype == torch.float32:
        for one, two in zip(said, again, strict=True):
            assert torch.equal(one.codes, two.codes)
    prompts = [stays.prompt(one) for one in ASKED]
    for codes in ([item.codes for item in of] for of in (said, again)):
        for one, two in zip(stays.force(prompts, codes), visits.force(prompts, codes), strict=True):
            assert torch.equal(one.hidden, two.hidden)


def test_shards_and_layers_of_differing_types_visit_too(deep, tmp_path):
    changed = Checkpoint.open(deep).edit(
        Step("widen"), lambda name, tensor: {name: tensor.float() if ".layers.1." in name else tensor}
    )
    changed.save(tmp_path / "wide")
    stays, visits = (TTS.load(tmp_path / "wide", dtype=torch.bfloat16, room_bytes=room) for room in (None, 0))
    prompt = stays.prompt(ASKED[0])
    codes = torch.zeros(3, 16, dtype=torch.long)
    assert torch.equal(stays.force([prompt], [codes])[0].hidden, visits.force([prompt], [codes])[0].hidden)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_visit_whatever_mode_the_model_was_loaded_in(deep, dtype, device):
    with torch.inference_mode():
        inside = TTS.load(deep, device=device, dtype=dtype, room_bytes=0)
    outside = TTS.load(deep, device=device, dtype=dtype, room_bytes=0)
    for one, two in zip(inside.talker.model.layers, outside.talker.model.layers, strict=True):
        for name, parameter in one.named_parameters():
            assert not parameter.is_inference()
            assert torch.equal(parameter, two.get_parameter(name))


@pytest.mark.parametrize("n_readers", [1, 3, 7])
def test_a_layer_is_read_whole_however_many_readers_share_it(deep, n_readers, monkeypatch):
    monkeypatch.setattr(visiting, "_N_READERS", n_readers)
    monkeypatch.setattr(visiting, "_SHARE_BYTES", 1)
    stays, visits = (TTS.load(deep, dtype=torch.bfloat16, room_bytes=room) for room in (None, 0))
    assert all(len(layer.shares) == n_readers for layer in visits.talker.model.layers._layers)
    for own, visitor in zip(stays.talker.model.layers, visits.talker.model.layers, strict=True):
        for name, parameter in own.named_parameters():
            assert torch.equal(parameter, visitor.get_parameter(name))


def test_what_stands_side_by_side_is_read_at_once(deep):
    layers = TTS.load(deep, room_bytes=0).talker.model.layers._layers
    assert [len(share) for layer in layers for share in layer.shares] == [1] * 5


def test_threads_end_with_the_model(deep):
    before = threading.active_count()
    visits = TTS.load(deep, room_bytes=0)
    next(iter(visits.talker.model.layers))
    assert threading.active_count() > before
    del visits
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_pass_begins_with_the_first_layer_whatever_became_of_the_last(deep):
    stays, visits = (TTS.load(deep, dtype=torch.bfloat16, room_bytes=room) for room in (None, 0))
    layers = visits.talker.model.layers
    for n_run in (5, 1, 5, 3, 4, 5, 5):
        passing = iter(layers)
        for _, own, visitor in zip(range(n_run), stays.talker.model.layers, passing, strict=False):
            for name, parameter in own.named_parameters():
                assert torch.equal(parameter, visitor.get_parameter(name))
        passing.close()
    assert len(list(layers)) == len(layers) == 5
    assert layers.take_waited_s() > 0
    assert layers.take_waited_s() == 0


def test_nothing_of_a_visiting_layer_counts_as_a_weight_of_the_model(deep):
    visits = TTS.load(deep, room_bytes=0)
    assert not [name for name in visits.model.state_dict() if name.startswith(LAYERS.removeprefix("talker.") + ".")]
    assert not [name for name, _ in visits.model.named_parameters() if name.startswith(f"{LAYERS}.")]


def test_what_stays_on_the_host_is_what_was_checked_edits_included(deep):
    table = f"{TEXT_EMBEDDING}.weight"
    edited = Checkpoint.open(deep).edit(Step("turn"), lambda name, one: {name: -one if name == table else one})
    for source in (Checkpoint.open(deep), edited):
        stays, visits = (TTS.load(source, dtype=torch.bfloat16, room_bytes=room) for room in (1 << 40, 0))
        for one, two in ((visits.model, stays.model), (visits.decoder, stays.decoder)):
            expected = dict(two.named_parameters())
            assert all(torch.equal(parameter, expected[name]) for name, parameter in one.named_parameters())


def test_bad_layers_are_named_though_they_stay_in_their_file(deep, tmp_path):
    bad = f"{LAYERS}.3.mlp.up_proj.weight"
    spoiled = Checkpoint.open(deep).edit(
        Step("spoil"), lambda name, tensor: {name: torch.full_like(tensor, torch.nan) if name == bad else tensor}
    )
    spoiled.save(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=f"{bad} has .* NaN"):
        TTS.load(tmp_path / "nan", room_bytes=0)


def test_a_file_that_shrinks_in_use_is_named(deep, tmp_path):
    folder = shutil.copytree(deep, tmp_path / "deep")
    visits = TTS.load(folder, room_bytes=0)
    prompt = visits.prompt(ASKED[0])
    with (folder / "model.safetensors").open("rb+") as weights:
        weights.truncate(200_000)
    with pytest.raises(CheckpointError, match="model.safetensors was cut short"):
        visits.force([prompt], [torch.zeros(3, 16, dtype=torch.long)])


def test_batches_are_as_large_as_the_cache_allows(deep, monkeypatch):
    tts = TTS.load(deep)
    asked = [Utterance("word " * n, "english", VOICE, seed=n) for n in (3, 1, 2, 1)]
    whole = corpus.speak(tts, asked)
    sizes = []

    def counting(self, prompts, seeds, knobs=None):
        sizes.append(len(prompts))
        return real(self, prompts, seeds, knobs)

    real = Engine.codes
    monkeypatch.setattr(Engine, "codes", counting)
    # Keys and values of five layers, two heads of 32: the longest, alone too large, is said all the same.
    monkeypatch.setattr(corpus, "_CACHE_VALUES", 2 * 5 * 2 * 32 * 100)
    parts = corpus.speak(tts, asked)
    assert sizes == [2, 1, 1]
    for one, two in zip(whole, parts, strict=True):
        assert torch.equal(one.codes, two.codes)


def test_tensors_stream_alike_however_often_the_file_is_mapped(deep, monkeypatch):
    checkpoint = Checkpoint.open(deep)
    before = list(checkpoint.tensors())
    monkeypatch.setattr(checkpoints, "_RUN_BYTES", 1000)
    after = list(checkpoint.tensors())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(before, after, strict=True))
