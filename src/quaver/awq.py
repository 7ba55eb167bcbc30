"""Activation-aware INT4 quantization of the talker's linears, layer by layer, as one verb.

Each layer is searched (see awq_search) on what the quantized layers before it give for the calibration utterances. One
layer at a time is on the device, in float32; the utterances wait in host memory. What is finished, the calibration and
each layer, is kept beside the output until that is whole (see partial), so that a run that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quaver import corpus
from quaver.awq_search import GroupReport, LayerSearch, Moment, search_layer
from quaver.checkpoint import Checkpoint, Edit
from quaver.config import ModelConfig
from quaver.corpus import Item, Progress
from quaver.errors import CheckpointError, RecipeError
from quaver.files import check_new
from quaver.int4 import GROUP, Int4Weight, require_shape
from quaver.meter import Meter, host_bytes, limited
from quaver.model.layers import GROUPS, Decoder, DecoderLayer
from quaver.model.tts import LAYERS, TTS, require_device
from quaver.partial import Partial
from quaver.provenance import Step

KEPT = ("talker.code_predictor", "talker.codec_head", "talker.text_projection", "speaker_encoder")
"""Prefixes of the linears that stay as they are (``modules_to_not_convert``)."""

Search = Callable[[DecoderLayer, Mapping[str, Moment], torch.dtype], LayerSearch]
"""Finds the INT4 weights of a float32 layer from its inputs' moments and the type its norms are stored in."""

_BATCH_POSITIONS = 4096
_ROOM_BYTES = 250_000_000
"""Larger talkers speak with their layers visiting the device."""
_GPU_BYTES = 2_400_000_000
_GPU_LAYERS = 12
"""What may be held on a GPU: as many bytes, or as many layers in float32 where those are more."""
_CALIBRATION = "calibration"
_STREAMED = "float32."
"""Before the names of the norms of a finished layer as the stream runs them: what is stored of them is rounded."""


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
    least and the largest of them. ``seconds`` has the stages of this run; ``n_resumed`` layers an earlier one had
    finished. ``device_bytes`` is the most that PyTorch held on a GPU, ``host_bytes`` the most that was resident in this
    process, mapped files and libraries included.
    """

    layers: tuple[LayerReport, ...]
    absorbed: Mapping[str, tuple[float, float]]
    n_utterances: int
    n_positions: int
    calibration_sha256: str
    tensor_bytes: tuple[int, int]
    n_resumed: int
    seconds: Mapping[str, float]
    device_bytes: int | None
    host_bytes: int | None

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
        layers = f"{len(self.layers)} layers in INT4"
        if self.n_resumed:
            layers += f" ({self.n_resumed} of them finished earlier)"
        told = [layers, f"{before:.1f} MB to {after:.1f} MB", error, calibration]
        split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        told.append(f"{sum(self.seconds.values()):.0f} s ({split})")
        peaks = (("GPU", self.device_bytes), ("host", self.host_bytes))
        told.extend(f"{place} memory {n_bytes / 1e9:.2f} GB at most" for place, n_bytes in peaks if n_bytes is not None)
        return "; ".join(told)


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

    ``calibration`` is a JSON-lines file (see corpus.load) or items; by default the model speaks texts of its own, with
    its floats in ``dtype``. ``search`` is what happens in one layer: a benchmark puts its rivals there.
    Layer by layer, each calibrated on what the quantized layers before it give. Everything else stays bit-equal but
    the norms that absorbed scales. A run that was interrupted goes on from its finished layers when it is asked for
    again, to the same bytes. Raises CheckpointError for a model that is quantized already or does not fit the format,
    before any work, and what Partial.towards raises.
    """
    recipe, out, device = recipe or Recipe(), check_new(out), require_device(device)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    _check(checkpoint)
    meter = Meter(device)
    with meter.stage("summing"):
        key = _key(checkpoint, recipe, calibration, search, device, dtype)
    with limited(device, gpu_bytes(checkpoint.config)), Partial.towards(out, key) as partial:
        rows, digest = _calibrate(checkpoint, recipe, calibration, partial, meter, device, dtype, progress)
        n_resumed = _quantize_layers(checkpoint, rows, search, partial, meter, device, progress)
        found = [partial.note(_piece(index)) for index in range(_n_layers(checkpoint))]
        layers = tuple(
            LayerReport(index, tuple(GroupReport(**group) for group in one["groups"]))
            for index, one in enumerate(found)
        )
        absorbed = {name: (low, high) for one in found for name, (low, high) in one["absorbed"].items()}
        result = {
            "calibration_sha256": digest,
            "calibration_utterances": len(rows),
            "calibration_positions": sum(map(len, rows)),
            "absorbed": {name: list(ends) for name, ends in absorbed.items()},
            "loss_nearest": sum(layer.loss_nearest for layer in layers),
            "loss": sum(layer.loss for layer in layers),
        }
        with meter.stage("writing"):
            # Inside the folder of the pieces: what a kill leaves half-written there is cleared by the next run.
            made = partial.folder / "made"
            checkpoint.edit(
                Step("quantize", {**asdict(recipe), "method": "awq"}, result=result),
                _replacing(partial, found),
                {"quantization_config": settings()},
            ).write(made)
            partial.deliver(made, out)
    saved = Checkpoint.open(out)
    sizes = tuple(sum(spec.n_bytes for spec in one.specs.values()) for one in (checkpoint, saved))
    return AwqReport(
        layers=layers,
        absorbed=absorbed,
        n_utterances=len(rows),
        n_positions=sum(map(len, rows)),
        calibration_sha256=digest,
        tensor_bytes=(sizes[0], sizes[1]),
        n_resumed=n_resumed,
        seconds=meter.seconds,
        device_bytes=meter.device_bytes,
        host_bytes=host_bytes(),
    )


def settings() -> dict[str, Any]:
    """``quantization_config`` of what this module writes."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": list(KEPT),
    }


def gpu_bytes(config: ModelConfig) -> int:
    """The most that quantizing a model of ``config`` takes of a GPU's memory, the driver's own aside."""
    with torch.device("meta"):
        layer = DecoderLayer(config.talker_config)
    return max(_GPU_BYTES, _GPU_LAYERS * sum(4 * one.numel() for one in layer.parameters()))


def _key(
    checkpoint: Checkpoint, recipe: Recipe, calibration: str | Path | Sequence[Item] | None, search: Search,
    device: torch.device, dtype: torch.dtype | None,
) -> dict[str, Any]:  # fmt: skip
    """All that the bytes of a layer depend on, by what a person would call it."""
    on_gpu = device.type == "cuda"
    return {
        "model": [asdict(origin) for origin in checkpoint.origins()],
        "recipe": {**asdict(recipe), "dtype": str(dtype), "search": f"{search.__module__}.{search.__qualname__}"},
        "calibration set": corpus.identity(calibration),
        "version of quaver": metadata.version("quaver"),
        # A sum of floats depends on who adds them up.
        "version of PyTorch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
    }


def _check(checkpoint: Checkpoint) -> None:
    if checkpoint.edits:
        raise CheckpointError(f"{checkpoint.path} has edits that are not saved: save it, and quantize what was saved")
    if checkpoint.config.quantization_config is not None:
        raise CheckpointError(f"{checkpoint.path} is quantized already: quantize the model it was made from")
    for index in range(checkpoint.config.talker_config.num_hidden_layers):
        for group in GROUPS:
            for linear in group.linears:
                name = f"{LAYERS}.{index}.{linear}.weight"
                if name not in checkpoint.specs:
                    raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
                shape = checkpoint.specs[name].shape
                if len(shape) != 2:
                    raise CheckpointError(
                        f"{checkpoint.path}: tensor {name} has shape {shape}: it is no linear layer's"
                    )
                require_shape(name, *shape)


def _calibrate(
    checkpoint: Checkpoint, recipe: Recipe, calibration: str | Path | Sequence[Item] | None, partial: Partial,
    meter: Meter, device: torch.device, dtype: torch.dtype | None, progress: Progress | None,
) -> tuple[list[Tensor], str]:  # fmt: skip
    """What the first layer reads for each item of the calibration set, [T, D], on the host; the set's fingerprint."""
    note = partial.note(_CALIBRATION)
    if note is None:
        with meter.stage("loading"):
            tts = TTS.load(checkpoint, device=device, dtype=dtype, room_bytes=_ROOM_BYTES)
        with meter.stage("calibration"):
            if calibration is None:
                items: Sequence[Item] = corpus.builtin(tts, recipe.n_samples, seed=recipe.seed, progress=progress)
            elif isinstance(calibration, str | Path):
                items = corpus.load(tts, calibration, recipe.n_samples, progress)
            else:
                items = calibration[: recipe.n_samples]
            if not items:
                raise RecipeError(f"{calibration} holds no utterance: at least one is needed to calibrate")
            note = {"sha256": corpus.fingerprint(items)}
            inputs = talker_inputs(tts, items, recipe.n_positions)
            note["lengths"] = list(map(len, inputs))
            # One tensor: reading hundreds takes longer, and turns a Ctrl-C into an error of the library's.
            partial.keep(_CALIBRATION, {"inputs": torch.cat(inputs)}, note)
    rows = torch.split(partial.tensors(_CALIBRATION)["inputs"], note["lengths"])
    return list(rows), note["sha256"]


@torch.inference_mode()
def talker_inputs(tts: TTS, items: Sequence[Item], n_positions: int) -> list[Tensor]:
    """What the talker's first layer reads for each item: prompt and frames [P + T, D], cut at ``n_positions``."""
    return [tts.inputs(tts.prompt(item.utterance), item.codes)[:n_positions].cpu() for item in items]


@dataclass(frozen=True, slots=True)
class Batch:
    """Streams of like length on the host, ``x`` [B, T, D] float32, and which positions are real, ``mask`` [B, T]."""

    x: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> list[Batch]:
        """``rows``, [T, D] each, shortest first, in batches that fit in little memory."""
        batches: list[list[Tensor]] = [[]]
        for row in sorted(rows, key=len):
            if batches[-1] and (len(batches[-1]) + 1) * len(row) > _BATCH_POSITIONS:
                batches.append([])
            batches[-1].append(row.float())
        padded = []
        for batch in batches:
            lengths = torch.tensor([len(row) for row in batch])
            x = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            padded.append(cls(x, torch.arange(x.shape[1]) < lengths[:, None]))
        return padded


class Stream:
    """Runs one layer after the other over the calibration batches, each of which visits the ``device`` for that."""

    def __init__(self, decoder: Decoder, rows: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        self.batches = Batch.of(rows)
        self._device = torch.device(device)
        longest = max(batch.x.shape[1] for batch in self.batches)
        positions = torch.arange(longest, device=self._device)[None]
        self._rotaries = [decoder.rotary(positions[:, : batch.x.shape[1]], torch.float32) for batch in self.batches]

    def advance(self, layer: DecoderLayer) -> None:
        """Every batch goes through ``layer``; padding never reaches a real position, which see only earlier ones."""
        for batch, rotary in zip(self.batches, self._rotaries, strict=True):
            batch.x.copy_(layer(batch.x.to(self._device), rotary))

    def observe(self, layer: DecoderLayer) -> dict[str, Moment]:
        """The moments of each group's inputs in ``layer``, by the group's name; the stream stays where it is."""
        sums: dict[str, Moment] = {}
        n_positions = sum(int(batch.mask.sum()) for batch in self.batches)
        for batch, rotary in zip(self.batches, self._rotaries, strict=True):
            with _listening(layer, batch.mask.to(self._device), sums):
                layer(batch.x.to(self._device), rotary)
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
    checkpoint: Checkpoint, rows: Sequence[Tensor], search: Search, partial: Partial, meter: Meter,
    device: torch.device, progress: Progress | None,
) -> int:  # fmt: skip
    """Finishes every layer, kept as a piece of ``partial``; returns how many were finished already."""
    n_layers = _n_layers(checkpoint)
    todo = [index for index in range(n_layers) if partial.note(_piece(index)) is None]
    if not todo:
        return n_layers
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config.talker_config)
    stream = Stream(decoder, rows, device)
    for index in range(todo[-1] + 1):
        piece = _piece(index)
        if index in todo:
            with meter.stage("reading"):
                layer = _read_layer(checkpoint, index, device)
            with meter.stage("moments"):
                moments = stream.observe(layer)
            norm_dtype = checkpoint.specs[f"{LAYERS}.{index}.input_layernorm.weight"].dtype
            with meter.stage("search"):
                found = search(layer, moments, norm_dtype)
            for stage, seconds in found.seconds.items():
                meter.add(stage, seconds)
                meter.add("search", -seconds)
            with meter.stage("keeping"):
                partial.keep(piece, *_finished(checkpoint, index, found, norm_dtype))
            del layer, moments, found
        if index < todo[-1]:
            # From what was kept alone, so that it makes no difference whether this run found it.
            with meter.stage("reading"):
                layer = _restore(_read_layer(checkpoint, index, device), index, partial.tensors(piece))
            with meter.stage("running"):
                stream.advance(layer)
            del layer
        if progress:
            progress("quantizing layers", index + 1, n_layers)
    return n_layers - len(todo)


def _piece(index: int) -> str:
    return f"layer-{index:03}"


def _n_layers(checkpoint: Checkpoint) -> int:
    return checkpoint.config.talker_config.num_hidden_layers


def _read_layer(checkpoint: Checkpoint, index: int, device: torch.device) -> DecoderLayer:
    """The layer ``index`` in float32 on ``device``."""
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config.talker_config)
    tensors = {name: checkpoint.read(f"{LAYERS}.{index}.{name}").to(device) for name in layer.state_dict()}
    layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return layer.requires_grad_(requires_grad=False).eval()


def _finished(
    checkpoint: Checkpoint, index: int, found: LayerSearch, norm_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is kept of a layer: tensors to be stored and norms to run on; which tensor gives way to which, and figures.

    Stored tensors have their names in the checkpoint.
    """
    prefix = f"{LAYERS}.{index}"
    kept: dict[str, Tensor] = {}
    gives_way: dict[str, list[str]] = {}
    absorbed = {f"{prefix}.{linear}.weight": _ends(scale) for linear, scale in found.units.items()}
    for linear, weight in found.weights.items():
        stored = {f"{prefix}.{linear}.{key}": value for key, value in weight.tensors().items()}
        gives_way[f"{prefix}.{linear}.weight"] = list(stored)
        kept |= stored
    for norm in sorted({group.before for group in GROUPS} - found.weights.keys()):
        name, streamed = f"{prefix}.{norm}.weight", found.layer.get_parameter(f"{norm}.weight").data
        before, after = checkpoint.read(name).to(streamed.device), streamed.to(norm_dtype)
        kept[_STREAMED + name] = streamed
        if not torch.equal(after, before):
            kept[name], gives_way[name] = after, [name]
            # A channel that a weight of 0 silences took no scale.
            absorbed[name] = _ends((before.float() / after.float())[after != 0])
    groups = [asdict(group) for group in found.reports]
    return kept, {"groups": groups, "absorbed": absorbed, "gives_way": gives_way}


def _restore(layer: DecoderLayer, index: int, kept: Mapping[str, Tensor]) -> DecoderLayer:
    """The ``layer`` as it runs once quantized, of what was kept of it; filled in place."""
    for name, parameter in layer.named_parameters():
        full = f"{LAYERS}.{index}.{name}"
        module = full.removesuffix(".weight")
        if _STREAMED + full in kept:
            parameter.data.copy_(kept[_STREAMED + full])
        elif f"{module}.qweight" in kept:
            stored = (kept[f"{module}.{key}"].to(parameter.device) for key in ("qweight", "qzeros", "scales"))
            parameter.data.copy_(Int4Weight.read(*stored).dequantize())
    return layer


def _replacing(partial: Partial, found: Sequence[Mapping[str, Any]]) -> Edit:
    """The edit that puts what was kept of each layer in the place of what gives way to it."""
    places = {
        name: (_piece(index), names) for index, one in enumerate(found) for name, names in one["gives_way"].items()
    }

    def edit(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        return partial.tensors(*places[name]) if name in places else {name: tensor}

    return edit


def _ends(scale: Tensor) -> tuple[float, float]:
    """The least and the largest of ``scale``, to six digits."""
    low, high = (float(f"{float(end):.6g}") for end in scale.aminmax())
    return low, high
