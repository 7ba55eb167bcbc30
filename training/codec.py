"""Train the codec: samples to 16 codes a frame and back, on one GPU or several of one host.

    torchrun --nproc-per-node=2 -m training.codec --data FOLDER --codec PARTS --out OUT --seconds 490
    python -m training.codec --polish --data FOLDER --set SET --codec PARTS --out OUT --seconds 392

FOLDER is what `training.phonetic distil` wrote. PARTS are codec-end parts (see `training.parts`) to start from: with
as many codes as now, training goes on; with another number, encoder and decoder are kept, codebook 0 is learnt anew
as what is said, and coding begins after a warm-up. OUT gets codec-half, codec-late and codec-end parts.

`--polish` trains the decoder alone, on codes that keep their meaning: also of synthesized sets, and on one GPU. It
writes codec-polished parts every two minutes. With `--anew` the encoder is kept too, but gets new projections and
codebooks first, which takes seconds; from then on its codes are fixed.

A whole train step is two CUDA graphs with one all-reduce of gradients between them. On a CPU the same step runs
uncaptured, for tests (`--toy`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.model.codec_encoder import Codec
from training import data, parts, phonetic, quantizer, recipe
from training.losses import Discriminators, MelDistance
from training.patches import WIDTH, Patches
from training.pool import Crops, Pool, Recording, from_corpus, from_set

_REPORTED = (
    *("mel", "wave", "commit", "own", "adv", "match", "trunk", "heard", "spread", "loss"),
    *("r2", "r2-coded", "patch", "patch-coded"),
)
_ODD_STEPS = 100
"""So many steps and one in ten may give gradients that are not finite; more end the run."""


def excerpts(real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """The same second of both, at a random place of each row: discriminating all of it cost more than the codec."""
    length = min(data.RATE_HZ, real.shape[1])
    start = torch.randint(real.shape[1] - length + 1, (len(real), 1), device=real.device)
    index = start + torch.arange(length, device=real.device)
    return real.gather(1, index), made.gather(1, index)


def initialise(codec: Codec) -> None:
    """Starting values where the modules' own would stall a short training."""
    for name, parameter in codec.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.1)


def unexplained(found: Tensor, crops: Crops, power: Tensor) -> Tensor:
    """The share of the targets' power that ``found`` [B, T, d >= K] misses; dimensions beyond K are to be 0."""
    wanted = F.pad(crops.targets, (0, found.shape[-1] - crops.targets.shape[-1]))
    missed = ((found - wanted).square().sum(-1) * crops.known).sum()
    return missed / crops.known.sum().clamp(min=1.0) / power


def _take(codec: Codec, start: dict[str, Tensor]) -> bool:
    """Loads what fits of ``start``; False if that has other codebooks, which then are left as they were."""
    own = codec.state_dict()
    fits = {key: value for key, value in start.items() if value.shape == own[key].shape}
    whole = len(fits) == len(own)
    if not whole:
        fits = {k: v for k, v in fits.items() if not k.endswith(("cluster_usage", "embed_sum", "embedding_sum"))}
    codec.load_state_dict(fits, strict=whole)
    return whole


class Trainer:
    """The codec, its discriminators and the two halves of a train step.

    ``polishing`` trains the decoder alone, on the codes of the encoder as it is.
    """

    def __init__(
        self,
        pool: Pool,
        settings: recipe.CodecRecipe,
        device: torch.device,
        world: int,
        start: dict[str, Tensor] | None = None,
        polishing: bool = False,
    ) -> None:
        self.pool, self.settings, self.device, self.world, self.polishing = pool, settings, device, world, polishing
        torch.manual_seed(settings.seed)
        self.codec = Codec(recipe.codec_config())
        initialise(self.codec)
        self.coded = start is not None and _take(self.codec, start)
        if polishing and not self.coded:
            raise ValueError(f"only the decoder of a trained codec of {recipe.N_CODES} codes can be trained alone")
        self.codec.to(device)
        self.discriminators = Discriminators().to(device)
        self.distance = MelDistance().to(device)
        # The decoder's copies of the codebooks and of the input projections are never used here.
        own = {n: p for n, p in self.codec.named_parameters() if "decoder.quantizer" not in n or "output_proj" in n}
        # The first codec branch's unused output projections never get a gradient.
        skipped = {id(q.output_proj.weight) for q, _ in quantizer.branches(self.codec)}
        self.own = [
            p
            for n, p in own.items()
            if p.requires_grad and id(p) not in skipped and (n.startswith("decoder.") or not polishing)
        ]
        self.theirs = list(self.discriminators.parameters())
        self.ema = copy.deepcopy(self.codec.decoder)
        width = self.codec.encoder.config.vector_quantization_hidden_dimension
        self.patches = Patches(width - phonetic.WIDTH).to(device)
        decoder = self.codec.decoder.config
        # What the decoder makes of the latents before it makes sound of it, read as pictures; not part of the codec.
        self.sketch = nn.Linear(decoder.latent_dim, WIDTH // math.prod(decoder.upsampling_ratios)).to(device)
        self.trunk = torch.zeros(0)
        self.codec.decoder.decoder[0].register_forward_pre_hook(self._keep_trunk)
        self.own += list(self.sketch.parameters())
        # Hears what is said in sound, as codebook 0 was taught to; it learns no more.
        self.listener = copy.deepcopy(self.codec.encoder).requires_grad_(False) if start is not None else None
        self.followed = list[Tensor](self.ema.parameters()), list[Tensor](self.codec.decoder.parameters())
        n_books, n_codes, width = recipe.N_CODEBOOKS, recipe.N_CODES, self.codec.encoder.config.codebook_dim
        sizes = [p.numel() for p in (*self.own, *self.theirs)] + [n_books * n_codes, n_books * n_codes * width]
        self.flat = torch.zeros(sum(sizes), device=device)
        views = torch.split(self.flat, sizes)
        for parameter, view in zip((*self.own, *self.theirs), views, strict=False):
            parameter.grad = view.view_as(parameter)
        self.counts, self.sums = views[-2].view(n_books, n_codes), views[-1].view(n_books, n_codes, width)
        self.lr = [torch.tensor(0.0, device=device) for _ in range(2)]
        fused = device.type == "cuda"
        self.optimizers = [
            torch.optim.AdamW(group, lr=rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=fused, capturable=fused)
            for group, rate in zip((self.own, self.theirs), self.lr, strict=True)
        ]
        self.ramp = torch.tensor(0.0, device=device)
        self.report = torch.zeros(len(_REPORTED), device=device)
        self.odd = torch.zeros((), device=device)
        n_vectors = settings.batch * settings.n_frames
        self.residuals = torch.zeros(n_books, n_vectors, width, device=device)
        self.codes = torch.zeros(n_books, n_vectors, dtype=torch.long, device=device)

    def _keep_trunk(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.trunk = inputs[0]

    def draw(self) -> Crops:
        """A batch of crops."""
        return self.pool.draw(self.settings.batch, self.settings.n_frames, self.settings.changed)

    def kept(self, n: int) -> Tensor:
        """How many acoustic codebooks [n] the decoder gets of each crop: all, but in a share ``fewer`` rather few."""
        n_acoustic = recipe.N_CODEBOOKS - 1
        fewer = (n_acoustic * torch.rand(n, device=self.device).square()).long()
        return torch.where(torch.rand(n, device=self.device) < self.settings.fewer, fewer, n_acoustic)

    def encode(self, samples: Tensor) -> Tensor:
        """The latents of ``samples``: when polishing, exactly those that will be coded."""
        fast = self.device.type == "cuda" and not self.polishing
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=fast),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.polishing),
        ):
            return self.codec.encoder.latents(samples).float()

    def to_tell(self, crops: Crops, pictures: Tensor, said: Tensor) -> Tensor:
        """What the acoustic latent is to tell [B, T, d]: what is said, once more and in its true colours, and how.

        ``said`` [B, T, d] is what codebook 0 has to code: where there are no targets it stands for them.
        """
        wanted = F.pad(crops.targets, (0, phonetic.WIDTH - crops.targets.shape[-1]))
        wanted = torch.where(crops.known[..., None] > 0, wanted, said.detach()[..., : phonetic.WIDTH])
        seen = self.patches.components(pictures)
        return torch.cat((wanted * (self.settings.said_share * seen.shape[-1] / self.pool.power).sqrt(), seen), dim=-1)

    def reheard(self, real: Tensor, made: Tensor) -> Tensor:
        """The share of what is said in half of ``real`` [B, N] that is not heard in ``made``."""
        if self.listener is None:
            return made.new_zeros(())
        n = max(1, len(real) // 2)
        both = torch.cat((real[:n], made[:n]))
        latents = self.listener.latents(both)
        wanted, got = self.listener.quantizer.semantic.input_proj(latents).float().chunk(2)
        missed: Tensor = (got - wanted).square().sum(1).mean() / self.pool.power
        return missed

    def sketched(self, pictures: Tensor) -> Tensor:
        """How far ``pictures`` [B, T, WIDTH] are from those read off the middle of the decoder after a pass."""
        drawn = self.sketch(self.trunk.transpose(1, 2)).float()
        distance: Tensor = (drawn.reshape(pictures.shape) - (pictures - self.patches.mean)).abs().mean()
        return distance

    def differentiate(self) -> None:
        """Draws a batch and leaves its gradients and codebook statistics in ``flat``."""
        s, crops = self.settings, self.draw()
        real, latents = crops.samples, self.encode(crops.samples)
        pictures = self.patches.pictures(real)
        spread = latents.square().mean()
        zero = spread.new_zeros(())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if self.coded:
                found = quantizer.quantize(self.codec, latents, self.kept(len(latents)))
                made, commitment = self.codec.decoder.from_latents(found.latents).float(), found.commitment
                sketched = self.sketched(pictures)
                self.residuals.copy_(found.residuals)
                self.codes.copy_(found.codes)
                own, adversarial, matching = self.discriminators(*excerpts(real, made))
            else:
                made = self.codec.decoder.from_latents(quantizer.unquantized(self.codec, latents)).float()
                sketched = self.sketched(pictures)
                commitment = own = adversarial = matching = zero
            heard = self.reheard(real, made)
        if self.coded:
            pictured = self.to_tell(crops, pictures, found.semantic[0])
            missed, missed_coded = (unexplained(z, crops, self.pool.power) for z in found.semantic)
            blurred, blurred_coded = ((z - pictured).square().mean() for z in found.acoustic)
            if not self.polishing:
                counts, sums = quantizer.statistics(found, recipe.N_CODES)
                self.counts.copy_(counts)
                self.sums.copy_(sums)
        else:
            said, acoustic = quantizer.to_code(self.codec, latents)
            pictured = self.to_tell(crops, pictures, said)
            missed, blurred = unexplained(said, crops, self.pool.power), (acoustic - pictured).square().mean()
            missed_coded = blurred_coded = zero + 1.0
        mel, wave = self.distance(real, made), (real - made).abs().mean()
        loss = s.mel_weight * mel + wave + s.sketch_weight * sketched + s.heard_weight * heard
        loss = loss + self.ramp * (s.adversarial_weight * adversarial + s.matching_weight * matching)
        if not self.polishing:
            loss = loss + s.commitment_weight * commitment + 0.1 * (spread - 2.0).clamp(min=0.0)
            loss = loss + s.phonetic_weight * missed + s.picture_weight * blurred
        gradients = list(torch.autograd.grad(loss, self.own, retain_graph=self.coded))
        if self.coded:
            gradients += torch.autograd.grad(own, self.theirs)
        else:
            gradients += [torch.zeros_like(p) for p in self.theirs]
        targets = [p.grad for p in (*self.own, *self.theirs)]
        torch._foreach_copy_(targets, gradients)  # type: ignore[arg-type]
        values = (mel, wave, commitment, own, adversarial, matching, sketched, heard, spread, loss)
        shares = (1 - missed, 1 - missed_coded, 1 - blurred, 1 - blurred_coded)
        reported = torch.stack((*values, *shares)).detach()
        self.report.lerp_(torch.where(reported.isfinite(), reported, self.report), 0.05)

    @torch.no_grad()
    def update(self) -> None:
        """Takes one optimizer step with what ``flat`` holds: values that are not finite count as none.

        A step most of whose values are not finite, as when the loss is not, is counted in ``odd``.
        """
        self.odd += (self.flat.isfinite().float().mean() < 0.5).float()
        self.flat.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        for group, optimizer in zip((self.own, self.theirs), self.optimizers, strict=True):
            gradients = [p.grad for p in group if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, (5.0 / norm.clamp(min=1e-6)).clamp(max=1.0))
            optimizer.step()
        if self.coded and not self.polishing:
            quantizer.follow(self.codec, self.counts, self.sums)
        torch._foreach_lerp_(*self.followed, 1.0 - self.settings.ema_decay)

    def reduce(self) -> None:
        """The mean of ``flat`` over all processes."""
        if self.world > 1:
            dist.all_reduce(self.flat)
            self.flat /= self.world

    def captured(self) -> Callable[[], None]:
        """One train step, as two CUDA graphs around the reduction; uncaptured on a CPU."""
        if self.device.type != "cuda":

            def plain() -> None:
                self.differentiate()
                self.reduce()
                self.update()

            return plain
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.differentiate()
                self.reduce()
                self.update()
        torch.cuda.current_stream().wait_stream(side)
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first, capture_error_mode="thread_local"):
            self.differentiate()
        with torch.cuda.graph(second, capture_error_mode="thread_local"):
            self.update()

        def replayed() -> None:
            first.replay()
            self.reduce()
            second.replay()

        return replayed

    def collect(self, n_batches: int) -> Tensor:
        """The latents [M, hidden] of many batches."""
        n_batches = n_batches if self.device.type == "cuda" else 2
        with torch.no_grad():
            return torch.cat([self.encode(self.draw().samples).transpose(1, 2).flatten(0, 1) for _ in range(n_batches)])

    def begin_anew(self) -> str:
        """Aims both projections at what they are to tell, the same on every process; says how far they tell it."""
        n_batches = 200 if self.device.type == "cuda" else 8
        explained = self.patches.fit(self.draw().samples for _ in range(n_batches))
        for buffer in self.patches.buffers():
            if self.world > 1:
                dist.broadcast(buffer, 0)
        latents, said, pictured, known = [], [], [], []
        with torch.no_grad():
            for _ in range(n_batches):
                crops = self.draw()
                found = self.encode(crops.samples)
                latents.append(found.transpose(1, 2).flatten(0, 1))
                own = quantizer.to_code(self.codec, found)[0]
                said.append(F.pad(crops.targets, (0, own.shape[-1] - crops.targets.shape[-1])).flatten(0, 1))
                pictured.append(self.to_tell(crops, self.patches.pictures(crops.samples), own).flatten(0, 1))
                known.append(crops.known.flatten())
        shares = quantizer.aim(self.codec, torch.cat(latents), (torch.cat(said), torch.cat(pictured)), torch.cat(known))
        quantizer.brighten(self.codec, torch.cat(latents))
        self.share()
        self.coded = False
        return (
            f"{explained:.3f} of the pictures to be told, {shares[1]:.3f} of that so far; what is said: {shares[0]:.3f}"
        )

    def begin_coding(self) -> None:
        """Ends the warm-up: codebooks by k-means on latents of many batches, the same on every process."""
        usage = self.settings.batch * self.settings.n_frames / recipe.N_CODES
        quantizer.start(self.codec, self.collect(200), usage)
        self.share()
        self.coded = True
        for optimizer in self.optimizers:
            # What they remember is of another way through.
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        for target, source in zip(*self.followed, strict=True):
            target.data.copy_(source.data)

    def share(self) -> None:
        """Gives every process the codebooks and projections of process 0."""
        if self.world == 1:
            return
        for book in quantizer.codebooks(self.codec):
            dist.broadcast(book.embed_sum, 0)
            dist.broadcast(book.cluster_usage, 0)
        for search, project in quantizer.branches(self.codec):
            dist.broadcast(search.input_proj.weight.data, 0)  # type: ignore[arg-type]
            dist.broadcast(project.weight.data, 0)  # type: ignore[arg-type]

    def pace(self, elapsed_s: float) -> None:
        """Sets learning rates and the adversarial ramp for a moment of the run: a cosine to zero over ``total_s``."""
        s = self.settings
        share = min(1.0, elapsed_s / s.total_s)
        factor = min(1.0, elapsed_s / 5.0) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * share)))
        self.lr[0].fill_(s.lr * factor)
        self.lr[1].fill_(s.discriminator_lr * max(factor, 0.3))
        self.ramp.fill_(min(1.0, max(0.0, (elapsed_s - s.warmup_s - 10.0) / s.adversarial_ramp_s)))


class Growing:
    """Sets that are still being spoken: read again beside the training, and put into its pool."""

    def __init__(self, pool: Pool, fixed: list[Recording], folders: list[Path], times_s: list[float]) -> None:
        self.pool, self.fixed, self.folders, self.times_s = pool, fixed, folders, times_s
        self.reader: threading.Thread | None = None
        self.found: list[Recording] = []

    def _read(self) -> None:
        self.found = [r for folder in self.folders for r in from_set(folder)]

    def look(self, elapsed_s: float, log: Callable[[str], None]) -> None:
        """Starts reading when it is time to, and fills the pool once all is read."""
        if self.reader and not self.reader.is_alive():
            self.reader = None
            self.pool.fill(self.fixed + self.found)
            log(f"{elapsed_s:.0f} s: now {self.pool.described}")
        if self.folders and self.times_s and elapsed_s > self.times_s[0]:
            self.times_s.pop(0)
            self.reader = threading.Thread(target=self._read, daemon=True)
            self.reader.start()


def train(trainer: Trainer, log: Callable[[str], None], save: Callable[[str], None], growing: Growing) -> None:
    """Runs warm-up and training until the recipe's seconds are over, and saves now and then.

    Raises FloatingPointError when too many steps were not finite.
    """
    s, clock = trainer.settings, torch.zeros(1, device=trainer.device)
    on_gpu = trainer.device.type == "cuda"
    begun = time.monotonic()
    step, n_steps, block = trainer.captured(), 0, 20 if on_gpu else 1
    log(f"captured after {time.monotonic() - begun:.0f} s")
    begun, n_logged = time.monotonic(), 0
    if trainer.polishing:
        saves = [(120.0 * (i + 1), "polished") for i in range(int(s.total_s / 120.0))]
    else:
        saves = [(0.5 * s.total_s, "half"), (0.8 * s.total_s, "late")]
    while True:
        clock.fill_(time.monotonic() - begun)
        if trainer.world > 1:
            dist.broadcast(clock, 0)
        elapsed = float(clock)
        if elapsed > s.total_s:
            break
        growing.look(elapsed, log)
        if elapsed > s.warmup_s and not trainer.coded:
            log(f"{elapsed:.0f} s, {n_steps} steps: coding begins")
            del step
            trainer.begin_coding()
            step = trainer.captured()
            log(f"{time.monotonic() - begun:.0f} s: captured again")
        trainer.pace(elapsed)
        for _ in range(block):
            step()
            n_steps += 1
        revives = trainer.coded and not trainer.polishing and elapsed < 0.8 * s.total_s
        if revives and n_steps % (2 * block) == 0:
            quantizer.revive(trainer.codec, trainer.residuals)
            trainer.share()
        if n_steps >= n_logged + (50 * block if on_gpu else 1):
            n_logged = n_steps
            values = " ".join(f"{n} {v:.3f}" for n, v in zip(_REPORTED, trainer.report.tolist(), strict=True))
            bits = quantizer.perplexity_bits(trainer.codes, recipe.N_CODES) if trainer.coded else torch.zeros(1)
            odd = int(trainer.odd)
            log(
                f"{elapsed:.0f} s, step {n_steps}: {values}, bits {bits[0]:.2f}, {bits.min():.2f}..{bits.max():.2f}"
                + (f", {odd} steps not finite" if odd else "")
            )
            if odd > _ODD_STEPS + n_steps // 10:
                raise FloatingPointError(f"{odd} of {n_steps} steps gave gradients that are not finite")
        while saves and elapsed > saves[0][0]:
            save(saves.pop(0)[1])
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    log(f"done: {n_steps} steps in {elapsed:.0f} s, {peak:.1f} GiB, {int(trainer.odd)} steps not finite")


@torch.no_grad()
def measure(trainer: Trainer, folder: Path, n_clips: int | None = None) -> str:
    """How well the held clips of ``folder`` fare, in words: targets explained, log-mel distance, use of codebook 0."""
    codec, lines = trainer.codec, []
    targets = phonetic.read(folder, "held")
    clips, ends = targets.clips[:n_clips], [*targets.starts[1:], len(targets.values)]
    groups: dict[str, list[tuple[float, ...]]] = {"all": []}
    used = []
    for clip, samples, start, end in zip(clips, data.read_clips(folder, clips), targets.starts, ends, strict=False):
        whole = np.pad(samples, (0, -len(samples) % recipe.SAMPLES_PER_FRAME))
        real = torch.from_numpy(whole)[None].to(trainer.device)
        wanted = targets.values[start:end].float()[None].to(trainer.device)
        found = quantizer.quantize(codec, codec.encoder.latents(real))
        made = trainer.ema.from_latents(codec_latents(trainer, found))
        crops = Crops(real, wanted, torch.ones(wanted.shape[:2], device=trainer.device))
        missed, coded = (float(unexplained(z, crops, wanted.square().sum(-1).mean())) for z in found.semantic)
        pictured = trainer.to_tell(crops, trainer.patches.pictures(real), found.semantic[0])
        power = pictured.square().mean()
        blurred = [float((z - pictured).square().mean() / power) for z in found.acoustic]
        row = (float(end - start), missed, coded, float(trainer.distance(real, made)), *blurred)
        groups["all"].append(row)
        groups.setdefault(clip.voice, []).append(row)
        used.append(found.codes[:1])
    for name, rows in groups.items():
        weight, missed, coded, mel, *blurred = np.array(rows).T
        lines.append(
            f"  {name}: r2 {1 - np.average(missed, weights=weight):.3f}, "
            f"coded {1 - np.average(coded, weights=weight):.3f}, mel {np.average(mel, weights=weight):.3f}, "
            + "all to be told {:.3f}, coded {:.3f}".format(*(1 - np.average(x, weights=weight) for x in blurred))
        )
    bits = float(quantizer.perplexity_bits(torch.cat(used, 1), recipe.N_CODES))
    return "\n".join([f"held: {len(clips)} clips, codebook 0 uses {bits:.2f} bits", *lines])


def codec_latents(trainer: Trainer, found: quantizer.Quantized) -> Tensor:
    """What the averaged decoder reads of ``found`` codes."""
    books = quantizer.codebooks(trainer.codec)
    vectors = [F.embedding(row, book.embedding) for row, book in zip(found.codes, books, strict=True)]
    read = trainer.ema.quantizer
    acoustic = torch.stack(vectors[1:]).sum(0)
    out: Tensor = read.rvq_first.output_proj(vectors[0].T[None]) + read.rvq_rest.output_proj(acoustic.T[None])
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that `training.phonetic distil` wrote")
    parser.add_argument("--set", type=Path, action="append", default=[], help="a synthesized set to learn from as well")
    parser.add_argument(
        "--growing", type=Path, action="append", default=[], help="a set still being spoken, read four times"
    )
    parser.add_argument("--room", type=float, default=14.0, help="hours of speech kept for growing sets")
    parser.add_argument("--codec", type=Path, help="a folder with codec-end parts to start from")
    parser.add_argument("--name", default="codec-end", help="another name of these parts")
    parser.add_argument("--out", type=Path, required=True, help="where the trained parts go, 15 MiB a file")
    parser.add_argument("--seconds", type=float, default=490.0)
    parser.add_argument("--fewer", type=float, help="the share of crops heard through the first codebooks only")
    parser.add_argument("--device", help="such as cuda:1, where several programs share a host")
    parser.add_argument("--anew", action="store_true", help="begin coding anew even where PARTS have as many codes")
    parser.add_argument("--polish", action="store_true", help="train the decoder alone")
    parser.add_argument("--toy", action="store_true", help="a few steps at toy size, on a CPU")
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> recipe.CodecRecipe:
    settings = recipe.polishing(args.seconds) if args.polish else recipe.CodecRecipe(total_s=args.seconds)
    if args.fewer is not None:
        settings = dataclasses.replace(settings, fewer=args.fewer)
    if args.toy:
        settings = dataclasses.replace(settings, batch=2, n_frames=4, warmup_s=args.seconds / 4)
    return settings


def main() -> None:
    """Trains and saves."""
    args = _arguments()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(args.device or (f"cuda:{rank}" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def log(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    begun = time.monotonic()
    settings = _settings(args)
    recordings = from_corpus(args.data, 12 if args.toy else None)
    for folder in args.set:
        recordings += from_set(folder)
    room = int(args.room * 3600 * 12.5) if args.growing else None
    pool = Pool(recordings, device, room)
    start = parts.read(args.codec, args.name) if args.codec else None
    trainer = Trainer(pool, settings, device, world, start, args.polish)
    goes_on = trainer.coded and not args.anew
    log(f"{world} x {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    log(f"{pool.described}, read in {time.monotonic() - begun:.0f} s; {'going on' if goes_on else 'anew'}")
    if device.type == "cuda":
        from training import snake

        log(f"snake kernel differs by {snake.check(device):.1e}")
        snake.install(trainer.codec)
        torch.cuda.manual_seed(settings.seed + rank)
    else:
        torch.manual_seed(settings.seed + rank)

    def save(name: str) -> None:
        if rank == 0:
            parts.write(args.out, f"codec-{name}", parts.codec_state(trainer.codec, trainer.ema), torch.float16)
            parts.write(args.out, "patches", trainer.patches.state_dict(), torch.float32)
            log(f"saved codec-{name}")

    if goes_on:
        # What was learnt before needs no warm-up.
        trainer.settings = dataclasses.replace(settings, warmup_s=0.0)
        trainer.patches.load_state_dict(parts.read(args.codec, "patches"))
    else:
        log(trainer.begin_anew())
    growing = Growing(pool, recordings, args.growing, [share * settings.total_s for share in (0.16, 0.3, 0.45, 0.6)])
    train(trainer, log, save, growing)
    save("polished" if args.polish else "end")
    torch.backends.cudnn.benchmark = False
    log(measure(trainer, args.data, 4 if args.toy else None))
    with contextlib.suppress(ValueError):
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
