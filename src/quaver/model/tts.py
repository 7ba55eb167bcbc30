"""The whole model: opened from a checkpoint, it enrols voices, builds prompts and forces known speech.

Shapes: B batch, T frames, P prompt positions, S text positions, Q codebooks, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from quaver import audio as audio_files
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.config import SUPPRESSED_IDS, ModelConfig, read_json
from quaver.errors import CheckpointError, RecipeError, VoiceError
from quaver.int4 import Int4Linear
from quaver.int8 import Int8Embedding, Int8Linear
from quaver.model import speaker as speaker_encoder
from quaver.model.codec import CodecDecoder
from quaver.model.codec_encoder import Codec
from quaver.model.encoders import load_codec_encoder, load_speaker_encoder
from quaver.model.filling import fill, map_anew
from quaver.model.homes import ENCODER, HELD, LAYERS, TEXT_EMBEDDING, Placement, default_dtype, homes, layers_bytes
from quaver.model.sparing import lent
from quaver.model.speaker import SpeakerEncoder
from quaver.model.stepper import attach
from quaver.model.talker import Talker
from quaver.model.visiting import Visiting
from quaver.sampling import Sampling
from quaver.text import Tokenizer, check_text
from quaver.voice import Voice

Layout = Literal["stream", "whole"]
"""How text meets speech: one text token a frame, or the whole text before the first frame."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """What to say and how: text, language, voice, an instruction in words, a seed, and the text layout."""

    text: str
    language: str = "auto"
    voice: Voice | None = None
    instruct: str | None = None
    seed: int = 0
    layout: Layout = "stream"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Talker inputs: ``embeds`` [P, D] before the first frame; ``tail`` [S, D], one row added to each frame.

    The last row of ``tail`` holds for every later frame.
    """

    embeds: Tensor
    tail: Tensor


@dataclass(frozen=True, slots=True)
class Logits:
    """What the model thinks of known speech of T frames.

    ``talker`` [T + 1, V]: row t predicts codebook 0 of frame t, row T what follows (the stop id).
    ``residual`` [T, Q - 1, V']: codebooks 1 to Q - 1. ``hidden`` [T + 1, D]: what the code predictor is handed.
    """

    talker: Tensor
    residual: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Defaults:
    """The checkpoint's own sampling, from generation_config.json."""

    sampling: Sampling = field(default_factory=Sampling)
    residual: Sampling = field(default_factory=lambda: Sampling(penalty=1.0))
    max_frames: int = 2048


class Model(nn.Module):
    """The modules of ``model.safetensors`` under their checkpoint names, in INT4 and INT8 where it is quantized.

    Its names, shapes and types say how each tensor is stored: writing, reading and planning all follow it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.talker = Talker(config.talker_config)
        speaker = config.speaker_encoder_config
        self.speaker_encoder: SpeakerEncoder | None = None
        if config.has_speaker_encoder:
            if speaker is None:
                raise CheckpointError("config.json: a base model needs speaker_encoder_config")
            self.speaker_encoder = SpeakerEncoder(speaker)
        own, in_int8 = config.quaver, set[str]()
        for name, module in list(self.named_modules()):
            stored = _as_stored(name, module, config)
            if stored is not module:
                parent, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(parent), leaf, stored)
                in_int8 |= {name} if isinstance(stored, Int8Linear | Int8Embedding) else set()
        for part in own.int8 if own is not None else ():
            if not any(f"{name}.".startswith(f"{part}.") for name in in_int8):
                raise CheckpointError(f"config.json: quaver.int8 names {part}, where this model has no matrix")


def _as_stored(name: str, module: nn.Module, config: ModelConfig) -> nn.Module:
    """What stands for ``module`` in a model of ``config``: itself, or its form in INT4 or INT8.

    Raises CheckpointError for a linear that the configuration has in both.
    """
    awq, own = config.quantization_config, config.quaver
    in_int8 = own is not None and own.holds(name)
    if isinstance(module, nn.Linear):
        in_int4 = awq is not None and not any(part in name for part in awq.modules_to_not_convert)
        if in_int4 and in_int8:
            raise CheckpointError(f"config.json: {name} is in quaver.int8, and modules_to_not_convert leaves it out")
        if in_int4 or in_int8:
            kind = Int4Linear if in_int4 else Int8Linear
            return kind(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, nn.Embedding) and in_int8:
        n_rows = own.text_rows if own is not None and name == TEXT_EMBEDDING else None
        return Int8Embedding(n_rows or module.num_embeddings, module.embedding_dim, pruned=n_rows is not None)
    return module


class TTS:
    """A Qwen3-TTS model, ready to be asked: ``force`` for known speech, and the engine's ``frames`` for new speech.

    ``decoder`` makes sound of codes. The encoders of voices and recordings are read when they are asked for.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Model, decoder: CodecDecoder, tokenizer: Tokenizer,
        placement: Placement = HELD,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.model = model
        self.talker = model.talker
        self.decoder = decoder
        self.placement = placement
        self.tokenizer = tokenizer
        self.defaults = _defaults(checkpoint.path / "generation_config.json")
        self.device = model.talker.codec_head.weight.device
        self.dtype = model.talker.codec_head.weight.dtype

    @classmethod
    def load(
        cls,
        source: str | Path | Checkpoint,
        *,
        codec: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        room_bytes: int | None = None,
        placement: Placement = HELD,
        sound_dtype: torch.dtype | None = None,
    ) -> TTS:
        """The model in a folder, of a hub id, of a name that ships with quaver, or of an opened checkpoint.

        ``dtype`` is what its floats become; by default as stored, but float32 on a CPU where that stays under 1 GB.
        The text embedding stays on the host, mapped, and speaker encoder and codec encoder in their files. On a GPU
        ``placement`` says what else it does not hold, and the large weights of the codec's decoder are kept in
        ``sound_dtype``, by default float16 (float32 on a CPU); sound is computed in float32.
        Where the talker's layers take more than ``room_bytes``, they stay in their files and visit the device one after
        the other at each step, and the codec's decoder stays on the host: for codes, not for sound, in little memory.
        The values are the same, and those of PyTorch: with ``room_bytes`` nothing is compiled for the CPU, so that a
        calibration does not depend on whether numba is installed.
        Weights stream: one tensor at a time, each checked once. Raises CheckpointError for a missing, left-over,
        mis-shaped or non-finite tensor, by name.
        """
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source, codec=codec)
        device = require_device(device)
        dtype = dtype or default_dtype(checkpoint.specs, device)
        with torch.device("meta"):
            model, sound = Model(checkpoint.config), Codec(checkpoint.codec_config)
        where = str(checkpoint.path)
        visits = room_bytes is not None and layers_bytes(checkpoint.specs, dtype) > room_bytes
        fill(model, checkpoint.tensors(), where, homes(device, placement, visits=visits), dtype)
        if visits and not checkpoint.edits:
            map_anew(model, checkpoint.specs)
        host = torch.device("cpu")
        fill(
            sound, checkpoint.codec_tensors(), str(checkpoint.codec_path),
            lambda name: None if name.startswith(ENCODER) else host, None,
        )  # fmt: skip
        model.speaker_encoder = None
        if not visits:
            sound_dtype = sound_dtype or (torch.float16 if device.type == "cuda" else torch.float32)
            sound.decoder.settle(device, sound_dtype, on_host=placement.sound_on_host)
        else:
            sound.decoder.settle(host, torch.float32)
            if not checkpoint.codec_edits:
                map_anew(sound, checkpoint.codec_specs)
        if visits:
            decoder, type_ = model.talker.model, model.talker.codec_head.weight.dtype
            decoder.layers = Visiting(checkpoint.config.talker_config, checkpoint.specs, LAYERS, device, type_)
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module.prepare(model.talker.codec_head.weight.dtype)
            elif isinstance(module, Int8Embedding):
                module.dtype = model.talker.codec_head.weight.dtype
        if room_bytes is None:
            attach(model.talker.model)
            attach(model.talker.code_predictor.model)
        _check_kept(model.talker.model.text_embedding, checkpoint)
        if placement.tables_on_host and device.type == "cuda":
            for table in model.talker.code_tables():
                table.weight = nn.Parameter(lent(table.weight, device), requires_grad=False)
            project = model.talker.text_projection
            for linear in (project.linear_fc1, project.linear_fc2):
                linear.weight = nn.Parameter(linear.weight.pin_memory(), requires_grad=False)
        return cls(checkpoint, model.eval(), sound.decoder.eval(), Tokenizer.load(checkpoint.path), placement)

    def tensors(self) -> Iterator[Tensor]:
        """All that its modules hold, in 4 bits too, as they are now; of those that share memory, each."""
        for module in (*self.model.modules(), *self.decoder.modules()):
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)
            if isinstance(module, Int4Linear):
                yield from module.held

    @torch.inference_mode()
    def enroll(self, audio: Audio, *, text: str | None = None, name: str = "voice") -> Voice:
        """The voice of a recording: its x-vector and, where ``text`` says what is spoken, its codes.

        Any rate is resampled to 24 kHz. Raises AudioError for audio without speech, VoiceError when the model takes
        preset or designed voices only.
        """
        if not self.config.has_speaker_encoder:
            raise VoiceError(
                f"{self.checkpoint.path.name} is a {self.config.tts_model_type} model: it cannot clone, Base models can"
            )
        audio_files.require_speech(audio, name)
        encoder = load_speaker_encoder(self.checkpoint)
        assert encoder is not None
        vector = encoder.vector(audio)
        if text is None:
            return Voice(name=name, speaker=vector)
        check_text(text)
        samples = torch.from_numpy(audio_files.resample(audio, speaker_encoder.SAMPLE_RATE_HZ).samples)[None]
        codes = load_codec_encoder(self.checkpoint).encode(samples)[0].T
        return Voice(name=name, speaker=vector, codes=codes, text=text)

    def voice(self, source: str | Path, *, text: str | None = None) -> Voice:
        """The voice that ``source`` names: a voice file, a recording, a preset, or a reference shipped with quaver.

        ``text`` is what a recording says (for in-context cloning). Raises VoiceError or AudioError.
        """
        path = Path(source)
        if path.suffix == ".safetensors":
            return Voice.load(path)
        presets = self.config.talker_config.spk_id
        if str(source).lower() in presets:
            return Voice(name=str(source).lower(), preset=str(source).lower())
        if path.suffix or path.exists():
            return self.enroll(audio_files.read(path), text=text, name=path.stem)
        shipped = references()
        if str(source) in shipped and self.config.has_speaker_encoder:
            return self.enroll(audio_files.read(shipped[str(source)]), text=text, name=str(source))
        known = sorted(presets) or (sorted(shipped) if self.config.has_speaker_encoder else [])
        raise VoiceError(
            f"{source} is no recording, no voice file and no voice known here ({', '.join(known) or 'none'})"
        )

    @torch.inference_mode()
    def prompt(self, utterance: Utterance) -> Prompt:
        """The talker's inputs for ``utterance``, as the official code assembles them.

        Raises RecipeError for an empty text, an unknown language or an instruction the model does not take, VoiceError
        for a voice it cannot take.
        """
        check_text(utterance.text)
        self._check(utterance)
        config, voice = self.config.talker_config, utterance.voice
        ids = self.tokenizer.ids_speech(utterance.text)
        codes, said = (None, None) if voice is None else (voice.codes, voice.text)
        marks = [self.config.tts_bos_token_id, self.config.tts_eos_token_id, self.config.tts_pad_token_id]
        spoken = self.tokenizer.ids_reference(said)[3:-2] if codes is not None and said is not None else []
        asked = self.tokenizer.ids_instruct(utterance.instruct) if utterance.instruct else []
        # All text at once, and all tags: on a GPU each look-up is a wait for the bus.
        before, role, text, *rest = self._text([asked, ids[:3], [*spoken, *ids[3:-5]], *([mark] for mark in marks)])
        bos, eos, pad = rest

        language = self._language_id(utterance)
        if language is None:
            tags = [config.codec_nothink_id, config.codec_think_bos_id, config.codec_think_eos_id]
        else:
            tags = [config.codec_think_id, config.codec_think_bos_id, language, config.codec_think_eos_id]
        speaker = [config.spk_id[voice.preset]] if voice is not None and voice.preset is not None else []
        opening, who, filler, start = self._codec([tags, speaker, [config.codec_pad_id], [config.codec_bos_id]])
        if voice is not None and voice.preset is None and voice.speaker is not None:
            who = voice.speaker.to(self.device, non_blocking=True).to(self.dtype)[None]
        head = torch.cat((opening, who, filler))
        head = head + torch.cat((pad.expand(len(head) - 1, -1), bos))

        speech = start
        if codes is not None and said is not None:
            frames = self.talker.embed_frames(codes.to(self.device, torch.long))
            speech = torch.cat((start, frames))
        text = torch.cat((text, eos))
        if utterance.layout == "whole":
            body, tail = torch.cat((text + filler, speech + pad)), pad
        else:
            n_both = min(len(text), len(speech))
            body = torch.cat((text[:n_both], pad.expand(len(speech) - n_both, -1))) + speech
            tail = torch.cat((text[n_both:], pad))
        return Prompt(torch.cat((before, role, head, body)), tail)

    def inputs(self, prompt: Prompt, codes: Tensor) -> Tensor:
        """Talker inputs [P + T, D] of ``prompt`` followed by the frames ``codes`` [T, Q]."""
        n_frames = len(codes)
        rows = torch.arange(n_frames, device=self.device).clamp(max=len(prompt.tail) - 1)
        frames = self.talker.embed_frames(codes.to(self.device, torch.long)) + prompt.tail[rows]
        return torch.cat((prompt.embeds, frames))

    @torch.inference_mode()
    def force(self, prompts: Sequence[Prompt], codes: Sequence[Tensor]) -> list[Logits]:
        """Logits of known speech: for each prompt, frames ``codes`` [T, Q]. One batch, any lengths."""
        rows = [self.inputs(prompt, frames) for prompt, frames in zip(prompts, codes, strict=True)]
        hidden = self.talker.hidden(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        found = []
        for prompt, frames, row in zip(prompts, codes, hidden, strict=True):
            n_prompt, n_frames = len(prompt.embeds), len(frames)
            states = row[n_prompt - 1 : n_prompt + n_frames]
            known = frames.to(self.device, torch.long)
            residual = self.talker.code_predictor.force(
                states[:n_frames], self.talker.embed_codec(known[:, 0]), known[:, 1:]
            )
            found.append(Logits(self.talker.codec_head(states).float(), residual.float(), states))
        return found

    def suppressed(self, *, stop_too: bool) -> Tensor:
        """The talker ids [V] bool that are never sampled; with the stop id where ``stop_too``."""
        config = self.config.talker_config
        banned = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.device)
        banned[-SUPPRESSED_IDS:] = True
        banned[config.codec_eos_token_id] = stop_too
        return banned

    def _text(self, spans: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The talker's inputs of each of some ``spans`` of text ids."""
        wanted, table = torch.tensor([i for ids in spans for i in ids]), self.talker.model.text_embedding
        if isinstance(table, Int8Embedding) and len(pruned := table.pruned(wanted)):
            raise RecipeError(
                f"this model has lost its text embedding of {self.tokenizer.text_of(int(pruned[0]))!r}: it was pruned "
                "to some languages (see its provenance.json); say it otherwise, or take a model that was not pruned"
            )
        return torch.split(self.talker.embed_text(wanted), [len(ids) for ids in spans])

    def _codec(self, spans: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The talker's inputs of each of some ``spans`` of ids of codebook 0 and control ids."""
        wanted = torch.tensor([i for ids in spans for i in ids]).to(self.device, non_blocking=True)
        return torch.split(self.talker.embed_codec(wanted), [len(ids) for ids in spans])

    def _check(self, utterance: Utterance) -> None:
        """Raises RecipeError or VoiceError for what this model cannot do."""
        kind, voice = self.config.tts_model_type, utterance.voice
        presets = ", ".join(sorted(self.config.talker_config.spk_id))
        if utterance.language.lower() not in self.config.languages:
            raise RecipeError(
                f"language {utterance.language!r} is unknown: this model speaks {', '.join(self.config.languages)}"
            )
        if utterance.layout not in ("stream", "whole"):
            raise RecipeError(f"layout {utterance.layout!r} is neither 'stream' nor 'whole'")
        if kind == "base":
            if voice is None:
                raise VoiceError("this Base model speaks in a cloned voice only: name a recording or a voice file")
            if voice.preset is not None or voice.speaker is None:
                raise VoiceError(f"the voice {voice.name} has no speaker vector: enrol a recording with this model")
            if voice.speaker.shape != (self.config.talker_config.hidden_size,):
                raise VoiceError(
                    f"the voice {voice.name} has {voice.speaker.numel()} values, this model's have "
                    f"{self.config.talker_config.hidden_size}: enrol the recording again with this model"
                )
            n_codebooks = self.config.talker_config.num_code_groups
            if voice.codes is not None and voice.codes.shape[1] != n_codebooks:
                raise VoiceError(
                    f"the voice {voice.name} has {voice.codes.shape[1]} codebooks, this model {n_codebooks}"
                )
            n_codes = self.config.talker_config.code_predictor_config.vocab_size
            if voice.codes is not None and int(voice.codes.max()) >= n_codes:
                raise VoiceError(
                    f"the voice {voice.name} has codes above this model's {n_codes}: enrol the recording again"
                )
        elif kind == "custom_voice":
            if voice is None or voice.preset not in self.config.talker_config.spk_id:
                raise VoiceError(f"this CustomVoice model speaks in a preset voice only: one of {presets}")
        elif voice is not None:
            raise VoiceError("this VoiceDesign model takes no voice: describe one with --instruct")
        if utterance.instruct and (kind == "base" or (kind == "custom_voice" and self.config.tts_model_size == "0b6")):
            raise RecipeError(
                f"this {kind} {self.config.tts_model_size} model takes no instruction: leave --instruct out"
            )

    def _language_id(self, utterance: Utterance) -> int | None:
        """The language tag, or None for "auto"; a preset that speaks a dialect brings its own."""
        config, language = self.config.talker_config, utterance.language.lower()
        preset = utterance.voice.preset if utterance.voice is not None else None
        if language in ("auto", "chinese") and preset is not None:
            dialect = config.spk_is_dialect.get(preset, False)
            if isinstance(dialect, str):
                return config.codec_language_id[dialect]
        return None if language == "auto" else config.codec_language_id[language]


def require_device(device: str | torch.device) -> torch.device:
    """``device`` as PyTorch's. Raises RecipeError for one that is not here."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("no CUDA device is available here: use --device cpu")
    return device


def references() -> dict[str, Path]:
    """The recordings that ship with quaver as voices to clone, by name."""
    folder = Path(str(resources.files("quaver"))) / "voices" / "references"
    return {path.stem: path for path in sorted(folder.glob("*.ogg"))}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor name and shape that a checkpoint of ``config`` must have, the codec's aside."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Model(config).state_dict().items()}


def _check_kept(table: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the ids whose rows ``table`` kept are ids of the model, in order, each once."""
    if not isinstance(table, Int8Embedding) or table.kept_ids is None:
        return
    n_ids = checkpoint.config.talker_config.text_vocab_size
    steps, (low, high) = table.kept_ids.diff(), table.kept_ids.aminmax()
    if bool((steps <= 0).any()) or low < 0 or high >= n_ids:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {TEXT_EMBEDDING}.kept_ids must hold ids below {n_ids} in order, each once"
        )


def _defaults(path: Path) -> Defaults:
    """The sampling in generation_config.json, the official defaults where it is silent. Raises CheckpointError."""
    value = read_json(path) if path.exists() else {}
    try:
        greedy, residual_greedy = not value.get("do_sample", True), not value.get("subtalker_dosample", True)
        return Defaults(
            Sampling(
                0.0 if greedy else float(value.get("temperature", 0.9)),
                int(value.get("top_k", 50)),
                float(value.get("top_p", 1.0)),
                float(value.get("repetition_penalty", 1.05)),
            ),
            Sampling(
                0.0 if residual_greedy else float(value.get("subtalker_temperature", 0.9)),
                int(value.get("subtalker_top_k", 50)),
                float(value.get("subtalker_top_p", 1.0)),
                1.0,
            ),
            int(value.get("max_new_tokens", 2048)),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
