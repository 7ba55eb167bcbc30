"""frame.cu on a GPU at the true widths, or as C++ on a CPU (cuda.h) at toy widths, against plain PyTorch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from quaver import int4
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine, Knobs
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.sampling import MIN_FRAMES, Sampling, distribution, uniforms
from quaver.voice import Voice

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed here")

from quaver.frame import FrameGraph, Weights
from quaver.kernels import persistent

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU of compute capability 9.0: no frame is one kernel")
HERE = Path(__file__).parent
N_BLOCKS = 12
KNOBS = [Sampling(0.0, penalty=1.3), Sampling(0.8, 40, 0.95, 1.1)]
if ON_GPU:
    KNOBS += [Sampling(0.9, 50, 1.0, 1.0), Sampling(1.0, 1), Sampling(1.3, 64, 0.5, 1.0)]


def changes(kind):
    """Shapes that the kernel fits; one talker is as wide as its predictor."""
    config = toy.settings()["talker_config"]
    n_codes, n_small, n_books = (2048, 2048, 16) if ON_GPU else (512, 512, 4)
    wide, narrow, heads = (2048, 1024, 16) if ON_GPU else (256, 128, 4)
    narrow = wide if kind == "int4" and not ON_GPU else narrow
    wide = narrow if kind == "int4" else wide
    moved = {k: v - toy.N_CODES + n_codes for k, v in config.items() if k.endswith("_id") and isinstance(v, int)}
    languages = {name: code - toy.N_CODES + n_codes for name, code in config["codec_language_id"].items()}
    shared = {"head_dim": 128, "num_hidden_layers": 2, "num_code_groups": n_books}
    small = {
        **config["code_predictor_config"], **shared, "hidden_size": narrow, "intermediate_size": 3 * narrow,
        "num_attention_heads": heads // 2, "num_key_value_heads": heads // 4, "vocab_size": n_small,
    }  # fmt: skip
    return {
        **moved, **shared, "codec_language_id": languages, "vocab_size": n_codes + 1024, "hidden_size": wide,
        "intermediate_size": 3 * wide, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "code_predictor_config": small,
    }  # fmt: skip


@pytest.fixture(scope="module", params=["projected", "int4"])
def speaker(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    changed, codec = changes(request.param), toy.codec_settings()
    for part in ("encoder_config", "decoder_config"):
        codec[part]["codebook_size"] = changed["code_predictor_config"]["vocab_size"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "codec_settings", lambda: codec)
        checkpoint = Checkpoint.open(toy.checkpoint(folder / "plain", **changed))
    if request.param == "int4":
        checkpoint = toy.rounded(folder / "plain", folder / "int4")
    else:
        checkpoint = checkpoint.edit(Step("test"), toy.never_stop)
    with pytest.MonkeyPatch.context() as patch:
        # PyTorch's 4-bit operator for bfloat16 on a CPU keeps no exact weight.
        patch.setattr(int4._Operator, "fits", staticmethod(lambda *_: False))
        tts = TTS.load(checkpoint, device="cuda" if ON_GPU else "cpu", dtype=torch.bfloat16)
    # Tensors that lie in a mapped file begin anywhere; on a GPU they do not.
    for parameter in tts.talker.parameters():
        parameter.data = parameter.data.clone()
    return tts


@pytest.fixture(scope="module")
def compiler():
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None and not ON_GPU:
        pytest.skip("no C++ compiler here: without a GPU the kernel runs as C++")
    return found


def stepping(graph, compiler, folder):
    """A function that takes a frame's step by the kernel: on the GPU, or as C++."""
    if ON_GPU:
        kernel = graph.kernel()
        assert kernel is not None
        return kernel
    constants = persistent.constants(graph.weights, graph.n_slots, N_BLOCKS)
    assert constants is not None
    text = persistent.source({**constants, "TRACED": False}, HERE / "cuda.h") + (HERE / "frame_on_cpu.cpp").read_text()
    (folder / "frame.cpp").write_text(text)
    flags = "-std=c++17 -O2 -shared -fPIC -fno-strict-aliasing -w".split()
    subprocess.run([compiler, *flags, folder / "frame.cpp", "-o", folder / "frame.so"], check=True)
    speak = ctypes.CDLL(str(folder / "frame.so")).speak
    tensors, numbers, lists = persistent.bound(graph.weights, graph.slots, *graph.stacks, graph.hidden)
    given = persistent.arguments(tensors, numbers, lists)

    def step(kept=tensors):
        assert speak(ctypes.byref(given)) == 0, kept.keys()

    return step


def prompts_voice(tts):
    width = tts.config.talker_config.hidden_size
    return Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))


def prompts_of(tts):
    voice = prompts_voice(tts)
    return [
        tts.prompt(Utterance(text, "english", voice)) for text in ("Hello there, you.", "One.", "Two, three.", "Four")
    ]


def misses(logits, codes, seed, knobs, banned=None):
    """How far each code [T] is from where its uniform number falls in the distribution of ``logits`` [T, V].

    ``banned(t)`` tells what cannot come. A greedy choice misses by what it is below the best, in deviations.
    """
    found = []
    seen = torch.zeros_like(logits[:1], dtype=torch.bool)
    for t, (row, code) in enumerate(zip(logits[:, None], codes.tolist(), strict=True)):
        cannot = None if banned is None else banned(t)
        probs, ids = distribution(row, knobs, banned=cannot, seen=seen if banned is not None else None)
        if knobs.temperature == 0:
            best = row[0, ids[0, 0]]
            found.append(float((best - row[0, code]) / row.std()))
        else:
            where = (ids[0] == code).nonzero()
            upto = probs[0].cumsum(0)
            # A code at the edge of what is kept may be kept by one and not by the other.
            at = int(where[0]) if len(where) else len(upto) - 1
            after, before, uniform = float(upto[at]), float(upto[at] - probs[0, at]), float(seed[t])
            found.append(max(before - uniform, uniform - after, 0.0))
        seen[0, code] = True
    return torch.tensor(found)


def far(tts, logits, codes, knobs, uniform):
    """The misses [Q, T] of the frames ``codes`` [T, Q] that were drawn with ``uniform`` [T, Q]."""

    def cannot(t):
        return tts.suppressed(stop_too=t < MIN_FRAMES)

    found = [misses(logits.talker[: len(codes)].float(), codes[:, 0], uniform[:, 0], knobs, cannot)]
    for book in range(1, codes.shape[1]):
        residual = logits.residual[:, book - 1].float()
        found.append(misses(residual, codes[:, book], uniform[:, book], replace(knobs, penalty=1.0)))
    return torch.stack(found)


@pytest.mark.parametrize("n_slots", [1, 2] if ON_GPU else [2])
def test_the_kernel_says_what_plain_pytorch_would(speaker, n_slots, compiler, tmp_path):
    """Every code is where its uniform number falls, given what was said; so are stop and hidden state."""
    prompts, n_frames = prompts_of(speaker)[:n_slots], 16 if ON_GPU else 3
    graph = FrameGraph(Weights(speaker), n_slots, 256, 64, whole=False)
    step = stepping(graph, compiler, tmp_path)
    stop_id, n_books = speaker.config.talker_config.codec_eos_token_id, speaker.config.talker_config.num_code_groups
    seeds = torch.arange(n_slots) * 2**33 + 7
    for knobs in KNOBS:
        residual = replace(knobs, penalty=1.0)
        for slot, prompt in enumerate(prompts):
            graph.join(slot, prompt, int(seeds[slot]), knobs, residual)
        for _ in range(n_frames):
            step()
        codes = graph.slots.codes[:n_frames].long().cpu()
        alive = graph.slots.alive.tolist()
        assert (codes[:, [slot for slot in range(n_slots) if alive[slot]]] >= 0).all()
        lengths = [int((codes[:, slot, 0] >= 0).sum()) for slot in range(n_slots)]
        forced = speaker.force(prompts, [codes[:length, slot] for slot, length in enumerate(lengths)])
        uniform = torch.stack([uniforms(seeds, t, n_books) for t in range(n_frames)])
        for slot, (logits, length) in enumerate(zip(forced, lengths, strict=True)):
            assert length > 0 and graph.slots.frame[slot] == length
            given = codes[:length, slot]
            found = far(speaker, logits, given, knobs, uniform[:, slot])
            assert found.max() < 0.2 and found.mean() < 0.05, (knobs, slot, found)
            stops = logits.talker.float().softmax(-1)[:length, stop_id].cpu()
            assert torch.allclose(graph.slots.stops[:length, slot].cpu(), stops, rtol=0.1, atol=1e-6)
            if alive[slot]:
                state = logits.hidden[-1].float()
                assert (graph.hidden[slot].float() - state).norm() < 0.02 * state.norm()


@pytest.mark.parametrize("heads", ["level"] if ON_GPU else ["level", "steep"])
def test_a_draw_is_right_where_logits_are_all_alike_or_orders_of_magnitude_apart(speaker, heads, compiler, tmp_path):
    """Where a bin has more than are kept the lowest ids are; where the last that is kept is far below, it is found.

    That as C++ alone: at true widths bfloat16 moves the steep ones by more than a draw is worth.
    """
    knobs, n_frames = Sampling(0.8, 40, 0.95, 1.1), 3
    rows = [speaker.talker.codec_head.weight, *(head.weight for head in speaker.talker.code_predictor.lm_head)]
    kept = [row.data.clone() for row in rows]
    generator = torch.Generator().manual_seed(3)
    try:
        for row in rows:
            spread = 10 ** (torch.rand(len(row), 1, generator=generator) * 9 - 7)
            row.data.mul_(0 if heads == "level" else spread.to(row.device))
        graph = FrameGraph(Weights(speaker), 1, 256, 64, whole=False)
        step = stepping(graph, compiler, tmp_path)
        prompt = prompts_of(speaker)[0]
        graph.join(0, prompt, 11, knobs, replace(knobs, penalty=1.0))
        for _ in range(n_frames):
            step()
        codes = graph.slots.codes[:n_frames, 0].long().cpu()
        assert (codes >= 0).all()
        uniform = torch.stack([uniforms(torch.tensor([11]), t, codes.shape[1])[0] for t in range(n_frames)])
        if heads == "level":
            # Of forty equal ones 38 hold 0.95 of the whole: PyTorch would take any forty.
            assert (codes == (38 * uniform).long()).all()
        else:
            (logits,) = speaker.force([prompt], [codes])
            found = far(speaker, logits, codes, knobs, uniform)
            assert found.max() < 0.2 and found.mean() < 0.05, found
    finally:
        for row, values in zip(rows, kept, strict=True):
            row.data.copy_(values)


@pytest.mark.parametrize("n_finite", [0, 3])
def test_a_draw_ends_where_hardly_a_logit_is_above_minus_infinity(speaker, n_finite, compiler, tmp_path):
    """As of a broken model: what is left is drawn from, and where nothing is, the first id comes."""
    head = speaker.talker.codec_head.weight
    kept = head.data.clone()
    graph = FrameGraph(Weights(speaker), 1, 256, 64, whole=False)
    knobs = Sampling(0.8, 40, 0.95, 1.1)
    graph.join(0, prompts_of(speaker)[0], 11, knobs, replace(knobs, penalty=1.0))
    state = graph.hidden[0].float()
    at = int(state.abs().argmax())
    assert state[at].abs() > 1.2
    try:
        head.data.zero_()
        head.data[n_finite:, at] = -3e38 * state[at].sign()
        stepping(graph, compiler, tmp_path)()
    finally:
        head.data.copy_(kept)
    uniform = float(uniforms(torch.tensor([11]), 0, 1)[0, 0])
    assert int(graph.slots.codes[0, 0, 0]) == int(n_finite * uniform)
    assert (graph.slots.codes[0, 0] >= 0).all()


@needs_gpu
def test_an_engine_sounds_as_plain_pytorch_makes_of_its_codes_which_are_the_likeliest(speaker, monkeypatch):
    """With all that is fast: at first nothing is recorded, then it is, and then replayed."""
    greedy = Sampling(0.0, penalty=1.0)
    utterance = Utterance("Hello there, you.", "english", prompts_voice(speaker))
    engine, said = Engine(speaker), []

    def heard(*asked):
        for frame in Engine.frames(engine, *asked):
            said.append(frame.codes[0])
            yield frame

    monkeypatch.setattr(engine, "frames", heard)
    n_faded = speaker.checkpoint.codec_config.output_sample_rate // 200
    for _ in range(3):
        said.clear()
        chunks = list(engine.speak(utterance, Knobs(greedy, greedy, 24), guard=None))
        codes = torch.stack(said)
        (forced,) = speaker.force([speaker.prompt(utterance)], [codes])
        found = far(speaker, forced, codes, greedy, torch.zeros(codes.shape))
        assert found.max() < 0.2 and found.mean() < 0.05, found
        stream = speaker.decoder.stream()
        wanted = torch.cat([stream.push(part.to(speaker.device)) for part in codes.split(4)]).float().cpu()
        samples = torch.from_numpy(np.concatenate([chunk.audio.samples for chunk in chunks]))
        assert samples.shape == wanted.shape
        between = slice(n_faded, -n_faded)
        assert (samples - wanted)[between].norm() <= 0.05 * wanted[between].norm()
        assert wanted[between].norm() > 0
    assert [graph.whole for graph in engine._idle] == [True]


@needs_gpu
def test_a_kernel_that_cannot_be_compiled_is_told_once_and_done_without(speaker, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(persistent, "_failures", [])
    monkeypatch.setattr(persistent, "source", lambda values: "no C++")
    weights = Weights(speaker)
    with pytest.warns(UserWarning, match="slower than it could be on cuda.*could not be compiled"):
        assert not FrameGraph(weights, 1, 256, 64, whole=True).whole
    graph = FrameGraph(weights, 1, 256, 64, whole=True)
    graph.join(0, prompts_of(speaker)[0], 0, Sampling(0.0), Sampling(0.0))
    graph.step()
    assert not graph.whole and int(graph.slots.frame[0]) == 1
