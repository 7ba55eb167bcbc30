"""A model with each part stored as a recipe says: INT4 as the quantizer has it, INT8 rows, bfloat16, fewer text rows.

INT4 layers are searched on what the layers before them give, as stored; the code predictor's on frames of known speech,
with the hidden states of the original talker. INT8 rounds to the nearest level and needs no calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver import ledger
from quaver.awq import LayerReport, Report, Tell, Work, int4_layers, talker_stack
from quaver.checkpoint import Checkpoint, Edit, Spec
from quaver.config import ModelConfig
from quaver.corpus import Item, Progress
from quaver.errors import RecipeError
from quaver.files import check_new
from quaver.int8 import Int8Embedding, Int8Linear, Int8Weight
from quaver.ledger import megabytes
from quaver.meter import host_bytes
from quaver.model.filling import PACKED_SUFFIXES
from quaver.model.homes import TEXT_EMBEDDING
from quaver.model.tts import TTS, Model
from quaver.provenance import Step
from quaver.recipe import PREDICTOR_LAYERS, RECIPE, STORES, Recipe, readers, settings
from quaver.scripts import kept_ids
from quaver.stack import Stack
from quaver.text import Tokenizer

DECODER = "decoder."
"""How the names of the codec decoder's tensors begin."""
_STACKS = ("talker", "predictor")
_FRAMES = 4096
"""The most frames on which the code predictor is calibrated, spread over all there are."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module that changed: its bytes on disk before and after, and the types that it is stored in now."""

    name: str
    bytes_before: int
    bytes_after: int
    stored: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedReport(Report):
    """What storing by ``recipe`` did: the parts that changed, the INT4 layers of talker and predictor, the rows of text
    that are left where some were pruned, and what to know beside that."""

    recipe: Recipe
    parts: tuple[Part, ...]
    talker: tuple[LayerReport, ...]
    predictor: tuple[LayerReport, ...]
    text_rows: int | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "recipe": self.recipe.to_json()}

    def summary(self) -> str:
        """The parts as a table, and what to know of the result, for people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        row = "{:<28} {:>12} {:>12}  {}"
        old, new = map(megabytes, self.tensor_bytes)
        yield "; ".join([f"stored by a recipe, {old} MB to {new} MB", *self.took()])
        yield row.format("changed, MB", "before", "after", "stored as")
        for part in self.parts:
            yield row.format(part.name, megabytes(part.bytes_before), megabytes(part.bytes_after), part.stored)
        for name, layers in (("talker", self.talker), ("code predictor", self.predictor)):
            if layers:
                yield f"{name}: {int4_layers(layers)}"
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


def quantize(
    source: str | Path | Checkpoint,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    calibration: str | Path | Sequence[Item] | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> MixedReport:
    """Writes ``source`` with each part stored as ``recipe`` says to the new folder ``out``, and reports.

    ``calibration`` is as for awq.quantize, and so is going on after an interruption; nothing is spoken where no part
    becomes INT4. Raises CheckpointError or RecipeError, before any work, for what cannot be done, and what
    Partial.towards raises.
    """
    out = check_new(out)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    recipe.check(checkpoint)
    config = checkpoint.config
    kept = rows_kept(checkpoint, recipe.languages) if recipe.languages else None
    n_rows = None if kept is None else len(kept)
    changed = settings(recipe, config, n_rows)
    stacks = _stacks(recipe, config)
    with Work.towards(
        out, checkpoint, recipe.calibration, calibration, stacks,
        device=device, dtype=dtype, progress=progress, tell=tell,
    ) as work:  # fmt: skip
        heard = work.calibrate()
        found = {name: work.quantize(stack, heard) for name, stack in zip(_STACKS, stacks, strict=True)}
        absorbed = {name: list(ends) for one in found.values() for name, ends in one.absorbed.items()}
        result: dict[str, Any] = {"calibration_sha256": heard.sha256, "absorbed": absorbed, "text_rows": n_rows}
        for name, one in found.items():
            result[f"{name}_loss_nearest"] = sum(layer.loss_nearest for layer in one.layers)
            result[f"{name}_loss"] = sum(layer.loss for layer in one.layers)
        saved = work.write(
            Step("quantize", {"method": RECIPE, **recipe.to_json()}, result=result),
            _edit(work.replacing(found.values()), int8_modules(config, changed), kept),
            changed,
            codec=halved if recipe.codec_decoder == "bfloat16" and _is_halved(checkpoint) else None,
        )
    parts, tensor_bytes = _parts(checkpoint, saved)
    return MixedReport(
        recipe=recipe,
        parts=parts,
        talker=found["talker"].layers,
        predictor=found["predictor"].layers,
        text_rows=n_rows,
        notes=tuple(_notes(recipe, saved)),
        n_utterances=heard.n_utterances,
        calibration_sha256=heard.sha256,
        tensor_bytes=tensor_bytes,
        n_resumed=sum(one.n_resumed for one in found.values()),
        seconds=work.meter.seconds,
        layer_seconds=work.layer_seconds,
        device_bytes=work.meter.device_bytes,
        host_bytes=host_bytes(),
    )


def _stacks(recipe: Recipe, config: ModelConfig) -> tuple[Stack, Stack]:
    """The layers of talker and code predictor as ``recipe`` stores them."""
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    return (
        talker_stack(config, [recipe.layer(index) for index in range(talker.num_hidden_layers)]),
        Stack(
            "predictor layer",
            PREDICTOR_LAYERS,
            predictor,
            [recipe.predictor] * predictor.num_hidden_layers,
            predictor_inputs,
        ),
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


def _edit(int4: Edit, int8: frozenset[str], kept: Tensor | None) -> Edit:
    """The edit ``int4``, but the modules ``int8`` rounded, of the text embedding the rows ``kept`` alone."""

    def edit(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in int8:
            return int4(name, tensor)
        if kept is not None and module == TEXT_EMBEDDING:
            stored = {**Int8Weight.nearest(tensor[kept.long()]).tensors(), "kept_ids": kept}
        else:
            stored = dict(Int8Weight.nearest(tensor).tensors())
        return {f"{module}.{key}": value for key, value in stored.items()}

    return edit


def with_speech(items: Sequence[Item]) -> list[Item]:
    """Those of ``items`` that hold a frame of speech. Raises RecipeError when none does."""
    found = [item for item in items if len(item.codes)]
    if not found:
        raise RecipeError("the calibration utterances hold no frame of speech: give some that do")
    return found


@torch.inference_mode()
def predictor_inputs(tts: TTS, items: Sequence[Item], n_positions: int) -> list[Tensor]:
    """What the code predictor's first layer reads, [Q, D] a frame, of the first ``n_positions`` frames of each item.

    No more than _FRAMES frames of all, evenly spread. Raises RecipeError where there is no frame.
    """
    spoken = [(item.utterance, item.codes[:n_positions]) for item in with_speech(items)]
    step = -(-sum(len(codes) for _, codes in spoken) // _FRAMES)
    frames: list[Tensor] = []
    first = 0
    for utterance, codes in spoken:
        known = codes.to(tts.device, torch.long)
        (logits,) = tts.force([tts.prompt(utterance)], [known])
        start = tts.talker.embed_codec(known[:, 0])
        read = tts.talker.code_predictor.inputs(logits.hidden[: len(known)], start, known[:, 1:])
        frames += read[first::step].cpu().unbind(0)
        first = (first - len(known)) % step
    return frames


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
