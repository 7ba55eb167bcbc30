"""Where the talker's layers visit a GPU, they and the predictor are recorded: the same codes, bit for bit, as if not.

    python -m pytest tests/gpu/test_speaking.py -q

Needs a CUDA device, but no Triton: this is the way of calibration where memory is short.
"""

from __future__ import annotations

import pytest
import torch

import toy
from quaver import batch
from quaver.engine import Engine, Knobs
from quaver.meter import Clock
from quaver.model import steps
from quaver.model.tts import TTS, Utterance
from quaver.sampling import Sampling
from quaver.voice import Voice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KNOBS = {
    "greedy": Knobs(Sampling(temperature=0), Sampling(temperature=0), 40),
    "sampled": Knobs(Sampling(), Sampling(penalty=1.0), 40),
    "top-p": Knobs(Sampling(top_p=0.9), Sampling(top_p=0.8, top_k=0, penalty=1.0), 40),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose predictor is narrower than its talker, with heads of the true size."""
    small = toy.settings()["talker_config"]["code_predictor_config"] | {"hidden_size": 256, "head_dim": 128}
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return toy.checkpoint(folder, num_hidden_layers=3, hidden_size=512, head_dim=128, code_predictor_config=small)


def spoken(tts, knobs, n_rows, **more):
    voice = Voice("v", torch.randn(512, generator=torch.Generator().manual_seed(0)))
    asked = [Utterance("word " * (1 + row % 7), "english", voice, seed=row) for row in range(n_rows)]
    return Engine(tts, graphs=False, **more).codes(
        [tts.prompt(one) for one in asked], [one.seed for one in asked], knobs
    )


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_recorded_model_says_the_same_codes(wide, dtype, knobs, monkeypatch):
    stays, visits = (TTS.load(wide, device="cuda", dtype=dtype, room_bytes=n) for n in (None, 0))
    for n_rows in (1, 5, 62):
        recorded, again = (spoken(visits, knobs, n_rows, clock=Clock(visits.device)) for _ in range(2))
        with monkeypatch.context() as plainly:
            for module in (batch, steps):
                plainly.setattr(module, "Recorded", lambda fn, beside=None: fn)
            visited = spoken(visits, knobs, n_rows)
        with monkeypatch.context() as plainly:
            plainly.setattr(batch, "RecordedSteps", lambda decoder, cache: None)
            passed = spoken(visits, knobs, n_rows)
        plain = spoken(stays, knobs, n_rows)
        # Recorded steps attend to all of the cache under a mask: other sums than those of the layers themselves.
        for one, two, three in zip(recorded, again, visited, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)
        for one, two in zip(passed, plain, strict=True):
            assert torch.equal(one, two)


def test_a_batch_that_is_done_holds_nothing(wide):
    tts = TTS.load(wide, device="cuda", dtype=torch.bfloat16, room_bytes=0)
    spoken(tts, KNOBS["sampled"], 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for n_rows in (3, 4, 5):
        spoken(tts, KNOBS["sampled"], n_rows)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
