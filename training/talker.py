r"""Train talker and code predictor together on an encoded set: any sentence, any voice.

    python -m training.talker --set SET --texts .data/texts.jsonl --latents LATENTS --tokenizer TEXT \
        --voices VOICES --out OUT --seconds 780

On one GPU or, with torchrun, several (or a CPU, with `--toy`). SET is what `training.encode` wrote, LATENTS the OUT of
`training.encoder measure`: of the codec the codebooks alone are used. Writes OUT/talker-*.safetensors (the running mean
of the weights, bf16, see `training.parts`) every minute, OUT/best-*.safetensors at the lowest held-out loss after two
fifths of the time, OUT/curve.jsonl with what `Trainer.judged` finds on held-out sentences, and OUT/said.safetensors
with a few sentences spoken.

Each example is a sentence in one voice, its speaker vector taken from a changed excerpt of that speaker by the encoder
of `training.voices`, which stays as it is. What was heard is made unreliable, up to nothing true at all: a model that
may trust it reads neither text nor voice. Two heads are guided along the text for the first half, and the linears carry
noise, so that INT4 does no harm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.checkpoint import Checkpoint
from quaver.config import ModelConfig, parse
from quaver.engine import Engine, Knobs
from quaver.files import write_file
from quaver.model import speaker as speaker_encoder
from quaver.model.codec import CodecDecoder
from quaver.model.tts import TTS, Layout, Model, Utterance
from quaver.sampling import ENDED, Sampling
from quaver.text import Tokenizer
from quaver.voice import Voice
from training import parts, recipe, shards, stack, voices
from training.encoder import captured, keep
from training.plans import Plan, Planner, Speech, length
from training.ranks import Ranks
from training.tokenizer import spelled

HELD_OUT_EVERY, HELD_OUT = 50, 7
"""Texts whose number leaves this rest are never trained on."""
PROMPT = 9
"""The fewest positions beside the frames."""
_IGNORED = -100
_PATIENCE_S = 300.0
_REPORTED = ("codebook 0", "right", "latent", "codebook 1", "codebook 5", "mean of 1 to 15", "stray")


def config_of(tokenizer: Tokenizer, *, toy: bool = False) -> ModelConfig:
    """The small voice's configuration with the ids of ``tokenizer``; fewer layers for a ``toy``."""
    settings = settings_of(tokenizer)
    if toy:
        talker = cast(dict[str, Any], settings["talker_config"])
        predictor = {**talker["code_predictor_config"], "num_hidden_layers": 1}
        settings["talker_config"] = {**talker, "num_hidden_layers": 4, "code_predictor_config": predictor}
    return parse(ModelConfig, settings, "training/recipe.py: model_settings")


def settings_of(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json of the small voice with the ids of ``tokenizer``."""
    names = ("<|im_start|>", "<|im_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
    special = {name: tokenizer.encode(name)[0] for name in names}
    return recipe.model_settings(special, tokenizer.encode("assistant")[0])


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Examples as ``rows`` int64 [6, B]: clip, reference clip, whether there is one, text first, language open, and
    which spelling. They take ``n_positions`` at most, and ``n_frames`` of speech."""

    rows: Tensor
    n_positions: int
    n_frames: int


class Examples:
    """An encoded set on the device, and batches drawn from it."""

    def __init__(
        self,
        encoded: shards.Encoded,
        references: np.ndarray,
        texts: dict[int, str],
        tokenizer: Tokenizer,
        settings: recipe.TalkerRecipe,
        device: torch.device,
    ) -> None:
        def put(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        self.settings, self.device = settings, device
        self.codes = encoded.codes.to(device, torch.int16)
        self.words = texts
        self.text, self.speaker, self.n_frames = (
            np.asarray(x, np.int64) for x in (encoded.text, encoded.speaker, encoded.n_frames)
        )
        start = np.cumsum(self.n_frames) - self.n_frames
        used, place = np.unique(self.text, return_inverse=True)
        spellings = spelled(tokenizer, [texts[int(i)] for i in used])
        lengths = np.array([[len(ids) for ids in variants] for variants in spellings], np.int64)
        self.tokens = put(np.array([i for variants in spellings for ids in variants for i in ids], np.int16))
        at = (np.cumsum(lengths) - lengths.flatten()).reshape(lengths.shape)
        self.n_text = lengths[place]
        self.on_device = {
            name: put(x)
            for name, x in (("at", at[place]), ("n_text", self.n_text), ("start", start), ("n_frames", self.n_frames))
        }
        self.speaker_on_device = put(self.speaker)
        self.references = voices.References(references, device)
        self.names = encoded.names
        held = self.text % HELD_OUT_EVERY == HELD_OUT
        self.held_out, self.trained = held.nonzero()[0], (~held).nonzero()[0]
        counts = np.bincount(self.speaker[self.trained], minlength=len(self.names))
        weight = counts[self.speaker[self.trained]] ** -settings.eveness
        self.weight = weight / weight.sum()
        short = self.trained[self.n_frames[self.trained] <= settings.n_reference]
        self.short = short[np.argsort(self.speaker[short], kind="stable")]
        self.n_short = np.bincount(self.speaker[short], minlength=len(self.names))
        self.short_at = np.cumsum(self.n_short) - self.n_short
        self.rng = np.random.default_rng(settings.seed)

    def batches(self) -> Iterator[Batch]:
        """Endless batches of examples of similar lengths."""
        while True:
            yield from self.round(self.rng.choice(self.trained, len(self.trained), p=self.weight))

    def round(self, clip: np.ndarray) -> list[Batch]:
        """Batches of one example each for ``clip``, in random order, layouts drawn by their shares."""
        s, rng, n = self.settings, self.rng, len(clip)
        whole, unnamed = rng.random(n) >= s.streamed, rng.random(n) < s.unnamed
        speaker = self.speaker[clip]
        pick = self.short_at[speaker] + (rng.random(n) * self.n_short[speaker]).astype(np.int64)
        reference = self.short[pick.clip(max=max(len(self.short) - 1, 0))] if len(self.short) else clip
        told = (rng.random(n) < s.in_context) & (self.n_short[speaker] > 0) & (reference != clip)
        spelling = rng.integers(self.n_text.shape[1], size=n)
        for _ in range(2):
            size = self._size(clip, reference, told, whole, unnamed, spelling)
            long = size > s.lengths[-1]
            whole &= ~(long & ~told)
            told &= ~long
        size = self._size(clip, reference, told, whole, unnamed, spelling)
        rows = np.stack([clip, reference, told, whole, unnamed, spelling]).astype(np.int64)
        cut = []
        for shorter, longest in pairwise((0, *s.lengths)):
            chosen = rng.permutation(((size > shorter) & (size <= longest)).nonzero()[0])
            n_rows = min(max(1, s.budget // longest), s.n_rows)
            for at in range(0, len(chosen), n_rows):
                # Few shapes, each a CUDA graph: what is missing in the last batch is made up for by the first.
                some = np.resize(np.concatenate((chosen[at : at + n_rows], chosen)), n_rows)
                cut.append(Batch(torch.from_numpy(rows[:, some]), longest, longest - PROMPT))
        return [cut[i] for i in rng.permutation(len(cut))]

    def fixed(self, n: int, *, whole: bool) -> Batch:
        """``n`` held-out examples, always the same ones, in one layout and without reference."""
        clip = np.random.default_rng(0).permutation(self.held_out)[:n]
        none, all_ = np.zeros(len(clip), np.int64), np.full(len(clip), int(whole))
        rows = np.stack([clip, clip, none, all_, none, none])
        size = self._size(clip, clip, none > 0, all_ > 0, none > 0, none)
        kept = size <= self.settings.lengths[-1]
        return Batch(torch.from_numpy(rows[:, kept]), int(size[kept].max()), int(self.n_frames[clip[kept]].max()))

    def _size(self, *drawn: np.ndarray) -> np.ndarray:
        clip, reference, told, whole, unnamed, spelling = map(torch.from_numpy, drawn)
        n_text, n_frames = torch.from_numpy(self.n_text), torch.from_numpy(self.n_frames)
        ref_text, ref = n_text[reference, 0] * told, n_frames[reference] * told
        return length(n_text[clip, spelling], n_frames[clip], ref_text, ref, whole, unnamed).numpy()

    def speech(self, clip: Tensor, spelling: Tensor, present: Tensor) -> Speech:
        """The clips [B] as the planner takes them; empty where not ``present``."""
        d = self.on_device
        n_text, n_frames = d["n_text"][clip, spelling] * present, d["n_frames"][clip] * present
        return Speech(d["at"][clip, spelling], n_text, d["start"][clip], n_frames)


class Trainer:
    """The model and one train step."""

    def __init__(
        self,
        model: Model,
        examples: Examples,
        books: Tensor,
        tokenizer: Tokenizer,
        config: ModelConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.examples, self.settings = model, examples, examples.settings
        self.ranks = ranks or Ranks(str(examples.device))
        self.device = device = examples.device
        self.planner = Planner(config, tokenizer, examples.tokens)
        hidden, n_books = config.talker_config.hidden_size, recipe.N_CODEBOOKS
        books = books.to(device)
        self.latents = books[1:].flatten(0, 1)
        # What a hidden state says of the frame's acoustic latent, read off linearly; it is not part of the model.
        self.readout = nn.Linear(hidden, books.shape[2]).to(device)
        self.book_rows = recipe.N_CODES * torch.arange(n_books - 1, device=device)
        self.code_rows = stack.code_rows(model.talker, device)
        some = torch.randint(len(examples.codes), (20_000,), device=device)
        self.power = self.acoustic(examples.codes[some].long()).var(0).sum()
        assert model.speaker_encoder is not None
        self.encoder = model.speaker_encoder.requires_grad_(False)
        self.parameters = [*(p for p in model.parameters() if p.requires_grad), *self.readout.parameters()]
        self.ema = [p.detach().clone() for p in self.parameters]
        predictor = model.talker.code_predictor
        decoders = (model.talker.model.layers, predictor.model.layers)
        self.linears = [m.weight for layers in decoders for m in layers.modules() if isinstance(m, nn.Linear)]
        self.clean = [w.detach().clone() for w in self.linears]
        self.spread = [torch.zeros((), device=device) for _ in self.linears]
        # The talker hears by the predictor's tables of codes.
        late = {id(p) for n, p in predictor.named_parameters() if "codec_embedding" not in n}
        self.late = [p for p in self.parameters if id(p) in late]
        groups = [p for p in self.parameters if id(p) not in late], self.late
        self.lr = [torch.zeros((), device=device) for _ in groups]
        self.optimizers = [self._optimizer(*both) for both in zip(groups, self.lr, strict=True)]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        # The first of them are heard most.
        weight = 0.8 ** torch.arange(n_books - 1, device=device)
        self.book_weight = weight / weight.sum()
        self.report, self.now = (torch.zeros(len(_REPORTED), device=device) for _ in range(2))
        self.loss_now = torch.zeros((), device=device)
        self.noise, self.guidance, self.harshness, self.following = (torch.zeros((), device=device) for _ in range(4))
        self.guided, self.learning = False, True
        self.settled = False
        """Whether the talker has learnt enough, and the code predictor alone goes on."""
        self.n_steps, self.n_returns = 0, 0
        self._remembered: list[Tensor] = []
        self.n_failed, self.in_a_row, self.most_in_a_row = (torch.zeros((), device=device) for _ in range(3))
        self.autocast: AbstractContextManager[Any] = nullcontext()
        self._captured: dict[tuple[int, bool, bool], tuple[Tensor, Callable[[], None]]] = {}
        self._updates: dict[bool, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _optimizer(self, parameters: list[nn.Parameter], lr: Tensor) -> torch.optim.AdamW:
        flat, rest = ([p for p in parameters if (p.dim() > 1) == many] for many in (True, False))
        groups = [{"params": flat, "weight_decay": self.settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        on_gpu = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True, capturable=on_gpu)

    def acoustic(self, codes: Tensor) -> Tensor:
        """The acoustic latents [N, d] that codebooks 1 and on of ``codes`` int64 [N, Q] add up to."""
        return F.embedding_bag(codes[:, 1:] + self.book_rows, self.latents, mode="sum")

    @torch.no_grad()
    def vectors(self, speaker: Tensor, told: Tensor, half_seconds: int) -> Tensor:
        """Noisy speaker vectors [B, D]; none, a zero, for some of those who are ``told`` [B] in context."""
        s = self.settings
        samples = self.examples.references.changed(speaker, speaker_encoder.SAMPLE_RATE_HZ * half_seconds // 2)
        with torch.autocast(self.device.type, enabled=False):
            found: Tensor = self.encoder(speaker_encoder.mel(samples))
        scale = found.square().mean(1, keepdim=True).sqrt()
        found = found + s.vector_noise * scale * torch.randn_like(found)
        silent = told & (torch.rand(len(found), device=self.device) < s.unheard)
        return found.masked_fill(silent[:, None], 0.0)

    def clean_vectors(self, speaker: Tensor) -> Tensor:
        """Speaker vectors [B, D] as at inference, from six seconds."""
        samples = self.examples.references.plain(speaker, 6 * speaker_encoder.SAMPLE_RATE_HZ)
        found: Tensor = self.encoder(speaker_encoder.mel(samples))
        return found

    def rates(self, n: int) -> Tensor:
        """How often heard codes are wrong, [B, 1, Q]."""
        s = self.settings
        rate = torch.rand(n, 1, 1, device=self.device).square() * s.replaced
        rate = rate.expand(n, 1, recipe.N_CODEBOOKS)
        kind = torch.rand(n, 1, 1, device=self.device)
        later = torch.arange(recipe.N_CODEBOOKS, device=self.device) > 0
        deaf, coarse = s.deaf * self.harshness, s.coarse * self.harshness
        lost = (kind < deaf) | ((kind < deaf + coarse) & later)
        return torch.where(lost, 1.0, rate)

    def embeds(self, plan: Plan, rate: Tensor, vectors: Tensor) -> Tensor:
        """Talker inputs [B, L, D]: text, control ids, frames heard with codes wrong at ``rate``, and the speaker."""
        talker = self.model.talker
        words = talker.text_projection(talker.model.text_embedding.weight)
        tables = torch.cat((words.float(), stack.code_tables(talker)))
        nothing = len(tables)
        tables = torch.cat((tables, tables.new_zeros(1, tables.shape[1])))
        heard = self.examples.codes[plan.frame.clamp(min=0)].long()
        # The reference is heard well: it tells the voice.
        heard = disturbed(heard, torch.where(plan.own[..., None], rate, 0.05))
        heard = torch.where(plan.frame[..., None] >= 0, heard + self.code_rows + len(words), nothing)
        codec = torch.where(plan.codec >= 0, plan.codec + len(words), nothing)
        index = torch.cat((plan.text[..., None], codec[..., None], heard), dim=-1)
        x = F.embedding_bag(index.flatten(0, 1), tables, mode="sum", padding_idx=nothing).view(*index.shape[:2], -1)
        at = torch.arange(x.shape[1], device=self.device) == plan.speaker[:, None]
        return x + at[..., None] * vectors[:, None]

    def spoken(self, batch: Batch, rate: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        """The parts of the loss of ``batch``, and what else its two judges need. F = most frames + 1."""
        e, s, talker = self.examples, self.settings, self.model.talker
        clip, reference, told, whole, unnamed, spelling = batch.rows.to(self.device)
        said = e.speech(clip, spelling, torch.ones_like(clip))
        plan = self.planner.plan(
            said, e.speech(reference, torch.zeros_like(spelling), told), whole > 0, unnamed > 0, batch.n_positions
        )
        x = self.embeds(plan, rate, vectors)
        hidden, heads = stack.states(talker.model, x, s.guided_layers, s.dropout if self.learning else 0.0)
        time_ = torch.arange(batch.n_frames + 1, device=self.device)
        n = said.n_frames[:, None]
        at = (plan.first[:, None] + time_).clamp(max=batch.n_positions - 1)
        spoken, last = time_ < n, time_ == n
        state = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        codes = e.codes[(said.start[:, None] + time_).clamp(max=len(e.codes) - 1)].long()
        wanted = torch.where(spoken, codes[..., 0], _IGNORED)
        wanted = torch.where(last, talker.config.codec_eos_token_id, wanted)
        logits = talker.codec_head(state).float()
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=_IGNORED)
        found = {
            "logits": logits, "each": each.view_as(wanted), "wanted": wanted, "spoken": spoken, "last": last,
            "state": state, "codes": codes, "n": said.n_frames,
        }  # fmt: skip
        if self.guided and self.learning:
            pace = (time_ + 0.5) / n
            place = torch.arange(batch.n_positions, device=self.device) - plan.spoken[:, None]
            share = (place + 0.5) / said.n_text[:, None]
            welcome = -((share[:, None] - pace[..., None]) / s.guided_width).square() / 2.0
            ours = (place >= 0) & (place < said.n_text[:, None])
            welcome = torch.where(ours[:, None], welcome, -30.0).clamp(min=-30.0)
            strays = [stack.strayed(head, at, welcome, spoken.float()) for head in heads]
            found["stray"] = torch.stack(strays).mean()
        return found

    def residual(self, found: dict[str, Tensor], n: int, rate: Tensor) -> Tensor:
        """The cross-entropy [Q - 1] of codebooks 1 on in ``n`` random frames a row, given codes wrong at ``rate``."""
        talker = self.model.talker
        row = torch.arange(len(found["n"]), device=self.device).repeat_interleave(n)
        frame = (torch.rand(len(row), device=self.device) * found["n"][row]).long()
        codes = found["codes"][row, frame]
        given = disturbed(codes, rate * torch.rand(len(row), 1, device=self.device).square())
        tables = stack.code_tables(talker)
        # The talker hears by the same tables: once it is settled they stay.
        embedded = F.embedding(given[:, :-1] + self.code_rows[:-1], tables.detach() if self.settled else tables)
        state = found["state"][row, frame]
        # One that wants gradients always: what was compiled is compiled for that.
        state = state if state.requires_grad or not torch.is_grad_enabled() else state.requires_grad_()
        guessed = stack.force(talker.code_predictor, state, embedded)
        each: Tensor = stack.surprise(guessed, codes[:, 1:])
        return each.mean(0)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of ``batch``; leaves its parts in ``report``."""
        s = self.settings
        speaker = self.examples.speaker_on_device[batch.rows[0].to(self.device)]
        n_frames = s.n_frames_settled if self.settled else s.n_frames
        with self.autocast:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settled):
                told = batch.rows[2].to(self.device) > 0
                vectors = self.vectors(speaker, told, 4 + batch.n_positions // 8 % 5)
                found = self.spoken(batch, self.rates(len(speaker)), vectors)
            spoken, last = found["spoken"], found["last"]
            weight = spoken + s.stop_weight * last
            first = (found["each"] * weight).sum() / weight.sum()
            latents = self.acoustic(found["codes"].flatten(0, 1)).view(*spoken.shape, -1)
            miss = (self.readout(found["state"]).float() - latents).square().sum(-1)
            unlike = (miss * spoken).sum() / spoken.sum() / self.power
            each = self.residual(found, -(-n_frames // len(speaker)), torch.full((), 0.1, device=self.device))
        stray = found.get("stray", first.detach() * 0.0)
        right = ((found["logits"].argmax(-1) == found["wanted"]) & spoken).sum() / spoken.sum()
        now = torch.stack([first, right, unlike, each[0], each[4], each.mean(), stray]).detach()
        self.now.copy_(now.nan_to_num(1e3, 1e3, 1e3))
        rest = 2.0 * unlike + 2.0 * (each * self.book_weight).sum() + self.guidance * stray
        # What is said hangs on codebook 0 alone.
        total: Tensor = 2.0 * first + rest
        return total

    def differentiate(self, batch: Batch) -> None:
        """Leaves the gradients of ``batch``, seen with noisy linears, in those who learn, and its loss."""
        learning = self.late if self.settled else self.parameters
        with torch.no_grad():
            self.disturb()
        loss = self.loss(batch)
        gradients = torch.autograd.grad(loss, learning)
        with torch.no_grad():
            torch._foreach_copy_(self.linears, self.clean)
            keep(learning, gradients)
            self.loss_now.copy_(loss)

    def update(self) -> None:
        """Takes a step of those who learn. One whose loss or gradient is not finite is left out: the fused optimizer
        sees to that by itself, so that nothing waits for the device (see `secure`)."""
        learning, optimizers = (self.late, self.optimizers[-1:]) if self.settled else (self.parameters, self.optimizers)
        with torch.no_grad():
            norm = nn.utils.clip_grad_norm_(learning, 1.0)
            failed = (~(norm.isfinite() & self.loss_now.isfinite())).float()
            self.n_failed += failed
            self.in_a_row.add_(1.0).mul_(failed)
            self.most_in_a_row.copy_(torch.maximum(self.most_in_a_row, self.in_a_row))
            for optimizer in optimizers:
                optimizer.found_inf = failed  # type: ignore[attr-defined]
                optimizer.step()
            apart = torch._foreach_sub(list[Tensor](self.parameters), self.ema)
            torch._foreach_mul_(apart, self.following)
            torch._foreach_add_(self.ema, apart)

    def step(self, batch: Batch) -> None:
        """One train step on ``batch``: on a GPU two CUDA graphs, the first that of the batch's shape, and between them
        the mean of all processes' gradients."""
        if self.n_steps % 100 == 0:
            for kept, linear in zip(self.spread, self.linears, strict=True):
                kept.copy_(linear.detach().std())
        self.following.fill_(1.0 - min(self.settings.ema_decay, (1.0 + self.n_steps) / (10.0 + self.n_steps)))
        rows, differentiate = self._shaped(batch)
        rows.copy_(batch.rows)
        differentiate()
        learning = self.late if self.settled else self.parameters
        self.ranks.mean([*(p.grad for p in learning if p.grad is not None), self.loss_now])
        self._update()()
        self.report.lerp_(self.now, 0.05 if self.n_steps else 1.0)
        self.n_steps += 1

    @torch.no_grad()
    def hear(self, state: dict[str, Tensor]) -> None:
        """Takes the speaker encoder of `training.voices`."""
        self.encoder.load_state_dict(state)

    def prepare(self) -> None:
        """Captures a step of every shape that there is, before the clock of the run starts."""
        wanted = set(self.settings.lengths)
        for batch in self.examples.round(self.examples.trained):
            if batch.n_positions in wanted:
                wanted.remove(batch.n_positions)
                self._shaped(batch)
        self._update()

    def _shaped(self, batch: Batch) -> tuple[Tensor, Callable[[], None]]:
        """The rows that `differentiate` reads in batches of this shape, and that as one graph."""
        key = batch.n_positions, self.guided, self.settled
        if key not in self._captured:
            rows = batch.rows.to(self.device)
            shaped = Batch(rows, batch.n_positions, batch.n_frames)
            self._captured[key] = rows, captured(lambda: self.differentiate(shaped), self._capturing(), self._pool)
        return self._captured[key]

    def _capturing(self) -> torch.device:
        return self.device if self.n_returns < 2 else torch.device("cpu")

    def _update(self) -> Callable[[], None]:
        if self.settled not in self._updates:
            self._updates[self.settled] = self._first_update()
        return self._updates[self.settled]

    def _first_update(self) -> Callable[[], None]:
        """`update`, captured; the runs before that leave nothing as they find it but the optimizers' state made."""
        rates = [float(lr) for lr in self.lr]
        for lr in self.lr:
            lr.fill_(0.0)
        loss, following = self.loss_now.clone(), self.following.clone()
        self.loss_now.fill_(math.nan)
        self.following.fill_(0.0)
        before = [x.clone() for x in (self.n_failed, self.in_a_row, self.most_in_a_row)]
        grads = [p.grad.clone() for p in self.parameters if p.grad is not None]
        step = captured(self.update, self._capturing(), self._pool)
        keep(self.parameters, tuple(grads))
        for kept, was in zip((self.n_failed, self.in_a_row, self.most_in_a_row), before, strict=True):
            kept.copy_(was)
        self.loss_now.copy_(loss)
        self.following.copy_(following)
        for lr, rate in zip(self.lr, rates, strict=True):
            lr.fill_(rate)
        return step

    def secure(self) -> None:
        """Remembers the state of the run, or goes back to the one remembered where five steps in a row were not finite.

        Then the learning rate is 0.7 of what it was, the second time there are no CUDA graphs any more, the third time
        nothing compiled. Raises FloatingPointError the fourth time. All processes must ask alike.
        """
        moments = (kept for o in self.optimizers for state in o.state.values() for kept in state.values())
        now = [*self.parameters, *self.ema, *moments]
        if self.most_in_a_row < 5:
            self._remembered = [tensor.detach().clone() for tensor in now]
            return
        odd = [n for n, p in self.model.named_parameters() if not p.isfinite().all()]
        found = (
            f"step {self.n_steps}: five in a row were not finite ({self.now.tolist()}); parameters not finite: {odd}"
        )
        self.n_returns += 1
        if not self._remembered or self.n_returns > 3:
            raise FloatingPointError(found)
        print(found, flush=True)
        with torch.no_grad():
            torch._foreach_copy_(now, self._remembered)
        for counter in (self.in_a_row, self.most_in_a_row):
            counter.zero_()
        if self.n_returns > 1:
            self._captured.clear()
            self._updates.clear()
        if self.n_returns > 2:
            stack.unfuse()

    def disturb(self) -> None:
        """Adds noise to the linears; ``clean`` keeps what they were."""
        torch._foreach_copy_(self.clean, self.linears)
        drawn = torch.randn(sum(w.numel() for w in self.linears), device=self.device) * self.noise
        pieces = torch.split(drawn, [w.numel() for w in self.linears])
        noise = [piece.view_as(w) * spread for piece, w, spread in zip(pieces, self.linears, self.spread, strict=True)]
        torch._foreach_add_(self.linears, noise)

    def pace(self, elapsed_s: float) -> None:
        """Sets learning rates, weight noise, guidance, harshness and who learns for a moment of the run."""
        s = self.settings
        share = min(1.0, elapsed_s / s.total_s)
        warm = 0.7**self.n_returns * min(1.0, (elapsed_s - s.elapsed_s + 0.5) / s.warmup_s)
        before = min(1.0, share / s.settled)
        for lr, gone in zip(self.lr, (before, share), strict=True):
            lr.fill_(warm * s.lr * (0.02 + 0.49 * (1.0 + math.cos(math.pi * gone))))
        self.noise.fill_(s.weight_noise * min(1.0, 2.0 * share))
        self.guidance.fill_(s.guidance * max(0.0, 1.0 - 2.0 * share))
        # Once the text is read, what was heard may be trusted more: the codes of a frame hang on those before it.
        self.harshness.fill_(max(s.least_harsh, min(1.0, 2.0 - 2.0 * share)))
        self.guided, self.settled = share < 0.5, share >= s.settled

    def averaged(self) -> dict[str, Tensor]:
        """The model's state with the running mean of its parameters."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return {**self.model.state_dict(), **dict(zip(names, self.ema, strict=False))}

    @contextmanager
    def as_averaged(self) -> Iterator[None]:
        """Within, the model has the running mean of its parameters, and learns nothing."""
        own = [p.detach().clone() for p in self.parameters]
        self.learning = False
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), self.ema)
        try:
            yield
        finally:
            self.learning = True
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), own)

    @torch.no_grad()
    def judged(self, n: int) -> dict[str, float]:
        """Cross-entropies in nats and accuracies on ``n`` held-out examples in each layout, with the true history and
        with a random one (deaf). ``probe``: what is known of codebook 0 beyond how often each of its codes comes."""
        counts = torch.bincount(self.examples.codes[:, 0].long(), minlength=recipe.N_CODES).double()
        share = counts / counts.sum()
        unigram = float(-(share * (share + 1e-12).log()).sum())
        values: dict[str, float] = {"unigram": unigram}
        with self.as_averaged():
            for layout in ("stream", "whole"):
                batch = self.examples.fixed(n, whole=layout == "whole")
                vectors = self.clean_vectors(self.examples.speaker_on_device[batch.rows[0].to(self.device)])
                for kind in ("true", "deaf"):
                    found = self.spoken(batch, torch.tensor(float(kind == "deaf"), device=self.device), vectors)
                    spoken, last, each = found["spoken"], found["last"], found["each"]
                    right = (found["logits"].argmax(-1) == found["wanted"]) & spoken
                    name = f"{layout} {kind}"
                    values[name] = float((each * spoken).sum() / spoken.sum())
                    values[f"{name} right"] = float(right.sum() / spoken.sum())
                    values[f"{name} stop"] = float((each * last).sum() / last.sum())
                    if kind == "true":
                        rest = self.residual(found, 4, torch.tensor(0.0, device=self.device))
                        values[f"{name} rest"] = float(rest.mean())
                values[f"{layout} probe"] = unigram - values[f"{layout} true"]
        return values

    def said(self, engine: Engine, n: int, out: Path, *, temperature: float = 0.6) -> dict[str, float]:
        """Lets the model say ``n`` held-out sentences, writes OUT/said.safetensors; how many stopped, and how long.

        Half with streamed text, half with the text first; in the voices of the held-out clips.
        """
        e = self.examples
        clips = np.random.default_rng(0).permutation(e.held_out)[:n]
        limit = 2 * int(e.n_frames[clips].max()) + 20
        sampling = Sampling(temperature, 50, 1.0, 1.0)
        with self.as_averaged(), torch.inference_mode():
            vectors = self.clean_vectors(e.speaker_on_device[torch.from_numpy(clips).to(self.device)]).cpu()
            prompts = []
            for i, (clip, vector) in enumerate(zip(clips, vectors, strict=True)):
                layout: Layout = "stream" if i % 2 == 0 else "whole"
                text = e.words[int(e.text[clip])]
                voice = Voice(name=e.names[int(e.speaker[clip])], speaker=vector)
                prompts.append(engine.tts.prompt(Utterance(text, "english", voice, layout=layout)))
            steps = engine.frames(prompts, list(range(n))[: len(prompts)], Knobs(sampling, sampling, limit))
            frames = [step.codes for step in steps]
        codes = torch.stack(frames, dim=1).cpu()
        n_said = (codes[..., 0] != ENDED).sum(1)
        ratio = n_said.double() / torch.from_numpy(e.n_frames[clips])
        kept = torch.cat([c[:k] for c, k in zip(codes, n_said.tolist(), strict=True)]).to(torch.int16)
        numbers = {"text": torch.from_numpy(e.text[clips]), "speaker": torch.from_numpy(e.speaker[clips])}
        write_file(out / "said.safetensors", save_bytes({"codes": kept, "n_frames": n_said, **numbers}))
        ended = float((n_said < len(frames)).double().mean()) if len(frames) == limit else 1.0
        return {"stopped": ended, "longer": float(ratio.mean()), "longest": float(ratio.max())}


def save(trainer: Trainer, out: Path, name: str = "talker") -> None:
    """Writes OUT/``name``-*.safetensors."""
    parts.write(out, name, trainer.averaged(), torch.bfloat16)


def disturbed(codes: Tensor, rate: Tensor) -> Tensor:
    """``codes`` [..., Q] with a share ``rate`` of them replaced by any code."""
    wrong = torch.rand(codes.shape, device=codes.device) < rate
    return torch.where(wrong, torch.randint(recipe.N_CODES, codes.shape, device=codes.device), codes)


def initialise(model: Model, readout: nn.Linear, books: Tensor) -> None:
    """Small normal weights, text as loud as speech, and tables of codes in the geometry of the codec.

    Text embeddings through two layers of small weights would be a thousandth of the codes they are added to: the model
    then learns its sentences from their first frames, and its text never.
    A code's embedding and its row in the head lie where its codebook vector lies, in one 64-dimensional subspace
    for all codebooks: what the first layers would have to find out about each of 6,144 codes is true at the start.
    """
    talker = model.talker
    for name, parameter in talker.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(talker.model.text_embedding.weight)
    for linear, std in ((talker.text_projection.linear_fc1, 1.0), (talker.text_projection.linear_fc2, 0.5)):
        nn.init.normal_(linear.weight, std=std * linear.in_features**-0.5)
    hidden = talker.config.hidden_size
    axes = torch.linalg.qr(torch.randn(hidden, 2 * books[0].shape[1]))[0].T
    first_axes, axes = axes[: books[0].shape[1]], axes[books[0].shape[1] :]
    predictor = talker.code_predictor
    with torch.no_grad():
        readout.weight.copy_(axes)
        tables = [(talker.model.codec_embedding.weight, talker.codec_head.weight, first_axes)]
        for embedding, head in zip(predictor.model.codec_embedding, predictor.lm_head, strict=True):
            assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
            tables.append((embedding.weight, head.weight, axes))
        top = books[1].square().mean().sqrt()
        for (table, rows, where), book in zip(tables, books, strict=True):
            size = book.square().mean().sqrt().clamp(min=1e-6)
            table[: len(book)] += 0.1 * (book / size) @ where * (size / top).clamp(max=1.0).sqrt()
            rows[: len(book)] += 0.1 * (book / size) @ where


def joined(
    encoded: shards.Encoded, texts: dict[int, str], share: float, n_frames: int, seed: int
) -> tuple[shards.Encoded, dict[int, str]]:
    """``encoded`` and two or three of its clips of one speaker after another, as clips of their own, ``share`` as many
    as there are and at most ``n_frames`` long; with their texts. Without them no example was longer than six seconds.
    """
    rng = np.random.default_rng(seed)
    text, speaker, length = (np.asarray(x, np.int64) for x in (encoded.text, encoded.speaker, encoded.n_frames))
    start = np.cumsum(length) - length
    free = (text % HELD_OUT_EVERY != HELD_OUT).nonzero()[0]
    by_speaker = {s: free[speaker[free] == s] for s in np.unique(speaker[free])}
    chains: list[np.ndarray] = []
    for first in rng.choice(free, int(share * len(text))):
        chain = np.append(first, rng.choice(by_speaker[speaker[first]], rng.integers(1, 3)))
        if length[chain].sum() <= n_frames:
            chains.append(chain)
    number = max(texts) + 1 + HELD_OUT_EVERY - (max(texts) + 1) % HELD_OUT_EVERY
    numbers = HELD_OUT_EVERY * np.arange(len(chains)) + number
    flat = np.concatenate([np.arange(start[c], start[c] + length[c]) for chain in chains for c in chain])
    more = {
        "text": numbers,
        "speaker": np.array([speaker[chain[0]] for chain in chains]),
        "n_frames": np.array([length[chain].sum() for chain in chains]),
    }

    def longer(name: str) -> Tensor:
        known: Tensor = getattr(encoded, name)
        return torch.cat((known, torch.from_numpy(more[name]).to(known.dtype)))

    codes = torch.cat((encoded.codes, encoded.codes[torch.from_numpy(flat)]))
    said = {int(n): " ".join(texts[int(text[c])] for c in chain) for n, chain in zip(numbers, chains, strict=True)}
    found = shards.Encoded(codes, longer("text"), longer("speaker"), longer("n_frames"), encoded.names)
    return found, texts | said


def read_texts(path: Path) -> dict[int, str]:
    """The training sentences by number."""
    rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return {int(row["id"]): row["text"] for row in rows}


class Watch:
    """Looks at a run now and then: OUT/curve.jsonl, OUT/best parts and OUT/said.safetensors."""

    def __init__(self, trainer: Trainer, engine: Engine, out: Path, n_judged: int) -> None:
        self.trainer, self.engine, self.out, self.n_judged = trainer, engine, out, n_judged
        out.mkdir(parents=True, exist_ok=True)
        self.curve = (out / "curve.jsonl").open("a", encoding="utf-8")
        self.begun_s = self.saved_s = self.said_s = trainer.settings.elapsed_s
        self.best = math.inf
        self.every = (100, 1000) if trainer.device.type == "cuda" else (5, 25)

    def tell(self, kind: str, elapsed_s: float, values: dict[str, float]) -> None:
        """Writes and prints ``values``."""
        step = self.trainer.n_steps
        line = {"kind": kind, "step": step, "seconds": round(elapsed_s, 1)}
        self.curve.write(json.dumps(line | {k: round(v, 4) for k, v in values.items()}) + "\n")
        self.curve.flush()
        words = ", ".join(f"{k} {v:.3f}" for k, v in values.items())
        print(f"{elapsed_s:.0f} s, step {step}, {kind}: {words}", flush=True)

    def check(self, elapsed_s: float, *, last: bool = False) -> None:
        """Judges the model on held-out sentences, and lets it say some every other minute."""
        try:
            values = self.trainer.judged(self.n_judged)
            self.tell("held out", elapsed_s, values)
            found = sum(values[f"{layout} {kind}"] for layout in ("stream", "whole") for kind in ("true", "deaf"))
            if found < self.best and elapsed_s > 0.4 * self.trainer.settings.total_s:
                self.best = found
                save(self.trainer, self.out, "best")
            if last or elapsed_s > self.said_s + 120.0:
                self.said_s = elapsed_s
                self.tell("said", elapsed_s, self.trainer.said(self.engine, 16 if last else 8, self.out))
        except Exception:
            # Whatever is wrong with a look at the model must not cost the model.
            traceback.print_exc()

    def look(self, elapsed_s: float) -> None:
        """What is due after a step."""
        trainer, step = self.trainer, self.trainer.n_steps
        if step % self.every[0] == 0 or step == 1:
            values = dict(zip(_REPORTED, trainer.report.tolist(), strict=True))
            pace = {"ms a step": 1e3 * (elapsed_s - self.begun_s) / step, "failed": float(trainer.n_failed)}
            self.tell("trained", elapsed_s, values | pace)
        if step % self.every[1] == 0:
            self.check(elapsed_s)
        if elapsed_s > self.saved_s + 60.0:
            self.saved_s = elapsed_s
            save(trainer, self.out)


def run(trainer: Trainer, engine: Engine, out: Path, n_judged: int, heard: Path | None = None) -> None:
    """Trains until the recipe's seconds are over; saves every minute and at the end. ``heard``: where `training.voices`
    writes, for which it waits."""
    settings, ranks, on_gpu = trainer.settings, trainer.ranks, trainer.device.type == "cuda"
    watch = None if ranks.rank else Watch(trainer, engine, out, n_judged)
    batches, elapsed = trainer.examples.batches(), settings.elapsed_s
    if on_gpu:
        trainer.pace(elapsed)
        trainer.prepare()
    if heard:
        since = time.monotonic()
        while not (heard / "done").exists():
            if time.monotonic() > since + _PATIENCE_S:
                raise TimeoutError(f"{heard}/done: training.voices has not written it for {_PATIENCE_S:.0f} s")
            time.sleep(0.5)
        trainer.hear(parts.read(heard, "voices"))
    ranks.start(elapsed)
    while elapsed < settings.total_s:
        if not on_gpu or trainer.n_steps % 10 == 0:
            trainer.pace(elapsed)
        trainer.step(next(batches))
        if trainer.n_steps % 200 == 0:
            trainer.secure()
        if watch:
            watch.look(elapsed)
        if not on_gpu or trainer.n_steps % 10 == 0:
            elapsed = ranks.elapsed_s()
    if watch:
        save(trainer, out)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        print(f"done: {trainer.n_steps} steps in {elapsed:.0f} s, {peak:.1f} GiB", flush=True)
        watch.check(elapsed, last=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, required=True, help="the folder of the encoded set")
    parser.add_argument("--texts", type=Path, required=True, help="texts.jsonl")
    parser.add_argument("--latents", type=Path, required=True, help="where the codebooks are")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--voices", type=Path, help="where `training.voices` writes, or has written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=780.0)
    parser.add_argument(
        "--resume", type=Path, help="a talker to go on with: a safetensors file or FOLDER/NAME of parts"
    )
    parser.add_argument("--elapsed", type=float, default=0.0, help="with --resume: seconds that the earlier run took")
    parser.add_argument(
        "--device", help="by default cuda:0, where there is one; with torchrun that of the first process"
    )
    parser.add_argument("--budget", type=int, help="positions in a step")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--bf16", action="store_true", help="products of matrices in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile layers and losses")
    parser.add_argument("--toy", action="store_true", help="fewer layers and tiny steps, on a CPU")
    args = parser.parse_args()
    if not (args.voices or args.resume):
        parser.error("no speaker encoder: give --voices, or --resume with a model that has one")
    return args


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # Its backward pass has made NaN of finite numbers on Hopper.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    return device


def main() -> None:
    """Reads, trains and saves."""
    args = _arguments()
    begun = time.monotonic()
    ranks = Ranks(args.device)
    device = _device(str(ranks.device))
    settings = recipe.TalkerRecipe(total_s=args.seconds + args.elapsed, elapsed_s=args.elapsed)
    if args.toy:
        settings = dataclasses.replace(settings, budget=1200, n_frames=40, n_frames_settled=80)
    chosen = {"budget": args.budget, "lr": args.lr, "dropout": args.dropout}
    settings = dataclasses.replace(settings, **{k: v for k, v in chosen.items() if v is not None})
    torch.manual_seed(settings.seed)
    tokenizer = Tokenizer.load(args.tokenizer)
    config = config_of(tokenizer, toy=args.toy)
    texts = read_texts(args.texts)
    encoded = shards.read(args.set)
    if settings.joined:
        encoded, texts = joined(encoded, texts, settings.joined, settings.n_joined, settings.seed)
    examples = Examples(encoded, shards.read_references(args.set), texts, tokenizer, settings, device)
    books = parts.read(args.latents, "coding")["books"]
    model = Model(config)
    readout = nn.Linear(config.talker_config.hidden_size, books.shape[2])
    initialise(model, readout, books)
    if args.resume:
        model.load_state_dict(parts.begun(args.resume))
    trainer = Trainer(model.train().to(device), examples, books, tokenizer, config, ranks)
    with torch.no_grad():
        trainer.readout.load_state_dict(readout.state_dict())
        torch._foreach_copy_(trainer.ema, list[Tensor](trainer.parameters))
    if device.type == "cuda":
        stack.settle(model.talker, device)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if args.bf16:
        trainer.autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    if args.compile:
        stack.fuse()
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    hours, frames = len(examples.codes) / 12.5 / 3600.0, float(examples.n_frames.mean())
    print(
        f"{len(examples.text)} clips, {hours:.2f} h, {frames:.0f} frames and {examples.n_text[:, 0].mean():.1f} "
        f"text ids each, {len(examples.names)} speakers, {len(examples.held_out)} clips held out; parameters {sizes}; "
        f"ready after {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    where = SimpleNamespace(config=config, path=Path("no-checkpoint"))
    engine = Engine(TTS(cast(Checkpoint, where), model, cast(CodecDecoder, None), tokenizer))
    # The same weights everywhere, other examples.
    torch.manual_seed(settings.seed + ranks.rank)
    examples.rng = np.random.default_rng(settings.seed + ranks.rank)
    run(trainer, engine, args.out, 16 if args.toy else 96, args.voices)
    ranks.end()


if __name__ == "__main__":
    main()
