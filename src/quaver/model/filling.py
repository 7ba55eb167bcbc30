"""Modules that were built without memory get their tensors as they are read, each checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from quaver.checkpoint import Spec, mapped
from quaver.errors import CheckpointError
from quaver.int8 import SUFFIXES as INT8_SUFFIXES

_INT4_SUFFIXES = (".qweight", ".qzeros", ".scales")
PACKED_SUFFIXES = (*_INT4_SUFFIXES, *INT8_SUFFIXES)
"""How the names of tensors end that keep their type whatever the model is computed in."""

Place = Callable[[str], torch.device | None]
"""Where a tensor goes, by its name; None: it is checked, and stays in its file."""


def fill(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: str, place: Place, dtype: torch.dtype | None
) -> None:
    """Gives every parameter and buffer of the meta-device ``module`` its tensor. Raises CheckpointError."""
    wanted = module.state_dict()
    missing = dict.fromkeys(wanted)
    for name, stored in tensors:
        if name not in wanted:
            raise CheckpointError(f"{where}: tensor {name} is left over: this architecture has none of that name")
        if stored.shape != wanted[name].shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(stored.shape)}, "
                f"the configuration says {tuple(wanted[name].shape)}"
            )
        if name.endswith(INT8_SUFFIXES) and stored.dtype != wanted[name].dtype:
            raise CheckpointError(f"{where}: tensor {name} has type {stored.dtype}, it must have {wanted[name].dtype}")
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        if stored.is_floating_point() and stored.numel():
            _check_finite(stored, name, where)
        del missing[name]
        device = place(name)
        if device is None:
            continue
        plain = stored.is_floating_point() and not name.endswith(PACKED_SUFFIXES)
        tensor = stored.to(device, dtype if plain else None)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor)
    if missing:
        name = next(iter(missing))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor {name} is missing{more}")


def _check_finite(tensor: Tensor, name: str, where: str) -> None:
    # Both extremes carry NaN and infinity along, and finding them takes no memory beside the tensor.
    low, high = tensor.aminmax()
    if low.isfinite() and high.isfinite():
        return
    n_bad = int((~tensor.isfinite()).sum())
    raise CheckpointError(f"{where}: tensor {name} has {n_bad} values that are NaN or infinite")


def map_anew(module: nn.Module, specs: Mapping[str, Spec]) -> None:
    """Gives the parameters of ``module`` that are on the host as ``specs`` say they are stored new maps of their files.

    Checking a tensor brings all of it to memory, where it counts as long as it stays mapped, and of some few rows are
    ever read.
    """
    parameters = {name: one for name, one in module.named_parameters() if one.device.type == "cpu" and name in specs}
    kept = {name: specs[name] for name, one in parameters.items() if one.dtype == specs[name].dtype}
    for name, tensor in mapped(kept):
        parameters[name].data = tensor
