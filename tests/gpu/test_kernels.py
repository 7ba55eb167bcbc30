"""Laws 4 and 5: every kernel against float64, and whole frames against plain PyTorch.

On a GPU at the true shapes; without one the same functions at toy shapes in Triton's interpreter, whose bfloat16 is not
that of a GPU and is left out. On a GPU machine, tests and benchmark in one call, from the project's root:

    python -m pytest tests/gpu -q; python bench/speed.py CONFIG.json CODEC_CONFIG.json --out speed.json
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import toy
from quaver import int4, mixed
from quaver.batch import Graphed
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine, Knobs
from quaver.int4 import GROUP, Int4Weight, Lanes, representable
from quaver.int8 import Int8Weight
from quaver.model.layers import Rotary
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.recipe import Recipe
from quaver.sampling import ENDED, Sampling, distribution, draw, uniforms
from quaver.voice import Voice

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed here")

from quaver import frame as frame_module
from quaver.frame import FrameGraph, Weights
from quaver.kernels import linear as products
from quaver.kernels.attention import Heads, Splits, attend, attend_prompt
from quaver.kernels.linear import Matrix, linear, norm
from quaver.kernels.sampler import Slots, sample_first, sample_residual, seat, tune

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
WIDTHS = [(2048, 2048), (6144, 2048), (2048, 6144), (1024, 3072)] if ON_GPU else [(32, 384)]
ROWS = [1, 2, 5, 16, 64, 130, 300] if ON_GPU else [1, 3, 20]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rms(x):
    return x.double().square().mean().sqrt().item()


def random_int4(n_out, n_in):
    groups = (n_out, n_in // GROUP)
    return Int4Weight(
        torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8),
        torch.randint(0, 16, groups, dtype=torch.uint8),
        representable(torch.rand(groups) * 0.01 + 0.001),
    )


def normed(x, gain, dtype):
    wide = x.to(dtype) if dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype) * gain.to(dtype)


def test_the_layout_for_the_gpu_holds_the_same_integers():
    weight = random_int4(24, 384)
    again = Lanes.of(weight).weight()
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.scales, weight.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_of_that_layout_is_a_plain_product_part_by_part(dtype, monkeypatch):
    weight = random_int4(24, 384)
    exact = weight.dequantize().to(dtype)
    monkeypatch.setattr(int4, "_PART", 10 * 384)
    lanes = Lanes.of(weight)
    assert torch.equal(lanes.dense(dtype), exact)
    x = torch.randn(5, 384).to(dtype)
    assert torch.allclose(lanes(x), F.linear(x, exact), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("tensor_cores", [None, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_out", "n_in"), WIDTHS)
def test_a_product_errs_at_most_twice_as_much_as_a_plain_one(n_out, n_in, dtype, bits, gated, tensor_cores):
    weight = random_int4(n_out * (2 if gated else 1), n_in)
    exact = weight.dequantize()
    if bits == 8:
        in_rows = Int8Weight.nearest(exact)
        exact = in_rows.dequantize()
    plain = exact.to(dtype).to(DEVICE)
    if bits == 4:
        matrix = Matrix(None, Lanes(*(tensor.to(DEVICE) for tensor in Lanes.of(weight).held)), None)
    elif bits == 8:
        matrix = Matrix(in_rows.values.to(DEVICE), None, None, in_rows.scales.to(DEVICE))
    else:
        matrix = Matrix(plain, None, None)
    for n_rows in ROWS if tensor_cores is None else [1]:
        x, gain, stream = (torch.randn(shape).to(dtype) for shape in ((n_rows, n_in), (n_in,), (n_rows, n_out)))

        def reference(kind, weight, x=x, gain=gain, stream=stream):
            y = F.linear(normed(x.to(weight.device), gain.to(weight.device), kind), weight.to(kind))
            if gated:
                gate, up = y.chunk(2, -1)
                y = F.silu(gate) * up
            return (y + stream.to(weight.device, kind)).cpu()

        wanted = reference(torch.float64, exact if bits < 16 else plain.double().cpu())
        y = torch.full((n_rows, n_out), torch.nan, dtype=dtype, device=DEVICE)
        linear(
            x.to(DEVICE), matrix, y, gain=gain.to(DEVICE), eps=1e-6, gated=gated, residual=stream.to(DEVICE),
            tensor_cores=tensor_cores,
        )  # fmt: skip
        assert rms(y.cpu() - wanted) <= 2 * rms(reference(dtype, plain) - wanted) + 2e-7 * rms(wanted)


@pytest.mark.skipif(ON_GPU, reason="there the rows of a long prompt are among those above")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("int4", [False, True])
def test_tiles_for_many_rows_give_the_same_as_those_for_few(int4, gated, monkeypatch):
    weight = random_int4(40 * (2 if gated else 1), 384)
    matrix = Matrix(None, Lanes.of(weight), None) if int4 else Matrix(weight.dequantize().half(), None, None)
    x, few, many = torch.randn(140, 384).half(), torch.empty(140, 40).half(), torch.empty(140, 40).half()
    linear(x, matrix, few, gated=gated)
    monkeypatch.setattr(products, "MANY_ROWS", 100)
    linear(x, matrix, many, gated=gated)
    assert torch.allclose(few, many, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_new", "n_splits", "lengths"),
    [(1, 1, [5]), (1, 4, [0, 70, 33]), (2, 1, [0, 0]), (2, 3, [100, 7]), (1, 16, [100, 1, 64, 65])],
)
def test_attention_errs_at_most_twice_as_much_as_a_plain_one(dtype, n_new, n_splits, lengths):
    n_heads, n_keys, d, n_slots, capacity = (16, 8, 128, len(lengths), 128) if ON_GPU else (4, 2, 32, len(lengths), 128)
    n_rows = n_slots * n_new
    qkv = torch.randn(n_rows, (n_heads + 2 * n_keys) * d).to(dtype)
    keys, values = (torch.randn(n_slots, n_keys, capacity, d).to(dtype) for _ in range(2))
    gains = [(1 + 0.1 * torch.randn(d)).to(dtype) for _ in range(2)]
    rotary = Rotary.at(torch.arange(capacity)[None], d, 1e6, dtype)
    cos, sin = rotary.cos[0, 0], rotary.sin[0, 0]

    def reference(kind):
        out = torch.zeros(n_rows, n_heads * d, dtype=kind)
        for slot, length in enumerate(lengths):
            all_keys, all_values = keys[slot].to(kind).clone(), values[slot].to(kind).clone()
            for new in range(n_new):
                row, at = qkv[slot + new * n_slots].view(-1, d), length + new
                q, k, v = row.split([n_heads, n_keys, n_keys])
                turn = Rotary(cos[at].to(kind), sin[at].to(kind))
                q, k = turn.turn(normed(q, gains[0], kind)), turn.turn(normed(k, gains[1], kind))
                all_keys[:, at], all_values[:, at] = k, v.to(kind)
                seen = [cache[:, : at + 1].repeat_interleave(n_heads // n_keys, 0) for cache in (all_keys, all_values)]
                weights = ((seen[0] @ q[..., None])[..., 0] * d**-0.5).softmax(-1)
                out[slot + new * n_slots] = (weights[:, None] @ seen[1])[:, 0].flatten()
        return out

    on_device = [tensor.to(DEVICE) for tensor in (qkv, keys, values)]
    heads = Heads(gains[0].to(DEVICE), gains[1].to(DEVICE), 1e-6,
                  cos[:, : d // 2].contiguous().to(DEVICE), sin[:, : d // 2].contiguous().to(DEVICE))  # fmt: skip
    past = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    splits = Splits.of(n_rows, n_heads, n_keys, d, n_splits, on_device[0])
    wanted, plain = reference(torch.float64), reference(dtype)
    # Twice: the second finds the counters as the first left them, and the cache already written.
    for _ in range(2):
        out = torch.full((n_rows, n_heads * d), torch.nan, dtype=dtype, device=DEVICE)
        attend(*on_device[:1], heads, *on_device[1:], past, splits, out)
        assert rms(out.cpu() - wanted) <= 2 * rms(plain - wanted) + 2e-7 * rms(wanted)
        assert not splits.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 70, 300, 2048] if ON_GPU else [1, 16, 70])
def test_attention_of_a_prompt_errs_at_most_twice_as_much_as_a_plain_one(dtype, n):
    n_heads, n_keys, d = (16, 8, 128) if ON_GPU else (4, 2, 32)
    qkv = torch.randn(n, (n_heads + 2 * n_keys) * d).to(dtype)
    gains = [(1 + 0.1 * torch.randn(d)).to(dtype) for _ in range(2)]
    rotary = Rotary.at(torch.arange(n)[None], d, 1e6, dtype)
    cos, sin = rotary.cos[0, 0], rotary.sin[0, 0]

    def reference(kind, device):
        q, k, v = qkv.to(device).view(n, -1, d).split([n_heads, n_keys, n_keys], 1)
        turn = Rotary(cos[:, None].to(device, kind), sin[:, None].to(device, kind))
        on_device = [gain.to(device) for gain in gains]
        q, k = turn.turn(normed(q, on_device[0], kind)), turn.turn(normed(k, on_device[1], kind))
        q, k, v = (part.to(kind).transpose(0, 1) for part in (q, k, v))
        repeated = [part.repeat_interleave(n_heads // n_keys, 0) for part in (k, v)]
        seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        scores = (q @ repeated[0].mT * d**-0.5).masked_fill(~seen, -torch.inf)
        out = scores.softmax(-1) @ repeated[1]
        return [part.cpu() for part in (out.transpose(0, 1).flatten(1), k, v)]

    wide = Rotary(cos[:, : d // 2].contiguous().to(DEVICE), sin[:, : d // 2].contiguous().to(DEVICE))
    heads = Heads(gains[0].to(DEVICE), gains[1].to(DEVICE), 1e-6, wide.cos, wide.sin)
    found = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
             for shape in ((n, n_heads * d), (n_keys, n, d), (n_keys, n, d))]  # fmt: skip
    attend_prompt(qkv.to(DEVICE), heads, found[1], found[2], found[0])
    wanted, plain = reference(torch.float64, DEVICE), reference(dtype, DEVICE)
    for one, exact, usual in zip(found, wanted, plain, strict=True):
        assert rms(one.cpu() - exact) <= 2 * rms(usual - exact) + 2e-7 * rms(exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_rows_is_the_models(dtype):
    x, gain = (torch.randn(*shape).to(dtype) for shape in ((5, 96), (96,)))
    y = torch.full((5, 96), torch.nan, dtype=dtype, device=DEVICE)
    norm(x.to(DEVICE), gain.to(DEVICE), 1e-6, y)
    wanted = normed(x, gain, torch.float64)
    assert rms(y.cpu() - wanted) <= 2 * rms(normed(x, gain, dtype) - wanted) + 2e-7 * rms(wanted)


@pytest.mark.parametrize("n_ids", [3072] if ON_GPU else [90])
@pytest.mark.parametrize(
    "knobs",
    [
        Sampling(0.0, penalty=1.3), Sampling(), Sampling(0.9, 5, 0.8), Sampling(1.0, 0, 0.5, 1.0), Sampling(2.0, 0),
        Sampling(0.7, 1), Sampling(0.9, 60, 0.95),
    ],
    ids=str,
)  # fmt: skip
def test_codes_are_those_of_the_reference(n_ids, knobs):
    n_slots, width, stop_id = 5, 24, n_ids - 15
    seeds = torch.tensor([0, 1729, -1, 2**40 + 7, -(2**50)])
    n_wrong = 0
    for frame in (1, 2):
        logits = torch.randn(n_slots, n_ids) * 2
        table, narrow = torch.randn(n_ids, width), torch.randn(n_ids, 16)
        slots = Slots.of(n_slots, 8, 4, n_ids, 16, table.to(DEVICE))
        slots.seed.copy_(seeds)
        slots.alive.fill_(1)
        slots.frame.fill_(frame)
        seen = torch.rand(n_slots, n_ids) < 0.3
        slots.seen.copy_(seen)
        for state in (slots.first, slots.residual):
            state.copy_(torch.tensor([knobs.temperature, knobs.top_k, knobs.top_p, knobs.penalty]))
        banned = torch.zeros(n_ids, dtype=torch.bool)
        banned[-20:] = True
        banned[stop_id] = frame < 2
        uniform = uniforms(seeds, frame, 16)
        first = draw(*distribution(logits, knobs, banned=banned, seen=seen), uniform[:, 0])
        x, embedded = (torch.zeros(n_slots, n, device=DEVICE) for n in (16, width))
        on_device = [tensor.to(DEVICE) for tensor in (logits, table, narrow)]
        sample_first(on_device[0], slots, *on_device[1:], x, embedded, stop_id=stop_id, n_banned=20, min_frames=2)
        alive = slots.alive.cpu().bool()
        found = slots.codes[frame, :, 0].cpu().long()
        n_wrong += int((found != torch.where(first == stop_id, ENDED, first)).sum())
        assert torch.equal(alive, found != ENDED)
        assert torch.allclose(slots.stops[frame].cpu(), logits.softmax(-1)[:, stop_id], rtol=1e-5)
        assert torch.equal(embedded.cpu(), table[found.clamp(min=0)])
        assert torch.equal(x.cpu(), narrow[found.clamp(min=0)])
        middle = draw(*distribution(logits, replace(knobs, penalty=1.0)), uniform[:, 3])
        sample_residual(3, on_device[0], slots, *on_device[1:], x, embedded)
        n_wrong += int((slots.codes[frame, :, 3].cpu()[alive] != middle[alive]).sum())
    # A uniform number within rounding of an edge may fall on its other side: one draw in many thousands.
    assert n_wrong == 0 if not ON_GPU else n_wrong <= 1


@pytest.mark.parametrize("seed", [5, 2**40 + 7, -(2**50), -1])
def test_a_slot_is_begun_anew_and_the_others_are_left_alone(seed):
    slots = Slots.of(3, 300, 4, 90, 16, torch.zeros(90, 24, device=DEVICE))
    slots.seen.fill_(1)
    slots.codes.fill_(7)
    slots.stops.fill_(2)
    seat(slots, 1, seed, 17, 3, Sampling(0.9, 50, 1.0, 1.05), Sampling(0.0, 5, 0.8, 1.0))
    assert slots.seed.tolist() == [0, seed, 0]
    states = (slots.frame, slots.past, slots.prompt, slots.n_text, slots.alive)
    assert [state.tolist() for state in states] == [[0, 0, 0], [0, 17, 0], [0, 17, 0], [1, 3, 1], [0, 1, 0]]
    assert slots.seen.sum(1).tolist() == [90, 0, 90]
    assert (slots.codes[:, 1] == ENDED).all()
    assert (slots.stops[:, 1] == 0).all()
    assert (slots.codes[:, ::2] == 7).all()
    assert (slots.stops[:, ::2] == 2).all()
    assert torch.allclose(slots.first.cpu(), torch.tensor([[1.0] * 4, [0.9, 50, 1, 1.05], [1] * 4]))
    tune(slots, 2, Sampling(0.5, 7, 0.6, 1.1), Sampling(0.0))
    assert torch.allclose(slots.first[2].cpu(), torch.tensor([0.5, 7, 0.6, 1.1]))
    assert torch.allclose(slots.residual[1].cpu(), torch.tensor([0.0, 5, 0.8, 1]))


N_CODEBOOKS = 16 if ON_GPU else 4


@pytest.fixture(scope="module", params=["same width", "projected", "int4", "int8"])
def speaker(request, tmp_path_factory):
    """A toy that never stops, in float32, loaded anew: its engine may change the layout of its weights."""
    folder = tmp_path_factory.mktemp("frames")
    small = {**toy.settings()["talker_config"]["code_predictor_config"], "num_code_groups": N_CODEBOOKS}
    changes = {"num_code_groups": N_CODEBOOKS, "code_predictor_config": {**small, "num_hidden_layers": 1}}
    if request.param == "projected":
        changes["hidden_size"] = 256
    made = toy.checkpoint(folder / "plain", **changes, num_hidden_layers=1)
    checkpoint = Checkpoint.open(made).edit(Step("test"), toy.never_stop)
    if request.param == "int4":
        checkpoint.save(folder / "steady")
        checkpoint = toy.rounded(folder / "steady", folder / "int4")
    if request.param == "int8":
        checkpoint.save(folder / "steady")
        mixed.quantize(folder / "steady", folder / "int8", Recipe(talker="int8", predictor="int8"))
        checkpoint = Checkpoint.open(folder / "int8")
    return TTS.load(checkpoint, device=DEVICE, dtype=torch.float32)


def prompts_of(tts):
    width = tts.config.talker_config.hidden_size
    voice = Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))
    return [tts.prompt(Utterance(text, "english", voice)) for text in ("Hello there, you.", "One.")]


@pytest.mark.parametrize("knobs", [Sampling(0.0, penalty=1.0), Sampling(penalty=1.2)], ids=["greedy", "sampled"])
def test_a_frame_is_what_plain_pytorch_makes_of_it(speaker, knobs, monkeypatch):
    """Law 5, and that a slot's codes do not depend on who shares the batch: each row is compared with itself alone."""
    if not ON_GPU:
        # The interpreter's time goes by the number of programs.
        monkeypatch.setattr(products, "_BLOCK_N", 128)
    prompts, n_frames = prompts_of(speaker), 40 if ON_GPU else 2
    asked = Knobs(knobs, replace(knobs, penalty=1.0), n_frames)
    plain = Engine(speaker, graphs=False)
    alone = [list(plain.frames([prompt], [seed], asked)) for seed, prompt in enumerate(prompts)]
    batch = Graphed(FrameGraph(Weights(speaker), 2, 128, 64), prompts, [0, 1], asked)
    together = [step for step in (batch.step() for _ in range(n_frames)) if step is not None]
    # A row may stop before the other, and sampling does so here and there: then it says nothing more.
    assert len(together) == max(map(len, alone))
    for row, frames in enumerate(alone):
        codes, stops = (torch.stack([step[i][row] for step in together]).cpu() for i in range(2))
        assert torch.equal(codes[: len(frames)], torch.stack([frame.codes[0] for frame in frames]).cpu())
        assert (codes[len(frames) :] == ENDED).all()
        wanted = torch.stack([frame.stop[0] for frame in frames]).cpu()
        assert torch.allclose(stops[: len(frames)], wanted, rtol=1e-3, atol=1e-7)
    if ON_GPU:
        graphs = Engine(speaker).codes(prompts, [0, 1], asked)
        wanted = plain.codes(prompts, [0, 1], asked)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(graphs, wanted, strict=True))


@pytest.mark.parametrize("n", [1, 15, 33, 256, 300] if ON_GPU else [1, 33])
def test_a_prompt_is_what_plain_pytorch_makes_of_it(speaker, n, monkeypatch):
    """Filled up and recorded where it is short, as it is where it is long."""
    if not ON_GPU:
        monkeypatch.setattr(products, "_BLOCK_N", 128)
    weights = Weights(speaker)
    width = speaker.config.talker_config.hidden_size
    embeds = torch.randn(n, width, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    with torch.inference_mode():
        hidden, *wanted = weights._from_modules(embeds)
        by_kernels = weights.prefill if ON_GPU else lambda x: _last(weights.heard(x))
        # On a GPU the second call records, and the third replays.
        for _ in range(3 if ON_GPU else 1):
            for one, other in zip(by_kernels(embeds), (hidden[-1], *wanted), strict=True):
                assert one.shape == other.shape
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def _last(found):
    hidden, keys, values = found
    return hidden[-1], keys, values


def test_prompts_are_filled_up_to_few_lengths():
    lengths = [frame_module._filled(n) for n in range(1, 257)]
    assert sorted(set(lengths)) == [16, 32, 48, 64, 96, 128, 192, 256]
    assert all(0 <= length - n < max(16, n / 2) for n, length in enumerate(lengths, 1))


def test_a_step_that_is_rehearsed_changes_nothing_that_is_said(speaker, monkeypatch):
    """A graph is captured when it is first needed, while slots may be speaking."""
    if not ON_GPU:
        monkeypatch.setattr(products, "_BLOCK_N", 128)
    weights, prompt = Weights(speaker), prompts_of(speaker)[0]

    def said(rehearsed):
        frame = FrameGraph(weights, 1, 128, 64)
        # With such a penalty a code that was only rehearsed would not be said.
        frame.join(0, prompt, 0, Sampling(0.0, penalty=9.0), Sampling(0.0, penalty=1.0))
        if rehearsed:
            frame._rehearse()
        frame.step()
        assert int(frame.slots.frame[0]) == 1
        return frame.slots.codes[0].clone(), frame.hidden.clone()

    for found, wanted in zip(said(rehearsed=True), said(rehearsed=False), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device: overlapping launches and captured graphs exist on one only")
def test_slots_join_leave_and_change_their_knobs_in_a_captured_graph(speaker):
    prompts = prompts_of(speaker)
    greedy, warm = Sampling(0.0, penalty=1.0), Sampling(1.5, 0, 1.0, 1.0)
    for overlap in (False, True):
        if overlap and torch.cuda.get_device_capability() < (9, 0):
            continue
        frame = FrameGraph(Weights(speaker), 2, 128, 64, overlap=overlap)

        def run(n, slot=0, frame=frame):
            start = int(frame.slots.frame[slot])
            for _ in range(n):
                frame.step()
            return frame.slots.codes[start : start + n, slot].clone()

        frame.join(0, prompts[0], 0, greedy, greedy)
        alone = run(12)
        frame.join(0, prompts[0], 0, greedy, greedy)
        before = run(4)
        frame.join(1, prompts[1], 1, warm, warm)
        assert torch.equal(torch.cat((before, run(8))), alone)
        frame.join(0, prompts[0], 0, greedy, greedy)
        frame.tune(0, warm, warm)
        assert not torch.equal(run(12), alone)
        frame.leave(0)
        assert (run(1) == ENDED).all()
