"""What half precision does to sound: signal to noise, in dB, of the codec's decoder against itself in float32.

    python bench/sound.py [MODEL] [--seconds 4]

Rows: weights kept in a type and computed in float32, as `TTS.load(sound_dtype=...)` does; everything in that type. The
codes are those of the references that ship with quaver. A shipped voice is stored in float16, so its weights are also
moved a little, by less than half a step of that type, to be numbers that float16 does not have.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from quaver import audio
from quaver.model.codec import CodecDecoder
from quaver.model.encoders import load_codec_encoder
from quaver.model.tts import TTS, references

RATE_HZ = 24000


def moved(decoder: CodecDecoder) -> CodecDecoder:
    """``decoder`` with each weight off the numbers of float16, by a quarter of a step either way at most."""
    found, generator = copy.deepcopy(decoder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in found.parameters():
            value.mul_(1 + (torch.rand(value.shape, generator=generator) - 0.5) * 2.0**-11)
    return found


def sounds(decoder: nn.Module, codes: list[Tensor]) -> list[Tensor]:
    """What ``decoder`` makes of ``codes``."""
    with torch.no_grad():
        return [decoder(one[None])[0].float() for one in codes]


def db(wanted: list[Tensor], found: list[Tensor]) -> str:
    """The ratio of signal to noise of each, in words."""
    values = [
        float(10 * torch.log10(a.square().sum() / (a - b).square().sum())) for a, b in zip(wanted, found, strict=True)
    ]
    return " ".join(f"{value:6.1f}" for value in values)


def peak(decoder: CodecDecoder, codes: list[Tensor]) -> float:
    """The largest activation between modules."""
    found = [0.0]

    def note(_: nn.Module, __: object, out: object) -> None:
        if isinstance(out, Tensor):
            found[0] = max(found[0], float(out.abs().max()))

    hooks = [module.register_forward_hook(note) for module in decoder.modules()]
    sounds(decoder, codes)
    for hook in hooks:
        hook.remove()
    return found[0]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--seconds", type=float, default=4.0)
    asked = parser.parse_args()
    tts = TTS.load(asked.model)
    encoder = load_codec_encoder(tts.checkpoint)
    codes = []
    for path in references().values():
        samples = audio.resample(audio.read(path), RATE_HZ).samples[: round(asked.seconds * RATE_HZ)]
        with torch.no_grad():
            codes.append(encoder.encode(torch.from_numpy(samples)[None])[0])
    print(f"{asked.model}: {len(codes)} references, {', '.join(references())}; dB")
    print(f"largest activation in float32: {peak(tts.decoder, codes):.0f} (float16 ends at 65504)")
    for name, decoder in (("as stored", tts.decoder), ("moved", moved(tts.decoder))):
        wanted = sounds(decoder, codes)
        for dtype in (torch.float16, torch.bfloat16):
            kept = copy.deepcopy(decoder)
            kept.settle(torch.device("cpu"), dtype)
            kind = str(dtype).removeprefix("torch.")
            print(f"{name:10} weights in {kind:9} {db(wanted, sounds(kept, codes))}", flush=True)
            everything = copy.deepcopy(decoder).to(dtype)
            print(f"{name:10} all in {kind:13} {db(wanted, sounds(everything, codes))}", flush=True)


if __name__ == "__main__":
    main()
