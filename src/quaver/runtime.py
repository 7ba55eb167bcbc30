"""What speaking takes of memory, line by line, told from a configuration before anything is loaded.

Weights are counted to the byte, and so are cache and slots. What is at work for a moment (a prompt, a push of the
codec, the libraries' room) is an upper estimate: of the two moments the larger one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quaver import ledger, meter
from quaver.checkpoint import Checkpoint, Spec
from quaver.config import FRAME_RATE_HZ, CodecDecoderConfig, DecoderConfig, ModelConfig
from quaver.errors import BudgetError
from quaver.ledger import megabytes
from quaver.model.homes import ENCODER, HELD, SPEAKER, TABLES, TEXT_EMBEDDING, Placement, default_dtype, memory_bytes
from quaver.model.layers import cache_dtype
from quaver.model.sparing import PART

PLACEMENTS = (
    HELD,
    Placement(tables_on_host=True),
    Placement(sound_on_host=True),
    Placement(tables_on_host=True, sound_on_host=True),
)
"""Where weights can be, what costs the least time first."""

POSITIONS = 64
"""Where memory is limited a cache is as long as asked for, in steps of so many positions."""

_CHUNK = 12
_PROMPT = 64
# What PyTorch gives cuBLAS and cuBLASLt each on compute capability 9, if they do not share it; less on others.
_WORKSPACE_BYTES = 32 << 20
# Values of the widest activations that are alive at once in a residual unit of the codec: six are counted in its code,
# and what cuDNN works in was measured to be two thirds of another.
_N_ALIVE = 7


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be said at a time: ``n_rows`` utterances of ``n_frames`` frames after a prompt of ``n_prompt``."""

    n_frames: int
    n_prompt: int = _PROMPT
    n_rows: int = 1

    @property
    def n_positions(self) -> int:
        """The cache's length."""
        return -(-(self.n_prompt + self.n_frames) // POSITIONS) * POSITIONS

    @classmethod
    def seconds(cls, seconds: float) -> Request:
        """One utterance of so many ``seconds``."""
        return cls(round(seconds * FRAME_RATE_HZ))


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that takes memory, on the device that computes and, where that is a GPU, on the host."""

    name: str
    device_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a model takes on ``device`` while it speaks: ``held`` all the time, and ``moments`` one after the other."""

    model: str
    device: str
    request: Request
    placement: Placement
    held: tuple[Line, ...]
    moments: tuple[Line, ...]

    @property
    def held_bytes(self) -> int:
        """What is on the device throughout."""
        return sum(line.device_bytes for line in self.held)

    @property
    def peak_bytes(self) -> int:
        """The most that is on the device at once."""
        return self.held_bytes + max(line.device_bytes for line in self.moments)

    @property
    def host_bytes(self) -> int:
        """What is on the host for it, mapped files included."""
        return sum(line.host_bytes for line in self.held)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**asdict(self), "peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes}


def weigh(
    checkpoint: Checkpoint,
    request: Request,
    device: str | torch.device = "cpu",
    placement: Placement = HELD,
    dtype: torch.dtype | None = None,
    *,
    limited: bool = False,
) -> Runtime:
    """What ``checkpoint`` takes on ``device`` while it says what is asked for; ``dtype`` as for TTS.load.

    ``limited``: in a process that is held to some memory (``meter.cap``).
    """
    device = torch.device(device)
    config, codec = checkpoint.config, checkpoint.codec_config.decoder_config
    specs, codec_specs = checkpoint.specs, checkpoint.codec_specs
    computed = dtype or _dtype(specs, device)
    here, there = (
        ledger.entries(specs, codec_specs, sizes)
        for sizes in (
            memory_bytes(specs, codec_specs, device, placement, dtype),
            _on_host(specs, codec_specs, device, placement, dtype),
        )
    )
    weights = [Line(a.name, a.memory_bytes, b.memory_bytes) for a, b in zip(here, there, strict=True)]
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    one_frame = Request(talker.num_code_groups, 0, request.n_rows)
    held = [
        *(line for line in weights if line.device_bytes or line.host_bytes),
        Line(f"cache of {request.n_positions:,} positions", _cache_bytes(talker, request, device, computed)),
        Line("cache of one frame", _cache_bytes(predictor, one_frame, device, computed)),
        Line("text, codes and knobs", _slots_bytes(config, request, computed)),
        Line("state of the codec", request.n_rows * _stream_bytes(codec)),
    ]
    if device.type == "cuda":
        projected = _projected_bytes(config, computed)
        lent = placement.tables_on_host
        if projected:
            held.append(Line("projected embeddings", 0 if lent else projected, projected if lent else 0))
        if widened := _widened_bytes(specs, computed):
            held.append(Line("embeddings of 8 bits, widened", 0, widened))
        held.append(Line("room of the libraries", 2 * (meter.WORKSPACE_BYTES if limited else _WORKSPACE_BYTES)))
    moments = (
        Line(f"a prompt of {request.n_prompt} positions", _prompt_bytes(config, request, device, computed)),
        Line(f"sound of {_CHUNK} frames", request.n_rows * _sound_bytes(codec)),
    )
    return Runtime(checkpoint.path.name, str(device), request, placement, tuple(held), moments)


def fit(
    checkpoint: Checkpoint, request: Request, device: str | torch.device, n_bytes: int,
    dtype: torch.dtype | None = None,
) -> Runtime:  # fmt: skip
    """The first of PLACEMENTS in which ``checkpoint`` says what is asked for in ``n_bytes`` of ``device``.

    Raises BudgetError, with the figures, where there is none.
    """
    on_gpu = torch.device(device).type == "cuda"
    placements = PLACEMENTS if on_gpu else PLACEMENTS[:1]
    tried = [weigh(checkpoint, request, device, one, dtype, limited=True) for one in placements]
    for one in tried:
        if one.peak_bytes <= n_bytes:
            return one
    least = min(tried, key=lambda one: one.peak_bytes)
    check(least, n_bytes)
    return least


def check(found: Runtime, n_bytes: int) -> None:
    """Raises BudgetError, with the figures, where ``found`` takes more than ``n_bytes``."""
    if found.peak_bytes <= n_bytes:
        return
    request, said = found.request, _said(found)
    what = f"{request.n_rows} utterances" if request.n_rows > 1 else "speech"
    raise BudgetError(
        f"{found.model} takes {megabytes(found.peak_bytes)} MB of {found.device} for {what} of up to "
        f"{request.n_frames / FRAME_RATE_HZ:.1f} s at a time, and {megabytes(n_bytes)} MB are allowed: the cache takes "
        f"{megabytes(said)}, all else {megabytes(found.peak_bytes - said)}; allow more, say less at a time "
        "(shorter sentences, --max-seconds), or take a smaller model (quaver quantize)"
    )


def _said(found: Runtime) -> int:
    """What goes by how much is said."""
    return sum(line.device_bytes for line in found.held if line.name.startswith("cache of "))


def _dtype(specs: Mapping[str, Spec], device: torch.device) -> torch.dtype:
    stored = specs["talker.codec_head.weight"].dtype
    return default_dtype(specs, device) or stored


def _on_host(
    specs: Mapping[str, Spec],
    codec_specs: Mapping[str, Spec],
    device: torch.device,
    placement: Placement,
    dtype: torch.dtype | None,
) -> dict[str, int]:
    """What each tensor takes on the host of a GPU: the text embedding as it is stored, others as they would there."""
    if device.type != "cuda":
        return dict.fromkeys((*specs, *codec_specs), 0)
    all_held, held = (memory_bytes(specs, codec_specs, device, one, dtype) for one in (HELD, placement))
    found = {}
    for name, spec in (*specs.items(), *codec_specs.items()):
        if name.startswith((SPEAKER, ENCODER)):
            found[name] = 0
        elif name.startswith(f"{TEXT_EMBEDDING}."):
            found[name] = spec.n_bytes
        else:
            found[name] = all_held[name] - held[name]
    return found


def _cache_bytes(config: DecoderConfig, request: Request, device: torch.device, dtype: torch.dtype) -> int:
    """Keys and values, and the turns of every position."""
    n_positions = request.n_positions if request.n_prompt else request.n_frames
    values = 2 * config.num_hidden_layers * request.n_rows * config.num_key_value_heads * n_positions * config.head_dim
    return values * cache_dtype(device, dtype).itemsize + n_positions * config.head_dim * dtype.itemsize


def _slots_bytes(config: ModelConfig, request: Request, dtype: torch.dtype) -> int:
    """The text of each utterance, a line a frame at most, its codes, and rooms between kernels."""
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    n_positions = request.n_positions
    texts = n_positions * talker.hidden_size * dtype.itemsize
    codes = n_positions * 4 * (talker.num_code_groups + 1)
    rooms = 16 * (talker.intermediate_size + talker.vocab_size + 2 * predictor.vocab_size) * dtype.itemsize
    splits = 4 * 16 * (talker.num_attention_heads * (talker.head_dim + 2))
    return request.n_rows * (texts + codes + rooms + splits + talker.vocab_size)


def _projected_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the predictor reads of each embedding but the last, where its width is not the talker's."""
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    if predictor.hidden_size == talker.hidden_size:
        return 0
    n_rows = talker.vocab_size + (talker.num_code_groups - 2) * predictor.vocab_size
    return n_rows * predictor.hidden_size * dtype.itemsize


def _widened_bytes(specs: Mapping[str, Spec], dtype: torch.dtype) -> int:
    """Embeddings of codes that are stored in 8 bits, as the kernels read them."""
    n_values = sum(spec.n_elements for name, spec in specs.items() if TABLES in name and name.endswith("weight_int8"))
    return n_values * dtype.itemsize


def _stream_bytes(codec: CodecDecoderConfig) -> int:
    """One attention window a layer, and the last inputs of every convolution."""
    window = 2 * (codec.sliding_window - 1) * codec.num_key_value_heads * codec.head_dim
    widths = [codec.decoder_dim >> i for i in range(1, len(codec.upsample_rates) + 1)]
    # Kernels of 7 with dilations 1, 3 and 9.
    units = sum(width * 6 * 13 for width in widths)
    return 4 * (codec.num_hidden_layers * window + units + 16 * codec.latent_dim)


def _prompt_bytes(config: ModelConfig, request: Request, device: torch.device, dtype: torch.dtype) -> int:
    """A prompt's own cache and activations, and the part of an INT4 weight that is made dense for it."""
    talker = config.talker_config
    cache = _cache_bytes(talker, Request(request.n_prompt, 0), device, dtype)
    wide = request.n_prompt * (3 * talker.intermediate_size + 8 * talker.hidden_size) * dtype.itemsize
    dense = 6 * PART if config.quantization_config is not None else 0
    return cache + wide + dense


def _sound_bytes(codec: CodecDecoderConfig) -> int:
    """The widest activations of a push in float32, or the part of a weight that is brought for it."""
    n_steps, widest = _CHUNK, 0
    for factor in codec.upsampling_ratios:
        n_steps *= factor
    for index, rate in enumerate(codec.upsample_rates):
        n_steps *= rate
        widest = max(widest, n_steps * (codec.decoder_dim >> (index + 1)))
    return max(4 * _N_ALIVE * widest, 6 * PART)


def table(found: Runtime, limit_bytes: int | None = None) -> Iterator[str]:
    """The ledger as lines of text; megabytes are millions of bytes, rounded up."""
    row = "{:<34} {:>12} {:>12}"
    on_gpu = found.device.startswith("cuda")
    yield f"{found.model} on {found.device}, {found.request.n_frames / FRAME_RATE_HZ:.1f} s of speech at a time"
    yield row.format("held all the time", "device MB" if on_gpu else "MB", "host MB" if on_gpu else "").rstrip()
    for line in found.held:
        yield row.format(
            line.name, megabytes(line.device_bytes), megabytes(line.host_bytes) if line.host_bytes else ""
        ).rstrip()
    yield row.format("for a moment", "", "").rstrip()
    for line in found.moments:
        yield row.format(line.name, megabytes(line.device_bytes), "").rstrip()
    host = megabytes(found.host_bytes) if on_gpu else ""
    yield row.format("at most, all in all", megabytes(found.peak_bytes), host).rstrip()
    if limit_bytes is not None:
        left = megabytes(max(0, limit_bytes - found.peak_bytes))
        yield f"of {megabytes(limit_bytes)} MB allowed: {left} MB are left"
    if on_gpu:
        yield "on top: the driver's context, and the code of libraries and kernels"
