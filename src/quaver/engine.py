"""Speaking: the one decode loop, and speech from it, streamed or whole.

Shapes: B batch, Q codebooks, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quaver.audio import Audio
from quaver.errors import RecipeError
from quaver.guard import Guard, Runaway, Watch, length
from quaver.model.speaker import SAMPLE_RATE_HZ
from quaver.model.tts import TTS, Prompt, Utterance
from quaver.sampling import Sampling, distribution, draw, uniforms
from quaver.text import split_sentences

MIN_FRAMES = 2
"""No utterance stops before this many frames (official generation code)."""

FinishReason = Literal["stop", "length", "runaway-trimmed", "runaway-retried"]
"""How a sentence ended: by itself; at ``max_frames``; cut where it should have ended; by itself with a later seed."""

ENDED = -1
"""The code of a row that has stopped."""

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
    leaves the stop id out.
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


class Engine:
    """Speaks with one model."""

    def __init__(self, tts: TTS) -> None:
        self.tts = tts

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
        tts, knobs = self.tts, knobs or self.knobs
        talker, predictor = tts.talker, tts.talker.code_predictor
        n_rows, n_codebooks = len(prompts), tts.config.talker_config.num_code_groups
        stop_id = tts.config.talker_config.codec_eos_token_id
        banned, banned_early = tts.suppressed(stop_too=False), tts.suppressed(stop_too=True)
        seed = torch.tensor(seeds, dtype=torch.long, device=tts.device)
        seen = torch.zeros(n_rows, tts.config.talker_config.vocab_size, dtype=torch.bool, device=tts.device)
        alive = torch.ones(n_rows, dtype=torch.bool, device=tts.device)

        lengths = torch.tensor([len(p.embeds) for p in prompts], device=tts.device)
        embeds = torch.nn.utils.rnn.pad_sequence([p.embeds for p in prompts], batch_first=True)
        cache = talker.cache(n_rows, embeds.shape[1] + knobs.max_frames, embeds)
        hidden = talker.hidden(embeds, cache, lengths)
        hidden = hidden[torch.arange(n_rows, device=tts.device), lengths - 1]
        small_cache = predictor.cache(n_rows, embeds)

        for frame in range(knobs.max_frames):
            uniform = uniforms(seed, frame, n_codebooks)
            logits = talker.codec_head(hidden)
            stop = logits.float().softmax(-1)[:, stop_id]
            probs, ids = distribution(
                logits,
                knobs.sampling,
                banned=banned_early if frame < MIN_FRAMES else banned,
                seen=seen,
            )
            first = draw(probs, ids, uniform[:, 0])
            alive = alive & (first != stop_id)
            if not bool(alive.any()):
                return
            seen.scatter_(1, first[:, None], True)
            # A stopped row goes on in the batch with any code: nobody reads it.
            codes = [torch.where(alive, first, 0)]
            embedded = talker.embed_codec(codes[0])
            logits = predictor.start(hidden, embedded, small_cache)
            for codebook in range(1, n_codebooks):
                codes.append(draw(*distribution(logits, knobs.residual), uniform[:, codebook]))
                if codebook < n_codebooks - 1:
                    logits = predictor.step(codebook, codes[-1], small_cache)
            stacked = torch.stack(codes, dim=1)
            yield Frame(torch.where(alive[:, None], stacked, ENDED), stop)
            text = torch.stack([prompt.text_at(frame) for prompt in prompts])
            x = embedded + predictor.embed(stacked[:, 1:]) + text
            hidden = talker.hidden(x[:, None], cache)[:, 0]

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
        encoder = self.tts.codec.encoder
        parameter = next(encoder.parameters())
        with torch.inference_mode():
            nothing = torch.zeros(1, 2 * SAMPLE_RATE_HZ, dtype=parameter.dtype, device=parameter.device)
            codes = encoder.encode(nothing)[0, 0]
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
        stream = self.tts.codec.decoder.stream()
        voice = take.part.voice
        if voice is not None and voice.codes is not None:
            stream.push(voice.codes.to(self.tts.device))
        waiting: list[Tensor] = []
        held = np.zeros(0, np.float32)
        n_sent = 0
        for codes in frames:
            waiting.append(codes)
            if len(waiting) == chunk_frames:
                samples = stream.push(torch.stack(waiting)).float().cpu().numpy()
                if n_sent == 0:
                    samples[:n_fade] *= ramp
                samples = np.concatenate((held, samples))
                samples, held = samples[:-n_fade], samples[-n_fade:]
                yield Chunk(Audio(samples, rate_hz), chunk_frames)
                waiting, n_sent = [], n_sent + chunk_frames
        # What was sent is sent: a sentence that ran away is cut no earlier.
        waiting = waiting[: max(0, take.n_kept - n_sent)]
        if waiting:
            samples = stream.push(torch.stack(waiting)).float().cpu().numpy()
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
