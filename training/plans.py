"""Training examples of the talker as arrays of ids: the prompt of `TTS.prompt` and the frames after it.

A plan says for each position which text id and which codec id (or which frame of speech) are summed there, and what
is to be predicted. `tests/test_training.py` holds the sums against `TTS.prompt` itself. L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quaver.config import ModelConfig
from quaver.model.tts import Layout
from quaver.text import Tokenizer

NOTHING = -1


@dataclass(frozen=True, slots=True)
class Speech:
    """A clip among all frames of the training set: ``n_frames`` frames from row ``start`` on."""

    text: str
    voice: int
    start: int
    n_frames: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One example. ``text``, ``codec``, ``frame`` and ``target`` are int32 [L]; NOTHING stands for none."""

    text: np.ndarray
    codec: np.ndarray
    frame: np.ndarray
    """The row, among all frames, of the speech that is heard at a position."""
    target: np.ndarray
    """The row of the frame to be predicted at a position."""
    speaker: int
    """The position of the speaker vector."""
    first: int
    """The position that predicts the first frame."""
    n_frames: int
    voice: int


class Planner:
    """Makes plans with a model's control ids and tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, n_positions: int) -> None:
        self.config, self.talker, self.tokenizer = config, config.talker_config, tokenizer
        self.n_positions = n_positions

    def plan(self, said: Speech, language: str, layout: Layout, reference: Speech | None = None) -> Plan | None:
        """The plan of ``said``, cloned in context from ``reference`` where given; None when it is too long."""
        config, talker = self.config, self.talker
        pad, filler = config.tts_pad_token_id, talker.codec_pad_id
        ids = self.tokenizer.ids_speech(said.text)
        text = [*ids[3:-5], config.tts_eos_token_id]
        tags = [talker.codec_think_id, talker.codec_think_bos_id, talker.codec_language_id.get(language, NOTHING)]
        if language == "auto":
            tags = [talker.codec_nothink_id, talker.codec_think_bos_id]
        head = [*tags, talker.codec_think_eos_id, NOTHING, filler]
        # Rows of (text id, codec id, frame).
        rows = [(i, NOTHING, NOTHING) for i in ids[:3]]
        rows += [(pad, c, NOTHING) for c in head[:-1]] + [(config.tts_bos_token_id, head[-1], NOTHING)]
        speaker = len(rows) - 2
        speech = [(talker.codec_bos_id, NOTHING)]
        if reference is not None:
            text = self.tokenizer.ids_reference(reference.text)[3:-2] + text
            speech += [(NOTHING, reference.start + i) for i in range(reference.n_frames)]
        if layout == "whole":
            rows += [(i, filler, NOTHING) for i in text]
            text = []
        rows += [(text[i] if i < len(text) else pad, c, f) for i, (c, f) in enumerate(speech)]
        first = len(rows) - 1
        tail = text[len(speech) :]
        rows += [(tail[i] if i < len(tail) else pad, NOTHING, said.start + i) for i in range(said.n_frames)]
        if len(rows) > self.n_positions:
            return None
        rows += [(pad, filler, NOTHING)] * (self.n_positions - len(rows))
        table = np.array(rows, dtype=np.int32)
        target = np.full(self.n_positions, NOTHING, dtype=np.int32)
        target[first : first + said.n_frames] = said.start + np.arange(said.n_frames)
        text_ids, codec_ids, frames = table.T.copy()
        return Plan(text_ids, codec_ids, frames, target, speaker, first, said.n_frames, said.voice)
