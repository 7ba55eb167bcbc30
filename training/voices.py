"""Train the speaker encoder alone: to tell speakers apart, from changed excerpts of what they say.

    python -m training.voices --set SET --set SET --out OUT --seconds 80

The talker's training begins with OUT (`--voices`) and goes on with it slowly: learnt beside all the rest, from nothing,
a voice takes longer than the text. Writes OUT/voices parts, the running mean of the weights and a direction for each
speaker in the order of their names, every 20 seconds and at the end, then OUT/done. Every twentieth speaker is held
out: of the ends of two recordings, how often those of one speaker are more alike than those of two (`told`).

Shapes: B batch, S speakers, N samples at 24 kHz, D the width of a speaker vector.
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
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import SpeakerConfig, parse
from quaver.model import speaker
from quaver.model.speaker import SpeakerEncoder
from training import parts, recipe, shards
from training.encoder import captured, check, descend, keep

HELD_OUT_EVERY = 20
_TOLD_S = 3.0


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
        uniform = torch.rand(9, n, 1, device=device)
        speed = 0.96 + 0.08 * uniform[0]
        start = uniform[1] * (self.samples.shape[1] - speed * n_samples - 2.0)
        at = start + speed * torch.arange(n_samples, device=device)
        left = at.long() + who[:, None] * self.samples.shape[1]
        flat = self.samples.view(-1)
        x = torch.lerp(flat[left].float(), flat[left + 1].float(), at - at.floor())
        x = x / (x.square().mean(1, keepdim=True) + 1.0).sqrt()
        hz = torch.linspace(0.0, speaker.SAMPLE_RATE_HZ / 2, n_samples // 2 + 1, device=device)
        tilt_db = 5.0 * (uniform[2] - 0.5) * (hz.clamp(min=100.0) / 1000.0).log2()
        edge_hz = torch.where(uniform[3] < 0.3, 6000.0 + 2000.0 * uniform[4], 1e6)
        gain = 10.0 ** (tilt_db / 20.0) * torch.sigmoid((edge_hz - hz) / 80.0)
        n_tail = min(n_samples, speaker.SAMPLE_RATE_HZ // 3)
        seconds = torch.arange(n_tail, device=device) / speaker.SAMPLE_RATE_HZ
        tail = torch.randn(n, n_tail, device=device) * torch.exp(-6.9 * seconds / (0.08 + 0.3 * uniform[5]))
        loud = torch.where(uniform[6] < 0.3, 0.6 * uniform[6] / 0.3, 0.0)
        tail = tail * loud / (tail.square().sum(1, keepdim=True) + 1e-6).sqrt()
        spectrum = torch.fft.rfft(x) * gain * (1.0 + torch.fft.rfft(tail, n=n_samples))
        x = torch.fft.irfft(spectrum, n=n_samples)
        x = x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt()
        x = x + 10.0 ** (-3.0 + 2.2 * uniform[7]) * torch.randn_like(x)
        out: Tensor = x * 0.06 * 10.0 ** (1.2 * (uniform[8] - 0.5))
        return out


def unsure(found: Tensor, directions: Tensor, who: Tensor, scale: float, margin: float = 0.0) -> Tensor:
    """The cross-entropy in nats of the speakers ``who`` [B] by the cosines of ``found`` [B, D] with ``directions``
    [S, D]; the right one has to win by ``margin`` (Wang et al. 2018, CosFace)."""
    cosine = F.normalize(found, dim=1, eps=1e-4) @ F.normalize(directions, dim=1, eps=1e-4).T
    return F.cross_entropy(scale * (cosine - margin * F.one_hot(who, len(directions))), who)


def unequal(found: Tensor) -> Tensor:
    """How far the vectors [B, D] are from a root mean square of 1, in squares of nats of power: nothing else hangs on
    how long they are, and without bounds they grow beyond all numbers."""
    return (found.square().mean(1) + 1e-6).log().square().mean()


class Trainer:
    """The speaker encoder and one train step."""

    def __init__(self, encoder: SpeakerEncoder, references: References, settings: recipe.VoicesRecipe) -> None:
        self.references, self.settings = references, settings
        self.device = device = references.samples.device
        self.encoder = encoder.to(device)
        n_speakers = len(references.samples)
        held = torch.arange(n_speakers, device=device) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self.held_out, self.trained = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
        self.directions = nn.Parameter(torch.randn(n_speakers, encoder.fc.out_channels, device=device))
        self.parameters = [*self.encoder.parameters(), self.directions]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.lr = torch.zeros((), device=device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=(0.9, 0.98), weight_decay=1e-2, fused=fused, capturable=fused
        )
        self.report, self.odd = (torch.zeros((), device=device) for _ in range(2))

    def step(self) -> None:
        """One train step; gradients that are not finite count as none."""
        s = self.settings
        who = self.trained[torch.randint(len(self.trained), (s.batch,), device=self.device)]
        found = self.encoder(speaker.mel(self.references.changed(who, round(s.seconds * speaker.SAMPLE_RATE_HZ))))
        missed = unsure(found, self.directions, who, s.scale, s.margin)
        gradients = torch.autograd.grad(missed + s.unequal_weight * unequal(found), self.parameters)
        with torch.no_grad():
            keep(self.parameters, gradients)
            self.odd += descend(self.optimizer, self.parameters, 1.0)
            torch._foreach_lerp_(self.ema, list[Tensor](self.parameters), 1.0 - s.ema_decay)
            self.report.lerp_(missed.nan_to_num(1e3), 0.02)

    def averaged(self) -> dict[str, Tensor]:
        """The running means: the encoder's state, and the speakers' directions."""
        names = [*(f"encoder.{name}" for name, _ in self.encoder.named_parameters()), "directions"]
        return dict(zip(names, self.ema, strict=True))

    @torch.no_grad()
    def told(self) -> float:
        """How often two pieces of a held-out speaker, from the start and the end of what there is, are more alike than
        pieces of two speakers: 0.5 says nothing, 1.0 all. By the averaged encoder; nan with fewer than two held out."""
        if len(self.held_out) < 2:
            return math.nan
        n = round(_TOLD_S * speaker.SAMPLE_RATE_HZ)
        samples, own = self.references.samples[self.held_out], [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(list[Tensor](self.parameters), self.ema)
        ends = (samples[:, :n], samples[:, -n:])
        first, second = (F.normalize(self.encoder.embed(end.float() / 32768.0), dim=1) for end in ends)
        torch._foreach_copy_(list[Tensor](self.parameters), own)
        likeness = first @ second.T
        same = likeness.diagonal()
        other = likeness[~torch.eye(len(same), dtype=torch.bool, device=self.device)]
        return float((same[:, None] > other).float().mean())


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
        log(f"step {n_steps}: {float(trainer.report):.3f} nats, told {trainer.told():.4f}, {odd} not finite")
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
    parser.add_argument("--set", type=Path, action="append", required=True, help="a synthesized set")
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

    names, references = shards.references([clip for folder in args.set for clip in shards.spoken(folder)])
    log(f"{len(names)} speakers")
    config = parse(SpeakerConfig, recipe.SPEAKER_ENCODER, "training/recipe.py: SPEAKER_ENCODER")
    train(Trainer(SpeakerEncoder(config), References(references, device), settings), args.out, log)


if __name__ == "__main__":
    main()
