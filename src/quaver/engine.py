"""Speaking: the one decode loop, and speech from it, streamed or whole.

Shapes: B batch, Q codebooks, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from quaver.audio import Audio
from quaver.errors import RecipeError
from quaver.model.tts import TTS, Prompt, Utterance
from quaver.sampling import ENDED, MIN_FRAMES, Sampling, distribution, draw, uniforms
from quaver.text import split_sentences

if TYPE_CHECKING:
    from quaver.frame import Frame, Weights

FinishReason = Literal["stop", "length"]

_GAP_S = 0.12
_FADE_S = 0.005


@dataclass(frozen=True, slots=True)
class Knobs:
    """How to sample: codebook 0, the residual codebooks, and the most frames an utterance may take."""

    sampling: Sampling
    residual: Sampling
    max_frames: int


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

    def step(self) -> Tensor | None:
        """The next frame's codes [B, Q], ENDED in stopped rows; None once every row has stopped."""


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

    def step(self) -> Tensor | None:
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
        probs, ids = distribution(
            talker.codec_head(self._hidden),
            knobs.sampling,
            banned=self._banned_early if self._frame < MIN_FRAMES else self._banned,
            seen=self._seen,
        )
        first = draw(probs, ids, uniform[:, 0])
        self._alive = self._alive & (first != tts.config.talker_config.codec_eos_token_id)
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
        return torch.where(self._alive[:, None], self._codes, ENDED)


class Graphed:
    """A Batch of which each step is one graph on the GPU; the host looks on one frame late."""

    def __init__(self, frame: Frame, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs) -> None:
        self._frame, self._n_rows = frame, len(prompts)
        for slot, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            frame.join(slot, prompt, seed, knobs.sampling, knobs.residual)
        self._n_asked, self._n_frames = 0, knobs.max_frames
        on_gpu = frame.slots.alive.is_cuda
        self._alive = torch.zeros(knobs.max_frames, self._n_rows, dtype=torch.int32, pin_memory=on_gpu)
        self._asked: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def step(self) -> Tensor | None:
        """See Batch."""
        index = self._n_asked
        self._n_asked += 1
        # The GPU works on the frame after the one that is waited for.
        while len(self._asked) < min(index + 2, self._n_frames):
            self._ask()
        codes, event = self._asked[index]
        if event is not None:
            event.synchronize()
        return codes if bool(self._alive[index].any()) else None

    def _ask(self) -> None:
        index, slots = len(self._asked), self._frame.slots
        self._frame.step()
        codes = slots.codes[index, : self._n_rows].long()
        self._alive[index].copy_(slots.alive[: self._n_rows], non_blocking=True)
        event = torch.cuda.Event() if self._alive.is_pinned() else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        self._asked.append((codes, event))


class Engine:
    """Speaks with one model: by graphs where there is a CUDA device and Triton, in plain PyTorch elsewhere.

    ``graphs`` False keeps to plain PyTorch there too.
    """

    def __init__(self, tts: TTS, *, graphs: bool = True) -> None:
        self.tts = tts
        self._graphs = graphs and tts.device.type == "cuda" and find_spec("triton") is not None
        self._weights: Weights | None = None
        self._idle: list[Frame] = []

    @property
    def knobs(self) -> Knobs:
        """The checkpoint's own knobs."""
        defaults = self.tts.defaults
        return Knobs(defaults.sampling, defaults.residual, defaults.max_frames)

    @torch.inference_mode()
    def frames(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs | None = None) -> Iterator[Tensor]:
        """Frames of codes [B, Q], one a step, until every row has stopped; a stopped row has ENDED in each code.

        A row's codes depend on its own prompt and seed alone, whoever shares the batch (but for float rounding).
        A row that never has ENDED when the iterator is done was cut at ``max_frames``.
        """
        knobs = knobs or self.knobs
        frame = self._frame(prompts, knobs) if self._graphs else None
        try:
            batch: Batch = (
                Rows(self.tts, prompts, seeds, knobs) if frame is None else Graphed(frame, prompts, seeds, knobs)
            )
            for _ in range(knobs.max_frames):
                codes = batch.step()
                if codes is None:
                    return
                yield codes
        finally:
            if frame is not None:
                self._idle.append(frame)

    def _frame(self, prompts: Sequence[Prompt], knobs: Knobs) -> Frame:
        """An idle frame of one slot a prompt, with room for them; one is built where none fits.

        Sizes are rounded up to powers of two, so that few are built; one that became too small is let go.
        """
        from quaver.frame import Frame, Weights

        n_positions = max(len(prompt.embeds) for prompt in prompts) + knobs.max_frames
        n_lines = min(max(len(prompt.tail) for prompt in prompts), knobs.max_frames)
        same = [frame for frame in self._idle if frame.n_slots == len(prompts)]
        for frame in same:
            self._idle.remove(frame)
            if frame.capacity >= n_positions and frame.n_lines >= n_lines:
                return frame
        if self._weights is None:
            self._weights = Weights(self.tts)
        return Frame(self._weights, len(prompts), _power_of_two(n_positions), _power_of_two(n_lines))

    def codes(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs | None = None) -> list[Tensor]:
        """Whole utterances: for each prompt its frames [T, Q]."""
        steps = list(self.frames(prompts, seeds, knobs))
        if not steps:
            return [torch.zeros(0, self.tts.config.talker_config.num_code_groups, dtype=torch.long) for _ in prompts]
        stacked = torch.stack(steps, dim=1).cpu()
        return [row[row[:, 0] != ENDED] for row in stacked]

    def speak(self, utterance: Utterance, knobs: Knobs | None = None, *, chunk_frames: int = 4) -> Iterator[Chunk]:
        """Speech as it is made, in chunks of ``chunk_frames`` frames (the last of a sentence may be shorter).

        Long text is spoken sentence by sentence, each with the next seed, joined by a short silence; the edges of a
        sentence are faded over 5 ms, so that no join clicks. Raises what TTS.prompt raises, before the first chunk.
        """
        if chunk_frames < 1:
            raise RecipeError(f"chunk_frames is {chunk_frames}: it must be 1 or more")
        sentences = split_sentences(utterance.text)
        # All prompts are built first: whatever is wrong with the request shows before any sound.
        parts = [
            replace(utterance, text=text, seed=utterance.seed + index)
            for index, text in enumerate(sentences or [utterance.text])
        ]
        prompts = [self.tts.prompt(part) for part in parts]
        return self._speak(parts, prompts, knobs or self.knobs, chunk_frames)

    def _speak(
        self, parts: Sequence[Utterance], prompts: Sequence[Prompt], knobs: Knobs, chunk_frames: int
    ) -> Iterator[Chunk]:
        rate_hz = self.tts.checkpoint.codec_config.output_sample_rate
        gap = np.zeros(round(_GAP_S * rate_hz), np.float32)
        for index, (part, prompt) in enumerate(zip(parts, prompts, strict=True)):
            yield from self._sentence(part, prompt, knobs, chunk_frames)
            if index + 1 < len(parts):
                yield Chunk(Audio(gap, rate_hz), 0)

    def _sentence(self, part: Utterance, prompt: Prompt, knobs: Knobs, chunk_frames: int) -> Iterator[Chunk]:
        """One sentence's chunks. Its last 5 ms are held back until it is known whether they end it."""
        rate_hz = self.tts.checkpoint.codec_config.output_sample_rate
        n_fade = round(_FADE_S * rate_hz)
        ramp = np.linspace(0, 1, n_fade, dtype=np.float32)
        stream = self.tts.codec.decoder.stream()
        if part.voice is not None and part.voice.codes is not None:
            stream.push(part.voice.codes.to(self.tts.device))
        waiting: list[Tensor] = []
        held = np.zeros(0, np.float32)
        n_frames = n_sent = 0
        for frame in self.frames([prompt], [part.seed], knobs):
            n_frames += 1
            waiting.append(frame[0])
            if len(waiting) == chunk_frames:
                samples = stream.push(torch.stack(waiting)).float().cpu().numpy()
                if n_frames == chunk_frames:
                    samples[:n_fade] *= ramp
                samples = np.concatenate((held, samples))
                samples, held = samples[:-n_fade], samples[-n_fade:]
                yield Chunk(Audio(samples, rate_hz), chunk_frames)
                waiting, n_sent = [], n_frames
        if waiting:
            samples = stream.push(torch.stack(waiting)).float().cpu().numpy()
            if n_sent == 0:
                samples[:n_fade] *= ramp
            held = np.concatenate((held, samples))
        held[-n_fade:] *= ramp[::-1]
        reason: FinishReason = "length" if n_frames == knobs.max_frames else "stop"
        yield Chunk(Audio(held, rate_hz), n_frames - n_sent, reason)

    def say(self, utterance: Utterance, knobs: Knobs | None = None) -> Speech:
        """The whole speech of ``utterance``: the chunks of ``speak``, joined."""
        start = time.perf_counter()
        first_audio_s = 0.0
        chunks: list[Chunk] = []
        for chunk in self.speak(utterance, knobs, chunk_frames=12):
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


def _power_of_two(n: int) -> int:
    """The least power of two from 64 on that is ``n`` or more."""
    return max(64, 1 << (n - 1).bit_length())
