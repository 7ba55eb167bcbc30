"""A frame as one kernel that stays on the GPU (frame.cu): compiled for the model's shapes when it is first asked for.

It reads the same weights and keeps the same state as the kernels in Triton, so the two can take turns from frame to
frame. NVRTC, which comes with PyTorch, compiles; the result is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sysconfig
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quaver.errors import QuaverError
from quaver.files import write_file

SOURCE = Path(__file__).with_name("frame.cu")
MOST_SLOTS = 4
MOST_KEPT = 64
"""The most ids that may be drawn from: more need a sort that this kernel has not."""
_HEAD_DIM = 128
MOST_SPLITS = 16
_SHARED_BYTES = 232_448
_THREADS = 544


_POINTERS = (
    "gains", "small_gains", "projection_bias", "keys", "values", "small_keys", "small_values", "cos", "sin", "small_cos",
    "small_sin", "seed", "frame", "past", "prompt", "n_text", "alive", "seen", "first", "residual", "texts", "codes",
    "stops", "hidden", "boxes", "parts", "part_weights", "exchange", "trace",
)  # fmt: skip


def _arguments(tensors: Mapping[str, Tensor], numbers: Mapping[str, float], lists: Sequence[Sequence[Tensor | None]]) -> ctypes.Structure:
    """``Arguments`` of frame.cu: pointers in its order, then the numbers, then its lists of pointers."""
    addresses = [0 if tensor is None else tensor.data_ptr() for part in lists for tensor in part]

    class Arguments(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_void_p) for name in _POINTERS),
            ("eps", ctypes.c_float), ("small_eps", ctypes.c_float),
            ("stop_id", ctypes.c_int), ("n_banned", ctypes.c_int),
            ("lists", ctypes.c_void_p * len(addresses)),
        ]  # fmt: skip

    filled = Arguments(**{name: tensors[name].data_ptr() for name in _POINTERS}, **numbers)
    filled.lists[:] = addresses
    return filled


class Persistent:
    """frame.cu for ``shapes`` (its constants), bound to ``tensors`` (its pointers by name) and ``numbers``."""

    def __init__(
        self, shapes: Mapping[str, int | bool], tensors: Mapping[str, Tensor], numbers: Mapping[str, float],
        lists: Sequence[Sequence[Tensor | None]],
    ) -> None:
        device = tensors["hidden"].device
        self._n_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        # What the kernel points to lives as long as it does.
        self._tensors, self._lists = dict(tensors), [list(part) for part in lists]
        self._device = device
        code = compiled({"GRID": self._n_blocks, "MOST_SPLITS": MOST_SPLITS, **shapes}, device)
        self._function = _function(code)
        self._arguments = _arguments(tensors, numbers, lists)
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))

    def __call__(self) -> None:
        """Enqueues a frame on the current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        launch = _driver().cuLaunchCooperativeKernel
        status = launch(
            self._function, self._n_blocks, 1, 1, _THREADS, 1, 1, _SHARED_BYTES, ctypes.c_void_p(stream), self._parameters
        )
        _checked("cuLaunchCooperativeKernel", status)


def compiled(shapes: Mapping[str, int | bool], device: torch.device) -> bytes:
    """The machine code of frame.cu with ``shapes`` as its constants: from the cache on disk where it is there."""
    constants = "".join(
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};\n"
        for name, value in shapes.items()
    )
    source = f"{constants}#line 1\n{SOURCE.read_text()}"
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    nvrtc = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = hashlib.sha256(f"{architecture} {version[0].value}.{version[1].value}\n{source}".encode()).hexdigest()[:24]
    kept = _cache_folder() / f"frame-{key}.cubin"
    if kept.exists():
        return kept.read_bytes()
    made = _compiled(nvrtc, source.encode(), architecture)
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
    """NVRTC as PyTorch brings it, or the system's."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = sorted(path for path in folder.glob("*/lib/libnvrtc.so.*") if "builtins" not in path.name)
    name = str(found[-1]) if found else find_library("nvrtc")
    if name is None:
        raise QuaverError("NVRTC is missing: pip install nvidia-cuda-nvrtc of the CUDA version that PyTorch has")
    return ctypes.CDLL(name)
