"""Training examples of the talker as arrays of ids: the prompt of `TTS.prompt` and the frames after it.

A plan says for each position which text id and which codec id (or which frame of speech) are summed there. Whole
batches are laid out at once on the model's device, from clips that lie one after the other in flat tensors.
`tests/test_training.py` holds the sums against `TTS.inputs` itself. B rows, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quaver.config import ModelConfig
from quaver.text import Tokenizer

NOTHING = -1
_LONGEST_HEAD = 9


@dataclass(frozen=True, slots=True)
class Speech:
    """Clips by row, each field [B]: ``n_text`` text ids from ``text`` on, ``n_frames`` frames from ``start`` on."""

    text: Tensor
    n_text: Tensor
    start: Tensor
    n_frames: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Examples side by side, int64. NOTHING stands for none."""

    text: Tensor
    """[B, L]: the text id at a position."""
    codec: Tensor
    """[B, L]: the control id at a position."""
    frame: Tensor
    """[B, L]: the row, among all frames, of the speech that is heard at a position."""
    own: Tensor
    """[B, L] bool: whether that speech is the utterance's own, not the reference's."""
    speaker: Tensor
    """[B]: the position of the speaker vector."""
    first: Tensor
    """[B]: the position that predicts the first frame."""
    spoken: Tensor
    """[B]: the position of the first text id that is to be spoken."""


def length(
    n_text: Tensor, n_frames: Tensor, n_ref_text: Tensor, n_ref: Tensor, whole: Tensor, unnamed: Tensor
) -> Tensor:
    """The positions [B] that examples take."""
    prompt = torch.where(unnamed, _LONGEST_HEAD - 1, _LONGEST_HEAD) + torch.where(whole, n_ref_text + n_text + 1, 0)
    return prompt + 1 + n_ref + n_frames


class Planner:
    """Lays out examples with a model's control ids; ``texts`` and all ids on one device."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, texts: Tensor) -> None:
        talker = config.talker_config
        self.texts, self.config, self.talker = texts, config, talker
        pad, bos, filler = config.tts_pad_token_id, config.tts_bos_token_id, talker.codec_pad_id
        role = tokenizer.ids_speech("a")[:3]
        english = [talker.codec_think_id, talker.codec_think_bos_id, talker.codec_language_id.get("english", NOTHING)]
        heads = []
        for tags in (english, [talker.codec_nothink_id, talker.codec_think_bos_id]):
            codec = [NOTHING] * 3 + [*tags, talker.codec_think_eos_id, NOTHING, filler]
            text = [*role, *[pad] * (len(codec) - 4), bos]
            short = _LONGEST_HEAD - len(codec)
            heads.append([text + [pad] * short, codec + [NOTHING] * short])
        self.heads = torch.tensor(heads, device=texts.device)

    def plan(self, said: Speech, reference: Speech, whole: Tensor, unnamed: Tensor, n_positions: int) -> Plan:
        """The plan of ``said``, cloned in context from ``reference`` where it has frames. Flags [B] bool."""
        config, talker = self.config, self.talker
        at = torch.arange(n_positions, device=self.texts.device)[None]
        body = torch.where(unnamed, _LONGEST_HEAD - 1, _LONGEST_HEAD)[:, None]
        n_ref_text, n_ref = reference.n_text[:, None], reference.n_frames[:, None]
        n_text = n_ref_text + said.n_text[:, None] + 1
        into = at - body
        since = into - torch.where(whole[:, None], n_text, 0)
        head = self.heads[unnamed.long()][:, :, at[0].clamp(max=_LONGEST_HEAD - 1)]
        index = torch.where(into < n_ref_text, reference.text[:, None] + into, said.text[:, None] + into - n_ref_text)
        text = self.texts[index.clamp(0, len(self.texts) - 1)].long()
        text = torch.where(into == n_text - 1, config.tts_eos_token_id, text)
        text = torch.where(into < n_text, text, config.tts_pad_token_id)
        codec = torch.where(since == 0, talker.codec_bos_id, torch.where(since < 0, talker.codec_pad_id, NOTHING))
        heard = since - 1
        own = (heard >= n_ref) & (heard < n_ref + said.n_frames[:, None])
        frame = torch.where(own, said.start[:, None] + heard - n_ref, NOTHING)
        frame = torch.where((heard >= 0) & (heard < n_ref), reference.start[:, None] + heard, frame)
        begun = into >= 0
        return Plan(
            torch.where(begun, text, head[:, 0]),
            torch.where(begun, codec, head[:, 1]),
            frame,
            own,
            body[:, 0] - 2,
            (at - since)[:, 0] + reference.n_frames,
            body[:, 0] + reference.n_text,
        )
