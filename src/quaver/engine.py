"""Speaking: the one decode loop, and speech from it, streamed or whole.

Shapes: B batch, Q codebooks, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quaver import meter, recorded, runtime
from quaver.audio import Audio
from quaver.batch import CHUNK_FRAMES, Batch, Frame, Graphed, Knobs, Rows
from quaver.checkpoint import Checkpoint
from quaver.errors import BudgetError, RecipeError
from quaver.guard import Guard
from quaver.meter import Clock
from quaver.model.encoders import load_codec_encoder
from quaver.model.speaker import SAMPLE_RATE_HZ
from quaver.model.tts import TTS, Prompt, Utterance, require_device
from quaver.model.visiting import Visiting
from quaver.sampling import ENDED
from quaver.take import FinishReason, Take
from quaver.text import split_sentences

if TYPE_CHECKING:
    from quaver.frame import FrameGraph, Weights
    from quaver.model.codec import CodecStream

__all__ = ["GUARD", "ROOM_S", "Chunk", "Engine", "FinishReason", "Frame", "Knobs", "Speech"]

GUARD = Guard()
"""What is done by default about speech that never ends: it is cut."""

ROOM_S = 30.0
"""How long a sentence may be, by default, where memory is limited: what is loaded leaves room for that."""

T = TypeVar("T")

_GAP_S = 0.12
_FADE_S = 0.005


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
    """Speaks with one model: by graphs where there is a CUDA device and Triton, in plain PyTorch elsewhere.

    ``graphs`` False keeps to plain PyTorch there too, as do layers that only visit the device: a graph's must stay.
    ``clock`` counts where the time of plain PyTorch goes. ``memory_bytes`` is what all of it may take of the device:
    what would take more is refused, with the figures, before anything is said. Without it, prompts and sound are
    recorded, which holds the memory that they work in.
    """

    def __init__(
        self, tts: TTS, *, graphs: bool = True, memory_bytes: int | None = None, clock: Clock | None = None
    ) -> None:
        self.tts = tts
        self._clock = clock
        self._sounds: list[CodecStream] = []
        # A graph knows where weights are.
        stay = not isinstance(tts.talker.model.layers, Visiting)
        self._graphs = graphs and stay and tts.device.type == "cuda" and find_spec("triton") is not None
        self._memory_bytes = memory_bytes
        self._weights: Weights | None = None
        self._idle: list[FrameGraph] = []
        self._n_positions = 0

    @classmethod
    def load(
        cls, source: str | Path | Checkpoint, *, codec: str | Path | None = None, device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None, memory_bytes: int | None = None, room_s: float = ROOM_S,
    ) -> Engine:  # fmt: skip
        """The model that ``source`` names (see TTS.load), ready to speak in ``memory_bytes`` of ``device``.

        Where that is not much, more of it waits on the host, as far as a sentence of ``room_s`` seconds needs it.
        PyTorch is held to it in the whole process. Raises BudgetError, with the figures, where nothing fits, and where
        memory runs out on the way.
        """
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source, codec=codec)
        try:
            return cls._loaded(checkpoint, torch.device(device), dtype, memory_bytes, room_s)
        except (MemoryError, RuntimeError) as error:
            short = meter.shortage(error)
            if short is None:
                raise
        # Not while the error is at hand: it holds on to all that was brought.
        raise BudgetError(
            f"out of memory while {checkpoint.path.name} was brought to {device} ({short}): leave more of it on the "
            "host (--memory), or take a smaller model (quaver quantize)"
        )

    @classmethod
    def _loaded(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, memory_bytes: int | None,
        room_s: float,
    ) -> Engine:  # fmt: skip
        if memory_bytes is None:
            return cls(TTS.load(checkpoint, device=device, dtype=dtype))
        device = require_device(device)
        fits = runtime.fit(checkpoint, runtime.Request.seconds(room_s), device, memory_bytes, dtype)
        meter.cap(device, memory_bytes)
        tts = TTS.load(checkpoint, device=device, dtype=dtype, placement=fits.placement)
        engine = cls(tts, memory_bytes=memory_bytes)
        if device.type == "cuda":
            if engine._graphs:
                engine._fused()
            meter.repack(device, tts.tensors())
        return engine

    @property
    def knobs(self) -> Knobs:
        """The checkpoint's own knobs."""
        defaults = self.tts.defaults
        return Knobs(defaults.sampling, defaults.residual, defaults.max_frames)

    @property
    def _records(self) -> bool:
        """Whether prompts and sound are recorded. A recording keeps what it works in: none where memory is limited."""
        return self._graphs and self._memory_bytes is None

    def release(self) -> None:
        """Lets go of what is kept for the next request: caches, graphs, recordings. Weights stay."""
        self._idle.clear()
        self._sounds.clear()
        recorded.forget()
        if self.tts.device.type == "cuda":
            torch.cuda.empty_cache()

    def _told(self, steps: Iterator[T]) -> Iterator[T]:
        """``steps``; where memory runs out in them, a BudgetError, and the engine can be asked for less."""
        while True:
            short = None
            try:
                step = next(steps)
            except StopIteration:
                return
            except (MemoryError, RuntimeError) as error:
                short = meter.shortage(error)
                if short is None:
                    raise
            if short is not None:
                # Not while the error is at hand: it holds on to all that was at work.
                self.release()
                raise BudgetError(
                    f"out of memory on {self.tts.device} ({short}): say less at a time (shorter sentences, "
                    "--max-seconds, fewer utterances side by side), or leave more of the model on the host (--memory)"
                )
            yield step

    def frames(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs | None = None) -> Iterator[Frame]:
        """A Frame a step, until every row has stopped; a stopped row has ENDED in each code.

        A row's codes depend on its own prompt and seed alone, whoever shares the batch (but for float rounding).
        A row that never has ENDED when the iterator is done was cut at ``max_frames``. Raises BudgetError where memory
        does not suffice.
        """
        return self._told(self._frames(prompts, seeds, knobs or self.knobs))

    @torch.inference_mode()
    def _frames(self, prompts: Sequence[Prompt], seeds: Sequence[int], knobs: Knobs) -> Iterator[Frame]:
        self._check_room(prompts, knobs)
        graph = self._graph_for(prompts, knobs) if self._graphs else None
        whole = False
        try:
            self._tidy()
            batch: Batch = (
                Rows(self.tts, prompts, seeds, knobs, self._clock)
                if graph is None
                else Graphed(graph, prompts, seeds, knobs)
            )
            self._tidy()
            for _ in range(knobs.max_frames):
                whole = False
                frame = batch.step()
                whole = True
                if frame is None:
                    return
                yield frame
        finally:
            # A graph whose step failed may be in any state.
            if graph is not None and whole:
                self._idle.append(graph)

    def _tidy(self) -> None:
        """Gives back what PyTorch keeps for reuse, where memory is limited: a prompt and sound take other sizes."""
        if self._memory_bytes is not None and self.tts.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_room(self, prompts: Sequence[Prompt], knobs: Knobs) -> None:
        """Raises BudgetError, with the figures, where what is asked for would take more memory than is allowed."""
        if self._memory_bytes is not None:
            n_prompt = max(len(prompt.embeds) for prompt in prompts)
            request = runtime.Request(knobs.max_frames, n_prompt, len(prompts))
            tts = self.tts
            told = runtime.weigh(tts.checkpoint, request, tts.device, tts.placement, tts.dtype, limited=True)
            runtime.check(told, self._memory_bytes)

    def _graph_for(self, prompts: Sequence[Prompt], knobs: Knobs) -> FrameGraph:
        """An idle graph of one slot a prompt, with room for them; one is built where none fits.

        Sizes are rounded up to powers of two, so that few are built, and where memory is limited as little as can be,
        for there only one is kept; one that became too small is let go.
        """
        from quaver.frame import FrameGraph

        scarce = self._memory_bytes is not None
        n_positions = max(len(prompt.embeds) for prompt in prompts) + knobs.max_frames
        n_lines = min(max(len(prompt.tail) for prompt in prompts), knobs.max_frames)
        for index, graph in enumerate(self._idle):
            if graph.n_slots == len(prompts) and graph.capacity >= n_positions and graph.n_lines >= n_lines:
                return self._idle.pop(index)
        self._idle = [] if scarce else [graph for graph in self._idle if graph.n_slots != len(prompts)]
        sizes = (max(n_positions, self._n_positions), n_lines)
        n_positions, n_lines = (_in_steps(n) if scarce else _power_of_two(n) for n in sizes)
        return FrameGraph(self._fused(), len(prompts), n_positions, n_lines, whole=True)

    def _fused(self) -> Weights:
        """The weights as the kernels read them: fused when they are first asked for."""
        from quaver.frame import Weights

        if self._weights is None:
            self._weights = Weights(self.tts, records=self._records)
            # What fusing let go of has other sizes than what speaking asks for.
            torch.cuda.empty_cache()
        return self._weights

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
        chunk_frames: int = CHUNK_FRAMES,
        guard: Guard | None = GUARD,
        settled: bool = False,
    ) -> Iterator[Chunk]:
        """Speech as it is made, in chunks of ``chunk_frames`` frames (the last of a sentence may be shorter).

        Long text is spoken sentence by sentence, each with the next seed, joined by a short silence; the edges of a
        sentence are faded over 5 ms, so that no join clicks. ``guard`` says what is done about a sentence that never
        ends; None leaves the model alone. What was sent cannot be taken back: only with ``settled``, where a sentence
        is not heard before it has ended, is it cut exactly, or tried again.
        Raises what TTS.prompt raises, before the first chunk, RecipeError for retries of what is sent at once, and
        BudgetError where memory does not suffice.
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
            Take(self, part, prompt, knobs or self.knobs, guard) for part, prompt in zip(parts, prompts, strict=True)
        ]
        for take in takes:
            self._check_room([take.prompt], take.knobs)
        # One graph serves all sentences: the first is as long as the longest needs.
        self._n_positions = max(len(take.prompt.embeds) + take.knobs.max_frames for take in takes)
        return self._told(self._speak(takes, chunk_frames, settled=settled))

    def _speak(self, takes: Sequence[Take], chunk_frames: int, *, settled: bool) -> Iterator[Chunk]:
        rate_hz = self.tts.checkpoint.codec_config.output_sample_rate
        gap = np.zeros(round(_GAP_S * rate_hz), np.float32)
        for index, take in enumerate(takes):
            yield from self._sentence(take, take.settled() if settled else take.streamed(), chunk_frames)
            if index + 1 < len(takes):
                yield Chunk(Audio(gap, rate_hz), 0)

    def _stream(self) -> CodecStream:
        """A stream at frame 0: an idle one, for what was recorded is its own, or a new one."""
        # Weights that are brought for each push would be held by the recording.
        recorded = self._records and not self.tts.placement.sound_on_host
        return self._sounds.pop() if self._sounds else self.tts.decoder.stream(recorded=recorded)

    def _sound(self, stream: CodecStream, frames: Sequence[Tensor]) -> NDArray[np.float32]:
        """The next samples: the one wait for the device in a chunk, which is at work on the frame after these."""
        codes = torch.stack(list(frames)).to(self.tts.device, non_blocking=True)
        samples: NDArray[np.float32] = stream.push(codes).float().cpu().numpy()
        return samples

    def _sentence(self, take: Take, frames: Iterable[Tensor], chunk_frames: int) -> Iterator[Chunk]:
        """One sentence's chunks. Its last 5 ms are held back until it is known whether they end it."""
        rate_hz = self.tts.checkpoint.codec_config.output_sample_rate
        n_fade = round(_FADE_S * rate_hz)
        ramp = np.linspace(0, 1, n_fade, dtype=np.float32)
        stream = self._stream()
        voice = take.part.voice
        if voice is not None and voice.codes is not None:
            stream.push(voice.codes.to(self.tts.device))
        waiting: list[Tensor] = []
        held = np.zeros(0, np.float32)
        n_sent = 0
        for codes in frames:
            waiting.append(codes)
            if len(waiting) == chunk_frames:
                samples = self._sound(stream, waiting)
                if n_sent == 0:
                    samples[:n_fade] *= ramp
                samples = np.concatenate((held, samples))
                samples, held = samples[:-n_fade], samples[-n_fade:]
                yield Chunk(Audio(samples, rate_hz), chunk_frames)
                waiting, n_sent = [], n_sent + chunk_frames
        # What was sent is sent: a sentence that ran away is cut no earlier.
        waiting = waiting[: max(0, take.n_kept - n_sent)]
        if waiting:
            samples = self._sound(stream, waiting)
            if n_sent == 0:
                samples[:n_fade] *= ramp
            held = np.concatenate((held, samples))
        if self._records:
            # Now, and not when the next listener waits.
            stream.reset()
            self._sounds.append(stream)
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


def _power_of_two(n: int) -> int:
    """The least power of two from 64 on that is ``n`` or more."""
    return max(64, 1 << (n - 1).bit_length())


def _in_steps(n: int) -> int:
    """The least multiple of the step of a cache's length that is ``n`` or more."""
    return -(-n // runtime.POSITIONS) * runtime.POSITIONS
