"""Train the codec's encoder: to tell what is said, as an earlier encoder hears it, and how it sounds.

    python -m training.encoder measure --set SET --first CODEC --out LATENTS
    python -m training.encoder train --set SET --first CODEC --latents LATENTS --out OUT --seconds 240

CODEC is a speech_tokenizer/model.safetensors of the same shapes: the encoder to start from, whose codebook 0 was taught
what is said (the one that ships: out of Whisper's encoder, by `training/phonetic.py` as of commit 02fd51e), and whose
hearing is the target of codebook 0 ever after. `measure` finds the principal axes of how speech sounds
(`training.latents`) and codebooks for both, from nothing but speech, so that the decoder and the talker can begin to
learn them while the encoder does. `train` writes OUT/codec parts every minute and at the end: the encoder and these
codebooks, beside CODEC's decoder. Both take minutes on a GPU; `--toy` on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quaver.model.codec_encoder import Codec, CodecEncoder
from training import parts, quantizer, recipe, rooms
from training.latents import WIDTHS, Latents
from training.pool import Pool, from_sets

_ODD_STEPS = 100


class Coding(nn.Module):
    """What every codebook is to code, measured on the sound itself, and codebooks for it."""

    books: Tensor
    power: Tensor
    """Of what is said: its variance, summed over its dimensions."""

    def __init__(self, listener: CodecEncoder) -> None:
        super().__init__()
        self.listener = listener.requires_grad_(False)
        width = listener.config.codebook_dim
        self.latents = Latents(width)
        self.register_buffer("books", torch.zeros(recipe.N_CODEBOOKS, recipe.N_CODES, width))
        self.register_buffer("power", torch.ones(()))

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is said in ``samples`` [B, N] and how it sounds, [B, T, d] each, and the features [B, T, F] of that."""
        said, _ = quantizer.to_code(self.listener, samples)
        with torch.autocast(samples.device.type, enabled=False):
            features = self.latents.features(samples)
            return said, self.latents(features), features

    @torch.no_grad()
    def measure(self, draw: Callable[[], Tensor], n_batches: int, *, axes: bool = True) -> str:
        """Fits axes (or not ``axes``) and codebooks to ``n_batches`` of samples; says how much they tell.

        The first acoustic codebooks tell nothing of the hum: no one can foresee it, and what a talker has to get right
        must not hang on it.
        """
        explained = self.latents.fit(draw() for _ in range(n_batches)) if axes else 1.0
        found = [self(draw()) for _ in range(n_batches)]
        said, sound = (torch.cat([f[i].flatten(0, 1) for f in found]) for i in (0, 1))
        self.power.copy_(said.var(0).sum())
        first = quantizer.fit(said, 1, recipe.N_CODES)
        steady = quantizer.fit(sound @ self.latents.steady(), recipe.N_STEADY, recipe.N_CODES)
        left = sound - quantizer.coded(sound, steady)[1]
        rest = torch.cat((steady, quantizer.fit(left, recipe.N_CODEBOOKS - 1 - recipe.N_STEADY, recipe.N_CODES)))
        self.books.copy_(torch.cat((first, rest)))
        features = found[-1][2]
        whole = self.latents.told(found[-1][1], features)
        few, coded = (
            self.latents.told(quantizer.coded(found[-1][1], books)[1], features) for books in (steady[:3], rest)
        )
        kinds = ", ".join(f"{k} {whole[k]:.3f}, in three {few[k]:.3f}, coded {coded[k]:.3f}" for k in WIDTHS)
        missed = (quantizer.coded(said, first)[1] - said).square().sum(1).mean() / self.power
        return f"{explained:.3f} of all that sounds: {kinds}; what is said {1 - float(missed):.3f}; {len(said)} frames"

    def state(self) -> dict[str, Tensor]:
        """All but the listener."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("listener.")}


def first_codec(file: Path) -> Codec:
    """The codec of the safetensors ``file``."""
    codec = Codec(recipe.codec_config())
    codec.load_state_dict(parts.begun(file))
    return codec


def open_coding(codec: Codec, folder: Path | None, device: torch.device) -> Coding:
    """What `measure` wrote to ``folder``, with the encoder of ``codec`` as its listener."""
    coding = Coding(copy.deepcopy(codec.encoder))
    if folder:
        coding.load_state_dict(parts.read(folder, "coding"), strict=False)
    return coding.to(device)


class Trainer:
    """The encoder and one train step."""

    def __init__(self, pool: Pool, coding: Coding, codec: Codec, settings: recipe.EncoderRecipe) -> None:
        self.pool, self.coding, self.settings = pool, coding, settings
        self.device = device = coding.books.device
        self.encoder = copy.deepcopy(codec.encoder).to(device)
        self.aim()
        self.ema = copy.deepcopy(self.encoder).requires_grad_(False)
        # Its quantizer's output projections are never used by an encoder.
        self.parameters, self.followed = (
            [p for n, p in encoder.named_parameters() if "output_proj" not in n] for encoder in (self.encoder, self.ema)
        )
        self.lr = torch.tensor(0.0, device=device)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=(0.9, 0.98), weight_decay=1e-3, fused=fused, capturable=fused
        )
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        spread = coding.latents.spread
        self.weight = spread.mean() / (spread + 0.02 * spread.max())
        self.report = torch.zeros(2, device=device)
        self.odd = torch.zeros((), device=device)
        """How many steps had gradients that are not finite."""

    def draw(self) -> Tensor:
        """A batch of crops."""
        return self.pool.draw(self.settings.batch, self.settings.n_frames, self.settings.changed)

    @torch.no_grad()
    def aim(self) -> None:
        """Lets the encoder tell as much as it does already."""
        latents, said, sound = [], [], []
        for _ in range(40 if self.device.type == "cuda" else 2):
            samples = self.draw()
            wanted = self.coding(samples)
            latents.append(self.encoder.latents(samples).transpose(1, 2).flatten(0, 1))
            said.append(wanted[0].flatten(0, 1))
            sound.append(wanted[1].flatten(0, 1))
        quantizer.aim(self.encoder, torch.cat(latents), (torch.cat(said), torch.cat(sound)))

    def step(self) -> None:
        """One train step; gradients that are not finite count as none."""
        samples, n_roomy = self.draw(), round(self.settings.roomy * self.settings.batch)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            said, sound, _ = self.coding(samples)
            samples = torch.cat((rooms.recorded(samples[:n_roomy]), samples[n_roomy:]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            got = quantizer.to_code(self.encoder, samples)
        missed = (got[0] - said).square().sum(-1).mean() / self.coding.power
        blurred = ((got[1] - sound).square() * self.weight).sum(-1).mean() / self.coding.latents.spread.square().sum()
        loss = self.settings.said_weight * missed + blurred
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            keep(self.parameters, gradients)
            self.odd += descend(self.optimizer, self.parameters, 1.0)
            torch._foreach_lerp_(
                list[Tensor](self.followed), list[Tensor](self.parameters), 1.0 - self.settings.ema_decay
            )
            self.report.lerp_(torch.stack((missed, blurred)).nan_to_num(1.0), 0.02)

    @torch.no_grad()
    def told(self, n_batches: int) -> str:
        """How much the averaged encoder tells of some plain crops, in words, and how often in the same codes."""
        samples = torch.cat(
            [self.pool.draw(self.settings.batch, self.settings.n_frames, 0.0) for _ in range(n_batches)]
        )
        books, latents = self.coding.books, self.coding.latents
        wanted_said, wanted, features = self.coding(samples)
        said, told = quantizer.to_code(self.ema, samples)
        whole, coded = (latents.told(x, features) for x in (told, quantizer.coded(told, books[1:])[1]))
        missed = (said - wanted_said).square().sum(-1).mean() / self.coding.power
        same = [
            float((a == b).float().mean())
            for x, y, some in ((said, wanted_said, books[:1]), (told, wanted, books[1:3]))
            for a, b in zip(quantizer.coded(x, some)[0], quantizer.coded(y, some)[0], strict=True)
        ]
        kinds = ", ".join(f"{k} {whole[k]:.3f}, coded {coded[k]:.3f}" for k in WIDTHS)
        agreed = ", ".join(f"{x:.2f}" for x in same)
        return f"{kinds}; what is said {1 - float(missed):.3f}; codebooks 0, 1 and 2 as measured: {agreed}"


def keep(parameters: list[nn.Parameter], gradients: tuple[Tensor, ...]) -> None:
    """Copies ``gradients`` to where `descend` finds them."""
    torch._foreach_copy_([p.grad for p in parameters if p.grad is not None], list(gradients))


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], bound: float) -> Tensor:
    """Takes a step with gradients of a norm of at most ``bound``, in which what is not finite counts as none; 1.0 where
    there was any, else 0.0."""
    grads = [p.grad for p in parameters if p.grad is not None]
    odd: Tensor = (~torch.stack(torch._foreach_norm(grads)).norm().isfinite()).float()
    for gradient in grads:
        gradient.nan_to_num_(0.0, 0.0, 0.0)
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_mul_(grads, (bound / norm.clamp(min=1e-6)).clamp(max=1.0))
    optimizer.step()
    return odd


def check(odd: Tensor, n_steps: int) -> int:
    """How many steps were not finite. Raises FloatingPointError where that is more than _ODD_STEPS and one in ten."""
    found = int(odd)
    if found > _ODD_STEPS + n_steps // 10:
        raise FloatingPointError(f"{found} of {n_steps} steps gave gradients that are not finite")
    return found


def captured(step: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """``step`` as a CUDA graph, after three runs of it; unchanged where ``device`` is no GPU. Graphs of one ``pool``
    share their memory: none may read what another left there."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


def train(trainer: Trainer, out: Path, codec: Codec, log: Callable[[str], None]) -> None:
    """Trains until the recipe's seconds are over; saves every minute and at the end.

    Raises FloatingPointError when too many steps were not finite.
    """
    s, on_gpu = trainer.settings, trainer.device.type == "cuda"
    step, n_steps, saved_s = captured(trainer.step, trainer.device), 0, 0.0
    (out / "done").unlink(missing_ok=True)
    begun, told = time.monotonic(), 0

    def save() -> None:
        log(trainer.told(8 if on_gpu else 1))
        whole = copy.deepcopy(codec)
        whole.encoder.load_state_dict({k: v.cpu() for k, v in trainer.ema.state_dict().items()})
        quantizer.install(whole.encoder, trainer.coding.books.cpu())
        parts.write(out, "codec", parts.codec_state(whole), torch.float32)

    while (elapsed := time.monotonic() - begun) < s.total_s:
        warm = min(1.0, (elapsed + 0.1) / 4.0)
        trainer.lr.fill_(s.lr * warm * (0.01 + 0.495 * (1.0 + math.cos(math.pi * elapsed / s.total_s))))
        for _ in range(10 if on_gpu else 1):
            step()
            n_steps += 1
        if on_gpu:
            torch.cuda.synchronize()
        if n_steps >= told + (500 if on_gpu else 1):
            told = n_steps
            missed, blurred = trainer.report.tolist()
            odd = check(trainer.odd, n_steps)
            told_odd = f", {odd} not finite" if odd else ""
            log(f"{elapsed:.0f} s, step {n_steps}: said {1 - missed:.3f}, sound missed {blurred:.4f}{told_odd}")
        if elapsed > saved_s + 60.0:
            saved_s = elapsed
            save()
    save()
    (out / "done").touch()
    log(f"done: {n_steps} steps in {elapsed:.0f} s")


def main() -> None:
    """Measures, or trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "train"))
    parser.add_argument("--set", type=Path, action="append", required=True, help="a synthesized set")
    parser.add_argument("--hours", type=float, default=12.0, help="of speech to learn from, all speakers alike")
    parser.add_argument("--first", type=Path, required=True, help="a trained codec's safetensors file")
    parser.add_argument("--latents", type=Path, help="what `measure` wrote; to measure: axes to keep")
    parser.add_argument(
        "--resume", type=Path, help="the codec whose encoder goes on: a safetensors file or FOLDER/NAME of parts"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--device")
    parser.add_argument("--toy", action="store_true", help="a few steps at toy size, on a CPU")
    args = parser.parse_args()
    begun = time.monotonic()
    device = torch.device(args.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.EncoderRecipe().seed)

    def log(text: str) -> None:
        print(f"encoder {time.monotonic() - begun:.0f} s | {text}", flush=True)

    pool = Pool(from_sets(args.set, args.hours), device)
    log(pool.described)
    codec = first_codec(args.first)
    settings = recipe.EncoderRecipe(total_s=args.seconds)
    if args.toy:
        settings = dataclasses.replace(settings, batch=3, n_frames=6)
    coding = open_coding(codec, args.latents, device)
    if args.what == "measure":
        n = 4 if args.toy else 200
        draw = partial(pool.draw, settings.batch, settings.n_frames, settings.changed)
        log(coding.measure(draw, n, axes=args.latents is None))
        parts.write(args.out, "coding", coding.state(), torch.float32)
        return
    if args.resume:
        codec.load_state_dict(parts.begun(args.resume))
    trainer = Trainer(pool, coding, codec, settings)
    train(trainer, args.out, codec, log)


if __name__ == "__main__":
    main()
