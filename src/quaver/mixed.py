"""A model with each part stored as a recipe says: INT4 as the quantizer has it, INT8 rows, bfloat16, fewer text rows.

INT4 layers are searched on what the layers before them give, as stored; the code predictor's on frames of known speech,
with the hidden states of the original talker. INT8 rounds to the nearest level and needs no calibration.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver import awq, corpus, ledger
from quaver.awq import LayerReport, Stream
from quaver.awq_search import search_layer
from quaver.checkpoint import Checkpoint, Edit, Spec
from quaver.config import ModelConfig
from quaver.corpus import Item, Progress
from quaver.errors import RecipeError
from quaver.files import check_new
from quaver.int8 import Int8Embedding, Int8Linear, Int8Weight
from quaver.ledger import megabytes
from quaver.model.layers import GROUPS, Decoder, DecoderLayer
from quaver.model.tts import PACKED_SUFFIXES, TEXT_EMBEDDING, TTS, Model
from quaver.provenance import Step
from quaver.recipe import PREDICTOR_LAYERS, RECIPE, STORES, Recipe, Store, readers, settings
from quaver.scripts import kept_ids
from quaver.text import Tokenizer

DECODER = "decoder."
"""How the names of the codec decoder's tensors begin."""
_FRAMES = 4096
"""The most frames on which the code predictor is calibrated, spread over all there are."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module that changed: its bytes on disk before and after, and the types that it is stored in now."""

    name: str
    bytes_before: int
    bytes_after: int
    stored: str


@dataclass(frozen=True, slots=True)
class MixedReport:
    """What storing by ``recipe`` did: the parts that changed, the INT4 layers of talker and predictor, the rows of text
    that are left where some were pruned, the calibration set, the time, and what to know beside that."""

    recipe: Recipe
    parts: tuple[Part, ...]
    talker: tuple[LayerReport, ...]
    predictor: tuple[LayerReport, ...]
    text_rows: int | None
    n_utterances: int
    calibration_sha256: str | None
    seconds: float
    notes: tuple[str, ...]
    tensor_bytes: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "recipe": self.recipe.to_json()}

    def summary(self) -> str:
        """The parts as a table, and what to know of the result, for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        row = "{:<28} {:>12} {:>12}  {}"
        old, new = map(megabytes, self.tensor_bytes)
        yield f"stored by a recipe, {old} MB to {new} MB in {self.seconds:.0f} s"
        yield row.format("changed, MB", "before", "after", "stored as")
        for part in self.parts:
            yield row.format(part.name, megabytes(part.bytes_before), megabytes(part.bytes_after), part.stored)
        for name, layers in (("talker", self.talker), ("code predictor", self.predictor)):
            if layers:
                after, nearest = sum(one.loss for one in layers), sum(one.loss_nearest for one in layers)
                share = after / nearest if nearest else 1.0
                error = f"output error {100 * share:.0f} % of that of rounding to nearest"
                yield f"{name}: {len(layers)} layers in INT4, {error}"
        if self.text_rows is not None:
            yield f"text embedding: {self.text_rows:,} rows are left; a text that needs another is refused"
        if self.recipe.measured:
            yield from self._chosen()
        yield from (f"note: {note}" for note in self.notes)

    def _chosen(self) -> Iterator[str]:
        """What a budget chose and why."""
        row = "{:<18} {:>6} {:>9} {:>9} {:>9} {:>11} {:>11}"
        yield row.format("block", "chosen", "keep MB", "int8 MB", "int4 MB", "int8 KL", "int4 KL")
        for one in self.recipe.measured:
            sizes = [megabytes(one.n_bytes[s]) if s in one.n_bytes else "" for s in STORES]
            costs = [f"{one.kl[s]:.3g}" if s in one.kl else "" for s in STORES[1:]]
            yield row.format(one.block, one.store, *sizes, *costs).rstrip()
        yield "KL: nats a frame over all codebooks, the block alone rounded to nearest; the search then does better"


@dataclass(frozen=True, slots=True)
class _Int4:
    """What became of a decoder's layers: see awq.QuantizedLayer, of all of them together."""

    layers: tuple[LayerReport, ...]
    tensors: Mapping[str, Mapping[str, Tensor]]
    absorbed: Mapping[str, tuple[float, float]]


_NOTHING = _Int4((), {}, {})


def quantize(
    source: str | Path | Checkpoint,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    calibration: str | Path | Sequence[Item] | None = None,
    progress: Progress | None = None,
) -> MixedReport:
    """Writes ``source`` with each part stored as ``recipe`` says to the new folder ``out``, and reports.

    ``calibration`` is as for awq.quantize; nothing is spoken where no part becomes INT4. Raises CheckpointError or
    RecipeError, before any work, for what cannot be done; whatever is interrupted leaves nothing behind.
    """
    start, out = time.perf_counter(), check_new(out)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    recipe.check(checkpoint)
    tts = TTS.load(checkpoint, device=device, dtype=dtype)
    stores = [recipe.layer(index) for index in range(checkpoint.config.talker_config.num_hidden_layers)]
    items: Sequence[Item] = ()
    talker = predictor = _NOTHING
    if "int4" in (*stores, recipe.predictor):
        items = awq.calibration_items(tts, recipe.calibration, calibration, progress)
        rows = awq.talker_inputs(tts, items, recipe.calibration.n_positions)
        talker = _walk(tts.talker.model, awq.LAYERS, stores, Stream(tts.talker.model, rows), checkpoint.specs, progress)
    if recipe.predictor == "int4":
        model = tts.talker.code_predictor.model
        stream = Stream(model, predictor_inputs(tts, items, recipe.calibration.n_positions))
        predictor = _walk(model, PREDICTOR_LAYERS, ["int4"] * len(model.layers), stream, checkpoint.specs, progress)
    kept = rows_kept(checkpoint, recipe.languages) if recipe.languages else None
    changed = settings(recipe, checkpoint.config, None if kept is None else len(kept))
    tensors = {**talker.tensors, **predictor.tensors}
    result: dict[str, Any] = {
        "calibration_sha256": corpus.fingerprint(items) if items else None,
        "absorbed": {name: list(ends) for name, ends in {**talker.absorbed, **predictor.absorbed}.items()},
        "text_rows": None if kept is None else len(kept),
    }
    for name, walked in (("talker", talker), ("predictor", predictor)):
        result |= {f"{name}_loss_nearest": sum(one.loss_nearest for one in walked.layers)}
        result |= {f"{name}_loss": sum(one.loss for one in walked.layers)}
    saved = checkpoint.edit(
        Step("quantize", {"method": RECIPE, **recipe.to_json()}, result=result),
        _edit(tensors, int8_modules(checkpoint.config, changed), kept),
        changed,
        codec=halved if recipe.codec_decoder == "bfloat16" and _is_halved(checkpoint) else None,
    ).save(out)
    parts, tensor_bytes = _parts(checkpoint, saved)
    return MixedReport(
        recipe=recipe,
        parts=parts,
        talker=talker.layers,
        predictor=predictor.layers,
        text_rows=None if kept is None else len(kept),
        n_utterances=len(items),
        calibration_sha256=result["calibration_sha256"],
        seconds=time.perf_counter() - start,
        notes=tuple(_notes(recipe, saved)),
        tensor_bytes=tensor_bytes,
    )


def rows_kept(checkpoint: Checkpoint, languages: Sequence[str]) -> Tensor:
    """The ids [N] int32, in order, whose text embedding rows the ``languages`` can need, the control ids too."""
    config = checkpoint.config
    control = {
        config.im_start_token_id, config.im_end_token_id, config.assistant_token_id,
        config.tts_bos_token_id, config.tts_eos_token_id, config.tts_pad_token_id,
    }  # fmt: skip
    needed = control | set(kept_ids(Tokenizer.load(checkpoint.path).spellings(), languages))
    n_ids = config.talker_config.text_vocab_size
    return torch.tensor(sorted(index for index in needed if index < n_ids), dtype=torch.int32)


def int8_modules(config: ModelConfig, changed: Mapping[str, Any]) -> frozenset[str]:
    """The modules that are in INT8 once the keys ``changed`` of config.json are replaced."""
    with torch.device("meta"):
        modules = Model(config.with_keys(changed)).named_modules()
        return frozenset(name for name, module in modules if isinstance(module, Int8Linear | Int8Embedding))


def stored_as(
    config: ModelConfig, changed: Mapping[str, Any], found: Mapping[str, Spec], file: Path
) -> dict[str, Spec]:
    """Every tensor of a model of ``config`` once the keys ``changed`` of config.json are replaced, as if in ``file``.

    Types are those of the tensors ``found`` where these have the name, else bfloat16.
    """
    with torch.device("meta"):
        state = Model(config.with_keys(changed)).state_dict()

    otherwise = {name: spec.dtype for name, spec in found.items()}
    types: dict[str, torch.dtype] = {
        name: value.dtype if name.endswith(PACKED_SUFFIXES) else otherwise.get(name, torch.bfloat16)
        for name, value in state.items()
    }
    return {name: Spec(file, types[name], tuple(value.shape)) for name, value in state.items()}


def halved(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """A tensor of the codec as it is stored with its decoder in bfloat16."""
    return {name: tensor.to(halved_type(name, tensor.dtype))}


def halved_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the codec's tensor ``name`` of type ``dtype`` once its decoder is in bfloat16."""
    return torch.bfloat16 if name.startswith(DECODER) and dtype == torch.float32 else dtype


def _is_halved(checkpoint: Checkpoint) -> bool:
    """Whether the codec's decoder has anything to store in bfloat16."""
    return any(halved_type(name, spec.dtype) != spec.dtype for name, spec in checkpoint.codec_specs.items())


def _notes(recipe: Recipe, saved: Checkpoint) -> Iterator[str]:
    told = readers(saved.config)
    if told is not None:
        yield told
    decoder = {str(spec.dtype) for name, spec in saved.codec_specs.items() if name.startswith(DECODER)}
    if recipe.codec_decoder == "bfloat16" and "torch.bfloat16" not in decoder:
        yield f"the codec's decoder has no float32 to store in bfloat16 ({', '.join(decoder)}): it stays as it is"


def _edit(tensors: Mapping[str, Mapping[str, Tensor]], int8: frozenset[str], kept: Tensor | None) -> Edit:
    """INT4 layers as found in ``tensors``; the modules ``int8`` rounded, of the text embedding the rows ``kept``."""

    def edit(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in int8:
            return tensors.get(name, {name: tensor})
        if kept is not None and module == TEXT_EMBEDDING:
            stored = {**Int8Weight.nearest(tensor[kept.long()]).tensors(), "kept_ids": kept}
        else:
            stored = dict(Int8Weight.nearest(tensor).tensors())
        return {f"{module}.{key}": value for key, value in stored.items()}

    return edit


@torch.no_grad()
def _walk(
    decoder: Decoder, prefix: str, stores: Sequence[Store], stream: Stream, specs: Mapping[str, Spec],
    progress: Progress | None,
) -> _Int4:  # fmt: skip
    """The layers of ``decoder`` that ``stores`` has in INT4, each for what the layers before it give as stored."""
    reports: list[LayerReport] = []
    tensors: dict[str, Mapping[str, Tensor]] = {}
    absorbed: dict[str, tuple[float, float]] = {}
    for index, (original, store) in enumerate(zip(decoder.layers, stores, strict=True)):
        assert isinstance(original, DecoderLayer)
        if store == "int4":
            done = awq.quantize_layer(original, f"{prefix}.{index}", stream, specs, search_layer)
            tensors |= done.tensors
            absorbed |= done.absorbed
            reports.append(LayerReport(index, done.reports))
            stream.advance(done.layer)
        else:
            stream.advance(rounded(original, store))
        if progress:
            progress(f"quantizing {prefix}", index + 1, len(stores))
    return _Int4(tuple(reports), tensors, absorbed)


def rounded(original: DecoderLayer, store: Store) -> DecoderLayer:
    """A float32 copy of a layer that computes with what ``store`` keeps of its matrices: 'keep' or 'int8'."""
    layer = copy.deepcopy(original).float()
    if store == "int8":
        for linear in (linear for group in GROUPS for linear in group.linears):
            weight = layer.get_parameter(f"{linear}.weight").data
            weight.copy_(Int8Weight.nearest(weight).dequantize())
    return layer


def with_speech(items: Sequence[Item]) -> list[Item]:
    """Those of ``items`` that hold a frame of speech. Raises RecipeError when none does."""
    found = [item for item in items if len(item.codes)]
    if not found:
        raise RecipeError("the calibration utterances hold no frame of speech: give some that do")
    return found


@torch.inference_mode()
def predictor_inputs(tts: TTS, items: Sequence[Item], n_positions: int) -> list[Tensor]:
    """What the code predictor's first layer reads, [Q, D] float32 a frame, of the first frames of each item.

    No more than _FRAMES frames of all, evenly spread. Raises RecipeError where there is no frame.
    """
    frames: list[Tensor] = []
    for item in with_speech(items):
        codes = item.codes[:n_positions].to(tts.device, torch.long)
        (logits,) = tts.force([tts.prompt(item.utterance)], [codes])
        first = tts.talker.embed_codec(codes[:, 0])
        frames += tts.talker.code_predictor.inputs(logits.hidden[: len(codes)], first, codes[:, 1:]).float().unbind(0)
    return frames[:: max(1, -(-len(frames) // _FRAMES))]


def _parts(before: Checkpoint, after: Checkpoint) -> tuple[tuple[Part, ...], tuple[int, int]]:
    """The modules that changed, and the bytes of all tensors before and after."""
    weighed = [ledger.weigh(one) for one in (before, after)]
    pairs = zip(weighed[0].entries, weighed[1].entries, strict=True)
    parts = tuple(
        Part(new.name, old.disk_bytes, new.disk_bytes, new.quantized or ", ".join(new.dtypes))
        for old, new in pairs
        if (old.disk_bytes, old.dtypes) != (new.disk_bytes, new.dtypes)
    )
    return parts, (weighed[0].total.disk_bytes, weighed[1].total.disk_bytes)
