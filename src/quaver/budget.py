"""A recipe that fits into a number of bytes, block by block, at the least measured divergence.

A block is a talker layer, the code predictor, or the text embedding. Each is rounded alone, to the nearest level, in
every way it can be stored, and the model is asked about known speech: the divergence of all codebooks of a frame from
the original's is what that costs. Then, step by step, the block and way that cost least per byte saved are taken.
The search of INT4 weights that follows makes the true cost smaller than the one measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quaver import awq, validate
from quaver.awq_search import nearest
from quaver.checkpoint import Checkpoint
from quaver.corpus import Item, Progress
from quaver.errors import BudgetError, RecipeError
from quaver.int4 import Int4Linear
from quaver.int8 import Int8Embedding, Int8Linear, Int8Weight
from quaver.mixed import halved_type, rows_kept, stored_as, with_speech
from quaver.model.homes import LAYERS, TEXT_EMBEDDING
from quaver.model.tts import TTS, Model
from quaver.recipe import PREDICTOR, Measured, Recipe, settings
from quaver.stack import Store
from quaver.validate import Opinion

_N_ASKED = 16
"""The most utterances that each block is asked about."""
_UNITS = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_KEEP = Recipe(talker="keep")


def size(text: str) -> int:
    """The bytes that ``text``, such as 0.9GB or 900MB, means. Raises RecipeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2] not in _UNITS:
        raise RecipeError(f"{text!r} is no size: write one as 0.9GB or 900MB (millions of bytes), or in MiB or GiB")
    return round(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class Block:
    """What is stored in one way: its name, how its tensors' names begin, and the recipe with it alone stored so."""

    name: str
    prefix: str
    alone: Mapping[Store, Recipe]


def blocks(checkpoint: Checkpoint, recipe: Recipe) -> list[Block]:
    """The blocks of which a budget has the choice: the text embedding only where ``recipe`` does not say it."""
    both: tuple[Store, ...] = ("int8", "int4")
    found = [
        Block(f"talker layer {index}", f"{LAYERS}.{index}.", {s: replace(_KEEP, layers={index: s}) for s in both})
        for index in range(checkpoint.config.talker_config.num_hidden_layers)
    ]
    found.append(Block("code predictor", f"{PREDICTOR}.", {s: replace(_KEEP, predictor=s) for s in both}))
    if recipe.text_embedding == "keep":
        found.append(Block("text embedding", f"{TEXT_EMBEDDING}.", {"int8": replace(_KEEP, text_embedding="int8")}))
    return found


def choose(
    checkpoint: Checkpoint,
    most_bytes: int,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    calibration: str | Path | Sequence[Item] | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, Sequence[Item]]:
    """``recipe`` with talker, code predictor and text embedding stored so that all tensors take ``most_bytes`` on disk.

    The codec counts. What ``recipe`` says of the text embedding, the codec and calibration stays. The utterances that
    were asked about come along, to calibrate on. Before any work it raises BudgetError, with the numbers, where nothing
    fits, and RecipeError where all fits as it is or the recipe says what the budget is to choose.
    """
    if recipe.layers or (recipe.talker, recipe.predictor) != ("int4", "keep"):
        raise RecipeError("a budget chooses how talker and code predictor are stored: take them out of the recipe")
    everything = replace(recipe, predictor="int4", text_embedding="int8")
    everything.check(checkpoint)
    found = blocks(checkpoint, recipe)
    fixed, n_bytes = _bytes(checkpoint, recipe, found)
    _check(checkpoint, most_bytes, fixed, found, n_bytes)
    tts = TTS.load(checkpoint, device=device, dtype=dtype)
    items = awq.calibration_items(tts, recipe.calibration, calibration, progress)
    kl = _measure(tts, found, with_speech(items)[:_N_ASKED], progress)
    chosen = fit(n_bytes, kl, most_bytes - fixed)
    stores = {block.name: store for block, store in zip(found, chosen, strict=True)}
    layers = {index: stores[block.name] for index, block in enumerate(found) if block.prefix.startswith(LAYERS)}
    text = stores.get("text embedding", recipe.text_embedding)
    made = replace(
        recipe,
        layers={index: store for index, store in layers.items() if store != "int4"},
        predictor=stores["code predictor"],
        text_embedding="keep" if text == "keep" else "int8",
        budget_bytes=most_bytes,
        measured=tuple(map(Measured, stores, chosen, n_bytes, kl)),
    )
    return made, items


def fit(n_bytes: Sequence[Mapping[Store, int]], kl: Sequence[Mapping[Store, float]], most_bytes: int) -> list[Store]:
    """For each block the way to store it so that all take at most ``most_bytes``, which the smallest ways must do.

    From everything kept, the step that costs least divergence a byte is taken until all fit; then whatever still fits
    is taken back, the costliest first.
    """
    chosen: list[Store] = ["keep"] * len(n_bytes)

    def total() -> int:
        return sum(sizes[store] for sizes, store in zip(n_bytes, chosen, strict=True))

    def steps() -> Iterator[tuple[float, int, int, Store]]:
        """Every change of one block: what it costs, how many bytes it saves, the block, and its store then."""
        for place, (sizes, costs, now) in enumerate(zip(n_bytes, kl, chosen, strict=True)):
            for store in sizes:
                if store != now:
                    yield costs[store] - costs[now], sizes[now] - sizes[store], place, store

    while total() > most_bytes:
        _, _, place, store = min(
            (max(cost, 0.0) / saved, -saved, place, store) for cost, saved, place, store in steps() if saved > 0
        )
        chosen[place] = store
    while back := [step for step in steps() if step[0] < 0 and total() - step[1] <= most_bytes]:
        _, _, place, store = min(back)
        chosen[place] = store
    return chosen


def _bytes(checkpoint: Checkpoint, recipe: Recipe, found: Sequence[Block]) -> tuple[int, list[dict[Store, int]]]:
    """The bytes of what is no block, and of each block by how it is stored."""
    text_rows = len(rows_kept(checkpoint, recipe.languages)) if recipe.languages else None

    def sizes(one: Recipe, text_rows: int | None = None) -> dict[str, int]:
        changed = settings(one, checkpoint.config, text_rows)
        made = stored_as(checkpoint.config, changed, checkpoint.specs, checkpoint.path)
        return {name: spec.n_bytes for name, spec in made.items()}

    whole = sizes(replace(_KEEP, text_embedding=recipe.text_embedding), text_rows)
    codec = sum(
        spec.n_elements * (halved_type(name, spec.dtype) if recipe.codec_decoder != "keep" else spec.dtype).itemsize
        for name, spec in checkpoint.codec_specs.items()
    )
    prefixes = tuple(block.prefix for block in found)
    fixed = codec + sum(n for name, n in whole.items() if not name.startswith(prefixes))
    by_block = []
    for block in found:
        ways = {"keep": whole, **{store: sizes(alone) for store, alone in block.alone.items()}}
        by_block.append(
            {s: sum(n for name, n in way.items() if name.startswith(block.prefix)) for s, way in ways.items()}
        )
    return fixed, by_block


def _check(
    checkpoint: Checkpoint, most_bytes: int, fixed: int, found: Sequence[Block], n_bytes: Sequence[Mapping[Store, int]]
) -> None:
    """Raises RecipeError where all fits kept, BudgetError where nothing does."""
    whole, least = (fixed + sum(pick(one.values()) for one in n_bytes) for pick in (max, min))
    if whole <= most_bytes:
        raise RecipeError(f"{checkpoint.path} takes {whole:,} bytes unquantized, within {most_bytes:,}: nothing to do")
    if least > most_bytes:
        talker, predictor, *text = _least_by_module(found, n_bytes)
        told = (
            f"talker layers {talker:,}, code predictor {predictor:,}{f', text embedding {text[0]:,}' if text else ''}"
        )
        raise BudgetError(
            f"{most_bytes:,} bytes cannot hold {checkpoint.path}: at its smallest it takes {least:,} on disk ({told}, "
            f"all else {fixed:,}); allow more, or prune text_embedding.languages or set codec.decoder by a recipe"
        )


def _least_by_module(found: Sequence[Block], n_bytes: Sequence[Mapping[Store, int]]) -> list[int]:
    """The fewest bytes of all talker layers, then of each other block."""
    least = [min(one.values()) for one in n_bytes]
    n_layers = sum(block.prefix.startswith(LAYERS) for block in found)
    return [sum(least[:n_layers]), *least[n_layers:]]


@torch.inference_mode()
def _measure(
    tts: TTS, found: Sequence[Block], items: Sequence[Item], progress: Progress | None
) -> list[dict[Store, float]]:
    """What each way of storing each block costs alone."""
    before = _opinions(tts, items)
    measured: list[dict[Store, float]] = []
    for done, block in enumerate(found, 1):
        costs: dict[Store, float] = {"keep": 0.0}
        for store, alone in block.alone.items():
            with rounded(tts, settings(alone, tts.config)):
                costs[store] = _divergence(before, _opinions(tts, items))
        measured.append(costs)
        if progress:
            progress("measuring blocks", done, len(found))
    return measured


def _opinions(tts: TTS, items: Sequence[Item]) -> list[Opinion]:
    return [validate.opinion(tts, logits, "cpu") for logits in validate.force(tts, items, lambda *_: None)]


def _divergence(before: Sequence[Opinion], after: Sequence[Opinion]) -> float:
    """Nats a frame over all codebooks: by the chain rule, the divergence of whole frames given the past."""
    differences = list(map(validate.difference, before, after))
    sums, counts = (np.sum(parts, axis=0) for parts in zip(*((d.kl, d.n_frames) for d in differences), strict=True))
    return float((sums / counts).sum())


@contextmanager
def rounded(tts: TTS, changed: Mapping[str, Any]) -> Iterator[None]:
    """While open, ``tts`` computes with what the keys ``changed`` of config.json would keep, rounded to nearest."""
    with torch.device("meta"):
        stored = dict(Model(tts.config.with_keys(changed)).named_modules())
    originals = {}
    try:
        for name, module in tts.model.named_modules():
            if isinstance(stored[name], Int4Linear | Int8Linear | Int8Embedding):
                weight = module.get_parameter("weight")
                originals[name] = weight.data
                kind = nearest if isinstance(stored[name], Int4Linear) else Int8Weight.nearest
                weight.data = kind(weight.data.float()).dequantize().to(weight.dtype)
        yield
    finally:
        for name, data in originals.items():
            tts.model.get_submodule(name).get_parameter("weight").data = data
