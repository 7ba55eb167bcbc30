"""Feed-forward weights of a language model blended into the talker (the "Darwin" merge).

In each decoder layer gate, up and down projections (84 tensors of a published model) move a small share of the way to
those of a donor of the same shapes: the Qwen3 model that the talker came from, or a descendant of it. Everything else
stays bit-equal. More than a few per cent make speech that never stops, so 10 % and more must be forced.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quaver.checkpoint import Checkpoint, Edit, Spec, read_specs, read_tensor, resolve
from quaver.corpus import Progress
from quaver.errors import CheckpointError, RecipeError
from quaver.files import check_new
from quaver.provenance import Origin, Provenance, Step

RISKY = 0.10
"""From this share on, blends were found to make speech that never stops."""
_KINDS = ("gate", "up", "down")
_FIRST = "layers.0.mlp.gate_proj.weight"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How much of the donor goes where. Raises RecipeError for a share out of range, or risky and not forced."""

    alpha: float = 0.03
    """The donor's share: 0 leaves the talker as it is, 1 puts the donor in its place."""
    layers: Mapping[int, float] = field(default_factory=dict)
    """Other shares for single layers."""
    tensors: str = "*"
    """Which of the tensors, as a pattern of their names: ``*.down_proj.weight``, ``*.layers.1?.mlp.*``."""
    method: Literal["lerp", "slerp"] = "lerp"
    """Along the straight line, or along the arc between the directions of the two tensors (Shoemake 1985)."""
    force: bool = False
    """Whether risky shares are meant."""

    def __post_init__(self) -> None:
        shares = {"alpha": self.alpha, **{f"the share of layer {i}": share for i, share in self.layers.items()}}
        for name, share in shares.items():
            if not 0.0 <= share <= 1.0:
                raise RecipeError(f"{name} is {share}: it must be from 0 (the talker) to 1 (the donor)")
            if share >= RISKY and not self.force:
                raise RecipeError(
                    f"{name} is {share:g}: from {RISKY:g} on speech may never stop, because the layers that foresee "
                    "the stop token are no longer those it was trained with; 0.03 is usual. Give --force if you mean it"
                )
        if self.method not in ("lerp", "slerp"):
            raise RecipeError(f"method is {self.method!r}: it must be lerp or slerp")

    def share(self, layer: int) -> float:
        """The donor's share in ``layer``."""
        return self.layers.get(layer, self.alpha)


def layer_shares(text: str) -> dict[int, float]:
    """Shares by layer out of ``N=ALPHA`` and ``N-M=ALPHA``, joined by commas; later ones count. Raises RecipeError."""
    found = dict[int, float]()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?=(\d*\.?\d+)", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise RecipeError(f"{part!r} names no layers and share: write 5=0.02 or 0-3=0.01")
        found |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1), float(match[3]))
    return found


@dataclass(frozen=True, slots=True)
class Donor:
    """A language model's folder, of which only the feed-forward weights are read."""

    path: Path
    specs: Mapping[str, Spec]
    prefix: str
    """What stands before ``layers.N`` in its names."""

    @classmethod
    def open(cls, source: str | Path) -> Donor:
        """The donor in a folder or of a hub id.

        Raises CheckpointError when it has no decoder with plain weights, Damaged when it is not what its provenance
        says.
        """
        path = resolve(source)
        provenance = Provenance.read(path)
        provenance.check(path)
        specs = read_specs(path, provenance)
        found = [n.removesuffix(_FIRST) for n in specs if n.endswith(_FIRST) and "code_predictor" not in n]
        if len(found) == 1:
            return cls(path, specs, found[0])
        if any(name.endswith("gate_proj.qweight") for name in specs):
            raise CheckpointError(f"{path} is quantized: blending needs the donor's plain weights")
        what = "no decoder with gate, up and down projections" if not found else f"more than one decoder: {found}"
        raise CheckpointError(f"{path} has {what}: name a language model such as Qwen3-1.7B, or a Qwen3-TTS model")

    def name(self, layer: int, kind: str) -> str:
        """What the donor calls a projection."""
        return f"{self.prefix}layers.{layer}.mlp.{kind}_proj.weight"


@dataclass(frozen=True, slots=True)
class Change:
    """What blending did to one tensor: the donor's share, and how far it moved, by its own size."""

    name: str
    alpha: float
    moved: float
    cosine: float
    """Of the talker's tensor and the donor's, as vectors."""


Told = Callable[[Change], None]


@dataclass(frozen=True, slots=True)
class BlendReport:
    """What blending did."""

    changes: tuple[Change, ...]
    share: float
    """The blended tensors' share of all values of the model."""

    @property
    def summary(self) -> str:
        """One line for a person."""
        alphas = sorted({change.alpha for change in self.changes})
        parts = f"alpha {alphas[0]:g}" if len(alphas) == 1 else f"alpha {alphas[0]:g} to {alphas[-1]:g}"
        moved = math.fsum(change.moved for change in self.changes) / len(self.changes)
        return (
            f"{len(self.changes)} tensors blended, {100 * self.share:.0f} % of the model's values, {parts}; "
            f"each moved by {100 * moved:.2g} % of its size on average"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {"n_tensors": len(self.changes), "share": self.share, "tensors": [asdict(c) for c in self.changes]}


def blended(source: Checkpoint, donor: Donor, recipe: Recipe, told: Told | None = None) -> Checkpoint:
    """``source`` with the donor's share in its talker, not written yet; ``told`` hears of each tensor as it is read.

    Raises CheckpointError when the models do not fit each other, RecipeError when the pattern names no tensor.
    """
    chosen = _chosen(source, donor, recipe)
    read = {file.name: file for file in sorted({donor.specs[theirs].file for theirs, _ in chosen.values()})}
    asked = {**asdict(recipe), "layers": {str(i): share for i, share in sorted(recipe.layers.items())}}
    step = Step("blend", asked, result={"n_tensors": len(chosen)}, parents=(Origin.of(donor.path, read),))
    return source.edit(step, _edit(source, donor, recipe, chosen, told))


def blend(
    source: Checkpoint, donor: Donor, out: str | Path, recipe: Recipe | None = None, *, progress: Progress | None = None
) -> BlendReport:
    """Writes ``source`` with the donor's share in its talker to the new folder ``out``, and reports.

    One pair of tensors is in memory at a time; side files and speech tokenizer come along. Raises what `blended` and
    saving raise; whatever is interrupted leaves nothing behind.
    """
    out, changes = check_new(out), list[Change]()

    def told(change: Change) -> None:
        changes.append(change)
        if progress:
            progress("blending", len(changes), edited.edits[-1][0].result["n_tensors"])

    edited = blended(source, donor, recipe or Recipe(), told)
    edited.save(out)
    n_values = sum(spec.n_elements for spec in source.specs.values())
    return BlendReport(tuple(changes), sum(source.specs[c.name].n_elements for c in changes) / n_values)


def _chosen(source: Checkpoint, donor: Donor, recipe: Recipe) -> dict[str, tuple[str, int]]:
    """The talker's tensors to blend, each with the donor's name of it and its layer; all are known to fit."""
    n_layers = source.config.talker_config.num_hidden_layers
    n_theirs = 1 + max(int(m[1]) for n in donor.specs if (m := re.fullmatch(_pattern(donor), n)))
    if n_theirs != n_layers:
        raise CheckpointError(f"{donor.path} has {n_theirs} decoder layers and the talker of {source.path} {n_layers}")
    outside = [i for i in recipe.layers if not 0 <= i < n_layers]
    if outside:
        raise RecipeError(f"there is no layer {outside[0]}: the talker of {source.path} has layers 0 to {n_layers - 1}")
    found = {}
    for layer in range(n_layers):
        for kind in _KINDS:
            name, theirs = f"talker.model.layers.{layer}.mlp.{kind}_proj.weight", donor.name(layer, kind)
            if name not in source.specs:
                hint = (
                    "it is quantized: blend first" if name.replace("weight", "qweight") in source.specs else "missing"
                )
                raise CheckpointError(f"{source.path}: tensor {name}: {hint}")
            if theirs not in donor.specs:
                raise CheckpointError(f"{donor.path}: tensor {theirs} is missing")
            ours_is, theirs_is = source.specs[name], donor.specs[theirs]
            if ours_is.shape != theirs_is.shape:
                raise CheckpointError(
                    f"{donor.path}: tensor {theirs} has shape {list(theirs_is.shape)}, {list(ours_is.shape)} is "
                    "needed: blend with a model of the same widths (Qwen3-0.6B or 1.7B for the published models)"
                )
            if not theirs_is.dtype.is_floating_point:
                raise CheckpointError(
                    f"{donor.path}: tensor {theirs} has type {theirs_is.dtype}: plain weights are needed"
                )
            if fnmatch.fnmatchcase(name, recipe.tensors):
                found[name] = theirs, layer
    if not found:
        raise RecipeError(f"no tensor of the {3 * n_layers} is named like {recipe.tensors!r}")
    return found


def _pattern(donor: Donor) -> str:
    return re.escape(donor.prefix) + r"layers\.(\d+)\.mlp\.gate_proj\.weight"


def _edit(
    source: Checkpoint,
    donor: Donor,
    recipe: Recipe,
    chosen: Mapping[str, tuple[str, int]],
    told: Told | None,
) -> Edit:
    mix = _slerp if recipe.method == "slerp" else _lerp

    def edit(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        if name not in chosen:
            return {name: tensor}
        theirs, layer = chosen[name]
        alpha, ours, other = recipe.share(layer), tensor.float(), read_tensor(donor.specs[theirs], theirs).float()
        for where, what, value in ((source.path, name, ours), (donor.path, theirs, other)):
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{where}: tensor {what} has values that are not finite")
        # At both ends bit for bit, negative zeros too.
        ends = {0.0: tensor, 1.0: other.to(tensor.dtype)}
        mixed = ends[alpha] if alpha in ends else mix(ours, other, alpha).to(tensor.dtype)
        if told:
            size = float(ours.norm())
            moved = float((mixed.float() - ours).norm()) / max(size, 1e-30)
            told(Change(name, alpha, moved, _cosine(ours, other)))
        return {name: mixed}

    return edit


def _lerp(ours: Tensor, theirs: Tensor, alpha: float) -> Tensor:
    return (1.0 - alpha) * ours + alpha * theirs


def _slerp(ours: Tensor, theirs: Tensor, alpha: float) -> Tensor:
    angle = math.acos(max(-1.0, min(1.0, _cosine(ours, theirs))))
    # Along one line, either way, there is no arc.
    if min(angle, math.pi - angle) < 1e-4:
        return _lerp(ours, theirs, alpha)
    whole = math.sin(angle)
    return math.sin((1.0 - alpha) * angle) / whole * ours + math.sin(alpha * angle) / whole * theirs


def _cosine(ours: Tensor, theirs: Tensor) -> float:
    a, b = ours.double().flatten(), theirs.double().flatten()
    size = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(a @ b) / size if size else 0.0
