"""An ONNX model small enough to travel: its large float tensors as int8 with one float scale a channel, zlib behind.

    python -m training.packing kokoro.onnx .data/carry/kokoro-a.bin .data/carry/kokoro-b.bin

A packed model is a list of `.npz` files; the first also holds the graph without those tensors. :func:`unpack` makes an
ordinary float32 model of them again. Needs `onnx` and NumPy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx  # type: ignore[import-not-found]

SMALLEST = 4096
"""Tensors of fewer elements stay float32 inside the graph: they are biases and gains, and weigh next to nothing."""


def pack(model: Path, files: list[Path]) -> None:
    """Write ``model`` as ``files``, about equally large. Raises ValueError for a model with external data."""
    proto = onnx.load(str(model), load_external_data=False)
    parts: list[dict[str, np.ndarray]] = [{} for _ in files]
    weights = [0] * len(files)
    for number, tensor in enumerate(proto.graph.initializer):
        if tensor.external_data:
            raise ValueError(f"{model}: tensor {tensor.name} lies outside the file")
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < 4 * SMALLEST:
            continue
        values = np.frombuffer(tensor.raw_data, "<f4").reshape(tuple(tensor.dims))
        part = int(np.argmin(weights))
        weights[part] += values.size
        parts[part][f"q{number}"], parts[part][f"s{number}"] = _quantize(values)
        tensor.raw_data = b""
    parts[0]["graph"] = np.frombuffer(proto.SerializeToString(), np.uint8)
    for file, arrays in zip(files, parts, strict=True):
        with file.open("wb") as sink:
            np.savez_compressed(sink, allow_pickle=False, **arrays)


def unpack(files: list[Path], model: Path) -> None:
    """Write the float32 model packed in ``files`` (in any order) to ``model``. Raises KeyError when one is missing."""
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        with np.load(file) as part:
            arrays.update({name: part[name] for name in part.files})
    proto = onnx.load_from_string(arrays.pop("graph").tobytes())
    for number, tensor in enumerate(proto.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.raw_data and np.prod(tensor.dims) >= SMALLEST:
            values = arrays[f"q{number}"].astype(np.float32) * arrays[f"s{number}"]
            tensor.raw_data = values.astype("<f4").tobytes()
    aside = model.with_suffix(".part")
    onnx.save(proto, str(aside))
    aside.rename(model)


def _quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tensor as int8 and float32 scales that broadcast against it, along the axis that loses least."""
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for axis in range(min(2, values.ndim)):
        others = tuple(i for i in range(values.ndim) if i != axis)
        scale = np.maximum(np.abs(values).max(others, keepdims=True) / 127, 1e-12)
        rounded = np.rint(values / scale)
        loss = float(np.square(rounded * scale - values).sum())
        if best is None or loss < best[0]:
            best = loss, rounded.astype(np.int8), scale.astype(np.float32)
    assert best is not None
    return best[1], best[2]


def main() -> None:
    """Pack one model and print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    pack(args.model, args.files)
    for file in args.files:
        print(file, file.stat().st_size)


if __name__ == "__main__":
    main()
