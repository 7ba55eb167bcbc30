"""A batch of utterances that decode side by side, a frame a step: in plain PyTorch, or as a graph on a GPU.

Shapes: B batch, Q codebooks, V vocabulary, D the talker's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from quaver.meter import Clock
from quaver.model.layers import KVCache
from quaver.model.steps import RecordedSteps
from quaver.model.talker import Talker
from quaver.model.tts import TTS, Prompt
from quaver.model.visiting import Visiting
from quaver.recorded import Recorded
from quaver.sampling import ENDED, MIN_FRAMES, Sampling, distribution, draw, uniforms

if TYPE_CHECKING:
    from quaver.frame import FrameGraph


CHUNK_FRAMES = 4
"""Frames of a chunk of a stream, by default."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """How to sample: codebook 0, the residual codebooks, and the most frames an utterance may take."""

    sampling: Sampling
    residual: Sampling
    max_frames: int


class Frame(NamedTuple):
    """One step of a batch: ``codes`` [B, Q], and ``stop`` [B], how likely each row was to end before this frame.

    ``stop`` is the model's own probability, 0..1, before any knob: so it is also there where sampling is greedy or
    leaves the stop id out. Both are on the host where a graph makes them, else on the model's device.
    """

    codes: Tensor
    stop: Tensor


class Batch(Protocol):
    """Utterances that decode side by side, one row each."""

    def step(self) -> Frame | None:
        """The next frame, its codes ENDED in stopped rows; None once every row has stopped."""


class Rows:
    """A Batch in plain PyTorch, on any device: the reference for every other.

    Where the talker's layers only visit a GPU, the residual codes of a frame, some thousands of steps of nearly
    nothing, are one recording: the first layers are on their way meanwhile. So is the way of a frame through each
    layer, which must not keep the next ones waiting. ``clock`` counts what the talker and the predictor take, and the
    waiting for layers.
    """

    def __init__(
        self, tts: TTS, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs, clock: Clock | None = None
    ) -> None:
        self._tts, self._knobs, self._clock = tts, knobs, clock
        n_rows = len(prompts)
        self._rows = torch.arange(n_rows, device=tts.device)
        self._text = torch.nn.utils.rnn.pad_sequence([prompt.tail for prompt in prompts], batch_first=True)
        self._last_line = torch.tensor([len(prompt.tail) - 1 for prompt in prompts], device=tts.device)
        self._seed = torch.tensor(seeds, dtype=torch.long, device=tts.device)
        self._seen = torch.zeros(n_rows, tts.config.talker_config.vocab_size, dtype=torch.bool, device=tts.device)
        self._alive = torch.ones(n_rows, dtype=torch.bool, device=tts.device)
        self._banned, self._banned_early = tts.suppressed(stop_too=False), tts.suppressed(stop_too=True)
        lengths = torch.tensor([len(p.embeds) for p in prompts], device=tts.device)
        embeds = torch.nn.utils.rnn.pad_sequence([p.embeds for p in prompts], batch_first=True)
        self._cache = tts.talker.cache(n_rows, embeds.shape[1] + knobs.max_frames, embeds)
        visits = isinstance(tts.talker.model.layers, Visiting)
        # On a CPU, where nothing is recorded, that would be other bits for more work.
        self._steps = RecordedSteps(tts.talker.model, self._cache) if visits and embeds.is_cuda else None
        hidden = self._heard(embeds, lengths)
        self._hidden = hidden[self._rows, lengths - 1]
        # Not a method: what holds itself lives until garbage is collected, and this holds the cache.
        small_cache = tts.talker.code_predictor.cache(n_rows, embeds)
        residual = partial(_residual_codes, tts.talker, knobs.residual, small_cache)
        self._residual = Recorded(residual) if visits else residual
        self._frame = 0
        self._codes: Tensor | None = None

    def step(self) -> Frame | None:
        """See Batch."""
        tts, knobs, talker = self._tts, self._knobs, self._tts.talker
        # The talker hears a frame only when the next one is asked for: the last frame of all is never heard.
        if self._codes is not None:
            lines = self._last_line.clamp(max=self._frame - 1)
            x = talker.embed_frames(self._codes) + self._text[self._rows, lines]
            self._hidden = self._heard(x[:, None])[:, 0]
        uniform = uniforms(self._seed, self._frame, tts.config.talker_config.num_code_groups)
        logits = talker.codec_head(self._hidden)
        stop_id = tts.config.talker_config.codec_eos_token_id
        stop = logits.float().softmax(-1)[:, stop_id]
        probs, ids = distribution(
            logits,
            knobs.sampling,
            banned=self._banned_early if self._frame < MIN_FRAMES else self._banned,
            seen=self._seen,
        )
        first = draw(probs, ids, uniform[:, 0])
        self._alive = self._alive & (first != stop_id)
        if not bool(self._alive.any()):
            return None
        self._seen.scatter_(1, first[:, None], True)
        # A stopped row goes on in the batch with any code: nobody reads it.
        first = torch.where(self._alive, first, 0)
        with nullcontext() if self._clock is None else self._clock.stage("predictor"):
            (residual,) = self._residual(self._hidden, first, uniform)
            self._codes = torch.cat((first[:, None], residual), dim=1)
        self._frame += 1
        return Frame(torch.where(self._alive[:, None], self._codes, ENDED), stop)

    def _heard(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The talker's hidden states of what it hears next (see Talker.hidden)."""
        with nullcontext() if self._clock is None else self._clock.stage("talker"):
            if self._steps is not None and lengths is None:
                hidden = self._steps(x)
            else:
                hidden = self._tts.talker.hidden(x, self._cache, lengths)
        layers = self._tts.talker.model.layers
        if self._clock is not None and isinstance(layers, Visiting):
            waited_s = layers.take_waited_s()
            self._clock.add("talker", -waited_s)
            self._clock.add("visits", waited_s)
        return hidden


def _residual_codes(
    talker: Talker, sampling: Sampling, cache: KVCache, hidden: Tensor, first: Tensor, uniform: Tensor
) -> tuple[Tensor]:
    """Codebooks 1 to Q - 1 of a frame, [B, Q - 1], drawn with ``uniform`` [B, Q] after those ``first`` [B].

    ``hidden`` [B, D] is the talker's; ``cache`` is room for one frame.
    """
    predictor, codes = talker.code_predictor, [first]
    logits = predictor.start(hidden, talker.embed_codec(first), cache)
    for codebook in range(1, uniform.shape[1]):
        codes.append(draw(*distribution(logits, sampling), uniform[:, codebook]))
        if codebook < uniform.shape[1] - 1:
            logits = predictor.step(codebook, codes[-1], cache)
    return (torch.stack(codes[1:], dim=1),)


class Graphed:
    """A Batch of which each step is one graph on the GPU; the host looks on one frame late, at a copy of its own."""

    def __init__(self, graph: FrameGraph, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs) -> None:
        self._graph, self._n_rows = graph, len(prompts)
        for slot, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            graph.join(slot, prompt, seed, knobs.sampling, knobs.residual)
        self._n_read, self._n_frames = 0, knobs.max_frames
        slots, n_frames = graph.slots, knobs.max_frames
        on_gpu = slots.alive.is_cuda
        self._codes = torch.zeros(n_frames, *slots.codes.shape[1:], dtype=torch.int32, pin_memory=on_gpu)
        self._stops = torch.zeros(n_frames, graph.n_slots, pin_memory=on_gpu)
        self._alive = torch.zeros(n_frames, graph.n_slots, dtype=torch.int32, pin_memory=on_gpu)
        self._asked: list[torch.cuda.Event | None] = []

    def step(self) -> Frame | None:
        """See Batch."""
        index = self._n_read
        self._n_read += 1
        # The GPU works on the frame after the one that is waited for; not at first, where it would keep a listener
        # waiting for sound.
        ahead = 1 if index < CHUNK_FRAMES else 2
        while len(self._asked) < min(index + ahead, self._n_frames):
            self._ask()
        event = self._asked[index]
        if event is not None:
            event.synchronize()
        rows = slice(self._n_rows)
        if not bool(self._alive[index, rows].any()):
            return None
        return Frame(self._codes[index, rows].long(), self._stops[index, rows])

    def _ask(self) -> None:
        index, slots = len(self._asked), self._graph.slots
        self._graph.step()
        self._codes[index].copy_(slots.codes[index], non_blocking=True)
        self._stops[index].copy_(slots.stops[index], non_blocking=True)
        self._alive[index].copy_(slots.alive, non_blocking=True)
        event = torch.cuda.Event() if self._alive.is_pinned() else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        self._asked.append(event)
