"""What every test shares: one thread a process (toys are tiny), and toy models built once."""

from __future__ import annotations

import os

import pytest
import torch

import toy
from quaver.model.tts import TTS

torch.set_num_threads(1)
# And of what tests start: two threads on cores that others use take ten times as long as one.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A toy Base checkpoint; tests read it and never change it."""
    return toy.checkpoint(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="session")
def toy_tts(toy_folder):
    """The toy Base model, loaded."""
    return TTS.load(toy_folder)
