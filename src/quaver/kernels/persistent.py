"""A frame as one kernel that stays on the GPU (frame.cu): compiled for the model's shapes when it is first asked for.

It reads the same weights and keeps the same state as the kernels in Triton, so the two can take turns from frame to
frame. NVRTC, which comes with PyTorch, compiles; the result is kept on disk. It needs compute capability 9.0 or 10
(bulk copies, 227 KB of shared memory), bfloat16, one slot or two, and shapes that keep every multiprocessor busy.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quaver.config import SUPPRESSED_IDS, DecoderConfig
from quaver.errors import QuaverError
from quaver.files import write_file

if TYPE_CHECKING:
    from quaver.frame import Layer, Stack, Weights
    from quaver.kernels.linear import Matrix
    from quaver.kernels.sampler import Slots

MACHINE, FRAME = (Path(__file__).with_name(name) for name in ("ptx.cuh", "frame.cu"))
MOST_SLOTS = 2
"""More rows than two slots begin with are more than the tensor cores' columns."""
MOST_KEPT = 64
"""The most ids that may be drawn from: more need a sort that this kernel has not."""
_HEAD_DIM = 128
_MOST_SPLITS = 16
_SHARED_BYTES = 232_448
_FITTING = ((9, 0), (10, 0), (10, 3))
"""The compute capabilities with bulk copies and so much shared memory; of these 9.0 alone was at hand."""
_MOST_MARKS = 4096
_THREADS = 544
_POINTERS = (
    "gains", "small_gains", "projection_bias", "keys", "values", "small_keys", "small_values", "cos", "sin",
    "small_cos", "small_sin", "seed", "frame", "past", "prompt", "n_text", "alive", "seen", "first", "residual",
    "texts", "codes", "stops", "hidden", "boxes", "parts", "part_weights", "exchange", "trace",
)  # fmt: skip
_FLOATS, _INTS = ("eps", "small_eps"), ("stop_id", "n_banned", "capacity", "n_lines")

_failures: list[str] = []
"""Why this machine cannot make or load the kernel, where it was seen that it cannot: it is not tried again."""


class Persistent:
    """The kernel bound to one frame's weights and state. Calling it enqueues a frame on the current stream."""

    def __init__(self, code: bytes, n_blocks: int, arguments: ctypes.Structure, tensors: Mapping[str, Tensor]) -> None:
        # What the kernel points to lives as long as it does.
        self._tensors, self._arguments = dict(tensors), arguments
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._function, self._n_blocks = _function(code), n_blocks

    @classmethod
    def of(
        cls, weights: Weights, slots: Slots, talker: Stack, predictor: Stack, hidden: Tensor, *, traced: bool = False
    ) -> Persistent | None:
        """The kernel that speaks a frame of ``slots``; None where the GPU, the model's shapes or storage do not fit.

        None too, and a warning once in a process, where an older CUDA cannot compile it: a frame needs no such kernel.
        ``traced``: blocks leave their moments in ``trace``, which makes it a little slower.
        """
        device = hidden.device
        if device.type != "cuda" or torch.cuda.get_device_capability(device) not in _FITTING or _nvrtc() is None:
            return None
        if _failures:
            return None
        n_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        found = constants(weights, len(hidden), n_blocks)
        if found is None or hidden.dtype != torch.bfloat16:
            return None
        tensors, numbers, lists = bound(weights, slots, talker, predictor, hidden, n_blocks if traced else 0)
        try:
            code = compiled({**found, "TRACED": traced}, device)
            return cls(code, n_blocks, arguments(tensors, numbers, lists), tensors)
        except (QuaverError, OSError) as error:
            _failures.append(str(error))
            warnings.warn(f"speech is slower than it could be on {device}: {error}", stacklevel=2)
            return None

    @property
    def trace(self) -> Tensor:
        """The moments of each block [blocks, n, 4]: cycles, which, cycles waited for weights, nanoseconds."""
        return self._tensors["trace"].view(-1, _MOST_MARKS, 4)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream(self._tensors["hidden"].device).cuda_stream
        launch = _driver().cuLaunchCooperativeKernel
        status = launch(
            self._function,
            self._n_blocks,
            1,
            1,
            _THREADS,
            1,
            1,
            _SHARED_BYTES,
            ctypes.c_void_p(stream),
            self._parameters,
        )
        _checked("cuLaunchCooperativeKernel", status)


def _matrices(layer: Layer) -> tuple[Matrix, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _stream(weights: Weights) -> list[Matrix]:
    """All weights of a frame in the order in which it reads them, the predictor's layers once."""
    return [
        weights.codec_head,
        *([] if weights.projection is None else [weights.projection]),
        *(matrix for layer in weights.predictor for matrix in _matrices(layer)),
        *weights.heads,
        *(matrix for layer in weights.talker for matrix in _matrices(layer)),
    ]


def constants(weights: Weights, n_slots: int, n_blocks: int) -> dict[str, int | bool] | None:
    """The constants of frame.cu for a model and ``n_blocks`` multiprocessors; None where it does not fit them."""
    config = weights.tts.config.talker_config
    small = config.code_predictor_config
    kinds = [
        {m.lanes is not None for layer in part for m in _matrices(layer)}
        for part in (weights.talker, weights.predictor)
    ]
    widths = (config.hidden_size, small.hidden_size)
    if (
        n_slots > MOST_SLOTS
        or any(m.row_scales is not None for m in _stream(weights))
        or any(len(kind) > 1 for kind in kinds)
        or any(of.head_dim != _HEAD_DIM or of.intermediate_size % _HEAD_DIM for of in (config, small))
        or any(not n_blocks * 4 <= width <= 2048 for width in widths)
        or any(n_ids % 512 or n_ids >= 4096 for n_ids in (config.vocab_size, small.vocab_size))
    ):
        return None
    return {
        "GRID": n_blocks, "THREADS": _THREADS, "MOST_SPLITS": _MOST_SPLITS, "SLOTS": n_slots, "D": config.hidden_size,
        "I": config.intermediate_size, "H": config.num_attention_heads, "G": config.num_key_value_heads,
        "L": config.num_hidden_layers, "E": small.hidden_size, "J": small.intermediate_size,
        "PH": small.num_attention_heads, "PG": small.num_key_value_heads, "PL": small.num_hidden_layers,
        "V": config.vocab_size, "W": small.vocab_size, "Q": config.num_code_groups, "TALKER_INT4": kinds[0] == {True},
        "PREDICTOR_INT4": kinds[1] == {True}, "PROJECTED": weights.projection is not None,
    }  # fmt: skip


def bound(
    weights: Weights, slots: Slots, talker: Stack, predictor: Stack, hidden: Tensor, n_traced: int = 0
) -> tuple[dict[str, Tensor], dict[str, float], list[list[Tensor | None]]]:
    """What the kernel points to by name, its numbers, and its lists of pointers: embeddings, projected, weights."""
    model = weights.tts.talker
    config = weights.tts.config.talker_config
    small = config.code_predictor_config
    n_slots = len(hidden)

    def gains(layers: Sequence[Layer], last: Tensor) -> Tensor:
        each = ((of.before_attention, of.query_gain, of.key_gain, of.before_mlp) for of in layers)
        return torch.cat([gain.detach() for layer in each for gain in layer] + [last.detach()])

    def words(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.int64, device=hidden.device)

    def widest(of: DecoderConfig) -> int:
        heads = of.num_attention_heads + 2 * of.num_key_value_heads
        return max(heads * of.head_dim, of.intermediate_size, of.hidden_size)

    n_shares = n_slots * config.num_attention_heads * _MOST_SPLITS
    projection = weights.projection
    tensors = {
        "gains": gains(weights.talker, model.model.norm.weight),
        "small_gains": gains(weights.predictor, model.code_predictor.model.norm.weight),
        "projection_bias": hidden if projection is None or projection.bias is None else projection.bias,
        "keys": talker.keys, "values": talker.values, "small_keys": predictor.keys, "small_values": predictor.values,
        "cos": talker.cos, "sin": talker.sin, "small_cos": predictor.cos, "small_sin": predictor.sin,
        "seed": slots.seed, "frame": slots.frame, "past": slots.past, "prompt": slots.prompt, "n_text": slots.n_text,
        "alive": slots.alive, "seen": slots.seen, "first": slots.first, "residual": slots.residual,
        "texts": slots.texts, "codes": slots.codes, "stops": slots.stops, "hidden": hidden,
        # Four boxes for up to two rows a slot, a word for every two values.
        "boxes": words(4 * n_slots * max(widest(config), widest(small), config.vocab_size, small.vocab_size)),
        "parts": words(n_shares * config.head_dim // 2), "part_weights": words(n_shares * 2),
        "exchange": words(1), "trace": words(n_traced * _MOST_MARKS * 4 or 4),
    }  # fmt: skip
    numbers = {
        "eps": config.rms_norm_eps, "small_eps": small.rms_norm_eps, "stop_id": config.codec_eos_token_id,
        "n_banned": SUPPRESSED_IDS, "capacity": talker.keys.shape[3], "n_lines": slots.texts.shape[1],
    }  # fmt: skip
    held = [
        (m.dense, None, None) if m.lanes is None else (m.lanes.packed, m.lanes.scales, m.lanes.zeros)
        for m in _stream(weights)
    ]
    return tensors, numbers, [list(weights.tables), list(weights.projected), [t for each in held for t in each]]


def arguments(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, float], lists: Sequence[Sequence[Tensor | None]]
) -> ctypes.Structure:
    """``Arguments`` of frame.cu: pointers in its order, then the numbers, then its lists of pointers."""
    addresses = [0 if tensor is None else tensor.data_ptr() for part in lists for tensor in part]

    class Arguments(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_void_p) for name in _POINTERS),
            *((name, ctypes.c_float) for name in _FLOATS),
            *((name, ctypes.c_int) for name in _INTS),
            ("lists", ctypes.c_void_p * len(addresses)),
        ]

    filled = Arguments(**{name: tensors[name].data_ptr() for name in _POINTERS}, **numbers)
    filled.lists[:] = addresses
    return filled


def source(values: Mapping[str, int | bool], machine: Path = MACHINE) -> str:
    """frame.cu with ``values`` of its constants above it, for a GPU or another ``machine``."""
    lines = (
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};\n"
        for name, value in values.items()
    )
    return f'{"".join(lines)}#line 1 "{machine.name}"\n{machine.read_text()}#line 1 "frame.cu"\n{FRAME.read_text()}'


def compiled(values: Mapping[str, int | bool], device: torch.device) -> bytes:
    """The machine code of frame.cu with ``values`` of its constants: from the cache on disk where it is there."""
    text = source(values)
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"sm_{major}{minor}a"
    nvrtc = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = hashlib.sha256(f"{architecture} {version[0].value}.{version[1].value}\n{text}".encode()).hexdigest()[:24]
    kept = _cache_folder() / f"frame-{key}.cubin"
    if kept.exists():
        return kept.read_bytes()
    made = _compiled(nvrtc, text.encode(), architecture)
    # Where nothing can be kept, the next process compiles again.
    with suppress(OSError, QuaverError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, made)
    return made


def _compiled(nvrtc: Any, source: bytes, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"frame.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"-default-device", b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    if status:
        raise QuaverError(f"the GPU's kernel could not be compiled for {architecture}: {log.decode(errors='replace')}")
    made = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return made


def _text(size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    n = ctypes.c_size_t()
    size(program, ctypes.byref(n))
    buffer = ctypes.create_string_buffer(n.value)
    get(program, buffer)
    return buffer.raw


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quaver" / "kernels"


def _function(code: bytes) -> ctypes.c_void_p:
    driver = _driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _checked("cuModuleLoadData", driver.cuModuleLoadData(ctypes.byref(module), code))
    _checked("cuModuleGetFunction", driver.cuModuleGetFunction(ctypes.byref(function), module, b"frame"))
    most_dynamic_shared = 8
    _checked("cuFuncSetAttribute", driver.cuFuncSetAttribute(function, most_dynamic_shared, _SHARED_BYTES))
    return function


def _checked(name: str, status: int) -> None:
    if status:
        raise QuaverError(f"{name} failed with CUDA error {status}")


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> Any:
    """NVRTC as PyTorch brings it, or the system's; None where there is none."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = sorted(path for path in folder.glob("*/lib/libnvrtc.so.*") if "builtins" not in path.name)
    name = str(found[-1]) if found else find_library("nvrtc")
    return None if name is None else ctypes.CDLL(name)
