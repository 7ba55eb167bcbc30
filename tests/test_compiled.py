"""Compiled steps on a CPU: near to float64, the same with any number of threads, never beyond memory."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toy
from quaver import int4
from quaver.checkpoint import Checkpoint
from quaver.config import ModelConfig, parse
from quaver.engine import Engine, Knobs
from quaver.int4 import GROUP, Int4Linear, Int4Weight, representable
from quaver.int8 import Int8Linear, Int8Weight
from quaver.model.layers import GROUPS, Decoder, KVCache
from quaver.model.stepper import attach
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.sampling import Sampling
from quaver.voice import Voice

compiled = pytest.importorskip("quaver.compiled")
KINDS = ("int4", "int8", "bfloat16")


def rms(x):
    return x.double().square().mean().sqrt().item()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def four_bits(n_out, n_in, seed=0):
    groups = (n_out, n_in // GROUP)
    return Int4Weight(
        torch.randint(0, 16, (n_out, n_in), generator=generator(seed), dtype=torch.uint8),
        torch.randint(5, 11, groups, generator=generator(seed + 1), dtype=torch.uint8),
        representable(torch.rand(groups, generator=generator(seed + 2)) / n_in**0.5 / 5),
    )


def stored(kind, n_out, n_in, seed=0):
    """A linear of ``kind``, prepared for bfloat16, and its exact weight."""
    if kind == "int4":
        weight = four_bits(n_out, n_in, seed)
        made = Int4Linear(n_in, n_out)
        made.load_state_dict(dict(weight.tensors()))
        made.prepare(torch.bfloat16)
        return made, weight.dequantize()
    exact = torch.randn(n_out, n_in, generator=generator(seed)) / n_in**0.5
    if kind == "int8":
        rounded = Int8Weight.nearest(exact)
        made = Int8Linear(n_in, n_out)
        made.load_state_dict(dict(rounded.tensors()))
        return made, rounded.dequantize()
    made = nn.Linear(n_in, n_out, bias=False).bfloat16().requires_grad_(False)
    made.weight.copy_(exact)
    return made, made.weight.float()


def matrix(linear):
    if isinstance(linear, Int4Linear):
        packed, zeros, scales = linear.halves()
        return compiled.matrix(compiled.INT4, packed, scales, zeros)
    if isinstance(linear, Int8Linear):
        return compiled.matrix(compiled.INT8, linear.weight_int8, linear.weight_scale)
    return compiled.matrix(compiled.BFLOAT16, linear.weight)


@pytest.fixture(params=[1, 2])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("n_threads")
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_out", "n_in"), [(8, 128), (24, 256), (384, 1024), (64, 3072)])
def test_a_product_errs_no_more_than_a_plain_one(kind, n_out, n_in, size):
    linear, weight = stored(kind, n_out, n_in)
    for n_rows in (1, 3):
        # One input is a hundred times the others, as in trained models.
        x = torch.randn(n_rows, n_in, generator=generator(5)) * size
        x[:, 7] *= 100
        x = x.bfloat16()
        exact = x.double() @ weight.double().T
        plain = F.linear(x, weight.bfloat16())
        y = compiled.product(x, matrix(linear), n_out)
        assert y.dtype == torch.bfloat16 and y.shape == exact.shape
        assert rms(y - exact) <= rms(plain - exact) + 2.0**-9 * rms(exact)
        # Not rounded to bfloat16, it is far nearer than bfloat16 can be (some 2e-3).
        assert rms(compiled.product(x.float(), matrix(linear), n_out) - exact) <= 2e-4 * rms(exact)


def decoder_of(kinds, seed=0):
    """A toy decoder of which layer i's linears are all of ``kinds[i]``, in bfloat16, and the same in float64."""
    settings = toy.settings()
    config = parse(ModelConfig, settings, "settings").talker_config
    made, exact = Decoder(config).bfloat16().requires_grad_(False), Decoder(config).double()
    for index, kind in enumerate(kinds):
        for path in (path for group in GROUPS for path in group.linears):
            parent, _, leaf = path.rpartition(".")
            plain = exact.layers[index].get_submodule(path)
            seed += 10
            linear, weight = stored(kind, plain.out_features, plain.in_features, seed)
            setattr(made.layers[index].get_submodule(parent), leaf, linear)
            plain.weight.data.copy_(weight)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator(3)) + 0.5)
            exact.get_parameter(name).data.copy_(parameter)
    return made.eval(), exact.eval().requires_grad_(False)


def stepped(decoder, x, n_before, n_rows_before=None):
    """Hidden states of the inputs after ``n_before``, one by one, after a prefill of those before."""
    cache = KVCache(decoder.config, len(x), x.shape[1], x)
    lengths = None if n_rows_before is None else torch.tensor(n_rows_before)
    decoder(x[:, :n_before], cache, lengths)
    return torch.cat([decoder(x[:, i : i + 1], cache) for i in range(n_before, x.shape[1])], dim=1)


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("int8", "bfloat16"), ("int4", "int8")])
def test_steps_err_no_more_than_pytorch(kinds):
    made, exact = decoder_of(kinds)
    x = torch.randn(1, 24, made.config.hidden_size, generator=generator(9)).bfloat16()
    wanted = exact(x.double())[:, 10:]
    plain = stepped(made, x, 10)
    attach(made)
    ours = stepped(made, x, 10)
    assert ours.dtype == torch.bfloat16
    assert rms(ours - wanted) <= rms(plain - wanted)
    assert not torch.equal(ours, plain), "nothing went through the compiled steps"
    # Two positions at once, as the code predictor begins a frame.
    cache = KVCache(made.config, 1, 2, x)
    assert rms(made(x[:, :2], cache) - exact(x[:, :2].double())) <= 2.0**-8 * rms(wanted)


def test_threads_change_nothing():
    made, _ = decoder_of(("int4", "int8"))
    attach(made)
    x = torch.randn(1, 12, made.config.hidden_size, generator=generator(9)).bfloat16()
    before = torch.get_num_threads()
    found = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        found.append(stepped(made, x, 4))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_one_thread_and_several_are_kept_apart_in_the_cache():
    # They were not: a process of two threads ran what one of one thread had left, on one processor.
    for alone, shared in (
        (compiled._step_alone, compiled._step_shared),
        (compiled._product_alone, compiled._product_shared),
    ):
        assert alone.py_func.__qualname__ != shared.py_func.__qualname__
        assert alone.targetoptions["parallel"] is False and shared.targetoptions["parallel"] is not False


def test_rows_of_different_lengths_step_side_by_side():
    made, _ = decoder_of(("int4", "int4"))
    attach(made)
    x = torch.randn(2, 12, made.config.hidden_size, generator=generator(9)).bfloat16()
    both = stepped(made, x, 6, [6, 3])
    alone = torch.cat((x[1:, :3], x[1:, 6:]), dim=1)
    assert rms(both[0] - stepped(made, x[:1], 6)[0]) <= 2.0**-7 * rms(both)
    assert rms(both[1] - stepped(made, alone, 3)[0]) <= 2.0**-7 * rms(both)


def test_a_position_beyond_the_cache_is_an_error():
    made, _ = decoder_of(("int4", "int4"))
    attach(made)
    x = torch.randn(1, 3, made.config.hidden_size).bfloat16()
    # A larger cache first: room that is there is no room in this one.
    made(x[:, :1], KVCache(made.config, 1, 8, x))
    cache = KVCache(made.config, 1, 2, x)
    made(x[:, :2], cache)
    with pytest.raises(IndexError, match="position 2 is beyond a cache of 2"):
        made(x[:, 2:], cache)


def test_threads_of_the_caller_do_not_disturb_each_other():
    made, _ = decoder_of(("int4", "bfloat16"))
    attach(made)
    xs = [torch.randn(1, 20, made.config.hidden_size, generator=generator(seed)).bfloat16() for seed in range(4)]
    wanted = [stepped(made, x, 3) for x in xs]
    found = {}
    callers = [
        threading.Thread(target=lambda i=i, x=x: found.update({i: stepped(made, x, 3)})) for i, x in enumerate(xs)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(found[i], y) for i, y in enumerate(wanted))


def test_what_is_stored_otherwise_goes_through_pytorch(monkeypatch):
    made, _ = decoder_of(("int4", "bfloat16"))
    attach(made)
    assert made.stepper is not None
    monkeypatch.setattr("quaver.model.stepper.compiled", lambda: None)
    attach(made)
    assert made.stepper is None
    monkeypatch.undo()
    attach(made.float())
    assert made.stepper is None


def test_a_copy_has_its_own_weights():
    made, _ = decoder_of(("int4", "bfloat16"))
    attach(made)
    again = copy.deepcopy(made)
    assert again.stepper is None and made.stepper is not None
    attach(again)
    x = torch.randn(1, 8, made.config.hidden_size, generator=generator(9)).bfloat16()
    wanted = stepped(made, x, 3)
    for parameter in made.parameters():
        parameter.data.zero_()
    assert torch.equal(stepped(again, x, 3), wanted)


def test_an_int4_checkpoint_speaks_by_steps(tmp_path, monkeypatch):
    raw = Checkpoint.open(toy.checkpoint(tmp_path / "raw")).edit(Step("test"), toy.never_stop).save(tmp_path / "model")
    folder = toy.rounded(raw.path, tmp_path / "int4").path
    voice = Voice(name="x", speaker=torch.randn(128, generator=generator(2)))
    knobs = Knobs(Sampling(), Sampling(penalty=1.0), 8)

    def codes(tts):
        return Engine(tts).codes([tts.prompt(Utterance("Hello there.", "english", voice))], [3], knobs)[0]

    tts = TTS.load(folder)
    assert tts.dtype == torch.bfloat16
    assert tts.talker.model.stepper is not None and tts.talker.code_predictor.model.stepper is not None
    assert torch.equal(codes(tts), codes(tts))
    monkeypatch.setattr(int4, "compiled", lambda: None)
    monkeypatch.setattr("quaver.model.stepper.compiled", lambda: None)
    plain = TTS.load(folder)
    assert plain.talker.model.stepper is None
    assert codes(plain).shape == codes(tts).shape
