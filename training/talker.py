r"""Train talker, code predictor and speaker encoder together on the crossed clips, whose codes a trained codec gives.

    torchrun --nproc-per-node=2 -m training.talker --data .data --codec PARTS/codec-end --tokenizer VOICE_FOLDER \
        --out OUT --seconds 2700

Runs on CPU cores, one process each. Writes OUT/talker-*.safetensors (bf16, see `training.parts`). Each example is a
sentence in one voice, its speaker vector taken from another clip of that voice, changed in speed, level, colour and
noise. What was heard is made unreliable: codes at random, the beginning of another clip, or nothing true at all. A clip
is known by its first frames, and a model that may trust them reads neither text nor voice: it was 97 % right on true
frames, and babbled on its own. The linears carry noise, so that INT4 does no harm.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import ModelConfig, parse
from quaver.model import speaker as speaker_encoder
from quaver.model.codec_encoder import Codec
from quaver.model.tts import Layout, Model
from quaver.text import Tokenizer
from training import data, parts, quantizer, recipe
from training.plans import Plan, Planner, Speech


def config_of(tokenizer: Tokenizer) -> ModelConfig:
    """The small voice's configuration with the ids of ``tokenizer``."""
    return parse(ModelConfig, settings_of(tokenizer), "training/recipe.py: model_settings")


def settings_of(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json of the small voice with the ids of ``tokenizer``."""
    names = ("<|im_start|>", "<|im_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
    special = {name: tokenizer.encode(name)[0] for name in names}
    return recipe.model_settings(special, tokenizer.encode("assistant")[0])


@torch.no_grad()
def encode(codec: Codec, samples: list[np.ndarray]) -> list[Tensor]:
    """The codes [T, Q] of each recording, each encoded alone, as `TTS.enroll` does."""
    return [codec.encoder.encode(torch.from_numpy(s)[None])[0].T for s in samples]


@dataclass(frozen=True, slots=True)
class Frames:
    """All frames of the training set: ``codes`` [T, Q] and their acoustic ``latents`` [T, d]."""

    codes: Tensor
    latents: Tensor


@torch.no_grad()
def acoustic(codec: Codec, codes: Tensor) -> Tensor:
    """The acoustic latents [T, d] that codebooks 1 and on of ``codes`` [T, Q] add up to."""
    books = quantizer.codebooks(codec)[1:]
    return torch.stack([book.embedding[codes[:, i + 1]] for i, book in enumerate(books)]).sum(0)


class Examples:
    """Everything a batch is drawn from."""

    def __init__(self, plans: list[Plan], speech: Frames, voices: list[np.ndarray]) -> None:
        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(p, name) for p in plans])).long()

        self.text, self.codec, self.frame, self.target = map(stacked, ("text", "codec", "frame", "target"))
        self.speaker, self.first, self.n_frames, self.voice = map(stacked, ("speaker", "first", "n_frames", "voice"))
        self.length = self.first + self.n_frames + 1
        self.speech = speech
        self.voices = [torch.from_numpy(v) for v in voices]

    def references(self, voice: int, n: int, seconds: float) -> Tensor:
        """``n`` changed excerpts [n, N] of the recordings of ``voice``."""
        samples, n_samples = self.voices[voice], int(seconds * data.RATE_HZ)
        uniform = torch.rand(5, n, 1)
        at = (0.93 + 0.14 * uniform[0]) * torch.arange(n_samples)
        start = (uniform[1] * (len(samples) - 1.1 * n_samples - 2)).long()
        left = start + at.long()
        x = torch.lerp(samples[left], samples[left + 1], at - at.floor())
        x = x + 0.5 * (uniform[2] - 0.5) * F.pad(x, (1, -1))
        noise = 10.0 ** (-4.0 + 2.0 * uniform[3]) * torch.randn_like(x)
        return (x + noise) * (0.4 + 0.9 * uniform[4])


class Trainer:
    """The model and one train step."""

    def __init__(self, model: Model, examples: Examples, settings: recipe.TalkerRecipe) -> None:
        self.model, self.examples, self.settings = model, examples, settings
        speech = examples.speech
        # What a hidden state says of the frame's acoustic latent, read off linearly; it is not part of the model.
        self.readout = nn.Linear(model.talker.config.hidden_size, speech.latents.shape[1])
        self.voices = nn.Parameter(torch.randn(len(examples.voices), model.talker.config.hidden_size))
        self.power = speech.latents.var(0).sum()
        self.parameters = [*model.parameters(), *self.readout.parameters(), self.voices]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.linears = [m.weight for m in model.talker.model.layers.modules() if isinstance(m, nn.Linear)]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
        self.noise = 0.0
        self.report = torch.zeros(7)
        self.unsure = torch.zeros(())
        self.n_steps = 0
        weight = torch.linspace(1.5, 0.5, recipe.N_CODEBOOKS - 1)
        self.book_weight = weight / weight.sum()

    def vectors(self, voice: Tensor) -> Tensor:
        """Speaker vectors [B, D] for rows of each ``voice``, from three changed excerpts a voice, with noise.

        Leaves in ``unsure`` how far the vectors' directions are from telling the voices apart.
        """
        encoder, e = self.model.speaker_encoder, self.examples
        assert encoder is not None
        n_each = 1
        samples = torch.cat([e.references(v, n_each, self.settings.reference_s) for v in range(len(e.voices))])
        found = encoder(speaker_encoder.mel(samples))
        likeness = 10.0 * F.normalize(found, dim=1) @ F.normalize(self.voices, dim=1).T
        self.unsure = F.cross_entropy(likeness, torch.arange(len(e.voices)).repeat_interleave(n_each))
        found = found[voice * n_each + torch.randint(n_each, voice.shape)]
        scale = found.detach().square().mean(1, keepdim=True).sqrt()
        noisy: Tensor = found + 0.1 * scale * torch.randn_like(found)
        return noisy

    def embeds(self, row: Tensor, length: int, rate: Tensor) -> Tensor:
        """Talker inputs [B, L, D] of the plans ``row``, what is heard made unreliable (codes at ``rate`` [B, 1, 1])."""
        e, talker = self.examples, self.model.talker
        frame, codec = e.frame[row, :length], e.codec[row, :length]
        heard = disturbed(e.speech.codes[self.mistaken(row, frame).clamp(min=0)], rate)
        x = talker.embed_text(e.text[row, :length])
        x = x + talker.embed_codec(codec.clamp(min=0)) * (codec >= 0)[..., None]
        x = x + talker.embed_frames(heard) * (frame >= 0)[..., None]
        at = torch.arange(length) == e.speaker[row][:, None]
        return x + at[..., None] * self.vectors(e.voice[row])[:, None]

    def mistaken(self, row: Tensor, frame: Tensor) -> Tensor:
        """``frame`` [B, L], where in some rows speech begins with frames of another row of the batch."""
        first = self.examples.first[row][:, None]
        other = torch.randperm(len(row))
        since = torch.arange(frame.shape[1]) - first - 1
        theirs = frame[other].gather(1, (first[other] + 1 + since).clamp(0, frame.shape[1] - 1))
        until = self.examples.n_frames[row][:, None] * torch.rand(len(row), 1)
        swapped = (torch.rand(len(row), 1) < self.settings.mistaken) & (since >= 0) & (since <= until)
        return torch.where(swapped & (theirs >= 0) & (frame >= 0), theirs, frame)

    def loss(self, row: Tensor) -> Tensor:
        """The loss of the plans ``row``; leaves its parts in ``report``."""
        s, e, talker = self.settings, self.examples, self.model.talker
        length = int(e.length[row].max())
        rate = torch.rand(len(row), 1, 1).square() * s.replaced
        rate = torch.where(torch.rand_like(rate) < s.deaf, 1.0, rate)
        hidden = talker.hidden(self.embeds(row, length, rate))
        target = e.target[row, :length]
        spoken, last = target >= 0, torch.arange(length) == (e.first + e.n_frames)[row][:, None]
        wanted = e.speech.codes[target.clamp(min=0)][..., 0]
        wanted = torch.where(last, talker.config.codec_eos_token_id, wanted)[spoken | last]
        logits = talker.codec_head(hidden[spoken | last])
        first = F.cross_entropy(logits, wanted)
        states, frames = hidden[spoken], target[spoken]
        unlike = (self.readout(states) - e.speech.latents[frames]).square().sum(-1).mean() / self.power
        chosen = torch.randperm(len(frames))[: s.n_frames * len(row)]
        codes = e.speech.codes[frames[chosen]]
        given = disturbed(codes, 0.1 * torch.rand(len(codes), 1).square())
        force = talker.code_predictor.force
        guessed = force(states[chosen], talker.embed_codec(given[:, 0]), given[:, 1:])
        each = F.cross_entropy(guessed.transpose(1, 2), codes[:, 1:], reduction="none").mean(0)
        right = (logits.argmax(-1) == wanted).float().mean()
        now = torch.stack([first, right, unlike, each[0], each[4], each.mean(), self.unsure]).detach()
        self.report = now if not self.n_steps else self.report.lerp(now, 0.05)
        total: Tensor = first + 3.0 * unlike + 2.0 * (each * self.book_weight).sum() + 0.5 * self.unsure
        return total

    def step(self, row: Tensor) -> None:
        """One train step on the plans ``row``, with noisy linears. Raises FloatingPointError for a loss not finite."""
        with torch.no_grad():
            noise = [torch.randn_like(w) * (self.noise * w.std()) for w in self.linears]
            torch._foreach_add_(self.linears, noise)
        loss = self.loss(row)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"step {self.n_steps}: the loss is {float(loss)}")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            torch._foreach_sub_(self.linears, noise)
            self.reduce()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            decay = min(self.settings.ema_decay, (1.0 + self.n_steps) / (10.0 + self.n_steps))
            torch._foreach_lerp_(self.ema, list[Tensor](self.parameters), 1.0 - decay)
        self.n_steps += 1

    def reduce(self) -> None:
        """The mean of the gradients over all processes."""
        if dist.is_initialized():
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            means = torch.split(flat, [g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [f.view_as(g) for f, g in zip(means, gradients, strict=True)])

    def pace(self, share: float) -> None:
        """Learning rate and weight noise at a ``share`` 0..1 of the run."""
        factor = min(1.0, (self.n_steps + 1) / 60) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share))))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        self.noise = self.settings.weight_noise * min(1.0, share / 0.3)

    def averaged(self) -> dict[str, Tensor]:
        """The model's state with the running mean of its parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        return {**self.model.state_dict(), **dict(zip(names, self.ema, strict=False))}


def disturbed(codes: Tensor, rate: Tensor) -> Tensor:
    """``codes`` [..., Q] with a share ``rate`` of them replaced by any code."""
    wrong = torch.rand(codes.shape) < rate
    return torch.where(wrong, torch.randint(recipe.N_CODES, codes.shape), codes)


def initialise(model: Model, readout: nn.Linear, codec: Codec) -> None:
    """Small normal weights, text as loud as speech, and tables of codes in the geometry of the codec.

    Text embeddings through two layers of small weights would be a thousandth of the codes they are added to: the model
    then learns its sentences from their first frames, and its text never.
    A code's embedding and its row in the head lie where its codebook vector lies, in one 64-dimensional subspace
    for all codebooks: what the first layers would have to find out about each of 8,192 codes is true at the start.
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
    books = [book.embedding for book in quantizer.codebooks(codec)]
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
            size = book.square().mean().sqrt()
            table[: len(book)] += 0.1 * (book / size) @ where * (size / top).clamp(max=1.0).sqrt()
            rows[: len(book)] += 0.1 * (book / size) @ where


@torch.no_grad()
def keep_codes(model: Model, earlier: dict[str, Tensor]) -> None:
    """Takes over what an earlier run knows of codes and voices, and starts anew with text and the talker's layers.

    A run that was told true frames leans on them and never learns to read. Text starts twice as loud as heard frames.
    """
    anew = ("talker.model.layers.", "talker.model.norm.", "talker.model.text_embedding.", "talker.text_projection.")
    kept = {name: value.float() for name, value in earlier.items() if not name.startswith(anew)}
    model.load_state_dict({**model.state_dict(), **kept})
    talker = model.talker
    nn.init.normal_(talker.model.text_embedding.weight)
    for linear in (talker.text_projection.linear_fc1, talker.text_projection.linear_fc2):
        nn.init.normal_(linear.weight, std=1.5 * linear.in_features**-0.5)
    heard = talker.embed_frames(torch.randint(recipe.N_CODES, (256, recipe.N_CODEBOOKS)))
    read = talker.embed_text(torch.arange(256))
    talker.text_projection.linear_fc2.weight *= 2.0 * heard.std() / read.std()


def make_plans(planner: Planner, clips: list[Speech], seed: int) -> list[list[Plan]]:
    """Plans by kind: text streamed, text first, and cloned in context; with the language named and not."""
    random_ = random.Random(seed)
    by_voice = {v: [c for c in clips if c.voice == v] for v in {c.voice for c in clips}}
    layouts: tuple[Layout, ...] = ("stream", "whole")
    kinds = [
        [planner.plan(c, language, layout) for c in clips for language in ("english", "auto")] for layout in layouts
    ]
    kinds.append(
        [
            planner.plan(c, random_.choice(("english", "auto")), layout, random_.choice(by_voice[c.voice]))
            for c in clips
            for layout in layouts
        ]
    )
    return [[p for p in kind if p is not None] for kind in kinds]


def batches(examples: Examples, kinds: list[range], settings: recipe.TalkerRecipe) -> Iterator[Tensor]:
    """Endless batches of plan indices, each of one kind and of similar lengths; kinds by their shares."""
    shares = torch.tensor(settings.shares)
    queues: list[list[Tensor]] = [[] for _ in kinds]
    while True:
        kind = int(torch.multinomial(shares, 1))
        if not queues[kind]:
            index = torch.tensor(kinds[kind])
            length = examples.length[index] + 6.0 * torch.rand(len(index))
            # Half of the plans of a kind say the same as the other half: one of each two is enough for a round.
            index = index[length.argsort()][torch.randint(2, (1,)) :: 2]
            queues[kind] = list(torch.split(index, settings.batch))
            random.shuffle(queues[kind])
        yield queues[kind].pop()


def main() -> None:
    """Encodes, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True, help="FOLDER/NAME of the trained codec's parts")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2700.0)
    parser.add_argument("--resume", type=Path, help="FOLDER/NAME of earlier talker parts to start from")
    parser.add_argument("--anew", action="store_true", help="with --resume: text and the talker's layers start anew")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    settings = recipe.TalkerRecipe(total_s=args.seconds)
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    clips = data.paired_clips(args.data, args.sentences)
    samples = data.read_clips(args.data, clips)
    codec = Codec(recipe.codec_config())
    codec.load_state_dict(parts.read(args.codec.parent, args.codec.name))
    codes = encode(codec.eval(), samples)
    print(f"{len(clips)} clips, {sum(map(len, codes))} frames, list {data.list_sha256(clips)}", flush=True)
    speeches, start = [], 0
    for clip, frames in zip(clips, codes, strict=True):
        speeches.append(Speech(clip.text, data.VOICES.index(clip.voice), start, len(frames)))
        start += len(frames)
    tokenizer = Tokenizer.load(args.tokenizer)
    config = config_of(tokenizer)
    kinds = make_plans(Planner(config, tokenizer, settings.n_positions), speeches, settings.seed)
    ends = np.cumsum([0, *map(len, kinds)]).tolist()
    ranges = [range(a, b) for a, b in itertools.pairwise(ends)]
    voices = [np.concatenate([s for s, c in zip(samples, clips, strict=True) if c.voice == v]) for v in data.VOICES]
    joined = torch.cat(codes)
    examples = Examples([p for kind in kinds for p in kind], Frames(joined, acoustic(codec, joined)), voices)
    model = Model(config)
    trainer = Trainer(model.train(), examples, settings)
    initialise(model, trainer.readout, codec)
    if args.resume:
        earlier = parts.read(args.resume.parent, args.resume.name)
        if args.anew:
            keep_codes(model, earlier)
        else:
            model.load_state_dict(earlier)
    if "RANK" in os.environ:
        join(trainer)
    for average, parameter in zip(trainer.ema, trainer.parameters, strict=True):
        average.copy_(parameter.detach())
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    print(f"plans {[len(k) for k in kinds]}; parameters {sizes}", flush=True)
    run(trainer, batches(examples, ranges, settings), args.out)


def join(trainer: Trainer) -> None:
    """Joins the other processes: the same model everywhere, other batches."""
    dist.init_process_group("gloo")
    for parameter in trainer.parameters:
        dist.broadcast(parameter.data, 0)
    torch.manual_seed(trainer.settings.seed + dist.get_rank())
    random.seed(trainer.settings.seed + dist.get_rank())


def agreed(seconds: float) -> float:
    """The first process's ``seconds``, on every process."""
    if not dist.is_initialized():
        return seconds
    clock = torch.tensor([seconds])
    dist.broadcast(clock, 0)
    return float(clock)


def run(trainer: Trainer, rows: Iterator[Tensor], out: Path) -> None:
    """Trains until the recipe's seconds are over; saves every five minutes and at the end."""
    begun, total_s, saved_s = time.monotonic(), trainer.settings.total_s, 0.0
    leads = not dist.is_initialized() or dist.get_rank() == 0
    while (elapsed := agreed(time.monotonic() - begun)) < total_s:
        trainer.pace(elapsed / total_s)
        trainer.step(next(rows))
        if trainer.n_steps % 50 == 0 and leads:
            first, right, unlike, one, five, rest, unsure = trainer.report.tolist()
            print(
                f"{elapsed:.0f} s, step {trainer.n_steps}: codebook 0 {first:.3f} nat ({right:.1%} right), "
                f"latent {unlike:.3f}, codebook 1 {one:.3f}, 5 {five:.3f}, mean of all {rest:.3f}, voices {unsure:.2f}",
                flush=True,
            )
        if elapsed > saved_s + 300.0 and leads:
            saved_s = elapsed
            parts.write(out, "talker", trainer.averaged(), torch.bfloat16)
    if not leads:
        return
    print(f"done: {trainer.n_steps} steps in {elapsed:.0f} s", flush=True)
    parts.write(out, "talker", trainer.averaged(), torch.bfloat16)


if __name__ == "__main__":
    main()
