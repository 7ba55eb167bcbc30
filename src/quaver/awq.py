"""Activation-aware INT4 quantization of the talker's linears, layer by layer, as one verb.

Each layer is searched (see awq_search) on what the quantized layers before it give for the calibration utterances. One
layer at a time is on the device, in float32; the utterances wait in host memory. What is finished, the calibration and
each layer, is kept beside the output until that is whole (see partial), so that a run that was killed goes on. `Work`
is that walk, whatever else becomes of the model: a recipe (see mixed) goes by it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver import corpus, recorded
from quaver.awq_search import GroupReport, LayerSearch, Moment, in_one_kernel, search_layer
from quaver.checkpoint import Checkpoint, Edit
from quaver.config import ModelConfig
from quaver.corpus import Item, Progress
from quaver.errors import CheckpointError, RecipeError
from quaver.files import check_new
from quaver.int4 import GROUP, require_shape
from quaver.meter import Clock, Meter, host_bytes, limited, split
from quaver.model.homes import LAYERS
from quaver.model.layers import GROUPS, Decoder, DecoderLayer
from quaver.model.tts import TTS, require_device
from quaver.partial import Partial
from quaver.provenance import Step
from quaver.stack import Stack, Store
from quaver.stream import Stream

KEPT = ("talker.code_predictor", "talker.codec_head", "talker.text_projection", "speaker_encoder")
"""Prefixes of the linears that stay as they are (``modules_to_not_convert``)."""

Search = Callable[[DecoderLayer, Mapping[str, Moment], torch.dtype], LayerSearch]
"""Finds the INT4 weights of a float32 layer from its inputs' moments and the type its norms are stored in."""

Tell = Callable[[str], None]
"""Called with a line for a person."""

_ROOM_BYTES = 250_000_000
"""Larger talkers speak with their layers visiting the device."""
_GPU_BYTES = 2_400_000_000
_GPU_LAYERS = 12
"""What may be held on a GPU: as many bytes, or as many layers in float32 where those are more."""
_CALIBRATION = "calibration"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What quantizing took: calibration, bytes of all tensors before and after, time and memory.

    ``seconds`` has the stages of this run, and ``layer_seconds`` those of each layer that it finished, by the layer's
    name; ``n_resumed`` layers an earlier one had finished. ``device_bytes`` is the
    most that PyTorch held on a GPU, ``host_bytes`` the most that was resident in this process, mapped files and
    libraries included.
    """

    n_utterances: int
    calibration_sha256: str | None
    tensor_bytes: tuple[int, int]
    n_resumed: int
    seconds: Mapping[str, float]
    layer_seconds: Mapping[str, Mapping[str, float]]
    device_bytes: int | None
    host_bytes: int | None

    def took(self) -> Iterator[str]:
        """What an earlier run had finished, the seconds by stage and the peaks of memory, in words."""
        if self.n_resumed:
            yield f"{self.n_resumed} of these layers finished earlier"
        yield f"{sum(self.seconds.values()):.0f} s ({split(self.seconds)})"
        for place, n_bytes in (("GPU", self.device_bytes), ("host", self.host_bytes)):
            if n_bytes is not None:
                yield f"{place} memory {n_bytes / 1e9:.2f} GB at most"


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqReport(Report):
    """What quantizing the talker did: every layer's choices, and what absorbed scales.

    ``absorbed`` names each norm, and each linear before it was rounded, whose weight was divided by scales, with the
    least and the largest of them.
    """

    layers: tuple[LayerReport, ...]
    absorbed: Mapping[str, tuple[float, float]]
    n_positions: int

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
        told = [
            int4_layers(self.layers),
            f"{before:.1f} MB to {after:.1f} MB",
            f"{self.n_utterances} utterances, {self.n_positions} positions",
        ]
        return "; ".join([*told, *self.took()])


def int4_layers(layers: Sequence[LayerReport]) -> str:
    """How many ``layers`` are in INT4 and how near they came, in words."""
    after, nearest = sum(one.loss for one in layers), sum(one.loss_nearest for one in layers)
    share = after / nearest if nearest else 1.0
    return f"{len(layers)} layers in INT4, output error {100 * share:.0f} % of that of rounding to nearest"


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
    tell: Tell | None = None,
) -> AwqReport:
    """Writes ``source`` with its talker's linears in INT4 to the new folder ``out``, and reports.

    ``calibration`` is a JSON-lines file (see corpus.load) or items; by default the model speaks texts of its own, with
    its floats in ``dtype``. ``search`` is what happens in one layer: a benchmark puts its rivals there. ``tell`` hears
    where the time went, line by line.
    Layer by layer, each calibrated on what the quantized layers before it give. Everything else stays bit-equal but
    the norms that absorbed scales. A run that was interrupted goes on from its finished layers when it is asked for
    again, to the same bytes. Raises CheckpointError for a model that is quantized already or does not fit the format,
    before any work, and what Partial.towards raises.
    """
    recipe, out = recipe or Recipe(), check_new(out)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    n_layers = checkpoint.config.talker_config.num_hidden_layers
    require_plain(checkpoint)
    require_stack(checkpoint, LAYERS, range(n_layers))
    talker = talker_stack(checkpoint.config, ["int4"] * n_layers)
    with Work.towards(
        out, checkpoint, recipe, calibration, [talker],
        device=device, dtype=dtype, search=search, progress=progress, tell=tell,
    ) as work:  # fmt: skip
        heard = work.calibrate()
        found = work.quantize(talker, heard)
        lengths = heard.lengths[talker.name]
        result = {
            "calibration_sha256": heard.sha256,
            "calibration_utterances": len(lengths),
            "calibration_positions": sum(lengths),
            "absorbed": {name: list(ends) for name, ends in found.absorbed.items()},
            "loss_nearest": sum(layer.loss_nearest for layer in found.layers),
            "loss": sum(layer.loss for layer in found.layers),
        }
        saved = work.write(
            Step("quantize", {**asdict(recipe), "method": "awq"}, result=result),
            work.replacing([found]),
            {"quantization_config": settings()},
        )
    sizes = tuple(sum(spec.n_bytes for spec in one.specs.values()) for one in (checkpoint, saved))
    return AwqReport(
        layers=found.layers,
        absorbed=found.absorbed,
        n_utterances=heard.n_utterances,
        n_positions=sum(lengths),
        calibration_sha256=heard.sha256,
        tensor_bytes=(sizes[0], sizes[1]),
        n_resumed=found.n_resumed,
        seconds=work.meter.seconds,
        layer_seconds=work.layer_seconds,
        device_bytes=work.meter.device_bytes,
        host_bytes=host_bytes(),
    )


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
    """Raises CheckpointError for a model that is quantized already, or has edits that no file holds."""
    if checkpoint.edits:
        raise CheckpointError(f"{checkpoint.path} has edits that are not saved: save it, and quantize what was saved")
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


def gpu_bytes(config: ModelConfig) -> int:
    """The most that quantizing a model of ``config`` takes of a GPU's memory, the driver's own aside."""
    with torch.device("meta"):
        layer = DecoderLayer(config.talker_config)
    return max(_GPU_BYTES, _GPU_LAYERS * sum(4 * one.numel() for one in layer.parameters()))


def calibration_items(
    tts: TTS,
    recipe: Recipe,
    calibration: str | Path | Sequence[Item] | None,
    progress: Progress | None,
    clock: Clock | None = None,
) -> Sequence[Item]:
    """The utterances to calibrate on: of a JSON-lines file, those given, or by default the model's own speech.

    ``clock`` counts what speaking takes. Raises RecipeError when there is none.
    """
    if calibration is None:
        items: Sequence[Item] = corpus.builtin(tts, recipe.n_samples, seed=recipe.seed, progress=progress, clock=clock)
    elif isinstance(calibration, str | Path):
        items = corpus.load(tts, calibration, recipe.n_samples, progress)
    else:
        items = calibration[: recipe.n_samples]
    if not items:
        raise RecipeError(f"{calibration} holds no utterance: at least one is needed to calibrate")
    return items


@torch.inference_mode()
def talker_inputs(tts: TTS, items: Sequence[Item], n_positions: int) -> list[Tensor]:
    """What the talker's first layer reads for each item: prompt and frames [P + T, D], cut at ``n_positions``."""
    return [tts.inputs(tts.prompt(item.utterance), item.codes)[:n_positions].cpu() for item in items]


def talker_stack(config: ModelConfig, stored: Sequence[Store]) -> Stack:
    """The talker's layers, ``stored`` one by one."""
    return Stack("layer", LAYERS, config.talker_config, stored, talker_inputs)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration set that was heard: its fingerprint, how many utterances, and by stack how long the inputs are.

    Where no layer becomes INT4 there is none: None, 0 and nothing.
    """

    sha256: str | None
    n_utterances: int
    lengths: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Found:
    """What became of a stack's INT4 layers: their reports, what absorbed which scales, and how many were there already.

    ``places`` has, for each stored tensor that gives way, the piece and the tensors there that take its place.
    """

    layers: tuple[LayerReport, ...]
    absorbed: Mapping[str, tuple[float, float]]
    places: Mapping[str, tuple[str, Sequence[str]]]
    n_resumed: int


@dataclass(frozen=True, slots=True)
class Work:
    """A model on its way to being quantized: calibrate, quantize each stack, write."""

    out: Path
    checkpoint: Checkpoint
    recipe: Recipe
    calibration: str | Path | Sequence[Item] | None
    stacks: Sequence[Stack]
    device: torch.device
    dtype: torch.dtype | None
    search: Search
    progress: Progress | None
    tell: Tell | None
    partial: Partial
    meter: Meter
    layer_seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def towards(
        cls,
        out: Path,
        checkpoint: Checkpoint,
        recipe: Recipe,
        calibration: str | Path | Sequence[Item] | None,
        stacks: Sequence[Stack],
        *,
        device: str | torch.device,
        dtype: torch.dtype | None,
        progress: Progress | None,
        tell: Tell | None = None,
        search: Search = search_layer,
    ) -> Iterator[Work]:
        """The work towards the new folder ``out``; what an earlier run of the same has finished is taken.

        While open, a GPU is held to `gpu_bytes`. Raises what Partial.towards raises.
        """
        device = require_device(device)
        meter = Meter(device)
        with meter.stage("summing"):
            key = _key(checkpoint, recipe, calibration, stacks, search, device, dtype)
        with limited(device, gpu_bytes(checkpoint.config)), Partial.towards(out, key) as partial:
            try:
                yield cls(
                    out, checkpoint, recipe, calibration, stacks, device, dtype, search, progress, tell, partial, meter
                )
            finally:
                recorded.forget()

    def calibrate(self) -> Calibration:
        """Has the calibration set spoken or encoded, and keeps what the stacks with INT4 layers read first.

        Without such a stack the model is loaded all the same, which checks every tensor.
        """
        note = self.partial.note(_CALIBRATION)
        if note is None:
            with self.meter.stage("loading"):
                tts = TTS.load(self.checkpoint, device=self.device, dtype=self.dtype, room_bytes=_ROOM_BYTES)
            stacks = [stack for stack in self.stacks if stack.int4]
            if not stacks:
                return Calibration(None, 0, {})
            clock = Clock(self.device)
            with self.meter.stage("calibration"):
                items = calibration_items(tts, self.recipe, self.calibration, self.progress, clock)
                # One tensor a stack: reading hundreds takes longer, and turns a Ctrl-C into an error of the library's.
                tensors, lengths = {}, {}
                for stack in stacks:
                    rows = stack.inputs(tts, items, self.recipe.n_positions)
                    tensors[stack.name], lengths[stack.name] = torch.cat(rows), list(map(len, rows))
                note = {"sha256": corpus.fingerprint(items), "n_utterances": len(items), "lengths": lengths}
                self.partial.keep(_CALIBRATION, tensors, note)
            self.meter.within("calibration", clock)
            if self.tell:
                self.tell(f"before the first layer: {split(self.meter.seconds)}")
        return Calibration(**note)

    @torch.no_grad()
    def quantize(self, stack: Stack, heard: Calibration) -> Found:
        """Finishes every INT4 layer of ``stack``, each kept as a piece."""
        pieces = {index: stack.piece(index) for index in stack.int4}
        todo = [index for index, piece in pieces.items() if self.partial.note(piece) is None]
        if todo:
            with torch.device("meta"):
                decoder = Decoder(stack.config)
            inputs = self.partial.tensors(_CALIBRATION, [stack.name])[stack.name]
            stream = Stream(decoder, torch.split(inputs, list(heard.lengths[stack.name])), self.device)
            for index in range(todo[-1] + 1):
                before = dict(self.meter.seconds)
                if index in todo:
                    self._finish(stack, index, stream)
                if index < todo[-1]:
                    # From what was kept alone, so that it makes no difference whether this run found it.
                    with self.meter.stage("reading"):
                        kept = self.partial.tensors(pieces[index]) if index in pieces else {}
                        layer = stack.as_stored(self.checkpoint, index, self.device, kept)
                    with self.meter.stage("running"):
                        stream.advance(layer)
                    del layer
                took = {name: one - before.get(name, 0.0) for name, one in self.meter.seconds.items()}
                self.layer_seconds[stack.piece(index)] = {name: one for name, one in took.items() if one}
                if self.tell:
                    self.tell(f"{stack.name} {index}: {sum(took.values()):.1f} s ({split(took)})")
                if self.progress:
                    self.progress(f"quantizing {stack.name}s", index + 1, stack.int4[-1] + 1)
        notes = {index: self.partial.note(piece) for index, piece in pieces.items()}
        return Found(
            layers=tuple(
                LayerReport(index, tuple(GroupReport(**group) for group in note["groups"]))
                for index, note in notes.items()
            ),
            absorbed={name: (low, high) for note in notes.values() for name, (low, high) in note["absorbed"].items()},
            places={
                name: (pieces[index], names)
                for index, note in notes.items()
                for name, names in note["gives_way"].items()
            },
            n_resumed=len(pieces) - len(todo),
        )

    def replacing(self, found: Iterable[Found]) -> Edit:
        """The edit that puts what was kept of each layer in the place of what gives way to it."""
        places = {name: place for one in found for name, place in one.places.items()}

        def edit(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
            return self.partial.tensors(*places[name]) if name in places else {name: tensor}

        return edit

    def write(self, step: Step, edit: Edit, settings: Mapping[str, Any], *, codec: Edit | None = None) -> Checkpoint:
        """Writes the edited model (see Checkpoint.edit) and opens it; nothing else is left."""
        with self.meter.stage("writing"):
            # Inside the folder of the pieces: what a kill leaves half-written there is cleared by the next run.
            made = self.partial.folder / "made"
            self.checkpoint.edit(step, edit, settings, codec=codec).write(made)
            self.partial.deliver(made, self.out)
        return Checkpoint.open(self.out)

    def _finish(self, stack: Stack, index: int, stream: Stream) -> None:
        """Searches the layer ``index`` of ``stack`` for what ``stream`` brings, and keeps what is found."""
        with self.meter.stage("reading"):
            layer = stack.read(self.checkpoint, index, self.device)
        with self.meter.stage("moments"):
            moments = stream.observe(layer)
        with self.meter.stage("search"):
            found = self.search(layer, moments, stack.norm_dtype(self.checkpoint, index))
        self.meter.within("search", found.clock)
        with self.meter.stage("keeping"):
            self.partial.keep(stack.piece(index), *stack.finished(self.checkpoint, index, found))


def _key(
    checkpoint: Checkpoint, recipe: Recipe, calibration: str | Path | Sequence[Item] | None, stacks: Sequence[Stack],
    search: Search, device: torch.device, dtype: torch.dtype | None,
) -> dict[str, Any]:  # fmt: skip
    """All that the bytes of a layer depend on, by what a person would call it."""
    on_gpu = device.type == "cuda"
    return {
        "model": [asdict(origin) for origin in checkpoint.origins()],
        "recipe": {
            **asdict(recipe),
            "stored": {stack.prefix: list(stack.stored) for stack in stacks},
            "dtype": str(dtype),
            "search": f"{search.__module__}.{search.__qualname__}",
        },
        "calibration set": corpus.identity(calibration),
        "version of quaver": metadata.version("quaver"),
        # A sum of floats depends on who adds them up.
        "version of PyTorch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "way of rounding": "in one kernel" if in_one_kernel(on_gpu=on_gpu) else "in small steps",
    }
