"""Train the codec's decoder: codes to samples, on one GPU or, with torchrun, several.

    python -m training.decoder --set SET --first CODEC --latents LATENTS --encoder ENCODER --out OUT --seconds 1200

CODEC and LATENTS as in `training.encoder`; ENCODER is FOLDER/codec, the parts that it writes, or a codec's file. Until
that is there the decoder learns what the codes are to tell, measured on the sound itself, as the talker does; from then
on half of its crops have the encoder's own codes.

With `--own` a share of the crops have the codes that the talker itself would say (`training.own`), as soon as they are
there and again whenever they are new: its first codebooks are right, the others as wrong as they will be. With
`--voices` whose voice is heard counts, by the speaker encoder that `training.voices` writes.

At first it only draws: its first half, down to 50 Hz, learns to give back what the codes tell, as a linear map of its
output. Learnt through sound that takes far longer.

Writes OUT/codec parts every two minutes and at the end, encoder and all; `--resume` goes on with them. A train step is
two CUDA graphs; on a CPU it runs uncaptured (`--toy`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model import speaker
from quaver.model.codec import CodecDecoder
from quaver.model.codec_encoder import Codec, CodecEncoder
from quaver.model.speaker import SpeakerEncoder
from training import data, parts, quantizer, recipe, shards
from training.encoder import Coding, captured, check, descend, first_codec, keep, open_coding
from training.latents import WIDTH, by_column
from training.losses import Discriminators, MelDistance
from training.pool import Pool, from_sets
from training.ranks import Ranks

_REPORTED = ("mel", "low", "own", "adv", "match", "sketch", "heard", "voice", "mel-own", "unlike")
_LOW_HZ = 500.0
_BRIGHT = 0.5


def excerpts(real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """The same second of both, at a random place of each row: discriminating all of it cost more than the codec."""
    length = min(data.RATE_HZ, real.shape[1])
    start = torch.randint(real.shape[1] - length + 1, (len(real), 1), device=real.device)
    index = start + torch.arange(length, device=real.device)
    return real.gather(1, index), made.gather(1, index)


class Trainer:
    """The decoder, its discriminators and its train steps."""

    def __init__(
        self,
        pool: Pool,
        coding: Coding,
        codec: Codec,
        settings: recipe.DecoderRecipe,
        ranks: Ranks,
        begun: dict[str, Tensor] | None = None,
    ) -> None:
        """``begun``: the state of a codec whose decoder reads these codes already, to go on with."""
        self.pool, self.coding, self.settings, self.ranks = pool, coding, settings, ranks
        self.device = device = coding.books.device
        torch.manual_seed(settings.seed)
        self.first = copy.deepcopy(codec).to(device).requires_grad_(False)
        self.encoder: CodecEncoder | None = None
        self.own: Tensor | None = None
        """The talker's own codes [frames, Q] for all frames of the encoded sets."""
        self.recognizer: SpeakerEncoder | None = None
        self.decoder = copy.deepcopy(codec.decoder).to(device)
        self.sounded = sounded
        if device.type == "cuda":
            from training import snake

            self.sounded = snake.sounded
        self.discriminators = Discriminators().to(device)
        self.distance = MelDistance().to(device)
        config = self.decoder.config
        self.n_parts = math.prod(config.upsampling_ratios)
        self.sketch = nn.Linear(config.latent_dim, WIDTH // self.n_parts).to(device)
        # The quantizer's input projections are never used by a decoder.
        own = {n: p for n, p in self.decoder.named_parameters() if "quantizer" not in n or "output_proj" in n}
        self.early = [p for n, p in own.items() if not n.startswith("decoder.")] + [*self.sketch.parameters()]
        self.late = [p for n, p in own.items() if n.startswith("decoder.")]
        self.theirs = list(self.discriminators.parameters())
        if begun:
            self.decoder.load_state_dict({k[8:]: v for k, v in begun.items() if k.startswith("decoder.")})
        else:
            self.aim()
        self.before = copy.deepcopy(self.decoder).requires_grad_(False)
        """What the second half can read, until it has heard more."""
        self.ema = copy.deepcopy(self.decoder).requires_grad_(False)
        self.followed = list(self.ema.parameters()), list[Tensor](self.decoder.parameters())
        for parameter in (*self.early, *self.late, *self.theirs):
            parameter.grad = torch.zeros_like(parameter)
        self.lr = [torch.tensor(0.0, device=device) for _ in range(3)]
        fused = device.type == "cuda"
        self.optimizers = [
            torch.optim.AdamW(group, lr=rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=fused, capturable=fused)
            for group, rate in zip((self.early, self.late, self.theirs), self.lr, strict=True)
        ]
        self._updates: dict[int, Callable[[], None]] = {}
        self.ramp = torch.tensor(0.0, device=device)
        self.report = torch.zeros(len(_REPORTED), device=device)
        self.odd = torch.zeros((), device=device)

    def autocast(self) -> torch.autocast:
        """bfloat16 where there is a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def read(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of codebook 0 and the sums of the others' [B, T, d] for ``samples`` [B, N], and the features."""
        books, n = self.coding.books, len(samples) // 2
        said, sound, features = self.coding(samples)
        if self.encoder is not None:
            theirs = quantizer.to_code(self.encoder, samples[n:])
            said, sound = torch.cat((said[:n], theirs[0])), torch.cat((sound[:n], theirs[1]))
        return quantizer.coded(said, books[:1])[1], quantizer.coded(sound, books[1:])[1], features

    @torch.no_grad()
    def aim(self) -> None:
        """Lets the decoder read on what it read, as far as the new codes tell it, and every new dimension faintly:
        what is faint takes it long to find."""
        told, passed = [], []
        for _ in range(40 if self.device.type == "cuda" else 2):
            samples = self.pool.draw(self.settings.batch, self.settings.n_frames, self.settings.changed)
            told.append(torch.cat(self.read(samples)[:2], -1).flatten(0, 1))
            codes = self.first.encoder.encode(samples)
            passed.append(self.first.decoder.quantizer.decode(codes).transpose(1, 2).flatten(0, 1))
        x, y = torch.cat(told), torch.cat(passed)
        read = self.decoder.quantizer
        found = quantizer.regressed(x, y).T.chunk(2, 1)
        for module, matrix in zip((read.rvq_first.output_proj, read.rvq_rest.output_proj), found, strict=True):
            quantizer.weight(module).copy_(matrix)
        outward, sound = quantizer.weight(read.rvq_rest.output_proj), x.chunk(2, 1)[1]
        axes = torch.linalg.qr(torch.randn(len(outward), outward.shape[1], device=self.device))[0]
        loud = y.square().mean().sqrt() * (outward.shape[0] / outward.shape[1]) ** 0.5
        outward += _BRIGHT * loud * axes / sound.square().mean(0).sqrt().clamp(min=1e-4)

    def drawn(self, middle: Tensor, features: Tensor) -> Tensor:
        """How far ``features`` [B, T, F] are from those read off the ``middle`` [B, latent, 4 T] of the decoder."""
        got = self.sketch(middle.transpose(1, 2)).float()
        wanted = by_column(self.coding.latents.normal(features) / self.coding.latents.gain.mean(), self.n_parts)
        distance: Tensor = (got - wanted).abs().mean() / wanted.abs().mean()
        return distance

    def draw_step(self) -> None:
        """One step of the first half alone."""
        samples = self.pool.draw(self.settings.drawn_batch, self.settings.n_frames, self.settings.changed)
        with self.autocast():
            first, rest, features = self.read(samples)
            with torch.no_grad():
                before = halfway(self.before, projected(self.before, first, rest))
            middle = halfway(self.decoder, projected(self.decoder, first, rest))
            sketch = self.drawn(middle, features)
            unlike = (middle - before).float().square().mean() / before.float().var()
        gradients = torch.autograd.grad(sketch + 0.2 * unlike, self.early)
        keep(self.early, gradients)
        self._tell(sketch=sketch, unlike=unlike)

    def step(self) -> None:
        """One train step of everything."""
        s = self.settings
        n = s.n_own if self.own is not None else 0
        real = self.pool.draw(s.batch - n, s.n_frames, s.changed)
        with self.autocast():
            first, rest, features = self.read(real)
            if self.own is not None:
                said, frames = self.pool.draw_as_said(n, s.n_frames)
                own_first, own_rest = self.vectors(self.own[frames].long())
                real, first = torch.cat((said, real)), torch.cat((own_first, first))
                rest = torch.cat((own_rest, rest))
            middle = halfway(self.decoder, projected(self.decoder, first, rest))
            made = self.sounded(self.decoder, middle).float()
            sketch = self.drawn(middle[n:], features)
            own, adversarial, matching = self.discriminators(*excerpts(real, made))
            heard = self.reheard(real, made)
        # No talker foresees the phase: what it says of that is no duty of its sound.
        mel, low = self.distance(real[n:], made[n:]), apart_below(real[n:], made[n:], _LOW_HZ)
        mel_own = self.distance(real[:n], made[:n]) if n else mel.detach() * 0.0
        voice = self.unlike(real, made) if self.recognizer else mel.detach() * 0.0
        mels = ((s.batch - n) * mel + n * mel_own) / s.batch
        loss = s.mel_weight * mels + s.low_weight * low + s.sketch_weight * sketch + s.heard_weight * heard
        loss = loss + self.ramp * (s.adversarial_weight * adversarial + s.matching_weight * matching)
        loss = loss + s.voice_weight * voice
        gradients = torch.autograd.grad(loss, [*self.early, *self.late], retain_graph=True)
        theirs = torch.autograd.grad(own, self.theirs)
        keep([*self.early, *self.late, *self.theirs], (*gradients, *theirs))
        told = {"mel": mel, "low": low, "own": own, "adv": adversarial, "match": matching, "sketch": sketch}
        self._tell(**told, heard=heard, voice=voice, **{"mel-own": mel_own})

    def vectors(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What `read` makes of sound, of ``codes`` int64 [B, T, Q]: the vectors of codebook 0 and the sums of the
        others' [B, T, d]."""
        books = self.coding.books
        sums = [F.embedding(codes[..., i], book) for i, book in enumerate(books)]
        return sums[0], torch.stack(sums[1:]).sum(0)

    def unlike(self, real: Tensor, made: Tensor) -> Tensor:
        """How far the voices heard in ``real`` and ``made`` [B, N] are apart: one minus the cosine."""
        assert self.recognizer is not None
        with torch.autocast(self.device.type, enabled=False):
            found = self.recognizer(speaker.mel(torch.cat((real, made))))
            wanted, got = F.normalize(found, dim=1, eps=1e-4).chunk(2)
            apart: Tensor = 1.0 - (wanted * got).sum(1).mean()
        return apart

    def reheard(self, real: Tensor, made: Tensor) -> Tensor:
        """The share of what is said in half of ``real`` [B, N] that is not heard in ``made``."""
        n = max(1, len(real) // 2)
        said, _ = quantizer.to_code(self.coding.listener, torch.cat((real[:n], made[:n])))
        wanted, got = said.chunk(2)
        missed: Tensor = (got - wanted).square().sum(-1).mean() / self.coding.power
        return missed

    @torch.no_grad()
    def update(self, n_groups: int) -> None:
        """Takes one step of the first ``n_groups`` optimizers; gradients that are not finite count as none."""
        groups = (self.early, self.late, self.theirs)[:n_groups]
        for parameters, optimizer in zip(groups, self.optimizers, strict=False):
            self.odd += descend(optimizer, parameters, 5.0)
        torch._foreach_lerp_(list[Tensor](self.followed[0]), self.followed[1], 1.0 - self.settings.ema_decay)

    def captured(self, sounding: bool) -> Callable[[], None]:
        """A train step: two CUDA graphs, and the mean of all processes' gradients between them."""
        n_groups = 3 if sounding else 1
        used = (self.early, self.late, self.theirs)[:n_groups]
        grads = [p.grad for parameters in used for p in parameters if p.grad is not None]
        differentiate = captured(self.step if sounding else self.draw_step, self.device)
        if n_groups not in self._updates:
            # What is run to be captured must change nothing: it would in every process something else.
            for tensor in (*self.lr, *grads):
                tensor.zero_()
            self._updates[n_groups] = captured(lambda: self.update(n_groups), self.device)
        update = self._updates[n_groups]

        def step() -> None:
            differentiate()
            self.ranks.mean(grads)
            update()

        return step

    @torch.no_grad()
    def _tell(self, **values: Tensor) -> None:
        now = torch.stack([values.get(name, self.odd * 0.0).float() for name in _REPORTED])
        self.report.lerp_(torch.where(now.isfinite(), now, self.report), 0.03)

    def follow(self, encoder: CodecEncoder) -> None:
        """From now on half of the codes are those of ``encoder``."""
        self.encoder = encoder.to(self.device).requires_grad_(False)

    def recognize(self, state: dict[str, Tensor]) -> None:
        """From now on whose voice is heard counts, by the speaker encoder in ``state`` (`training.voices`)."""
        encoder = SpeakerEncoder(recipe.speaker_config())
        encoder.load_state_dict(state)
        self.recognizer = encoder.to(self.device).requires_grad_(False)
        # A filter bank is made once for a device, and not within a graph.
        speaker.mel(torch.zeros(1, data.RATE_HZ, device=self.device))

    def take(self, codes: Tensor) -> bool:
        """From now on some crops have the talker's own ``codes`` [frames, Q]; whether there were none before."""
        if self.own is None:
            self.own = codes.to(self.device, torch.int16)
            return True
        self.own.copy_(codes)
        return False

    def pace(self, elapsed_s: float) -> None:
        """Sets learning rates and the adversarial ramp for a moment of the run."""
        s = self.settings
        sounding = elapsed_s - s.drawn_s
        if sounding < 0.0:
            share = min(1.0, elapsed_s / s.drawn_s)
            self.lr[0].fill_(s.drawn_lr * min(1.0, elapsed_s / 3.0) * (0.1 + 0.45 * (1.0 + math.cos(math.pi * share))))
            return
        share = min(1.0, sounding / max(1.0, s.total_s - s.drawn_s))
        factor = min(1.0, (sounding + 0.1) / 5.0) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * share)))
        self.lr[0].fill_(s.lr * factor)
        self.lr[1].fill_(s.lr * factor)
        self.lr[2].fill_(s.discriminator_lr * max(factor, 0.3))
        self.ramp.fill_(min(1.0, max(0.0, (sounding - s.adversarial_start_s) / s.adversarial_ramp_s)))

    def whole(self) -> Codec:
        """The codec with the averaged decoder, and with the encoder that it listens to."""
        codec = copy.deepcopy(self.first)
        codec.decoder.load_state_dict(self.ema.state_dict())
        if self.encoder is not None:
            codec.encoder.load_state_dict(self.encoder.state_dict())
        quantizer.install(codec.encoder, self.coding.books)
        return codec


def projected(decoder: CodecDecoder, first: Tensor, rest: Tensor) -> Tensor:
    """The latents [B, codebook_dim, T] that ``decoder`` makes of the vectors of its two quantizers [B, T, d]."""
    read = decoder.quantizer
    said, sound = read.rvq_first.output_proj(first.transpose(1, 2)), read.rvq_rest.output_proj(rest.transpose(1, 2))
    out: Tensor = said + sound
    return out


def halfway(decoder: CodecDecoder, latents: Tensor) -> Tensor:
    """What the first half of ``decoder`` makes of ``latents`` [B, codebook_dim, T]: [B, latent, 4 T]."""
    x: Tensor = decoder.pre_conv(latents)
    x = decoder.pre_transformer(x.transpose(1, 2)).transpose(1, 2)
    for stage in decoder.upsample:
        assert isinstance(stage, nn.ModuleList)
        for module in stage:
            x = module(x)
    out: Tensor = x
    return out


def sounded(decoder: CodecDecoder, middle: Tensor) -> Tensor:
    """The samples [B, N] that the second half of ``decoder`` makes of what the first half made."""
    for module in decoder.decoder:
        middle = module(middle)
    return middle.squeeze(1).clamp(-1.0, 1.0)


def apart_below(real: Tensor, made: Tensor, hz: float) -> Tensor:
    """How far the complex spectra of ``real`` and ``made`` [B, N] are apart below ``hz``; about 1.3 at random."""
    window = torch.hann_window(1024, device=real.device)
    n = round(1024 * hz / data.RATE_HZ)
    spectra = torch.view_as_real(torch.stft(torch.cat((real, made)), 1024, 256, window=window, return_complex=True))
    wanted, got = spectra[:, 1:n].chunk(2)
    distance = (got - wanted).square().sum(-1).add(1e-6).sqrt().mean()
    found: Tensor = distance / wanted.square().sum(-1).add(1e-6).sqrt().mean()
    return found


class Others:
    """What other stages of a run write for the decoder while it learns, taken up as soon as it is whole."""

    def __init__(self, trainer: Trainer, encoder: Path | None, voices: Path | None, own: Path | None) -> None:
        self.trainer, self.encoder, self.voices, self.own = trainer, encoder, voices, own
        self._last_ns = 0

    def news(self) -> str:
        """What is new in all processes, and was taken up; empty where nothing was that changes a train step."""
        trainer, found = self.trainer, list[str]()
        path, changed_ns = self.encoder, 0
        heard = bool(path and trainer.encoder is None and (path.is_file() or (path.parent / "done").exists()))
        known = bool(self.voices and trainer.recognizer is None and (self.voices / "done").exists())
        if self.own and (self.own / "done").exists():
            changed_ns = (self.own / "done").stat().st_mtime_ns
        heard, known, said = trainer.ranks.everywhere([heard, known, changed_ns > self._last_ns])
        if path and heard:
            codec = Codec(recipe.codec_config())
            codec.load_state_dict(parts.begun(path))
            trainer.follow(codec.encoder)
            found.append("half of it in the encoder's codes")
        if self.voices and known:
            trainer.recognize(parts.read(self.voices, "voices"))
            found.append("its voices are heard")
        if self.own and said:
            self._last_ns = changed_ns
            if trainer.take(shards.read(self.own).codes):
                found.append("some of it in the talker's own codes")
        return ", ".join(found)


def train(trainer: Trainer, ranks: Ranks, others: Others, save: Callable[[], None], log: Callable[[str], None]) -> None:
    """Draws, then sounds, until the recipe's seconds are over, with what ``others`` write meanwhile.

    Raises FloatingPointError when too many steps were not finite.
    """
    s, on_gpu = trainer.settings, trainer.device.type == "cuda"
    step: Callable[[], None] | None = None
    sounding, n_steps, told, saved_s, elapsed = False, 0, 0, 0.0, 0.0
    while elapsed < s.total_s:
        again = step is None or sounding != (elapsed >= s.drawn_s)
        if news := others.news():
            again = True
            log(f"{elapsed:.0f} s, step {n_steps}: from now on {news}")
        if again:
            sounding, first = elapsed >= s.drawn_s, step is None
            step = None
            step = trainer.captured(sounding)
            if first:
                ranks.start()
        trainer.pace(elapsed)
        for _ in range(10 if on_gpu else 1):
            assert step is not None
            step()
            n_steps += 1
        elapsed = ranks.elapsed_s()
        if n_steps >= told + (500 if on_gpu else 1):
            told, odd = n_steps, check(trainer.odd, n_steps)
            values = " ".join(f"{n} {v:.3f}" for n, v in zip(_REPORTED, trainer.report.tolist(), strict=True))
            log(f"{elapsed:.0f} s, step {n_steps}: {values}" + (f", {odd} not finite" if odd else ""))
        if elapsed > saved_s + 120.0 and sounding:
            saved_s = elapsed
            save()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    log(f"done: {n_steps} steps in {elapsed:.0f} s, {peak:.1f} GiB, {int(trainer.odd)} not finite")


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, action="append", required=True, help="a synthesized set")
    parser.add_argument("--hours", type=float, default=12.0, help="of speech to learn from, all speakers alike")
    parser.add_argument("--first", type=Path, required=True, help="a trained codec's safetensors file")
    parser.add_argument("--latents", type=Path, required=True, help="what `training.encoder measure` wrote")
    parser.add_argument(
        "--encoder", type=Path, help="what `training.encoder train` writes, FOLDER/codec, or a codec's file"
    )
    parser.add_argument("--voices", type=Path, help="where `training.voices` writes")
    parser.add_argument("--own", type=Path, help="where `training.own` writes")
    parser.add_argument("--resume", type=Path, help="a codec to go on with: a safetensors file or FOLDER/NAME of parts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--drawn", type=float, help="for how many seconds the decoder only draws")
    parser.add_argument("--device")
    parser.add_argument("--toy", action="store_true", help="a few steps at toy size, on a CPU")
    args = parser.parse_args()
    begun = time.monotonic()
    ranks = Ranks(args.device)
    device = ranks.device

    def log(text: str) -> None:
        if ranks.rank == 0:
            print(f"decoder {time.monotonic() - begun:.0f} s | {text}", flush=True)

    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    settings = recipe.DecoderRecipe(total_s=args.seconds)
    if args.drawn is not None:
        settings = dataclasses.replace(settings, drawn_s=args.drawn)
    if args.toy:
        settings = dataclasses.replace(settings, batch=3, n_own=1, drawn_batch=3, n_frames=6, drawn_s=args.seconds / 2)
    pool = Pool(from_sets(args.set, args.hours), device)
    log(pool.described)
    codec = first_codec(args.first)
    begun_with = parts.begun(args.resume) if args.resume else None
    trainer = Trainer(pool, open_coding(codec, args.latents, device), codec, settings, ranks, begun_with)
    if device.type == "cuda":
        from training import snake

        differs = snake.check(trainer.decoder, sounded)
        log(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; its fast half differs by {differs:.1e}")
    torch.manual_seed(settings.seed + ranks.rank)

    def save() -> None:
        if ranks.rank:
            return
        parts.write(args.out, "codec", parts.codec_state(trainer.whole().cpu()), torch.float32)
        log("saved")

    train(trainer, ranks, Others(trainer, args.encoder, args.voices, args.own), save, log)
    save()
    ranks.end()


if __name__ == "__main__":
    main()
