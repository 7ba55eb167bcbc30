"""Train the codec: samples to 16 codes a frame and back, on one GPU or several of one host.

    torchrun --nproc-per-node=2 -m training.codec --data .data --out OUT --state STATE

Reads every training clip of the corpus and the crossed clips (the voices of the small model are drawn more often) and
writes OUT/codec-*.safetensors (see `training.parts`). `--resume` goes on from such parts. A whole train step is two
CUDA graphs with one all-reduce of gradients between them. On a CPU the same step runs uncaptured, for tests (`--toy`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quaver.model.codec_encoder import Codec
from training import data, parts, quantizer, recipe
from training.losses import Discriminators, MelDistance

_REPORTED = ("mel", "wave", "commit", "own", "adv", "match", "narrow", "spread", "loss")


class Crops:
    """Random crops of the clips, drawn on the device: start offsets into one long recording a voice after the other."""

    def __init__(
        self, clips: list[data.Clip], samples: list[np.ndarray], often: tuple[str, ...], device: torch.device
    ) -> None:
        order = sorted(range(len(clips)), key=lambda i: clips[i].voice)
        starts, offset = [], 0
        for i in order:
            starts += [offset] * (5 if clips[i].voice in often else 1)
            offset += len(samples[i])
        joined = np.concatenate([samples[i] for i in order])
        self.samples = torch.from_numpy((joined * 32767.0).clip(-32768, 32767).astype(np.int16)).to(device)
        self.starts = torch.tensor(starts, device=device)

    def draw(self, batch: int, n_samples: int) -> Tensor:
        """Samples [batch, n_samples]: half begin where a clip begins, half anywhere up to two seconds later."""
        device = self.samples.device
        start = self.starts[torch.randint(len(self.starts), (batch,), device=device)]
        later = torch.randint(2 * data.RATE_HZ, (batch,), device=device)
        start = start + later * torch.randint(2, (batch,), device=device)
        start = start.clamp(max=len(self.samples) - n_samples)
        crops = self.samples[start[:, None] + torch.arange(n_samples, device=device)]
        gain = 0.7 + 0.5 * torch.rand(batch, 1, device=device)
        return crops.float() / 32767.0 * gain


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


class Trainer:
    """The codec, its discriminators and the two halves of a train step."""

    def __init__(self, crops: Crops, settings: recipe.CodecRecipe, device: torch.device, world: int) -> None:
        self.crops, self.settings, self.device, self.world = crops, settings, device, world
        torch.manual_seed(settings.seed)
        self.codec = Codec(recipe.codec_config())
        initialise(self.codec)
        self.codec.to(device)
        self.discriminators = Discriminators().to(device)
        self.distance = MelDistance().to(device)
        # The decoder's copies of the codebooks and of the input projections are never used here.
        self.own = [p for n, p in self.codec.named_parameters() if "decoder.quantizer" not in n or "output_proj" in n]
        self.own = [p for p in self.own if p.requires_grad]
        self.theirs = list(self.discriminators.parameters())
        # The first codec branch's unused output projections never get a gradient.
        skipped = {id(q.output_proj.weight) for q, _ in quantizer.branches(self.codec)}
        self.own = [p for p in self.own if id(p) not in skipped]
        self.ema = copy.deepcopy(self.codec.decoder)
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
        n_vectors = settings.batch * settings.n_frames
        self.residuals = torch.zeros(n_books, n_vectors, width, device=device)
        self.codes = torch.zeros(n_books, n_vectors, dtype=torch.long, device=device)
        self.latents = torch.zeros(n_vectors, self.codec.encoder.config.hidden_size, device=device)
        self.coded = False

    def differentiate(self) -> None:
        """Draws a batch and leaves its gradients and codebook statistics in ``flat``."""
        s = self.settings
        real = self.crops.draw(s.batch, s.n_frames * recipe.SAMPLES_PER_FRAME)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            latents = self.codec.encoder.latents(real).float()
            spread = latents.square().mean()
            self.latents.copy_(latents.detach().transpose(1, 2).flatten(0, 1))
            zero = spread.new_zeros(())
            if self.coded:
                found = quantizer.quantize(self.codec, latents)
                made, commitment = self.codec.decoder.from_latents(found.latents).float(), found.commitment
                self.residuals.copy_(found.residuals)
                self.codes.copy_(found.codes)
                counts, sums = quantizer.statistics(found, recipe.N_CODES)
                self.counts.copy_(counts)
                self.sums.copy_(sums)
                narrow = found.narrowness
                own, adversarial, matching = self.discriminators(*excerpts(real, made))
            else:
                made = self.codec.decoder.from_latents(quantizer.unquantized(self.codec, latents)).float()
                commitment = narrow = zero
                own = adversarial = matching = zero
        mel, wave = self.distance(real, made), (real - made).abs().mean()
        loss = s.mel_weight * mel + wave + s.commitment_weight * commitment + narrow
        loss = loss + 0.1 * (spread - 2.0).clamp(min=0.0)
        loss = loss + self.ramp * (s.adversarial_weight * adversarial + s.matching_weight * matching)
        gradients = list(torch.autograd.grad(loss, self.own, retain_graph=self.coded))
        if self.coded:
            gradients += torch.autograd.grad(own, self.theirs)
        else:
            gradients += [torch.zeros_like(p) for p in self.theirs]
        targets = [p.grad for p in (*self.own, *self.theirs)]
        torch._foreach_copy_(targets, gradients)  # type: ignore[arg-type]
        reported = torch.stack([mel, wave, commitment, own, adversarial, matching, narrow, spread, loss])
        self.report.lerp_(reported.detach(), 0.05)

    @torch.no_grad()
    def update(self) -> None:
        """Takes one optimizer step with what ``flat`` holds; a value that overflowed counts as none."""
        self.flat.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        for group, optimizer in zip((self.own, self.theirs), self.optimizers, strict=True):
            gradients = [p.grad for p in group if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, (5.0 / norm).clamp(max=1.0))
            optimizer.step()
        if self.coded:
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

    def begin_coding(self) -> None:
        """Ends the warm-up: codebooks by k-means on latents of many batches, the same on every process."""
        pool = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            n_pool = 40 if self.device.type == "cuda" else 2
            for _ in range(n_pool):
                real = self.crops.draw(self.settings.batch, self.settings.n_frames * recipe.SAMPLES_PER_FRAME)
                pool.append(self.codec.encoder.latents(real).float().transpose(1, 2).flatten(0, 1))
        n_vectors = self.settings.batch * self.settings.n_frames
        quantizer.widen(self.codec, torch.cat(pool))
        quantizer.start(self.codec, torch.cat(pool), n_vectors / recipe.N_CODES)
        self.share()
        self.coded = True
        for optimizer in self.optimizers:
            # The projections were rescaled: their old moments mislead.
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


def train(trainer: Trainer, log: Callable[[str], None], save: Callable[[str], None]) -> None:
    """Runs warm-up and training until the recipe's seconds are over; saves once, half-way."""
    s, clock = trainer.settings, torch.zeros(1, device=trainer.device)
    begun = time.monotonic()
    if s.warmup_s == 0.0:
        trainer.begin_coding()
    step, n_steps, block = trainer.captured(), 0, 20 if trainer.device.type == "cuda" else 1
    log(f"captured after {time.monotonic() - begun:.0f} s")
    begun, n_logged, saved = time.monotonic(), 0, False
    while True:
        clock.fill_(time.monotonic() - begun)
        if trainer.world > 1:
            dist.broadcast(clock, 0)
        elapsed = float(clock)
        if elapsed > s.total_s:
            break
        if elapsed > s.warmup_s and not trainer.coded:
            log(f"{elapsed:.0f} s, {n_steps} steps: coding begins")
            del step
            trainer.begin_coding()
            step = trainer.captured()
        trainer.pace(elapsed)
        for _ in range(block):
            step()
            n_steps += 1
        if trainer.coded and n_steps % (2 * block) == 0 and elapsed < 0.8 * s.total_s:
            quantizer.revive(trainer.codec, trainer.residuals)
            trainer.share()
        if n_steps >= n_logged + (50 * block if trainer.device.type == "cuda" else 1):
            n_logged = n_steps
            values = " ".join(f"{n} {v:.3f}" for n, v in zip(_REPORTED, trainer.report.tolist(), strict=True))
            bits = quantizer.perplexity_bits(trainer.codes, recipe.N_CODES) if trainer.coded else torch.zeros(1)
            log(f"{elapsed:.0f} s, step {n_steps}: {values}, bits {bits.min():.2f}..{bits.max():.2f}")
        if elapsed > 0.5 * s.total_s and not saved:
            saved = True
            save("half")
    peak = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
    log(f"done: {n_steps} steps in {elapsed:.0f} s, {peak:.1f} GiB")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="where the trained parts go, in files of at most 16 MiB"
    )
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--resume", type=Path, help="a folder with codec-end parts to go on from, instead of a warm-up")
    parser.add_argument("--toy", action="store_true", help="a few steps at toy size, on a CPU")
    return parser.parse_args()


def main() -> None:
    """Trains and saves."""
    args = _arguments()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def log(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    crossed = data.crossed_clips(args.data, args.sentences)
    clips = list({c.file: c for c in (*data.read_manifest(args.data), *crossed)}.values())
    clips = [c for c in clips if (args.data / c.file).exists()]
    settings = recipe.CodecRecipe(total_s=args.seconds)
    if args.resume:
        settings = dataclasses.replace(settings, warmup_s=0.0)
    if args.toy:
        clips = clips[:6] + crossed[:6]
        settings = dataclasses.replace(settings, batch=2, n_frames=4, warmup_s=0.0 if args.resume else args.seconds / 3)
    samples = data.read_clips(args.data, clips)
    if device.type == "cuda":
        log(f"{world} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    log(
        f"{len(clips)} clips, {sum(map(len, samples)) / data.RATE_HZ / 60:.1f} min, list {data.list_sha256(clips)[:16]}"
    )
    trainer = Trainer(Crops(clips, samples, data.VOICES, device), settings, device, world)
    if args.resume:
        trainer.codec.load_state_dict(parts.read(args.resume, "codec-end"))
    if device.type == "cuda":
        from training import snake

        log(f"snake kernel differs by {snake.check(device):.1e}")
        snake.install(trainer.codec)
        torch.cuda.manual_seed(settings.seed + rank)

    def save(name: str) -> None:
        if rank == 0:
            parts.write(args.out, f"codec-{name}", parts.codec_state(trainer.codec, trainer.ema), torch.float16)

    train(trainer, log, save)
    save("end")
    with contextlib.suppress(ValueError):
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
