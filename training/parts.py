"""Trained tensors in files small enough to carry: a state dict cut into safetensors parts of at most 15 MiB."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quaver.model.codec_encoder import Codec
from training import quantizer

_LIMIT_BYTES = 15 * 2**20


def write(folder: Path, name: str, state: dict[str, Tensor], dtype: torch.dtype) -> list[Path]:
    """Writes ``state`` to ``folder``/``name``-0.safetensors and on, floating-point tensors as ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in state.items():
        tensor = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        if size and size + tensor.nbytes > _LIMIT_BYTES:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    paths = [folder / f"{name}-{i}.safetensors" for i in range(len(groups))]
    for path, group in zip(paths, groups, strict=True):
        beside = path.with_name(path.name + ".part")
        save_file(group, beside)
        beside.replace(path)
    return paths


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The float32 state dict that ``write`` cut up. Raises FileNotFoundError when there is none."""
    paths = sorted(folder.glob(f"{name}-[0-9].safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}/{name}-0.safetensors is missing")
    return {key: value for path in paths for key, value in begun(path).items()}


def begun(path: Path) -> dict[str, Tensor]:
    """The float32 state dict to go on with: of a safetensors file, or of parts, ``path`` being FOLDER/NAME."""
    if path.suffix == ".safetensors":
        return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    return read(path.parent, path.name)


def codec_state(codec: Codec) -> dict[str, Tensor]:
    """The state of a codec, its codebooks shared out."""
    whole = Codec(codec.config)
    whole.load_state_dict(codec.state_dict())
    quantizer.export(whole)
    return dict(whole.state_dict())
