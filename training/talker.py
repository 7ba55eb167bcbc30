"""Train talker, code predictor and speaker encoder together on the crossed clips, whose codes a trained codec gives.

    python -m training.talker --data .data --codec PARTS --tokenizer VOICE_FOLDER --out OUT --seconds 180

Writes OUT/talker-*.safetensors (bf16, see `training.parts`). Each example is a sentence in one voice, its speaker
vector taken from another clip of that voice, changed in speed, level, colour and noise. Heard codes are replaced at
random, so that free speech finds back after a wrong draw; the linears carry noise, so that INT4 does no harm.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.config import ModelConfig, parse
from quaver.model import speaker as speaker_encoder
from quaver.model.codec_encoder import Codec
from quaver.model.tts import Layout, Model
from quaver.text import Tokenizer
from training import data, parts, recipe
from training.plans import NOTHING, Plan, Planner, Speech


def config_of(tokenizer: Tokenizer) -> ModelConfig:
    """The small voice's configuration with the ids of ``tokenizer``."""
    return parse(ModelConfig, settings_of(tokenizer), "training/recipe.py: model_settings")


def settings_of(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json of the small voice with the ids of ``tokenizer``."""
    names = ("<|im_start|>", "<|im_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
    special = {name: tokenizer.encode(name)[0] for name in names}
    return recipe.model_settings(special, tokenizer.encode("assistant")[0])


@torch.no_grad()
def encode(codec: Codec, samples: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The codes [T, Q] of each recording, each encoded alone and in full precision, as `TTS.enroll` does."""
    return [codec.encoder.encode(torch.from_numpy(s)[None].to(device))[0].T for s in samples]


class Examples:
    """Everything a batch is drawn from, on the device."""

    def __init__(self, plans: list[Plan], codes: Tensor, voices: list[np.ndarray], device: torch.device) -> None:
        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(p, name) for p in plans])).long().to(device)

        self.text, self.codec, self.frame, self.target = map(stacked, ("text", "codec", "frame", "target"))
        self.speaker, self.first, self.n_frames, self.voice = map(stacked, ("speaker", "first", "n_frames", "voice"))
        self.codes = codes
        lengths = torch.tensor([len(v) for v in voices], device=device)
        self.voice_start, self.voice_length = lengths.cumsum(0) - lengths, lengths
        joined = np.concatenate(voices)
        self.samples = torch.from_numpy((joined * 32767.0).clip(-32768, 32767).astype(np.int16)).to(device)
        self.device = device

    def references(self, voice: Tensor, seconds: float) -> Tensor:
        """A changed excerpt [B, N] of the recordings of each ``voice`` [B]."""
        n = int(seconds * data.RATE_HZ)
        uniform = torch.rand(5, len(voice), 1, device=self.device)
        speed = 0.93 + 0.14 * uniform[0]
        room = self.voice_length[voice][:, None] - 1.1 * n - 2
        at = self.voice_start[voice][:, None] + uniform[1] * room + speed * torch.arange(n, device=self.device)
        left = at.long()
        share = (at - left).float()
        x = torch.lerp(self.samples[left].float(), self.samples[left + 1].float(), share) / 32767.0
        x = x + 0.5 * (uniform[2] - 0.5) * F.pad(x, (1, -1))
        noise = 10.0 ** (-4.0 + 2.0 * uniform[3]) * torch.randn_like(x)
        return (x + noise) * (0.4 + 0.9 * uniform[4])


class Trainer:
    """The model and one train step."""

    def __init__(self, model: Model, examples: Examples, settings: recipe.TalkerRecipe, n_in_context: int) -> None:
        self.model, self.examples, self.settings = model, examples, settings
        self.n_in_context = n_in_context
        device = examples.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.linears = [m.weight for m in model.talker.model.layers.modules() if isinstance(m, nn.Linear)]
        decayed = [p for p in self.parameters if p.dim() > 1]
        plain = [p for p in self.parameters if p.dim() < 2]
        self.lr = torch.tensor(0.0, device=device)
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=fused, capturable=fused)
        self.noise = torch.tensor(0.0, device=device)
        self.report = torch.zeros(5, device=device)
        weight = torch.linspace(1.5, 0.5, recipe.N_CODEBOOKS - 1, device=device)
        self.book_weight = weight / weight.sum()

    def draw(self) -> Tensor:
        """Indices [B] of plans: a fixed share of them in context (these are the last ``n_in_context`` plans)."""
        batch, device = self.settings.batch, self.examples.device
        n_plain = len(self.examples.voice) - self.n_in_context
        n_cloned = int(self.settings.in_context * batch) if self.n_in_context else 0
        plain = torch.randint(n_plain, (batch - n_cloned,), device=device)
        if not n_cloned:
            return plain
        return torch.cat((plain, n_plain + torch.randint(self.n_in_context, (n_cloned,), device=device)))

    def loss(self) -> Tensor:
        """The loss of a fresh batch; leaves its parts in ``report``."""
        s, e, talker = self.settings, self.examples, self.model.talker
        row = self.draw()
        device = e.device
        encoder = self.model.speaker_encoder
        assert encoder is not None
        mels = speaker_encoder.mel(e.references(e.voice[row], s.reference_s))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            vector = encoder(mels).float()
            vector = vector + 0.15 * vector.detach().square().mean(1, keepdim=True).sqrt() * torch.randn_like(vector)
            rate = torch.rand(s.batch, 1, 1, device=device).pow(2) * 0.35
            frame, codec = e.frame[row], e.codec[row]
            heard = self.disturbed(e.codes[frame.clamp(min=0)], rate)
            embeds = talker.embed_text(e.text[row])
            embeds = embeds + talker.embed_codec(codec.clamp(min=0)) * (codec >= 0)[..., None]
            embeds = embeds + talker.embed_frames(heard) * (frame >= 0)[..., None]
            at = torch.arange(s.n_positions, device=device) == e.speaker[row][:, None]
            embeds = embeds + at[..., None] * vector[:, None]
            hidden = talker.hidden(embeds)
            target = e.target[row]
            position = torch.arange(s.n_positions, device=device)
            last = (position == (e.first[row] + e.n_frames[row])[:, None]).long()
            wanted = torch.where(target >= 0, e.codes[target.clamp(min=0)][..., 0], NOTHING)
            wanted = torch.where(last > 0, talker.config.codec_eos_token_id, wanted)
            logits = talker.codec_head(hidden).float()
            first = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NOTHING)
            chosen = (torch.rand(s.batch, s.n_frames, device=device) * e.n_frames[row][:, None]).long()
            chosen = e.first[row][:, None] + chosen
            states = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
            codes = e.codes[target.gather(1, chosen).clamp(min=0)]
            given = self.disturbed(codes, 0.5 * rate).flatten(0, 1)
            codes = codes.flatten(0, 1)
            guessed = talker.code_predictor.force(states, talker.embed_codec(given[:, 0]), given[:, 1:]).float()
            each = F.cross_entropy(guessed.flatten(0, 1), codes[:, 1:].flatten(), reduction="none")
            each = each.view(len(codes), -1).mean(0)
        known = wanted >= 0
        right = ((logits.argmax(-1) == wanted) & known).sum() / known.sum()
        parts_of_it = torch.stack([first, right, each[0], each[4], each.mean()])
        self.report.lerp_(parts_of_it.detach(), 0.02)
        return first + 4.0 * (each * self.book_weight).sum()

    def disturbed(self, codes: Tensor, rate: Tensor) -> Tensor:
        """``codes`` [B, n, Q] with a share ``rate`` of them replaced by any code."""
        wrong = torch.rand(codes.shape, device=codes.device) < rate
        return torch.where(wrong, torch.randint(recipe.N_CODES, codes.shape, device=codes.device), codes)

    def step(self) -> None:
        """One train step, on noisy linears."""
        with torch.no_grad():
            noise = [torch.randn_like(w) * (self.noise * w.std()) for w in self.linears]
            torch._foreach_add_(self.linears, noise)
        gradients = torch.autograd.grad(self.loss(), self.parameters)
        with torch.no_grad():
            torch._foreach_sub_(self.linears, noise)
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            gradients = torch._foreach_mul(gradients, (1.0 / norm).clamp(max=1.0))
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(gradient)
            self.optimizer.step()
            torch._foreach_lerp_(self.ema, self.parameters, 1.0 - self.settings.ema_decay)

    def captured(self) -> Callable[[], None]:
        """The step as one CUDA graph; itself on a CPU."""
        if self.examples.device.type != "cuda":
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

    def pace(self, share: float) -> None:
        """Learning rate and weight noise at a ``share`` 0..1 of the run."""
        self.lr.fill_(self.settings.lr * min(1.0, share / 0.02) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * share))))
        self.noise.fill_(self.settings.weight_noise * min(1.0, share / 0.3))


def initialise(model: Model) -> None:
    """Small normal weights, as the published configuration asks (initializer_range 0.02)."""
    for name, parameter in model.talker.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def make_plans(planner: Planner, clips: list[Speech], seed: int) -> tuple[list[Plan], int]:
    """Every clip in both layouts, with its language and without, and as many clones in context, which come last."""
    layouts: tuple[Layout, ...] = ("stream", "whole")
    plain = [planner.plan(c, language, layout) for c in clips for language in ("english", "auto") for layout in layouts]
    random_ = random.Random(seed)
    by_voice = {v: [c for c in clips if c.voice == v] for v in {c.voice for c in clips}}
    cloned = []
    for clip in clips:
        for layout in layouts:
            reference = random_.choice(by_voice[clip.voice])
            cloned.append(planner.plan(clip, random_.choice(("english", "auto")), layout, reference))
    found = [p for p in plain if p is not None]
    if len(found) < len(plain):
        raise ValueError(f"{len(plain) - len(found)} plans are longer than {planner.n_positions} positions")
    in_context = [p for p in cloned if p is not None]
    return found + in_context, len(in_context)


def main() -> None:
    """Encodes, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True, help="the folder of the trained codec's parts")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--toy", action="store_true", help="a few steps at toy size, on a CPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = recipe.TalkerRecipe(total_s=args.seconds)
    if args.toy:
        settings = recipe.TalkerRecipe(total_s=args.seconds, batch=4, n_frames=4)
    torch.manual_seed(settings.seed)
    clips = data.crossed_clips(args.data, args.sentences)
    samples = data.read_clips(args.data, clips)
    codec = Codec(recipe.codec_config())
    codec.load_state_dict(parts.read(args.codec, "codec-end"))
    codes = encode(codec.to(device).eval(), samples, device)
    print(f"{len(clips)} clips, {sum(map(len, codes))} frames, list {data.list_sha256(clips)[:16]}", flush=True)
    speeches, start = [], 0
    for clip, frames in zip(clips, codes, strict=True):
        speeches.append(Speech(clip.text, data.VOICES.index(clip.voice), start, len(frames)))
        start += len(frames)
    tokenizer = Tokenizer.load(args.tokenizer)
    config = config_of(tokenizer)
    plans, n_in_context = make_plans(Planner(config, tokenizer, settings.n_positions), speeches, settings.seed)
    voices = [np.concatenate([s for s, c in zip(samples, clips, strict=True) if c.voice == v]) for v in data.VOICES]
    examples = Examples(plans, torch.cat(codes), voices, device)
    model = Model(config)
    initialise(model)
    trainer = Trainer(model.to(device).train(), examples, settings, n_in_context)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    print(f"{len(plans)} plans, {n_in_context} in context; parameters {sizes}", flush=True)
    torch.set_float32_matmul_precision("high")
    run(trainer)
    for parameter, average in zip(trainer.parameters, trainer.ema, strict=True):
        parameter.data.copy_(average)
    parts.write(args.out, "talker", dict(model.state_dict()), torch.bfloat16)


def run(trainer: Trainer) -> None:
    """Trains until the recipe's seconds are over."""
    step, n_steps, n_logged = trainer.captured(), 0, 0
    block = 20 if trainer.examples.device.type == "cuda" else 1
    begun = time.monotonic()
    while (elapsed := time.monotonic() - begun) < trainer.settings.total_s:
        trainer.pace(elapsed / trainer.settings.total_s)
        for _ in range(block):
            step()
        n_steps += block
        if n_steps >= n_logged + 50 * block or block == 1:
            n_logged = n_steps
            first, right, one, five, rest = trainer.report.tolist()
            print(
                f"{elapsed:.0f} s, step {n_steps}: codebook 0 {first:.3f} nat ({right:.1%} right), "
                f"1 {one:.3f}, 5 {five:.3f}, mean of 1..15 {rest:.3f}",
                flush=True,
            )
    print(f"done: {n_steps} steps in {elapsed:.0f} s", flush=True)


if __name__ == "__main__":
    main()
