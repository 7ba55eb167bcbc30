"""Speaking: the one decode loop, and speech from it, streamed or whole.

Shapes: B batch, Q codebooks, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quaver.audio import Audio
from quaver.errors import RecipeError
from quaver.model.tts import TTS, Prompt, Utterance
from quaver.sampling import Sampling, distribution, draw, uniforms
from quaver.text import split_sentences

MIN_FRAMES = 2
"""No utterance stops before this many frames (official generation code)."""

FinishReason = Literal["stop", "length"]
ENDED = -1
"""The code of a row that has stopped."""

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
    def frames(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs | None = None) -> Iterator[Tensor]:
        """Frames of codes [B, Q], one a step, until every row has stopped; a stopped row has ENDED in each code.

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
            probs, ids = distribution(
                talker.codec_head(hidden),
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
            yield torch.where(alive[:, None], stacked, ENDED)
            text = torch.stack([prompt.text_at(frame) for prompt in prompts])
            x = embedded + predictor.embed(stacked[:, 1:]) + text
            hidden = talker.hidden(x[:, None], cache)[:, 0]

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
