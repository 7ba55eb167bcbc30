"""Train the speaker encoder: how a voice sounds, from changed excerpts of what it says.

    python -m training.voices --set ENCODED --latents LATENTS --out OUT --seconds 80

ENCODED is what `training.encode` wrote, LATENTS what `training.encoder measure` wrote. A vector that tells who speaks
is a number on a list, and a voice that is not on it could be any (docs/VOICE.md). So a speaker's vector is to be a
manner: how far each kind of sound is, in that mouth, from how all say it. What is measured of all that a speaker says
is the target of three seconds of it, however they were recorded; voices that sound alike have vectors that are alike.
The talker learns to speak by these vectors, and the encoder stays as it is.

Writes OUT/voices parts, the running mean of the encoder's weights, every 20 seconds and at the end, then OUT/done.
Every twentieth speaker is held out: how much of the manner is told, and, of the ends of a recording and of others', how
often those of one speaker are more alike than those of two.

Shapes: B batch, S speakers, N samples at 24 kHz, T frames, Q codebooks, D the width of a speaker vector.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quaver.model import speaker
from quaver.model.speaker import SpeakerEncoder
from training import parts, quantizer, recipe, rooms, shards
from training.encoder import captured, check, descend, keep

HELD_OUT_EVERY = 20
_TOLD_S = 3.0
_FRAMES = 1 << 18


@torch.no_grad()
def manners(encoded: shards.Encoded, books: Tensor, settings: recipe.VoicesRecipe, width: int) -> Tensor:
    """The manner [S, ``width``] of every speaker of ``encoded``, of power 1 on average; ``books`` [Q, K, d].

    The codes of codebook 0 are put into classes of sounds. How a speaker's frames of a class sound, on average, less
    how all speakers' do, is one part of a vector that is then turned to its principal axes over all speakers, loud axes
    made fainter; classes of which little was heard count as said like everybody's (the supervector of Reynolds et al.
    2000, Speaker verification using adapted Gaussian mixture models).
    """
    device, n_speakers, n_classes = books.device, len(encoded.names), settings.n_classes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        means = quantizer.kmeans(books[0], n_classes)
        axes = torch.linalg.qr(torch.randn(width, width))[0].to(device)
    kind = quantizer.nearest(books[0], means)
    who = encoded.speaker.long().repeat_interleave(encoded.n_frames.long())
    sums = torch.zeros(n_speakers * n_classes, books.shape[2], device=device)
    counts = torch.zeros(n_speakers * n_classes, device=device)
    for speakers, codes in zip(torch.split(who, _FRAMES), torch.split(encoded.codes, _FRAMES), strict=True):
        rows = codes.to(device).long()
        place = speakers.to(device) * n_classes + kind[rows[:, 0]]
        sound = torch.stack([F.embedding(rows[:, i], books[i]) for i in range(1, len(books))]).sum(0)
        sums.index_add_(0, place, sound)
        counts.index_add_(0, place, torch.ones_like(place, dtype=torch.float32))
    sums, counts = sums.view(n_speakers, n_classes, -1), counts.view(n_speakers, n_classes, 1)
    usual = sums.sum(0) / counts.sum(0).clamp(min=1.0)
    apart = (sums - counts * usual) / (counts + settings.relevance)
    apart = (apart * (counts.sum(0) / counts.sum()).sqrt()).flatten(1)
    left, size, _ = torch.linalg.svd(apart - apart.mean(0), full_matrices=False)
    n = min(settings.n_axes, width, len(size))
    scores = left[:, :n] * size[:n] ** settings.loudness
    scores = scores * (n_speakers * width / scores.square().sum()).sqrt()
    found: Tensor = scores @ axes[:n]
    return found


class References:
    """A recording of every speaker, int16 [S, N] on a device."""

    def __init__(self, samples: np.ndarray, device: torch.device) -> None:
        self.samples = torch.as_tensor(samples).to(device, torch.int16)

    def plain(self, who: Tensor, n_samples: int) -> Tensor:
        """Excerpts [B, n_samples] in -1..1 from the start of the speakers ``who`` [B]."""
        return self.samples[who, :n_samples].float() / 32768.0

    def changed(self, who: Tensor, n_samples: int) -> Tensor:
        """Random excerpts [B, n_samples] of the speakers ``who`` [B], changed in speed, level, colour, band, room and
        noise; of at most half of a recording."""
        device, n = self.samples.device, len(who)
        n_samples = min(n_samples, self.samples.shape[1] // 2)
        uniform = torch.rand(3, n, 1, device=device)
        speed = 0.96 + 0.08 * uniform[0]
        start = uniform[1] * (self.samples.shape[1] - speed * n_samples - 2.0)
        at = start + speed * torch.arange(n_samples, device=device)
        left = at.long() + who[:, None] * self.samples.shape[1]
        flat = self.samples.view(-1)
        x = torch.lerp(flat[left].float(), flat[left + 1].float(), at - at.floor())
        x = x / (x.square().mean(1, keepdim=True) + 1.0).sqrt()
        return rooms.recorded(x, colour_db=5.0) * 0.06 * 10.0 ** (1.2 * (uniform[2] - 0.5))


class Trainer:
    """The speaker encoder and one train step."""

    def __init__(
        self, encoder: SpeakerEncoder, references: References, wanted: Tensor, settings: recipe.VoicesRecipe
    ) -> None:
        """``wanted``: the speakers' manners [S, D]."""
        self.references, self.settings = references, settings
        self.device = device = references.samples.device
        self.encoder, self.wanted = encoder.to(device), wanted.to(device)
        held = torch.arange(len(wanted), device=device) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self.held_out, self.trained = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
        self.parameters = list(self.encoder.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.lr = torch.zeros((), device=device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=fused, capturable=fused
        )
        self.report, self.odd = (torch.zeros((), device=device) for _ in range(2))

    def missed(self, found: Tensor, who: Tensor) -> Tensor:
        """The share of the manners of ``who`` [B] that the vectors ``found`` [B, D] do not tell."""
        share: Tensor = (found - self.wanted[who]).square().mean() / self.wanted[who].square().mean()
        return share

    def step(self) -> None:
        """One train step; gradients that are not finite count as none."""
        s = self.settings
        who = self.trained[torch.randint(len(self.trained), (s.batch,), device=self.device)]
        found = self.encoder(speaker.mel(self.references.changed(who, round(s.seconds * speaker.SAMPLE_RATE_HZ))))
        missed = self.missed(found, who)
        gradients = torch.autograd.grad(missed, self.parameters)
        with torch.no_grad():
            keep(self.parameters, gradients)
            self.odd += descend(self.optimizer, self.parameters, 1.0)
            torch._foreach_lerp_(self.ema, list[Tensor](self.parameters), 1.0 - s.ema_decay)
            self.report.lerp_(missed.nan_to_num(1e3), 0.02)

    def averaged(self) -> dict[str, Tensor]:
        """The running mean of the encoder's state."""
        return dict(zip((n for n, _ in self.encoder.named_parameters()), self.ema, strict=True))

    @torch.no_grad()
    def told(self) -> tuple[float, float]:
        """Of held-out speakers, by the averaged encoder: the share of their manners that is told, and how often two
        pieces of one, from the start and the end of what there is, are more alike than pieces of two: 0.5 says nothing,
        1.0 all. nan with fewer than two held out."""
        if len(self.held_out) < 2:
            return math.nan, math.nan
        n = round(_TOLD_S * speaker.SAMPLE_RATE_HZ)
        samples, own = self.references.samples[self.held_out], [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(list[Tensor](self.parameters), self.ema)
        ends = (samples[:, :n], samples[:, -n:])
        vectors = [self.encoder.embed(end.float() / 32768.0) for end in ends]
        torch._foreach_copy_(list[Tensor](self.parameters), own)
        told = 1.0 - float(sum(self.missed(found, self.held_out) for found in vectors)) / 2
        first, second = (F.normalize(found, dim=1) for found in vectors)
        likeness = first @ second.T
        same = likeness.diagonal()
        other = likeness[~torch.eye(len(same), dtype=torch.bool, device=self.device)]
        return told, float((same[:, None] > other).float().mean())


def train(trainer: Trainer, out: Path, log: Callable[[str], None]) -> None:
    """Trains until the recipe's seconds are over; saves every 20 seconds and at the end.

    Raises FloatingPointError when too many steps were not finite.
    """
    s, on_gpu = trainer.settings, trainer.device.type == "cuda"
    (out / "done").unlink(missing_ok=True)
    step, n_steps, saved_s = captured(trainer.step, trainer.device), 0, 0.0
    begun = time.monotonic()

    def save() -> None:
        odd = check(trainer.odd, n_steps)
        told, alike = trainer.told()
        now = f"step {n_steps}: {float(trainer.report):.3f} missed, of those held out {told:.3f} told"
        log(f"{now}, told apart {alike:.4f}, {odd} not finite")
        parts.write(out, "voices", trainer.averaged(), torch.float32)

    while (elapsed := time.monotonic() - begun) < s.total_s:
        warm = min(1.0, (elapsed + 0.1) / s.warmup_s)
        trainer.lr.fill_(s.lr * warm * (0.01 + 0.495 * (1.0 + math.cos(math.pi * elapsed / s.total_s))))
        for _ in range(10 if on_gpu else 1):
            step()
            n_steps += 1
        if on_gpu:
            torch.cuda.synchronize()
        if elapsed > saved_s + 20.0:
            saved_s = elapsed
            save()
    save()
    (out / "done").touch()


def main() -> None:
    """Reads, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, required=True, help="the folder of the encoded set")
    parser.add_argument("--latents", type=Path, required=True, help="where the codebooks are")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--device")
    parser.add_argument("--toy", action="store_true", help="tiny steps, on a CPU")
    args = parser.parse_args()
    begun = time.monotonic()
    device = torch.device(args.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    settings = recipe.VoicesRecipe(total_s=args.seconds)
    if args.toy:
        settings = dataclasses.replace(settings, batch=4)
    torch.manual_seed(settings.seed)

    def log(text: str) -> None:
        print(f"voices {time.monotonic() - begun:.0f} s | {text}", flush=True)

    encoded, config = shards.read(args.set), recipe.speaker_config()
    books = parts.read(args.latents, "coding")["books"].to(device)
    wanted = manners(encoded, books, settings, config.enc_dim)
    log(f"{len(wanted)} speakers, {len(encoded.codes)} frames")
    references = References(shards.read_references(args.set), device)
    train(Trainer(SpeakerEncoder(config), references, wanted, settings), args.out, log)


if __name__ == "__main__":
    main()
