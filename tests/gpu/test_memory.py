"""What waits on the host of a GPU, what a graph takes, and memory that runs out there.

python -m pytest tests/gpu/test_memory.py -q; python bench/memory.py --out memory.json
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

import toy
from quaver import meter, runtime
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine, Knobs
from quaver.errors import BudgetError
from quaver.model.homes import Placement
from quaver.model.sparing import lent
from quaver.model.tts import TTS, Utterance
from quaver.provenance import Step
from quaver.runtime import Request
from quaver.sampling import Sampling
from quaver.voice import Voice

pytest.importorskip("triton", reason="graphs need Triton, which is not installed here")

from quaver.frame import FrameGraph, Weights

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device: a host without one lends nothing")
GREEDY = Knobs(Sampling(0.0), Sampling(0.0, penalty=1.0), 24)
ALL_ON_HOST = Placement(tables_on_host=True, sound_on_host=True)


@pytest.fixture(scope="module", params=["same width", "projected"])
def steady(request, tmp_path_factory):
    """An INT4 toy that never stops; projected, its embeddings are tabled for the predictor."""
    folder = tmp_path_factory.mktemp("memory")
    changes = {"hidden_size": 256} if request.param == "projected" else {}
    Checkpoint.open(toy.checkpoint(folder / "plain", **changes)).edit(Step("test"), toy.never_stop).save(folder / "s")
    return toy.rounded(folder / "s", folder / "int4")


def hello(checkpoint):
    width = checkpoint.config.talker_config.hidden_size
    voice = Voice(name="x", speaker=torch.randn(width, generator=torch.Generator().manual_seed(5)))
    return Utterance("Hello there, you.", "english", voice)


def test_a_graph_takes_what_is_told(steady):
    tts = TTS.load(steady, device="cuda" if ON_GPU else "cpu", dtype=torch.float32)
    for n_rows in (1, 3):
        request = Request(100, 20, n_rows)
        graph = FrameGraph(Weights(tts), n_rows, request.n_positions, request.n_positions)
        told = runtime.weigh(steady, request, "cuda", dtype=torch.float32)
        lines = {line.name: line.device_bytes for line in told.held}
        talker = graph._talker
        cache = sum(tensor.nbytes for tensor in (talker.keys, talker.values, talker.cos, talker.sin))
        assert lines["cache of 128 positions"] == cache
        slots = sum(getattr(graph.slots, field.name).nbytes for field in fields(graph.slots))
        rooms = (graph.hidden, graph._embedded, graph._pair, graph._single, graph._first_logits, graph._logits)
        between = sum(t.nbytes for s in (talker, graph._predictor) for t in (s.qkv, s.attended, s.inner))
        splits = sum(getattr(one, f.name).nbytes for one in talker.splits.values() for f in fields(one))
        taken = slots + sum(room.nbytes for room in rooms) + between + splits
        assert 0.5 * lines["text, codes and knobs"] < taken <= lines["text, codes and knobs"]
    projected = sum(table.nbytes for table in Weights(tts).projected)
    assert lines.get("projected embeddings", projected) == projected


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_lent_table_is_read_like_any_other_and_takes_nothing(dtype):
    table = (torch.randn(3000, 128) * 50).to(dtype)
    ids = torch.randint(3000, (64,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    seen = lent(table, torch.device("cuda"))
    assert torch.cuda.memory_allocated() == before
    assert seen.is_cuda
    # By this it is known as another's, which cannot be laid out anew (meter.repack).
    assert not seen.untyped_storage().resizable()
    assert seen.dtype == dtype
    wanted = table.to("cuda")
    assert torch.equal(F.embedding(ids, seen) if dtype.is_floating_point else seen[ids], wanted[ids])
    if dtype == torch.bfloat16:
        assert torch.equal(seen @ wanted[:8].T, wanted @ wanted[:8].T)


@needs_gpu
def test_what_waits_on_the_host_changes_no_code_and_no_sound(steady):
    said = [
        Engine(TTS.load(steady, device="cuda", placement=one)).say(hello(steady), GREEDY, guard=None)
        for one in (Placement(), ALL_ON_HOST)
    ]
    assert said[0].n_frames == said[1].n_frames == 24
    assert abs(said[0].audio.samples - said[1].audio.samples).max() < 1e-3


@needs_gpu
def test_memory_that_runs_out_on_a_gpu_is_told_and_leaves_the_engine_usable(steady):
    engine = Engine(TTS.load(steady, device="cuda"))
    wanted = engine.say(hello(steady), GREEDY, guard=None).audio.samples
    prompt = engine.tts.prompt(hello(steady))
    huge = replace(GREEDY, max_frames=1 << 27)
    with pytest.raises(BudgetError, match=r"out of memory on cuda.*Tried to allocate") as caught:
        next(engine.frames([prompt], [0], huge))
    assert caught.value.__context__ is None
    assert (engine.say(hello(steady), GREEDY, guard=None).audio.samples == wanted).all()


@needs_gpu
def test_an_engine_with_little_memory_speaks_and_refuses(steady):
    least = runtime.weigh(steady, Request.seconds(4), "cuda", ALL_ON_HOST, limited=True).peak_bytes
    try:
        # The toy is so small that PyTorch's own blocks count: what is allowed is told, what it holds is not.
        engine = Engine.load(steady, device="cuda", memory_bytes=least + (64 << 20), room_s=4)
        assert engine.say(hello(steady), GREEDY, guard=None).n_frames == 24
        with pytest.raises(BudgetError, match="are allowed"):
            engine.say(hello(steady), replace(GREEDY, max_frames=1 << 20), guard=None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
def test_weights_laid_out_anew_take_less_and_say_the_same(steady):
    engine = Engine(TTS.load(steady, device="cuda"))
    weights = engine._fused()
    meter.repack(engine.tts.device, engine.tts.tensors())
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert all(torch.isfinite(layer.before_mlp).all() for layer in weights.talker)
    found = engine.say(hello(steady), GREEDY, guard=None)
    wanted = Engine(TTS.load(steady, device="cuda")).say(hello(steady), GREEDY, guard=None)
    assert abs(found.audio.samples - wanted.audio.samples).max() < 1e-3
    # What other tests left is in it too.
    assert allocated <= reserved
