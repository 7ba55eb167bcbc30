"""Polish the codec's decoder on frozen codes, while the talker learns those codes on another GPU.

    python -m training.polish --data .data --codec PARTS --out OUT --seconds 180 --device cuda:1

Encoder and codebooks stay as they are, so codes keep their meaning; only the decoder learns. Clips of the sentences
that the voice speaks are drawn most often. Writes OUT/codec-polished-*.safetensors.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quaver.model.codec_encoder import Codec
from training import data, parts, recipe
from training.codec import excerpts
from training.losses import Discriminators, MelDistance

_ADVERSARIAL, _MATCHING, _MEL = 2.0, 6.0, 15.0
_OFTEN = 6


class Polisher:
    """The decoder, fresh discriminators and one train step on one device."""

    def __init__(self, codec: Codec, latents: Tensor, samples: Tensor, starts: Tensor) -> None:
        self.codec, self.latents, self.samples, self.starts = codec, latents, samples, starts
        self.device = latents.device
        self.batch, self.n_frames = 10, 32
        self.ema = copy.deepcopy(codec.decoder)
        decoder = codec.decoder
        self.own = [p for n, p in decoder.named_parameters() if not n.startswith("quantizer")]
        self.averaged = [p for n, p in self.ema.named_parameters() if not n.startswith("quantizer")]
        self.discriminators = Discriminators().to(self.device)
        self.distance = MelDistance().to(self.device)
        self.theirs = list(self.discriminators.parameters())
        self.lr = [torch.tensor(0.0, device=self.device) for _ in range(2)]
        self.ramp = torch.tensor(0.0, device=self.device)
        fused = self.device.type == "cuda"
        self.optimizers = [
            torch.optim.AdamW(group, lr=rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=fused, capturable=fused)
            for group, rate in zip((self.own, self.theirs), self.lr, strict=True)
        ]
        for p in (*self.own, *self.theirs):
            p.grad = torch.zeros_like(p)
        self.report = torch.zeros(4, device=self.device)

    def step(self) -> None:
        """One train step on crops that begin at a frame."""
        start = self.starts[torch.randint(len(self.starts), (self.batch,), device=self.device)]
        later = torch.randint(16, (self.batch,), device=self.device)
        start = start + later * torch.randint(2, (self.batch,), device=self.device)
        start = start.clamp(max=len(self.latents) - self.n_frames)[:, None]
        latents = self.latents[start + torch.arange(self.n_frames, device=self.device)].transpose(1, 2)
        n = self.n_frames * recipe.SAMPLES_PER_FRAME
        at = start * recipe.SAMPLES_PER_FRAME + torch.arange(n, device=self.device)
        real = self.samples[at].float() / 32767.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            made = self.codec.decoder.from_latents(latents).float()
            own, adversarial, matching = self.discriminators(*excerpts(real, made))
        mel = self.distance(real, made)
        loss = _MEL * mel + (real - made).abs().mean()
        loss = loss + self.ramp * (_ADVERSARIAL * adversarial + _MATCHING * matching)
        gradients = torch.autograd.grad(loss, self.own, retain_graph=True)
        theirs = torch.autograd.grad(own, self.theirs)
        self.report.lerp_(torch.stack([mel, own, adversarial, matching]).detach(), 0.05)
        with torch.no_grad():
            for group, values, optimizer in zip(
                (self.own, self.theirs), (gradients, theirs), self.optimizers, strict=True
            ):
                norm = torch.stack(torch._foreach_norm(values)).norm()
                scaled = torch._foreach_mul(values, (5.0 / norm).clamp(max=1.0))
                torch._foreach_copy_([p.grad for p in group], scaled)  # type: ignore[arg-type]
                optimizer.step()
            torch._foreach_lerp_(self.averaged, self.own, 1.0 - 0.9995)

    def captured(self) -> Callable[[], None]:
        """The step as one CUDA graph; itself on a CPU."""
        if self.device.type != "cuda":
            return self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def prepare(codec: Codec, clips: list[data.Clip], samples: list[np.ndarray], often: set[str]) -> Polisher:
    """A polisher on the codec's own codes of every clip."""
    device = next(codec.parameters()).device
    latents, padded, starts, n_frames = [], [], [], 0
    with torch.no_grad():
        for clip, one in zip(clips, samples, strict=True):
            codes = codec.encoder.encode(torch.from_numpy(one)[None].to(device))
            latents.append(codec.decoder.quantizer.decode(codes)[0].T)
            whole = F.pad(torch.from_numpy(one), (0, -len(one) % recipe.SAMPLES_PER_FRAME))
            padded.append((whole * 32767.0).clamp(-32768, 32767).to(torch.int16))
            starts += [n_frames] * (_OFTEN if clip.file in often else 1)
            n_frames += codes.shape[2]
    index = torch.tensor(starts, device=device)
    return Polisher(codec, torch.cat(latents).clone(), torch.cat(padded).to(device), index)


def run(polisher: Polisher, total_s: float) -> None:
    """Trains for ``total_s`` seconds: a cosine to zero, discriminators brought in after a tenth."""
    step, n_steps, block = polisher.captured(), 0, 20 if polisher.device.type == "cuda" else 1
    begun, n_logged = time.monotonic(), 0
    while (elapsed := time.monotonic() - begun) < total_s:
        share = elapsed / total_s
        factor = min(1.0, share / 0.02) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * share)))
        polisher.lr[0].fill_(4e-4 * factor)
        polisher.lr[1].fill_(4e-4 * max(factor, 0.3))
        polisher.ramp.fill_(min(1.0, max(0.0, (share - 0.08) / 0.12)))
        for _ in range(block):
            step()
        n_steps += block
        if n_steps >= n_logged + 50 * block or block == 1:
            n_logged = n_steps
            mel, own, adversarial, matching = polisher.report.tolist()
            print(
                f"polish {elapsed:.0f} s, step {n_steps}: mel {mel:.3f} own {own:.3f} adv {adversarial:.3f} "
                f"match {matching:.3f}",
                flush=True,
            )
    print(f"polish done: {n_steps} steps in {elapsed:.0f} s", flush=True)


def main() -> None:
    """Polishes and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="this many clips only, for a test")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(recipe.CodecRecipe().seed)
    crossed = data.crossed_clips(args.data, args.sentences)
    others = [c for c in data.read_manifest(args.data) if (args.data / c.file).exists()]
    clips = list({c.file: c for c in (*crossed, *others)}.values())[: args.limit]
    codec = Codec(recipe.codec_config())
    codec.load_state_dict(parts.read(args.codec, "codec-end"))
    codec.to(device)
    # The benchmark would try kernels anew for every length of clip.
    torch.backends.cudnn.benchmark = False
    polisher = prepare(codec, clips, data.read_clips(args.data, clips), {c.file for c in crossed})
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        from training import snake

        snake.install(codec)
    print(f"polish: {len(clips)} clips, {len(polisher.latents)} frames", flush=True)
    run(polisher, args.seconds)
    parts.write(args.out, "codec-polished", parts.codec_state(codec, polisher.ema), torch.float16)


if __name__ == "__main__":
    main()
