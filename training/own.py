"""What the talker itself would say of clips whose first codebook is given: the codes its decoder will have to read.

    python -m training.own --set SET --set SET --encoded ENCODED --texts .data/texts.jsonl --latents LATENTS \
        --tokenizer TEXT --talker TALKER/talker --out OWN --hours 30

A decoder that has only met true codes says the talker's blurred ones blurredly. Of the clips that `training.decoder`
draws from (the same SETs and hours), codebook 0 stays as it is and the code predictor says the others: first with the
true codes as history, then again with what it said. OWN is an encoded set as large as ENCODED, all other clips being as
they are there; OWN/done says that it is whole. TALKER is FOLDER/NAME of parts or a model.safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quaver.model.tts import Model
from quaver.text import Tokenizer
from training import parts, recipe, shards
from training.pool import chosen
from training.ranks import Ranks
from training.talker import Batch, Examples, Trainer, config_of, read_texts

_FRAMES = 16_384
_ROUNDS = 2


class Sayer:
    """A talker that says clips of an encoded set with codebook 0 given."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        trainer.learning = trainer.guided = False

    @torch.no_grad()
    def rest(self, hidden: Tensor, first: Tensor) -> Tensor:
        """Codebooks 1 to Q - 1 [N, Q - 1] of frames with the hidden states [N, D] and the codes ``first`` [N]."""
        talker = self.trainer.model.talker
        predictor, cache = talker.code_predictor, talker.code_predictor.cache(len(first), hidden)
        temperature = torch.empty(len(first), 1, device=first.device).uniform_(*recipe.OWN_TEMPERATURES)

        def drawn(logits: Tensor) -> Tensor:
            likely = logits.float() / temperature
            return (likely - torch.empty_like(likely).exponential_().log()).argmax(-1)

        codes = [drawn(predictor.start(hidden, talker.embed_codec(first), cache))]
        for book in range(1, predictor.n_residual):
            codes.append(drawn(predictor.step(book, codes[-1], cache)))
        return torch.stack(codes, 1)

    @torch.no_grad()
    def said(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The frames of the clips in ``batch`` and their codes 1 and on: [N] and [N, Q - 1]."""
        trainer, e = self.trainer, self.trainer.examples
        clip = batch.rows[0].to(trainer.device)
        vectors = trainer.clean_vectors(e.speaker_on_device[clip])
        with trainer.autocast:
            found = trainer.spoken(batch, torch.zeros((), device=trainer.device), vectors)
            spoken = found["spoken"]
            time_ = torch.arange(spoken.shape[1], device=trainer.device)
            frames = (e.on_device["start"][clip][:, None] + time_)[spoken]
            states, first = found["state"][spoken], found["codes"][..., 0][spoken]
            pairs = zip(torch.split(states, _FRAMES), torch.split(first, _FRAMES), strict=True)
            return frames, torch.cat([self.rest(hidden, codes) for hidden, codes in pairs])

    def say(self, clips: np.ndarray, log: Callable[[str], None]) -> Tensor:
        """The codes int16 [frames, Q] of the whole set, those of ``clips`` said anew."""
        e = self.trainer.examples
        batches, true = e.round(clips), e.codes
        for number in range(_ROUNDS):
            heard = true.clone()
            for batch in batches:
                frames, codes = self.said(batch)
                heard[frames, 1:] = codes.to(torch.int16)
            e.codes = heard
            log(f"said {len(batches)} batches, time {number + 1}")
        e.codes = true
        return heard.cpu()


def main() -> None:
    """Says and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, action="append", required=True, help="a synthesized set")
    parser.add_argument("--hours", type=float, default=30.0, help="of speech, as the decoder has them")
    parser.add_argument("--encoded", type=Path, required=True, help="what `training.encode` made of these sets")
    parser.add_argument("--texts", type=Path, required=True, help="texts.jsonl")
    parser.add_argument("--latents", type=Path, required=True, help="where the codebooks are")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--talker", type=Path, required=True, help="a safetensors file or FOLDER/NAME of parts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--toy", action="store_true", help="of fewer layers, on a CPU")
    args = parser.parse_args()
    begun = time.monotonic()

    def log(text: str) -> None:
        print(f"own {time.monotonic() - begun:.0f} s | {text}", flush=True)

    ranks = Ranks(args.device)
    settings = dataclasses.replace(recipe.TalkerRecipe(), in_context=0.0)
    if args.toy:
        settings = dataclasses.replace(settings, budget=1200)
    torch.manual_seed(settings.seed)
    tokenizer, encoded = Tokenizer.load(args.tokenizer), shards.read(args.encoded)
    clips = np.array([index for index, _, _ in chosen(args.set, args.hours)])
    config, references = config_of(tokenizer, toy=args.toy), shards.read_references(args.encoded)
    examples = Examples(encoded, references, read_texts(args.texts), tokenizer, settings, ranks.device)
    model = Model(config)
    model.load_state_dict(parts.begun(args.talker))
    books = parts.read(args.latents, "coding")["books"]
    trainer = Trainer(model.to(ranks.device), examples, books, tokenizer, config, ranks)
    on_gpu = ranks.device.type == "cuda"
    trainer.autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
    log(f"{len(clips)} of {len(encoded.text)} clips")
    codes = Sayer(trainer).say(clips, log)
    changed = (codes != encoded.codes).float().mean(0)
    log("changed: " + " ".join(f"{share:.2f}" for share in changed.tolist()))
    (args.out / "done").unlink(missing_ok=True)
    shards.write(args.out, dataclasses.replace(encoded, codes=codes))
    (args.out / "done").touch()
    log("done")


if __name__ == "__main__":
    main()
