"""Activation-aware INT4 quantization of the talker's linears, layer by layer, as one verb.

Each layer is searched (see awq_search) on what the quantized layers before it give for the calibration utterances. One
layer at a time is held in float32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quaver import corpus
from quaver.awq_search import GroupReport, LayerSearch, Moment, search_layer
from quaver.checkpoint import Checkpoint, Spec
from quaver.corpus import Item, Progress
from quaver.errors import CheckpointError, RecipeError
from quaver.files import check_new
from quaver.int4 import GROUP, require_shape
from quaver.model.layers import GROUPS, Decoder, DecoderLayer
from quaver.model.tts import TTS
from quaver.provenance import Step

LAYERS = "talker.model.layers"
KEPT = ("talker.code_predictor", "talker.codec_head", "talker.text_projection", "speaker_encoder")
"""Prefixes of the linears that stay as they are (``modules_to_not_convert``)."""

Search = Callable[[DecoderLayer, Mapping[str, Moment], torch.dtype], LayerSearch]
"""Finds the INT4 weights of a float32 layer from its inputs' moments and the type its norms are stored in."""

_BATCH_POSITIONS = 4096


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to calibrate on: utterances, the positions at which each is cut, and the seed they are spoken with."""

    n_samples: int = 128
    n_positions: int = 512
    seed: int = 1729

    def __post_init__(self) -> None:
        if self.n_samples < 1 or self.n_positions < 1:
            raise RecipeError(f"{self.n_samples} samples of {self.n_positions} positions: both must be 1 or more")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One decoder layer."""

    index: int
    groups: tuple[GroupReport, ...]

    @property
    def loss_nearest(self) -> float:
        """The groups' error under rounding to nearest."""
        return sum(group.loss_nearest for group in self.groups)

    @property
    def loss(self) -> float:
        """The groups' error as quantized."""
        return sum(group.loss for group in self.groups)


@dataclass(frozen=True, slots=True)
class AwqReport:
    """What quantizing did: every layer's choices, what absorbed scales, the calibration set, the time.

    ``absorbed`` names each norm, and each linear before it was rounded, whose weight was divided by scales, with the
    least and the largest of them.
    """

    layers: tuple[LayerReport, ...]
    absorbed: Mapping[str, tuple[float, float]]
    n_utterances: int
    n_positions: int
    calibration_sha256: str
    calibration_s: float
    search_s: float
    tensor_bytes: tuple[int, int]

    @property
    def loss_nearest(self) -> float:
        """All layers' error under rounding to nearest."""
        return sum(layer.loss_nearest for layer in self.layers)

    @property
    def loss(self) -> float:
        """All layers' error as quantized."""
        return sum(layer.loss for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the sums."""
        return {**asdict(self), "loss_nearest": self.loss_nearest, "loss": self.loss}

    def summary(self) -> str:
        """One line for a person."""
        before, after = (n_bytes / 1e6 for n_bytes in self.tensor_bytes)
        share = self.loss / self.loss_nearest if self.loss_nearest else 1.0
        error = f"output error {100 * share:.0f} % of that of rounding to nearest"
        calibration = f"{self.n_utterances} utterances, {self.n_positions} positions"
        seconds = f"{self.calibration_s:.0f} s to make them, {self.search_s:.0f} s to search"
        return (
            f"{len(self.layers)} layers in INT4, {before:.1f} MB to {after:.1f} MB; {error}; {calibration}; {seconds}"
        )


def quantize(
    source: str | Path | Checkpoint,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    calibration: str | Path | Sequence[Item] | None = None,
    search: Search = search_layer,
    progress: Progress | None = None,
) -> AwqReport:
    """Writes ``source`` with its talker's linears in INT4 to the new folder ``out``, and reports.

    ``calibration`` is a JSON-lines file (see corpus.load) or items; by default the model speaks texts of its own.
    ``search`` is what happens in one layer: a benchmark puts its rivals there.
    Layer by layer, each calibrated on what the quantized layers before it give. Everything else stays bit-equal but
    the norms that absorbed scales. Raises CheckpointError for a model that is quantized already or does not fit the
    format, before any work; whatever is interrupted leaves nothing behind.
    """
    recipe, out = recipe or Recipe(), check_new(out)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    require_plain(checkpoint)
    require_stack(checkpoint, LAYERS, range(checkpoint.config.talker_config.num_hidden_layers))
    start = time.perf_counter()
    tts = TTS.load(checkpoint, device=device, dtype=dtype)
    items = calibration_items(tts, recipe, calibration, progress)
    rows = talker_inputs(tts, items, recipe.n_positions)
    calibrated = time.perf_counter()
    layers, tensors, absorbed = _quantize_layers(tts, rows, search, progress)
    searched = time.perf_counter()
    digest = corpus.fingerprint(items)
    result = {
        "calibration_sha256": digest,
        "calibration_utterances": len(rows),
        "calibration_positions": sum(map(len, rows)),
        "absorbed": {name: list(ends) for name, ends in absorbed.items()},
        "loss_nearest": sum(layer.loss_nearest for layer in layers),
        "loss": sum(layer.loss for layer in layers),
    }
    saved = checkpoint.edit(
        Step("quantize", {**asdict(recipe), "method": "awq"}, result=result),
        lambda name, tensor: tensors.get(name, {name: tensor}),
        {"quantization_config": settings()},
    ).save(out)
    sizes = tuple(sum(spec.n_bytes for spec in one.specs.values()) for one in (checkpoint, saved))
    return AwqReport(
        layers=layers,
        absorbed=absorbed,
        n_utterances=len(rows),
        n_positions=sum(map(len, rows)),
        calibration_sha256=digest,
        calibration_s=calibrated - start,
        search_s=searched - calibrated,
        tensor_bytes=(sizes[0], sizes[1]),
    )


def calibration_items(
    tts: TTS, recipe: Recipe, calibration: str | Path | Sequence[Item] | None, progress: Progress | None
) -> Sequence[Item]:
    """The utterances to calibrate on: of a JSON-lines file, those given, or by default the model's own speech.

    Raises RecipeError when there is none.
    """
    if calibration is None:
        items: Sequence[Item] = corpus.builtin(tts, recipe.n_samples, seed=recipe.seed, progress=progress)
    elif isinstance(calibration, str | Path):
        items = corpus.load(tts, calibration, recipe.n_samples, progress)
    else:
        items = calibration[: recipe.n_samples]
    if not items:
        raise RecipeError(f"{calibration} holds no utterance: at least one is needed to calibrate")
    return items


def settings(kept: Sequence[str] = KEPT) -> dict[str, Any]:
    """``quantization_config`` of a model with its linears in AWQ INT4 but for those that ``kept`` names."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": list(kept),
    }


def require_plain(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a model that is quantized already."""
    if checkpoint.config.quantization_config is not None or checkpoint.config.quaver is not None:
        raise CheckpointError(f"{checkpoint.path} is quantized already: quantize the model it was made from")


def require_stack(checkpoint: Checkpoint, prefix: str, indices: Iterable[int]) -> None:
    """Raises CheckpointError, naming the tensor, unless the decoder layers ``prefix.index`` can be INT4."""
    for index in indices:
        for group in GROUPS:
            for linear in group.linears:
                name = f"{prefix}.{index}.{linear}.weight"
                if name not in checkpoint.specs:
                    raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
                shape = checkpoint.specs[name].shape
                if len(shape) != 2:
                    raise CheckpointError(
                        f"{checkpoint.path}: tensor {name} has shape {shape}: it is no linear layer's"
                    )
                require_shape(name, *shape)


@torch.inference_mode()
def talker_inputs(tts: TTS, items: Sequence[Item], n_positions: int) -> list[Tensor]:
    """What the talker's first layer reads for each item: prompt and frames [P + T, D], cut at ``n_positions``."""
    return [tts.inputs(tts.prompt(item.utterance), item.codes)[:n_positions].float() for item in items]


@dataclass(frozen=True, slots=True)
class Batch:
    """Streams of like length, ``x`` [B, T, D] float32, and which positions are real, ``mask`` [B, T]."""

    x: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> list[Batch]:
        """``rows``, [T, D] each, shortest first, in batches that fit in little memory."""
        batches: list[list[Tensor]] = [[]]
        for row in sorted(rows, key=len):
            if batches[-1] and (len(batches[-1]) + 1) * len(row) > _BATCH_POSITIONS:
                batches.append([])
            batches[-1].append(row)
        padded = []
        for batch in batches:
            lengths = torch.tensor([len(row) for row in batch], device=batch[0].device)
            x = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            padded.append(cls(x, torch.arange(x.shape[1], device=x.device) < lengths[:, None]))
        return padded


class Stream:
    """Runs one layer after the other over the calibration batches."""

    def __init__(self, decoder: Decoder, rows: Sequence[Tensor]) -> None:
        self.batches = Batch.of(rows)
        longest = max(batch.x.shape[1] for batch in self.batches)
        positions = torch.arange(longest, device=self.batches[0].x.device)[None]
        self._rotaries = [decoder.rotary(positions[:, : batch.x.shape[1]], torch.float32) for batch in self.batches]

    def advance(self, layer: DecoderLayer) -> None:
        """Every batch goes through ``layer``; padding never reaches a real position, which see only earlier ones."""
        self.batches = [
            Batch(layer(batch.x, rotary), batch.mask)
            for batch, rotary in zip(self.batches, self._rotaries, strict=True)
        ]

    def observe(self, layer: DecoderLayer) -> dict[str, Moment]:
        """The moments of each group's inputs in ``layer``, by the group's name; the stream stays where it is."""
        sums: dict[str, Moment] = {}
        n_positions = sum(int(batch.mask.sum()) for batch in self.batches)
        for batch, rotary in zip(self.batches, self._rotaries, strict=True):
            with _listening(layer, batch.mask, sums):
                layer(batch.x, rotary)
        return {name: Moment(one.second / n_positions, one.size / n_positions) for name, one in sums.items()}


@contextmanager
def _listening(layer: DecoderLayer, mask: Tensor, sums: dict[str, Moment]) -> Iterator[None]:
    """While open, adds what each group's linears read at real positions to ``sums``."""

    def listen(name: str, x: Tensor) -> None:
        real = x[mask]
        if name not in sums:
            size = real.shape[1]
            sums[name] = Moment(real.new_zeros(size, size), real.new_zeros(size))
        sums[name].second.addmm_(real.T, real)
        sums[name].size.add_(real.abs().sum(0))

    handles = [
        layer.get_submodule(group.linears[0]).register_forward_pre_hook(
            lambda _, inputs, name=group.name: listen(name, inputs[0])
        )
        for group in GROUPS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _quantize_layers(
    tts: TTS, rows: Sequence[Tensor], search: Search, progress: Progress | None
) -> tuple[tuple[LayerReport, ...], dict[str, Mapping[str, Tensor]], dict[str, tuple[float, float]]]:
    """Every layer's report, what stands in place of each tensor that changes, and what absorbed which scales."""
    decoder, specs = tts.talker.model, tts.checkpoint.specs
    stream = Stream(decoder, rows)
    reports: list[LayerReport] = []
    tensors: dict[str, Mapping[str, Tensor]] = {}
    absorbed: dict[str, tuple[float, float]] = {}
    for index, original in enumerate(decoder.layers):
        assert isinstance(original, DecoderLayer)
        done = quantize_layer(original, f"{LAYERS}.{index}", stream, specs, search)
        tensors |= done.tensors
        absorbed |= done.absorbed
        stream.advance(done.layer)
        reports.append(LayerReport(index, done.reports))
        if progress:
            progress("quantizing layers", index + 1, len(decoder.layers))
    return tuple(reports), tensors, absorbed


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """One layer in INT4: what it computes now (float32), its groups' reports, what stands in place of each tensor that
    changes, and what absorbed which scales."""

    layer: DecoderLayer
    reports: tuple[GroupReport, ...]
    tensors: Mapping[str, Mapping[str, Tensor]]
    absorbed: Mapping[str, tuple[float, float]]


def quantize_layer(
    original: DecoderLayer, prefix: str, stream: Stream, specs: Mapping[str, Spec], search: Search
) -> QuantizedLayer:
    """The layer ``original``, called ``prefix`` in the checkpoint of ``specs``, in INT4 for what ``stream`` brings."""
    tensors: dict[str, Mapping[str, Tensor]] = {}
    absorbed: dict[str, tuple[float, float]] = {}
    layer = copy.deepcopy(original).float()
    dtype = specs[f"{prefix}.input_layernorm.weight"].dtype
    found = search(layer, stream.observe(layer), dtype)
    for linear, weight in found.weights.items():
        name = f"{prefix}.{linear}"
        tensors[f"{name}.weight"] = {f"{name}.{key}": value.cpu() for key, value in weight.tensors().items()}
        found.layer.get_parameter(f"{linear}.weight").data.copy_(weight.dequantize())
    for norm in sorted({group.before for group in GROUPS} - found.weights.keys()):
        before = original.get_parameter(f"{norm}.weight").to(dtype)
        stored = found.layer.get_parameter(f"{norm}.weight").data.to(dtype)
        if not torch.equal(stored, before):
            name = f"{prefix}.{norm}.weight"
            tensors[name] = {name: stored.cpu()}
            # A channel that a weight of 0 silences took no scale.
            absorbed[name] = _ends((before.float() / stored.float())[stored != 0])
    absorbed |= {f"{prefix}.{linear}.weight": _ends(scale) for linear, scale in found.units.items()}
    return QuantizedLayer(found.layer, tuple(found.reports), tensors, absorbed)


def _ends(scale: Tensor) -> tuple[float, float]:
    """The least and the largest of ``scale``, to six digits."""
    low, high = (float(f"{float(end):.6g}") for end in scale.aminmax())
    return low, high
