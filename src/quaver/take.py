"""One sentence on its way from a prompt to frames: watched, cut where it runs away, or tried again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from quaver.guard import Guard, Runaway, Watch, length
from quaver.model.tts import Prompt, Utterance

if TYPE_CHECKING:
    from quaver.engine import Engine, Knobs

FinishReason = Literal["stop", "length", "runaway-trimmed", "runaway-retried"]
"""How a sentence ended: by itself; at ``max_frames``; cut where it should have ended; by itself with a later seed."""


class Take:
    """A sentence to be spoken; once its frames are there, the ``reason`` it ended and how many are worth keeping."""

    def __init__(self, engine: Engine, part: Utterance, prompt: Prompt, knobs: Knobs, guard: Guard | None) -> None:
        self._engine, self.part, self.prompt, self._guard = engine, part, prompt, guard
        self._length = None if guard is None else length(part)
        # The watch ends it there: a cache need not be longer.
        most = knobs.max_frames if self._length is None else min(knobs.max_frames, self._length.most)
        self.knobs, self._max_frames = replace(knobs, max_frames=most), knobs.max_frames
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
        engine = self._engine
        watch = None if self._length is None else Watch(self._length, lambda: engine.silence)
        n_frames = 0
        for codes, stop in engine.frames([self.prompt], [self.part.seed + retry], self.knobs):
            n_frames += 1
            runaway: Runaway | None = None if watch is None else watch.push(int(codes[0, 0]), float(stop[0]))
            if runaway is not None:
                self.reason, self.n_kept = "runaway-trimmed", runaway.keep
            if runaway is None or runaway.keep == n_frames:
                yield codes[0]
            if runaway is not None:
                return
        self.reason, self.n_kept = "length" if n_frames == self._max_frames else "stop", n_frames
