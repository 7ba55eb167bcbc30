"""Laws 1 and 3 on a toy, the search on random layers, and every way quantizing can go wrong."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import toy
from quaver import awq, awq_search, corpus, stream
from quaver.awq_search import (
    Feed,
    Feedback,
    LayerSearch,
    Moment,
    absorbable,
    better_rows,
    compensated,
    fold,
    nearest,
    row_errors,
    search_clip,
    search_layer,
    settled,
)
from quaver.checkpoint import Checkpoint
from quaver.config import read_model_config
from quaver.corpus import Item
from quaver.errors import BudgetError, CheckpointError, RecipeError
from quaver.int4 import GROUP, Int4Linear, Int4Weight
from quaver.model.homes import HELD, LAYERS, homes
from quaver.model.layers import GROUPS, DecoderLayer
from quaver.model.tts import TTS, Utterance, shapes
from quaver.provenance import Step
from quaver.verify import verify
from quaver.voice import Voice

TEXTS = ("one small boat", "the rain has stopped", "who is there", "apples and pears", "good night", "on we go")


@pytest.fixture(scope="module")
def items(toy_tts):
    """Six utterances of one to two seconds, in three voices, with random codes."""
    generator = torch.Generator().manual_seed(0)
    voices = [Voice(f"v{index}", torch.randn(128, generator=generator)) for index in range(3)]
    return [
        Item(
            Utterance(text, "english" if index % 2 else "auto", voices[index % 3]),
            torch.randint(0, toy.N_CODES, (12 + 3 * index, 16), generator=generator),
        )
        for index, text in enumerate(TEXTS)
    ]


@pytest.fixture(scope="module")
def quantized(toy_folder, items, tmp_path_factory):
    """The toy in INT4, and the report."""
    out = tmp_path_factory.mktemp("awq") / "int4"
    return out, awq.quantize(toy_folder, out, calibration=items)


@pytest.fixture
def layer(toy_tts):
    """A float32 copy of the toy's first layer, with norms that differ by channel."""
    made = copy.deepcopy(toy_tts.talker.model.layers[0]).float()
    for norm in (made.input_layernorm, made.post_attention_layernorm):
        norm.weight.data.uniform_(0.2, 3, generator=torch.Generator().manual_seed(1)).copy_(norm.weight.bfloat16())
    return made


def moments_of(layer, seed=0, n=400):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in GROUPS:
        n_in = layer.get_parameter(f"{group.linears[0]}.weight").shape[1]
        x = torch.randn(n, n_in, generator=generator) * torch.rand(n_in, generator=generator).mul(4).exp()
        found[group.name] = Moment(x.T @ x / n, x.abs().mean(0))
    return found


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_folding_preserves_the_function(toy_tts, items, group):
    talker = copy.deepcopy(toy_tts.talker)
    rows = torch.nn.utils.rnn.pad_sequence(awq.talker_inputs(toy_tts, items, 512), batch_first=True)
    before = talker.hidden(rows)
    generator = torch.Generator().manual_seed(2)
    for layer in talker.model.layers:
        size = len(layer.get_parameter(f"{group.before}.weight"))
        weights = copy.deepcopy(layer.state_dict())
        fold(layer, group, torch.rand(size, generator=generator).mul(4).sub(2).exp())
        changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, weights[name])}
        assert changed == {f"{name}.weight" for name in (*group.linears, group.before)}
    after = talker.hidden(rows)
    assert (after - before).abs().max() <= 2e-5 * before.abs().max()


def test_grouped_queries_share_the_scale_of_their_value_head(layer):
    # The toy has 4 query heads on 2 value heads of 32 channels.
    group = next(group for group in GROUPS if group.name == "o")
    feed = Feed.of(layer, group)
    spread = feed.spread(torch.arange(64))
    for head in range(4):
        assert spread[32 * head : 32 * head + 32].tolist() == list(range(32 * (head // 2), 32 * (head // 2) + 32))
    assert torch.equal(feed.gather(spread.float()), torch.arange(64).float())


def test_awq_loss_is_at_most_that_of_rounding_to_nearest(quantized):
    _, report = quantized
    assert [layer.index for layer in report.layers] == [0, 1]
    for layer in report.layers:
        assert [group.name for group in layer.groups] == [group.name for group in GROUPS]
        assert layer.loss <= layer.loss_nearest
        for group in layer.groups:
            assert 0 < group.loss <= group.loss_nearest
    # Measured: 0.65. At 0.9 the search would hardly be working.
    assert report.loss <= 0.9 * report.loss_nearest


def test_the_whole_talker_is_nearer_to_the_original_than_rounded_to_nearest(toy_tts, items, quantized):
    rounded = copy.deepcopy(toy_tts.talker)
    for layer in rounded.model.layers:
        for group in GROUPS:
            for linear in group.linears:
                weight = layer.get_parameter(f"{linear}.weight")
                weight.data.copy_(nearest(weight.data).dequantize())
    rows = torch.nn.utils.rnn.pad_sequence(awq.talker_inputs(toy_tts, items, 512), batch_first=True)
    wanted = toy_tts.talker.hidden(rows)
    small = TTS.load(quantized[0], dtype=torch.float32)
    error, error_nearest = ((talker.hidden(rows) - wanted).square().mean() for talker in (small.talker, rounded))
    assert error < 0.9 * error_nearest


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["plain", "outlier", "flat", "dead", "few"]))
def test_no_layer_ever_loses_by_the_search(toy_layer, seed, kind):
    layer = copy.deepcopy(toy_layer)
    moments = moments_of(layer, seed, n=3 if kind == "few" else 200)
    for name, moment in moments.items():
        if kind == "outlier":
            moment.second[5, 5] += 1e6
            moment.size[5] += 1e3
        elif kind == "flat":
            moments[name] = Moment(torch.eye(len(moment.size)), torch.ones_like(moment.size))
        elif kind == "dead":
            moments[name] = Moment(torch.zeros_like(moment.second), torch.zeros_like(moment.size))
    search = search_layer(layer, moments, torch.bfloat16)
    assert sum(report.loss for report in search.reports) <= sum(report.loss_nearest for report in search.reports)
    assert all(bool(weight.dequantize().isfinite().all()) for weight in search.weights.values())


@pytest.fixture(scope="module")
def toy_layer(toy_tts):
    return copy.deepcopy(toy_tts.talker.model.layers[1]).float()


def test_the_reported_loss_is_the_true_output_error(layer):
    # Measured on the inputs themselves, on the function as the original layer computes it.
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 128, generator=generator) * torch.rand(128, generator=generator).mul(3).exp()
    moments = moments_of(layer) | {"qkv": Moment(x.T @ x / len(x), x.abs().mean(0))}
    search = search_layer(layer, moments, torch.bfloat16)
    scale = layer.input_layernorm.weight / search.layer.input_layernorm.weight
    units = {"self_attn.v_proj": search.units.get("self_attn.v_proj", torch.ones(64))}
    true = 0.0
    for linear in GROUPS[0].linears:
        wanted = x @ layer.get_parameter(f"{linear}.weight").T
        made = (x / scale) @ search.weights[linear].dequantize().T * units.get(linear, 1)
        true += float((made - wanted).square().sum() / wanted.square().sum())
    assert search.reports[0].name == "qkv"
    assert true == pytest.approx(search.reports[0].loss, rel=1e-3)


def test_rounding_to_nearest_stays_within_half_a_step():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    weight[3] = 0
    weight[4] = weight[4].abs() + 1
    weight[5, :128] = -0.25
    rounded = nearest(weight)
    error = (rounded.dequantize() - weight).abs().reshape(16, 2, 128)
    # Half a step, and what rounding the scale itself to 8 bits may cut off at the end of the range.
    assert bool((error <= rounded.scales[..., None] * (0.5 + 15 * 2**-8)).all())
    assert bool((rounded.dequantize()[3] == 0).all())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300))
def test_clipping_never_raises_the_error(seed, n_inputs):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 256, generator=generator) ** 3
    x = torch.randn(n_inputs, 256, generator=generator)
    second = x.T @ x / n_inputs
    shrink = search_clip(weight, second)
    assert float(shrink.min()) > 0.5 and float(shrink.max()) <= 1
    before, after = (row_errors(nearest(weight, ratio).dequantize() - weight, second) for ratio in (None, shrink))
    assert bool((after <= before * (1 + 1e-4) + 1e-5 * row_errors(weight, second)).all())


def plain_gptq(weight, second, grid, damping):
    """Column by column from the inverse moment itself, without blocks or a factor: slow, and easy to check."""
    order = second.diagonal().argsort(descending=True).tolist()
    moment = second.double() + damping * second.diagonal().mean().double() * torch.eye(len(second))
    left, values = weight.double().clone(), grid.values.clone()
    for step, column in enumerate(order):
        group = column // GROUP
        scale, zero = grid.scales[:, group].double(), grid.zeros[:, group].double()
        values[:, column] = ((left[:, column] / scale).round() + zero).clamp(0, 15).to(torch.uint8)
        error = left[:, column] - (values[:, column].double() - zero) * scale
        rest = order[step:]
        inverse = torch.linalg.inv(moment[rest][:, rest])
        left[:, rest[1:]] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
    return values


def test_errors_are_made_up_for_as_plain_gptq_does():
    torch.manual_seed(0)
    weight = torch.randn(24, 2 * GROUP)
    x = torch.randn(4000, 2 * GROUP) @ torch.randn(2 * GROUP, 2 * GROUP) / 16
    second = x.T @ x / len(x)
    grid = nearest(weight)
    feedback = Feedback.of(second)
    assert feedback is not None
    found = compensated(weight, second, grid, feedback)
    expected = plain_gptq(weight, second, grid, awq_search._DAMPING)
    # A tie between two levels may fall either way in float32, and what follows in its row with it.
    assert float((found.values == expected).float().mean()) > 0.97
    before, after = (row_errors(one.dequantize() - weight, second) for one in (grid, found))
    assert bool((after <= before).all())
    assert float(after.sum() / before.sum()) < 0.75
    assert torch.equal(found.scales, grid.scales)
    assert torch.equal(found.zeros, grid.zeros)


def test_independent_inputs_leave_nothing_to_make_up_for():
    torch.manual_seed(0)
    weight, same = torch.randn(8, GROUP), torch.eye(GROUP)
    grid, feedback = nearest(weight), Feedback.of(same)
    assert feedback is not None
    assert torch.equal(compensated(weight, same, grid, feedback).values, grid.values)
    # A moment with a NaN in it is of no use, and one of nothing does no harm.
    assert Feedback.of(torch.full((GROUP, GROUP), float("nan"))) is None
    silent = Feedback.of(torch.zeros(GROUP, GROUP))
    assert silent is not None
    assert torch.equal(compensated(weight, torch.zeros(GROUP, GROUP), grid, silent).values, grid.values)


def test_what_is_settled_gains_by_no_single_move():
    torch.manual_seed(0)
    weight, x = torch.randn(6, 2 * GROUP), torch.randn(3000, 2 * GROUP) @ torch.randn(2 * GROUP, 2 * GROUP) / 16
    second, grid = x.T @ x / len(x), nearest(weight)
    found = settled(weight, second, grid, n_rounds=50)
    before, after = (row_errors(one.dequantize() - weight, second) for one in (grid, found))
    assert bool((after < before).all())
    wide, moment = (found.dequantize() - weight).double(), second.double()
    steps = found.scales.double().repeat_interleave(GROUP, 1)
    slope, power = 2 * wide @ moment, moment.diagonal()
    for way in (1, -1):
        allowed = (found.values < 15) if way > 0 else (found.values > 0)
        gain = -(way * steps * slope + steps.square() * power)
        assert float(gain[allowed].max()) < 1e-4 * float(after.max())
    assert torch.equal(found.scales, grid.scales)
    assert torch.equal(settled(weight, torch.zeros_like(second), grid).values, grid.values)


def test_every_row_takes_its_best_form():
    torch.manual_seed(0)
    weight, second = torch.randn(16, GROUP), torch.eye(GROUP)
    forms = [nearest(weight, torch.full((16, 1), share)) for share in (1.0, 0.8, 0.6)]
    best = better_rows(weight, second, *forms)
    errors = torch.stack([row_errors(form.dequantize() - weight, second) for form in forms])
    torch.testing.assert_close(row_errors(best.dequantize() - weight, second), errors.amin(0))
    assert len(errors.argmin(0).unique()) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_absorbs_its_scale_without_rounding(layer, dtype):
    group = GROUPS[0]
    norm = layer.input_layernorm.weight
    norm.data = norm.data.to(dtype).float()
    norm.data[7] = 0
    scale = torch.rand(128, generator=torch.Generator().manual_seed(5)).mul(6).sub(3).exp()
    exact = absorbable(layer, group, scale, dtype)
    stored = (norm / exact).to(dtype)
    assert torch.allclose(stored.float() * exact, norm, rtol=3e-7, atol=0)
    assert exact[7] == 1
    others = torch.arange(128) != 7
    assert torch.allclose(exact[others], scale[others], rtol=2**-8)


def test_padding_is_not_observed(toy_tts, items):
    decoder = toy_tts.talker.model
    rows = awq.talker_inputs(toy_tts, items, 512)
    together = stream.Stream(decoder, rows)
    assert len(together.batches) == 1 and not bool(together.batches[0].mask.all())
    moments = together.observe(decoder.layers[0])
    n_positions = sum(map(len, rows))
    for group in GROUPS:
        alone = [stream.Stream(decoder, [row]).observe(decoder.layers[0])[group.name].second * len(row) for row in rows]
        expected = torch.stack(alone).sum(0) / n_positions
        assert torch.allclose(moments[group.name].second, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_the_stream_runs_the_decoder(toy_tts, items, monkeypatch):
    monkeypatch.setattr(stream, "_BATCH_POSITIONS", 60)
    decoder = toy_tts.talker.model
    rows = awq.talker_inputs(toy_tts, items, 512)
    running = stream.Stream(decoder, rows)
    assert len(running.batches) > 1
    for layer in decoder.layers:
        running.advance(layer)
    found = [x[mask] for batch in running.batches for x, mask in zip(batch.x, batch.mask, strict=True)]
    for row, made in zip(sorted(rows, key=len), found, strict=True):
        assert torch.allclose(decoder.norm(made), decoder(row[None])[0], atol=1e-5)


def test_inputs_are_cut(toy_tts, items):
    assert [len(row) for row in awq.talker_inputs(toy_tts, items, 20)] == [20] * len(items)


def test_all_but_the_talkers_linears_and_their_norms_is_bit_equal(toy_folder, quantized):
    out, report = quantized
    source, made = Checkpoint.open(toy_folder), Checkpoint.open(out)
    before, after = dict(source.tensors()), dict(made.tensors())
    linears = {
        f"talker.model.layers.{index}.{linear}" for index in range(2) for group in GROUPS for linear in group.linears
    }
    expected = before.keys() - {f"{name}.weight" for name in linears}
    expected |= {f"{name}.{part}" for name in linears for part in ("qweight", "qzeros", "scales")}
    assert after.keys() == expected
    changed = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert changed == {name for name in report.absorbed if name.endswith("norm.weight")}
    assert all(name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")) for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in changed)
    codec = dict(made.codec_tensors())
    assert all(torch.equal(value, codec[name]) for name, value in source.codec_tensors())
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        assert digest(toy_folder / file) == digest(out / file)


def test_the_configuration_and_the_provenance_say_what_was_done(toy_folder, quantized):
    out, report = quantized
    settings = json.loads((out / "config.json").read_text())
    assert settings.pop("quantization_config") == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": [
            "talker.code_predictor",
            "talker.codec_head",
            "talker.text_projection",
            "speaker_encoder",
        ],
    }
    assert settings == json.loads((toy_folder / "config.json").read_text())
    checkpoint = Checkpoint.open(out)
    verify(out)
    step = checkpoint.provenance.steps[-1]
    assert step.tool == "quantize"
    assert step.recipe == {"method": "awq", **dataclasses.asdict(awq.Recipe())}
    assert step.result["absorbed"] == {name: list(ends) for name, ends in report.absorbed.items()}
    assert step.result["calibration_sha256"] == report.calibration_sha256
    (parent,) = step.parents
    files = {p.relative_to(toy_folder).as_posix() for p in toy_folder.rglob("*") if p.is_file()}
    assert (parent.name, parent.licences, set(parent.files)) == (toy_folder.name, ("unknown",), files)
    assert parent.files["model.safetensors"].sha256 == digest(toy_folder / "model.safetensors")


def test_what_absorbed_scales_is_named_with_their_range(toy_folder, quantized):
    before, after = dict(Checkpoint.open(toy_folder).tensors()), dict(Checkpoint.open(quantized[0]).tensors())
    absorbed = quantized[1].absorbed
    assert any(name.endswith("norm.weight") for name in absorbed)
    assert {name.rpartition("layers.")[2][2:] for name in absorbed} <= {f"{group.before}.weight" for group in GROUPS}
    for name, ends in absorbed.items():
        if name in after:
            ratio = before[name].float() / after[name].float()
            assert ends == pytest.approx((float(ratio.min()), float(ratio.max())), rel=1e-5)
        assert 0 < ends[0] < ends[1]


def test_exactly_the_talkers_linears_load_as_int4(quantized):
    small = TTS.load(quantized[0])
    found = {name for name, module in small.model.named_modules() if isinstance(module, Int4Linear)}
    assert found == {f"talker.model.layers.{i}.{linear}" for i in range(2) for g in GROUPS for linear in g.linears}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loaded_model_computes_what_is_stored(quantized, items, dtype):
    # The stored tensors, read by the reference, in the original model: against the model as loaded.
    out, _ = quantized
    small = TTS.load(out, dtype=dtype)
    checkpoint = Checkpoint.open(out)
    plain = copy.deepcopy(small.talker)
    for index, layer in enumerate(plain.model.layers):
        for group in GROUPS:
            for linear in group.linears:
                name = f"talker.model.layers.{index}.{linear}"
                stored = [checkpoint.read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
                weight = Int4Weight.read(*stored).dequantize().to(dtype)
                module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
                module.weight.data.copy_(weight)
                parent, _, leaf = linear.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, module)
    rows = torch.nn.utils.rnn.pad_sequence(awq.talker_inputs(small, items, 512), batch_first=True).to(dtype)
    wanted, made = plain.hidden(rows).float(), small.talker.hidden(rows).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (made - wanted).square().mean().sqrt() <= tolerance * wanted.square().mean().sqrt()


def test_scales_read_the_same_in_both_half_types(quantized):
    for name, tensor in Checkpoint.open(quantized[0]).tensors():
        if name.endswith(".scales"):
            assert tensor.dtype == torch.float16
            assert torch.equal(tensor.bfloat16().float(), tensor.float())


def test_the_same_bytes_twice(toy_folder, items, quantized, tmp_path):
    out, report = quantized
    again = awq.quantize(toy_folder, tmp_path / "again", calibration=items)
    assert digest(out / "model.safetensors") == digest(tmp_path / "again" / "model.safetensors")
    assert digest(out / "provenance.json") == digest(tmp_path / "again" / "provenance.json")
    assert again.layers == report.layers


def test_progress_tells_every_layer_and_the_report_is_json(toy_folder, items, tmp_path):
    told, lines = [], []
    report = awq.quantize(
        toy_folder,
        tmp_path / "out",
        awq.Recipe(n_samples=2, n_positions=16),
        calibration=items,
        progress=lambda *event: told.append(event),
        tell=lines.append,
    )
    assert [event for event in told if event[0] == "quantizing layers"] == [
        ("quantizing layers", 1, 2),
        ("quantizing layers", 2, 2),
    ]
    assert (report.n_utterances, report.n_positions) == (2, 32)
    assert [line.partition(": ")[0] for line in lines] == ["before the first layer", "layer 0", "layer 1"]
    value = json.loads(json.dumps(report.to_json()))
    assert set(value["layer_seconds"]) == {"layer-000", "layer-001"}
    assert sum(value["layer_seconds"]["layer-001"].values()) <= sum(value["seconds"].values())
    assert value["layers"][1]["groups"][0]["name"] == "qkv"
    assert value["loss"] == report.loss
    before, after = report.tensor_bytes
    assert f"{before / 1e6:.1f} MB to {after / 1e6:.1f} MB" in report.summary()


KILLED = """
import os, signal, sys
import torch
from quaver import awq
from quaver.partial import Partial

torch.set_num_threads(1)
source, out, when = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(what, done, total):
    if f"{what} {done}" == when:
        die()

if when == "deliver":
    Partial.deliver = die
awq.quantize(source, out, awq.Recipe(n_samples=2, n_positions=40), progress=progress)
"""


def test_the_report_tells_what_speaking_took(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(awq, "_ROOM_BYTES", 0)
    report = awq.quantize(toy_folder, tmp_path / "out", awq.Recipe(n_samples=2, n_positions=40))
    assert min(report.seconds[name] for name in ("talker", "visits", "predictor", "calibration")) > 0


@pytest.fixture(scope="module")
def whole(toy_folder, tmp_path_factory):
    """The toy quantized at one go on its own speech."""
    out = tmp_path_factory.mktemp("whole") / "out"
    awq.quantize(toy_folder, out, awq.Recipe(n_samples=2, n_positions=40))
    return out


def kill(toy_folder, out, when):
    """Quantizes as `whole` does in a process of its own, which is killed ``when`` progress says that."""
    done = subprocess.run([sys.executable, "-c", KILLED, toy_folder, out, when], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists()
    return out.with_name(f".{out.name}.partial")


def digests(folder):
    return {path.relative_to(folder).as_posix(): digest(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("when", ["speaking 2", "quantizing layers 1", "quantizing layers 2", "deliver"])
def test_a_killed_run_goes_on_to_the_same_bytes(toy_folder, whole, tmp_path, monkeypatch, when):
    kill(toy_folder, tmp_path / "out", when)
    if when != "speaking 2":
        # What was said is not said again.
        monkeypatch.setattr(corpus, "builtin", None)
    n_finished = {"quantizing layers 1": 1, "quantizing layers 2": 2, "deliver": 2}.get(when, 0)
    report = awq.quantize(toy_folder, tmp_path / "out", awq.Recipe(n_samples=2, n_positions=40))
    assert report.n_resumed == n_finished
    assert ("finished earlier" in report.summary()) == bool(n_finished)
    assert digests(tmp_path / "out") == digests(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_of_another_kind_is_an_error_that_says_which(toy_folder, whole, tmp_path):
    partial = kill(toy_folder, tmp_path / "out", "quantizing layers 1")
    before = digests(partial)
    for recipe, more, what in (
        (awq.Recipe(n_samples=2, n_positions=39), {}, "recipe"),
        (awq.Recipe(n_samples=2, n_positions=40), {"dtype": torch.bfloat16}, "recipe"),
        (awq.Recipe(n_samples=2, n_positions=40), {"search": lambda *_: None}, "recipe"),
        (awq.Recipe(n_samples=3, n_positions=40), {"calibration": []}, "calibration set and recipe"),
    ):
        with pytest.raises(RecipeError, match=f"of another {what}: go on with that one"):
            awq.quantize(toy_folder, tmp_path / "out", recipe, **more)
    other = toy.checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="of another model: "):
        awq.quantize(other, tmp_path / "out", awq.Recipe(n_samples=2, n_positions=40))
    assert digests(partial) == before


def test_a_damaged_piece_is_named_and_once_removed_made_again(toy_folder, whole, tmp_path):
    partial = kill(toy_folder, tmp_path / "out", "deliver")
    (piece,) = partial.glob("layer-000.*.safetensors")
    content = bytearray(piece.read_bytes())
    content[-7] ^= 1
    piece.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layer-000.* is damaged: remove it"):
        awq.quantize(toy_folder, tmp_path / "out", awq.Recipe(n_samples=2, n_positions=40))
    piece.unlink()
    report = awq.quantize(toy_folder, tmp_path / "out", awq.Recipe(n_samples=2, n_positions=40))
    assert report.n_resumed == 1
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.parametrize("full", ["layer-001", "made"])
def test_a_full_disk_keeps_what_is_finished(toy_folder, items, quantized, tmp_path, monkeypatch, full):
    real = os.fsync

    def fsync(file):
        if full in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(BudgetError, match=r"no space left .*what is finished is kept in .*\.out\.partial"):
        awq.quantize(toy_folder, tmp_path / "out", calibration=items)
    monkeypatch.undo()
    report = awq.quantize(toy_folder, tmp_path / "out", calibration=items)
    assert report.n_resumed == (1 if full == "layer-001" else 2)
    assert digests(tmp_path / "out") == digests(quantized[0])


def test_an_interrupted_run_leaves_only_what_it_finished(toy_folder, items, tmp_path):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        awq.quantize(toy_folder, tmp_path / "out", calibration=items, progress=interrupt)
    (partial,) = tmp_path.iterdir()
    assert partial.name == ".out.partial"
    assert {path.name.partition(".")[0] for path in partial.iterdir()} == {"calibration", "key", "layer-000", "lock"}


def test_the_report_tells_where_time_and_memory_went(quantized):
    report = quantized[1]
    assert set(report.seconds) >= {"summing", "loading", "calibration", "moments", "search", "writing"}
    assert set(report.seconds) >= {"scales", "inverse", "clip", "rounding", "settling", "check"}
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.device_bytes is None
    assert report.host_bytes > 50_000_000
    assert f"host memory {report.host_bytes / 1e9:.2f} GB" in report.summary()
    # The bytes of the model do not depend on a clock.
    assert "seconds" not in (quantized[0] / "provenance.json").read_text()


PUBLISHED = Path(__file__).parent / "oracle" / "published"


@pytest.mark.parametrize("shape", ["1.7b-base", "0.6b-base"])
def test_what_speaking_holds_on_a_gpu_fits(shape):
    config = read_model_config(PUBLISHED / f"config-{shape}.json")
    gpu = torch.device("cuda")
    place, stays, layers = homes(gpu, HELD, visits=True), 0, 0
    for name, size in shapes(config).items():
        n_bytes = 2 * torch.Size(size).numel()
        stays += n_bytes if place(name) == gpu else 0
        layers += n_bytes if name.startswith(LAYERS) else 0
    n_layers = config.talker_config.num_hidden_layers
    cache = 2 * corpus._CACHE_VALUES
    # Where attention has no kernel of its own it repeats a layer's keys and values for all heads, thrice in float32.
    repeats = config.talker_config.num_attention_heads // config.talker_config.num_key_value_heads
    attention = 3 * 2 * repeats * cache / n_layers
    assert layers > awq._ROOM_BYTES
    assert stays + 2 * layers / n_layers + cache + attention < 0.95 * awq.gpu_bytes(config)
    assert awq.gpu_bytes(config) <= 2.5e9


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self._live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage):
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self._live.pop(key)


def test_the_search_holds_no_more_than_a_few_layers(monkeypatch):
    # The true proportions at an eighth of the width, with as large a part at a time and fewer scales and clips.
    monkeypatch.setattr(awq_search, "_PART", awq_search._PART // 64)
    monkeypatch.setattr(awq_search, "_EXPONENTS", (0.0, 0.5))
    monkeypatch.setattr(awq_search, "_CLIPS", (1.0, 0.9))
    config = read_model_config(PUBLISHED / "config-1.7b-base.json").talker_config
    narrow = dataclasses.replace(
        config, hidden_size=256, intermediate_size=768, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    layer = DecoderLayer(narrow).requires_grad_(requires_grad=False)
    moments = moments_of(layer)
    n_bytes = sum(one.nbytes for one in layer.parameters())
    given = n_bytes + sum(one.second.nbytes for one in moments.values())
    with Held() as held:
        search_layer(layer, moments, torch.bfloat16)
    assert given + held.peak < awq._GPU_LAYERS * n_bytes


def test_quantizing_twice_is_refused(quantized, items, tmp_path):
    with pytest.raises(CheckpointError, match="is quantized already"):
        awq.quantize(quantized[0], tmp_path / "out", calibration=items)
    assert not list(tmp_path.iterdir())


def test_a_width_that_is_no_multiple_of_128_is_named(items, tmp_path):
    odd = toy.checkpoint(tmp_path / "odd", intermediate_size=192)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight has shape \(128, 192\)"):
        awq.quantize(odd, tmp_path / "out", calibration=items)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_matrix_is_named(toy_folder, items, tmp_path):
    bad = "talker.model.layers.1.mlp.up_proj.weight"
    flat = Checkpoint.open(toy_folder).edit(Step("flat"), lambda n, t: {n: t.flatten() if n == bad else t})
    flat.save(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=f"{bad} has shape"):
        awq.quantize(tmp_path / "bad", tmp_path / "out", calibration=items)


def test_nan_weights_are_named(toy_folder, items, tmp_path):
    bad = "talker.model.layers.1.mlp.up_proj.weight"

    def spoil(name, tensor):
        return {name: torch.full_like(tensor, torch.nan) if name == bad else tensor}

    Checkpoint.open(toy_folder).edit(Step("spoil"), spoil).save(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=bad):
        awq.quantize(tmp_path / "bad", tmp_path / "out", calibration=items)
    assert not (tmp_path / "out").exists()


def test_bad_requests_fail_before_any_work(toy_folder, items, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RecipeError, match="exists already"):
        awq.quantize(toy_folder, tmp_path / "there", calibration=items)
    with pytest.raises(RecipeError, match="does not exist"):
        awq.quantize(toy_folder, tmp_path / "no" / "out", calibration=items)
    with pytest.raises(RecipeError, match="must be 1 or more"):
        awq.Recipe(n_samples=0)
    with pytest.raises(RecipeError, match="no utterance"):
        awq.quantize(toy_folder, tmp_path / "out", calibration=[])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_worse_find_falls_back_to_rounding_to_nearest(layer, monkeypatch):
    # Clipping everything to 0.55 is worse here: the search must notice and keep plain rounding.
    def worse(self, weight, second, feedback):
        shrink = weight.new_full((len(weight), weight.shape[1] // GROUP), 0.55)
        return nearest(weight, shrink if self.activation_aware else None)

    monkeypatch.setattr(LayerSearch, "_rounded", worse)
    monkeypatch.setattr(LayerSearch, "_fold_best", lambda self, group: (0.0, 0.0, None))
    before = copy.deepcopy(layer.state_dict())
    search = search_layer(layer, moments_of(layer), torch.bfloat16)
    assert all(report.loss == report.loss_nearest and report.clipped == 0 for report in search.reports)
    assert all(torch.equal(value, before[name]) for name, value in search.layer.state_dict().items())
    assert isinstance(search.layer, DecoderLayer)


def test_the_order_of_utterances_does_not_matter_to_the_choices(toy_folder, items, quantized, tmp_path):
    shuffled = random.Random(6).sample(items, len(items))
    report = awq.quantize(toy_folder, tmp_path / "out", calibration=shuffled)
    for one, other in zip(report.layers, quantized[1].layers, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.02)
