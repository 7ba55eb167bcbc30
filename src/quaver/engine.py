"""Speaking: the one decode loop, and speech from it, streamed or whole.

Shapes: B batch, Q codebooks, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from quaver.audio import Audio
from quaver.errors import RecipeError
from quaver.guard import Guard, Runaway, Watch, length
from quaver.model.encoders import load_codec_encoder
from quaver.model.speaker import SAMPLE_RATE_HZ
from quaver.model.tts import TTS, Prompt, Utterance
from quaver.sampling import ENDED, MIN_FRAMES, Sampling, distribution, draw, uniforms
from quaver.text import split_sentences

if TYPE_CHECKING:
    from quaver.frame import FrameGraph, Weights

FinishReason = Literal["stop", "length", "runaway-trimmed", "runaway-retried"]
"""How a sentence ended: by itself; at ``max_frames``; cut where it should have ended; by itself with a later seed."""

GUARD = Guard()
"""What is done by default about speech that never ends: it is cut."""

_GAP_S = 0.12
_FADE_S = 0.005


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream: its samples and, on the last chunk of a sentence, why the sentence ended."""

    audio: Audio
    n_frames: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Speech:
    """Whole speech and how it came about.

    ``finish_reasons`` has one entry a sentence; ``first_audio_s`` and ``wall_s`` are measured from the call.
    """

    audio: Audio
    n_frames: int
    finish_reasons: tuple[FinishReason, ...]
    first_audio_s: float
    wall_s: float

    @property
    def x_real_time(self) -> float:
        """Seconds of speech made in a second."""
        return self.audio.seconds / self.wall_s


class Batch(Protocol):
    """Utterances that decode side by side, one row each."""

    def step(self) -> Frame | None:
        """The next frame, its codes ENDED in stopped rows; None once every row has stopped."""


class Rows:
    """A Batch in plain PyTorch, on any device: the reference for every other."""

    def __init__(self, tts: TTS, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs) -> None:
        self._tts, self._prompts, self._knobs = tts, prompts, knobs
        n_rows = len(prompts)
        self._seed = torch.tensor(seeds, dtype=torch.long, device=tts.device)
        self._seen = torch.zeros(n_rows, tts.config.talker_config.vocab_size, dtype=torch.bool, device=tts.device)
        self._alive = torch.ones(n_rows, dtype=torch.bool, device=tts.device)
        self._banned, self._banned_early = tts.suppressed(stop_too=False), tts.suppressed(stop_too=True)
        lengths = torch.tensor([len(p.embeds) for p in prompts], device=tts.device)
        embeds = torch.nn.utils.rnn.pad_sequence([p.embeds for p in prompts], batch_first=True)
        self._cache = tts.talker.cache(n_rows, embeds.shape[1] + knobs.max_frames, embeds)
        hidden = tts.talker.hidden(embeds, self._cache, lengths)
        self._hidden = hidden[torch.arange(n_rows, device=tts.device), lengths - 1]
        self._small_cache = tts.talker.code_predictor.cache(n_rows, embeds)
        self._frame = 0
        self._codes: Tensor | None = None

    def step(self) -> Frame | None:
        """See Batch."""
        tts, knobs = self._tts, self._knobs
        talker, predictor = tts.talker, tts.talker.code_predictor
        n_codebooks = tts.config.talker_config.num_code_groups
        # The talker hears a frame only when the next one is asked for: the last frame of all is never heard.
        if self._codes is not None:
            text = torch.stack([prompt.text_at(self._frame - 1) for prompt in self._prompts])
            x = talker.embed_frames(self._codes) + text
            self._hidden = talker.hidden(x[:, None], self._cache)[:, 0]
        uniform = uniforms(self._seed, self._frame, n_codebooks)
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
        codes = [torch.where(self._alive, first, 0)]
        logits = predictor.start(self._hidden, talker.embed_codec(codes[0]), self._small_cache)
        for codebook in range(1, n_codebooks):
            codes.append(draw(*distribution(logits, knobs.residual), uniform[:, codebook]))
            if codebook < n_codebooks - 1:
                logits = predictor.step(codebook, codes[-1], self._small_cache)
        self._codes = torch.stack(codes, dim=1)
        self._frame += 1
        return Frame(torch.where(self._alive[:, None], self._codes, ENDED), stop)


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
        # The GPU works on the frame after the one that is waited for.
        while len(self._asked) < min(index + 2, self._n_frames):
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


class Engine:
    """Speaks with one model: by graphs where there is a CUDA device and Triton, in plain PyTorch elsewhere.

    ``graphs`` False keeps to plain PyTorch there too.
    """

    def __init__(self, tts: TTS, *, graphs: bool = True) -> None:
        self.tts = tts
        self._graphs = graphs and tts.device.type == "cuda" and find_spec("triton") is not None
        self._weights: Weights | None = None
        self._idle: list[FrameGraph] = []

    @property
    def knobs(self) -> Knobs:
        """The checkpoint's own knobs."""
        defaults = self.tts.defaults
        return Knobs(defaults.sampling, defaults.residual, defaults.max_frames)

    @torch.inference_mode()
    def frames(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs | None = None) -> Iterator[Frame]:
        """A Frame a step, until every row has stopped; a stopped row has ENDED in each code.

        A row's codes depend on its own prompt and seed alone, whoever shares the batch (but for float rounding).
        A row that never has ENDED when the iterator is done was cut at ``max_frames``.
        """
        knobs = knobs or self.knobs
        graph = self._graph_for(prompts, knobs) if self._graphs else None
        try:
            batch: Batch = (
                Rows(self.tts, prompts, seeds, knobs) if graph is None else Graphed(graph, prompts, seeds, knobs)
            )
            for _ in range(knobs.max_frames):
                frame = batch.step()
                if frame is None:
                    return
                yield frame
        finally:
            if graph is not None:
                self._idle.append(graph)

    def _graph_for(self, prompts: Sequence[Prompt], knobs: Knobs) -> FrameGraph:
        """An idle graph of one slot a prompt, with room for them; one is built where none fits.

        Sizes are rounded up to powers of two, so that few are built; one that became too small is let go.
        """
        from quaver.frame import FrameGraph, Weights

        n_positions = max(len(prompt.embeds) for prompt in prompts) + knobs.max_frames
        n_lines = min(max(len(prompt.tail) for prompt in prompts), knobs.max_frames)
        same = [graph for graph in self._idle if graph.n_slots == len(prompts)]
        for graph in same:
            self._idle.remove(graph)
            if graph.capacity >= n_positions and graph.n_lines >= n_lines:
                return graph
        if self._weights is None:
            self._weights = Weights(self.tts)
        return FrameGraph(self._weights, len(prompts), _power_of_two(n_positions), _power_of_two(n_lines))

    def codes(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs | None = None) -> list[Tensor]:
        """Whole utterances: for each prompt its frames [T, Q]."""
        steps = [frame.codes for frame in self.frames(prompts, seeds, knobs)]
        if not steps:
            return [torch.zeros(0, self.tts.config.talker_config.num_code_groups, dtype=torch.long) for _ in prompts]
        stacked = torch.stack(steps, dim=1).cpu()
        return [row[row[:, 0] != ENDED] for row in stacked]

    @cached_property
    def silence(self) -> frozenset[int]:
        """The codes of codebook 0 that the codec gives to silence, its first second aside."""
        encoder = load_codec_encoder(self.tts.checkpoint)
        with torch.inference_mode():
            codes = encoder.encode(torch.zeros(1, 2 * SAMPLE_RATE_HZ))[0, 0]
        return frozenset(codes[len(codes) // 2 :].tolist())

    def speak(
        self,
        utterance: Utterance,
        knobs: Knobs | None = None,
        *,
        chunk_frames: int = 4,
        guard: Guard | None = GUARD,
        settled: bool = False,
    ) -> Iterator[Chunk]:
        """Speech as it is made, in chunks of ``chunk_frames`` frames (the last of a sentence may be shorter).

        Long text is spoken sentence by sentence, each with the next seed, joined by a short silence; the edges of a
        sentence are faded over 5 ms, so that no join clicks. ``guard`` says what is done about a sentence that never
        ends; None leaves the model alone. What was sent cannot be taken back: only with ``settled``, where a sentence
        is not heard before it has ended, is it cut exactly, or tried again.
        Raises what TTS.prompt raises, before the first chunk, and RecipeError for retries of what is sent at once.
        """
        if chunk_frames < 1:
            raise RecipeError(f"chunk_frames is {chunk_frames}: it must be 1 or more")
        if guard is not None and guard.retries and not settled:
            raise RecipeError(f"retries is {guard.retries}: sound that was sent cannot be tried again (streaming: 0)")
        sentences = split_sentences(utterance.text)
        # All prompts are built first: whatever is wrong with the request shows before any sound.
        parts = [
            replace(utterance, text=text, seed=utterance.seed + index)
            for index, text in enumerate(sentences or [utterance.text])
        ]
        prompts = [self.tts.prompt(part) for part in parts]
        takes = [
            _Take(self, part, prompt, knobs or self.knobs, guard) for part, prompt in zip(parts, prompts, strict=True)
        ]
        return self._speak(takes, chunk_frames, settled=settled)

    def _speak(self, takes: Sequence[_Take], chunk_frames: int, *, settled: bool) -> Iterator[Chunk]:
        rate_hz = self.tts.checkpoint.codec_config.output_sample_rate
        gap = np.zeros(round(_GAP_S * rate_hz), np.float32)
        for index, take in enumerate(takes):
            yield from self._sentence(take, take.settled() if settled else take.streamed(), chunk_frames)
            if index + 1 < len(takes):
                yield Chunk(Audio(gap, rate_hz), 0)

    def _sentence(self, take: _Take, frames: Iterable[Tensor], chunk_frames: int) -> Iterator[Chunk]:
        """One sentence's chunks. Its last 5 ms are held back until it is known whether they end it."""
        rate_hz = self.tts.checkpoint.codec_config.output_sample_rate
        n_fade = round(_FADE_S * rate_hz)
        ramp = np.linspace(0, 1, n_fade, dtype=np.float32)
        stream = self.tts.decoder.stream()
        voice = take.part.voice
        if voice is not None and voice.codes is not None:
            stream.push(voice.codes.to(self.tts.device))
        waiting: list[Tensor] = []
        held = np.zeros(0, np.float32)
        n_sent = 0
        for codes in frames:
            waiting.append(codes)
            if len(waiting) == chunk_frames:
                samples = stream.push(torch.stack(waiting).to(self.tts.device)).float().cpu().numpy()
                if n_sent == 0:
                    samples[:n_fade] *= ramp
                samples = np.concatenate((held, samples))
                samples, held = samples[:-n_fade], samples[-n_fade:]
                yield Chunk(Audio(samples, rate_hz), chunk_frames)
                waiting, n_sent = [], n_sent + chunk_frames
        # What was sent is sent: a sentence that ran away is cut no earlier.
        waiting = waiting[: max(0, take.n_kept - n_sent)]
        if waiting:
            samples = stream.push(torch.stack(waiting).to(self.tts.device)).float().cpu().numpy()
            if n_sent == 0:
                samples[:n_fade] *= ramp
            held = np.concatenate((held, samples))
        held[-n_fade:] *= ramp[::-1]
        yield Chunk(Audio(held, rate_hz), len(waiting), take.reason)

    def say(self, utterance: Utterance, knobs: Knobs | None = None, *, guard: Guard | None = GUARD) -> Speech:
        """The whole speech of ``utterance``: the settled chunks of ``speak``, joined."""
        start = time.perf_counter()
        first_audio_s = 0.0
        chunks: list[Chunk] = []
        for chunk in self.speak(utterance, knobs, chunk_frames=12, guard=guard, settled=True):
            if not chunks:
                first_audio_s = time.perf_counter() - start
            chunks.append(chunk)
        rate_hz = chunks[0].audio.rate_hz
        return Speech(
            audio=Audio(np.concatenate([chunk.audio.samples for chunk in chunks]), rate_hz),
            n_frames=sum(chunk.n_frames for chunk in chunks),
            finish_reasons=tuple(chunk.finish_reason for chunk in chunks if chunk.finish_reason is not None),
            first_audio_s=first_audio_s,
            wall_s=time.perf_counter() - start,
        )


class _Take:
    """A sentence to be spoken; once its frames are there, the ``reason`` it ended and how many are worth keeping."""

    def __init__(self, engine: Engine, part: Utterance, prompt: Prompt, knobs: Knobs, guard: Guard | None) -> None:
        self._engine, self.part, self._prompt, self._knobs, self._guard = engine, part, prompt, knobs, guard
        self.reason: FinishReason = "stop"
        self.n_kept = 0

    @property
    def _ran_away(self) -> bool:
        return self.reason == "runaway-trimmed"

    def settled(self) -> list[Tensor]:
        """The frames [Q] of the first try that does not run away; those of the first of all, cut, where each does."""
        first = list(self.streamed())
        if not self._ran_away or self._guard is None:
            return first
        n_kept = self.n_kept
        for retry in range(1, self._guard.retries + 1):
            again = list(self.streamed(retry))
            if not self._ran_away:
                self.reason = "runaway-retried"
                return again
        self.n_kept = n_kept
        return first[:n_kept]

    def streamed(self, retry: int = 0) -> Iterator[Tensor]:
        """The frames [Q] as they are made, no further than where a watch sees that they ran away."""
        engine, knobs = self._engine, self._knobs
        watch = None if self._guard is None else Watch(length(self.part), lambda: engine.silence)
        n_frames = 0
        for codes, stop in engine.frames([self._prompt], [self.part.seed + retry], knobs):
            n_frames += 1
            runaway: Runaway | None = None if watch is None else watch.push(int(codes[0, 0]), float(stop[0]))
            if runaway is not None:
                self.reason, self.n_kept = "runaway-trimmed", runaway.keep
            if runaway is None or runaway.keep == n_frames:
                yield codes[0]
            if runaway is not None:
                return
        self.reason, self.n_kept = "length" if n_frames == knobs.max_frames else "stop", n_frames


def _power_of_two(n: int) -> int:
    """The least power of two from 64 on that is ``n`` or more."""
    return max(64, 1 << (n - 1).bit_length())
