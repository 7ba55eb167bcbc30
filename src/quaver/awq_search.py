"""The search over one decoder layer: which scales to fold, which ranges to clip, and the rounding itself.

A linear's input channels are scaled up before rounding and the scale is taken back in the module before it: a norm's
weight, or the rows of another linear (AWQ, Lin et al. 2023). The function stays the same; the rounding error moves away
from the channels that carry much. Then each output row may clip its groups, and rounding itself goes input by input,
each making up for the errors before it (GPTQ), in several ranges of which each row takes the best; at last every value
moves to the level that is best given the others. Every choice has "leave it" among its candidates and is judged by the
error of the linear's output on calibration inputs, so none is worse than rounding to nearest.

That error is ``trace(E C E^T)`` for a weight error E and the inputs' second moment C: the moment [in, in] stands for
all calibration positions at once, and no input need be kept. Shapes: O outputs, I inputs, G groups of 128 inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from quaver.int4 import GROUP, LEVELS, Int4Weight, representable
from quaver.meter import Clock
from quaver.model.layers import GROUPS, DecoderLayer, Group
from quaver.recorded import Function, Recorded

_EXPONENTS = tuple(index / 20 for index in range(20))
_CLIPS = tuple(1 - 0.025 * index for index in range(20))
_RANGES = (1.0, 0.9)
"""Shares of their ranges to which all groups of a row may be narrowed alike, beside what the search for clips finds."""
_ROUNDS = 2
_DAMPING = 0.05
_PART = 1 << 23
"""Values that are held in float32 at a time where nothing but memory asks for parts."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Moment:
    """The inputs of a group over all positions: ``second`` [I, I], the mean of x x^T, and ``size`` [I], that of |x|."""

    second: Tensor
    size: Tensor


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One fused group: the chosen exponents, and the relative output error of rounding to nearest and of this.

    ``loss`` and ``loss_nearest`` sum, over the group's linears, the error's energy as a share of the output's.
    ``clipped`` is the share of weight groups whose range was narrowed.
    """

    name: str
    alpha: float
    beta: float
    loss_nearest: float
    loss: float
    clipped: float


def nearest(weight: Tensor, shrink: Tensor | None = None) -> Int4Weight:
    """``weight`` [O, I] rounded to the nearest of 16 levels that span each group's range and zero.

    ``shrink`` [O, G] narrows the ranges; what lies outside goes to the ends.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)
    high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    if shrink is not None:
        high, low = high * shrink, low * shrink
    scales = representable((high - low) / (LEVELS - 1))
    zeros = (-low / scales).round().clamp(0, LEVELS - 1)
    values = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, LEVELS - 1)
    return Int4Weight(values.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales)


@dataclass(frozen=True, slots=True)
class Feedback:
    """How inputs make up for one another."""

    order: Tensor
    """[I]: most power first."""
    inverse: Tensor
    """[I, I]: the upper Cholesky factor of the inverse of their damped second moment, in that order."""

    @classmethod
    def of(cls, second: Tensor, damping: float = _DAMPING) -> Feedback | None:
        """The feedback of inputs with the second moment ``second`` [I, I], their mean power times ``damping`` added to
        each; None where that is singular beyond help."""
        order = second.diagonal().argsort(descending=True)
        moment = second[order][:, order].double()
        moment.diagonal().add_(damping * moment.diagonal().mean().clamp(min=_TINY))
        factor, failed = torch.linalg.cholesky_ex(moment)
        if int(failed):
            return None
        # A matrix of this size in float64 is a tenth of the memory there is: none is held longer than it is read.
        del moment
        inverse = torch.cholesky_inverse(factor)
        del factor
        return cls(order, torch.linalg.cholesky(inverse, upper=True).to(second.dtype))


def compensated(weight: Tensor, second: Tensor, grid: Int4Weight, feedback: Feedback) -> Int4Weight:
    """``weight`` [O, I] on the levels of ``grid``, each input's rounding error made up for by the inputs after it.

    GPTQ (Frantar et al. 2023) on ranges that are settled, whatever group an input is in. Rows that come out no better
    than ``grid`` stay as they are there.
    """
    order, inverse = feedback.order, feedback.inverse
    left, values = weight[:, order], torch.empty_like(grid.values)
    compensate, _ = _blocks(on_gpu=weight.is_cuda)
    for start in range(0, weight.shape[1], GROUP):
        end = start + GROUP
        groups, own = order[start:end] // GROUP, inverse[start:end, start:end]
        scales, zeros = grid.scales[:, groups], grid.zeros[:, groups].float()
        levels, errors = compensate(left[:, start:end], scales, zeros, own)
        values[:, start:end] = levels.to(values.dtype)
        left[:, end:] -= errors @ inverse[start:end, end:]
    del left
    found = Int4Weight(values[:, order.argsort()].contiguous(), grid.zeros, grid.scales)
    return better_rows(weight, second, grid, found)


def _compensated_block(left: Tensor, scales: Tensor, zeros: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of 128 inputs in their order, and the errors [O, 128] that the inputs after them make up for."""
    # An input at a time is read and written: its values lie side by side.
    left = left.T.clone(memory_format=torch.contiguous_format)
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    low, high = -zeros, LEVELS - 1 - zeros
    steps, errors = torch.empty_like(left), torch.empty_like(left)
    for i in range(GROUP):
        torch.clamp((left[i] / scales[i]).round(), low[i], high[i], out=steps[i])
        torch.div(left[i] - steps[i] * scales[i], inverse[i, i], out=errors[i])
        left[i + 1 :] -= torch.outer(inverse[i, i + 1 :], errors[i])
    return (steps + zeros).T.contiguous(), errors.T.contiguous()


_COMPENSATE = Recorded(_compensated_block)


def settled(weight: Tensor, second: Tensor, found: Int4Weight, n_rounds: int = _ROUNDS) -> Int4Weight:
    """``found`` for ``weight`` [O, I] after every value, in turn, has moved to the level that is best given the others.

    Coordinate descent on each row's error (as QuantEase, Behdin et al. 2023): no row comes out worse.
    """
    order = second.diagonal().argsort(descending=True)
    moment = second[order][:, order]
    power = moment.diagonal().clamp(min=_TINY)
    values = found.values[:, order].float()
    slope = (found.dequantize()[:, order] - weight[:, order]) @ moment
    _, settle = _blocks(on_gpu=weight.is_cuda)
    for _ in range(n_rounds):
        moved = False
        for start in range(0, weight.shape[1], GROUP):
            end = start + GROUP
            groups, own = order[start:end] // GROUP, moment[start:end, start:end]
            scales, zeros = found.scales[:, groups], found.zeros[:, groups].float()
            levels, steps = settle(values[:, start:end], slope[:, start:end], scales, zeros, own, power[start:end])
            values[:, start:end] = levels
            slope += steps @ moment[start:end]
            moved = moved or bool(steps.any())
        if not moved:
            break
    after = Int4Weight(values[:, order.argsort()].to(torch.uint8).contiguous(), found.zeros, found.scales)
    return better_rows(weight, second, found, after)


def _settled_block(
    values: Tensor, slope: Tensor, scales: Tensor, zeros: Tensor, moment: Tensor, power: Tensor
) -> tuple[Tensor, Tensor]:
    """The levels of 128 inputs in their order after each has moved to its best, and by how much each did, [O, 128]."""
    slope = slope.T.clone(memory_format=torch.contiguous_format)
    values, scales, zeros = (one.T.contiguous() for one in (values, scales, zeros))
    low, high = -zeros, LEVELS - 1 - zeros
    before = values - zeros
    held, after, steps = before * scales, torch.empty_like(before), torch.empty_like(before)
    for i in range(GROUP):
        aim = (held[i] - slope[i] / power[i]) / scales[i]
        torch.clamp(aim.round(), low[i], high[i], out=after[i])
        torch.mul(after[i] - before[i], scales[i], out=steps[i])
        slope[i + 1 :] += torch.outer(moment[i, i + 1 :], steps[i])
    return (after + zeros).T.contiguous(), steps.T.contiguous()


_SETTLE = Recorded(_settled_block)


def in_one_kernel(*, on_gpu: bool) -> bool:
    """Whether a block is rounded in one kernel: then its sums are rounded once less than in steps input by input."""
    return on_gpu and find_spec("triton") is not None


def _blocks(*, on_gpu: bool) -> tuple[Function, Function]:
    """What compensates a block, and what settles one."""
    if in_one_kernel(on_gpu=on_gpu):
        from quaver.kernels import rounding

        return rounding.compensate, rounding.settle
    return _COMPENSATE, _SETTLE


def better_rows(weight: Tensor, second: Tensor, first: Int4Weight, *others: Int4Weight) -> Int4Weight:
    """Of several forms of ``weight`` [O, I] for each row that of the least error; the first of them where they tie."""
    least, best = _errors(first, weight, second), first
    for other in others:
        errors = _errors(other, weight, second)
        better = (errors < least)[:, None]
        pairs = ((other.values, best.values), (other.zeros, best.zeros), (other.scales, best.scales))
        best, least = Int4Weight(*(torch.where(better, a, b) for a, b in pairs)), torch.minimum(errors, least)
    return best


def _errors(form: Int4Weight, weight: Tensor, second: Tensor) -> Tensor:
    """The mean squared output error [O] of ``form`` for ``weight`` [O, I], in parts that fit in little memory."""
    n_rows, errors = max(1, _PART // weight.shape[1]), []
    for start in range(0, len(weight), n_rows):
        rows = slice(start, start + n_rows)
        part = Int4Weight(form.values[rows], form.zeros[rows], form.scales[rows])
        errors.append(row_errors(part.dequantize() - weight[rows], second))
    return torch.cat(errors)


def row_errors(delta: Tensor, second: Tensor) -> Tensor:
    """The mean squared output error [O] of the weight error ``delta`` [O, I] on inputs of moment ``second``."""
    return ((delta @ second) * delta).sum(-1)


def search_clip(weight: Tensor, second: Tensor) -> Tensor:
    """How far to narrow each group's range, [O, G] in 0.525..1, for the least output error.

    Group after group, each given the errors of the others: the error never rises, and 1 (no clipping) wins ties.
    """
    delta = nearest(weight).dequantize() - weight
    shrink = weight.new_ones(len(weight), weight.shape[1] // GROUP)
    for group in range(shrink.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        own, part = second[columns, columns], weight[:, columns]
        kept = delta[:, columns]
        others = delta @ second[:, columns] - kept @ own
        shrink[:, group], delta[:, columns] = _CLIP(part, own, others, kept)
    return shrink


def _clipped_group(part: Tensor, own: Tensor, others: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """How far to narrow one group's ranges [O] for the least error, and the errors [O, 128] of the weights then.

    ``part`` [O, 128] is its weights, ``own`` its inputs' moment, ``others`` [O, 128] what the errors of other groups
    bring there, ``kept`` [O, 128] its errors as they are.
    """
    best = part.new_ones(len(part))
    least = ((kept @ own + 2 * others) * kept).sum(-1)
    for ratio in _CLIPS[1:]:
        tried = nearest(part, part.new_full((len(part), 1), ratio)).dequantize() - part
        error = ((tried @ own + 2 * others) * tried).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = best.masked_fill(better, ratio)
        kept = torch.where(better[:, None], tried, kept)
    return best, kept


_CLIP = Recorded(_clipped_group)


@dataclass(frozen=True, slots=True)
class Feed:
    """How a group's input channels hang on the channels of the module before it.

    With grouped queries, each value head feeds ``n_repeats`` consecutive heads of ``width`` inputs.
    """

    n_repeats: int
    width: int

    @classmethod
    def of(cls, layer: DecoderLayer, group: Group) -> Feed:
        """The feed of ``group`` in ``layer``."""
        n_inputs = layer.get_parameter(f"{group.linears[0]}.weight").shape[1]
        n_sources = len(layer.get_parameter(f"{group.before}.weight"))
        return cls(n_inputs // n_sources, layer.self_attn.head_dim if n_inputs != n_sources else n_inputs)

    def spread(self, scale: Tensor) -> Tensor:
        """The scale [I] of each input, from that of each source channel."""
        return scale.view(-1, 1, self.width).expand(-1, self.n_repeats, -1).reshape(-1)

    def gather(self, sizes: Tensor) -> Tensor:
        """The mean of ``sizes`` [I] over the inputs of each source channel."""
        return sizes.view(-1, self.n_repeats, self.width).mean(1).reshape(-1)


def fold(layer: DecoderLayer, group: Group, scale: Tensor) -> None:
    """Multiplies the inputs of the group's linears by ``scale`` and divides the channels before them, in place.

    ``scale`` has one value a channel of ``group.before``. The layer's function stays as it is.
    """
    inputs = Feed.of(layer, group).spread(scale)
    for linear in group.linears:
        layer.get_parameter(f"{linear}.weight").data.mul_(inputs)
    before = layer.get_parameter(f"{group.before}.weight").data
    before.div_(scale if before.dim() == 1 else scale[:, None])


def absorbable(layer: DecoderLayer, group: Group, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale to ``scale`` that ``group.before`` absorbs without rounding when stored in ``dtype``.

    A norm's weight is stored, so the scale is what is left of it exactly; a linear before is quantized afterwards from
    its float32 rows. A norm weight of 0 silences its channel and takes no scale.
    """
    before = layer.get_parameter(f"{group.before}.weight")
    if before.dim() > 1:
        return scale
    exact = before / (before / scale).to(dtype).float()
    return torch.where(exact.isfinite() & (exact > 0), exact, torch.ones_like(exact))


def search_layer(layer: DecoderLayer, moments: Mapping[str, Moment], norm_dtype: torch.dtype) -> LayerSearch:
    """The best that the search finds for the float32 ``layer``; rounding to nearest should that be better after all."""
    found = LayerSearch(copy.deepcopy(layer), moments, norm_dtype)
    found.run(layer)
    if sum(report.loss for report in found.reports) <= sum(report.loss_nearest for report in found.reports):
        return found
    plain = LayerSearch(layer, moments, norm_dtype, activation_aware=False)
    plain.run(layer)
    return plain


@dataclass(slots=True)
class LayerSearch:
    """The search over one layer, which is folded in place.

    ``weights`` holds what was found, by linear; ``reports`` one entry a group, in the order of GROUPS.
    """

    layer: DecoderLayer
    moments: Mapping[str, Moment]
    norm_dtype: torch.dtype
    activation_aware: bool = True
    weights: dict[str, Int4Weight] = field(default_factory=dict)
    reports: list[GroupReport] = field(default_factory=list)
    # What the output rows of a linear were divided by; its errors count in the units before that.
    units: dict[str, Tensor] = field(default_factory=dict)
    # What each part of it took.
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.layer.input_layernorm.weight.device)

    def run(self, original: DecoderLayer) -> None:
        """Folds, clips and rounds every group, and compares with the layer as it was."""
        # From the last group to the first: a linear's rows are settled before its columns are searched.
        with self.clock.stage("scales"):
            chosen = {group.name: self._fold_best(group) for group in reversed(GROUPS)}
        for group in GROUPS:
            self.reports.append(self._round(group, original, *chosen[group.name]))

    def _round(self, group: Group, layer: DecoderLayer, alpha: float, beta: float, scale: Tensor | None) -> GroupReport:
        """Clips and rounds the linears of a group that was folded by ``scale``; compares with those of ``layer``."""
        second = self.moments[group.name].second
        inputs = Feed.of(self.layer, group).spread(scale) if scale is not None else second.new_ones(len(second))
        folded = second / torch.outer(inputs, inputs)
        with self.clock.stage("inverse"):
            feedback = Feedback.of(folded) if self.activation_aware else None
        before = after = 0.0
        n_clipped = n_groups = 0
        for linear in group.linears:
            original, weight = layer.get_parameter(f"{linear}.weight").data, self._weight(linear)
            self.weights[linear] = self._rounded(weight, folded, feedback)
            with self.clock.stage("check"):
                errors = row_errors(self.weights[linear].dequantize() - weight, folded) * self._units(linear).square()
                energy = row_errors(original, second).sum().clamp(min=_TINY)
                before += float(row_errors(nearest(original).dequantize() - original, second).sum() / energy)
                after += float(errors.sum() / energy)
                n_clipped += int((self.weights[linear].scales < nearest(weight).scales).sum())
                n_groups += weight.numel() // GROUP
        return GroupReport(group.name, alpha, beta, before, after, n_clipped / n_groups)

    def _rounded(self, weight: Tensor, second: Tensor, feedback: Feedback | None) -> Int4Weight:
        """Each row of ``weight`` [O, I] in the ranges in which it can be rounded best."""
        if not self.activation_aware:
            return nearest(weight)
        with self.clock.stage("clip"):
            shrink = search_clip(weight, second)
        grids = [nearest(weight, shrink), *(nearest(weight, torch.full_like(shrink, share)) for share in _RANGES)]
        if feedback:
            # Rows know nothing of one another: all forms of all rows are rounded at once.
            parts = [torch.cat(one) for one in zip(*((g.values, g.zeros, g.scales) for g in grids), strict=True)]
            with self.clock.stage("rounding"):
                rounded = compensated(weight.repeat(len(grids), 1), second, Int4Weight(*parts), feedback)
            pieces = (one.chunk(len(grids)) for one in (rounded.values, rounded.zeros, rounded.scales))
            grids = [Int4Weight(*one) for one in zip(*pieces, strict=True)]
        with self.clock.stage("settling"):
            return settled(weight, second, better_rows(weight, second, *grids))

    def _weight(self, linear: str) -> Tensor:
        return self.layer.get_parameter(f"{linear}.weight").data

    def _units(self, linear: str) -> Tensor:
        weight = self._weight(linear)
        return self.units.get(linear, weight.new_ones(len(weight)))

    def _fold_best(self, group: Group) -> tuple[float, float, Tensor | None]:
        """Folds the best scale of the grid and returns its exponents and itself, None where nothing was folded."""
        best: tuple[float, float, Tensor | None] = (0.0, 0.0, None)
        if not self.activation_aware:
            return best
        moment, feed = self.moments[group.name], Feed.of(self.layer, group)
        stacked = torch.cat([self._weight(linear) for linear in group.linears])
        importance = torch.cat([self._importance(linear, moment.second) for linear in group.linears])
        least = (row_errors(nearest(stacked).dequantize() - stacked, moment.second) * importance).sum()
        for alpha, beta, raw in _grid(feed.gather(moment.size), feed.gather(_weight_size(stacked))):
            scale = absorbable(self.layer, group, raw, self.norm_dtype)
            inputs = feed.spread(scale)
            scaled = stacked * inputs
            delta = (nearest(scaled).dequantize() - scaled) / inputs
            error = (row_errors(delta, moment.second) * importance).sum()
            if error < least:
                least, best = error, (alpha, beta, scale)
        if best[2] is not None:
            fold(self.layer, group, best[2])
            if self.layer.get_parameter(f"{group.before}.weight").dim() > 1:
                self.units[group.before] = best[2]
        return best

    def _importance(self, linear: str, second: Tensor) -> Tensor:
        """What an error of each output row counts: in its own units, and as a share of the linear's output."""
        squared = self._units(linear).square()
        energy = (row_errors(self._weight(linear), second) * squared).sum()
        return squared / energy.clamp(min=_TINY)


def _weight_size(weight: Tensor) -> Tensor:
    """How large each input's weights are within their groups, [I]: the mean of |w| over the group's largest."""
    groups = weight.abs().reshape(len(weight), -1, GROUP)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).reshape(-1)


def _grid(inputs: Tensor, weights: Tensor) -> Iterator[tuple[float, float, Tensor]]:
    """Candidate scales: ``inputs ** alpha``, and the same over ``weights ** (1 - alpha)``, centred on 1."""
    inputs, weights = inputs.clamp(min=1e-8), weights.clamp(min=1e-8)
    for alpha in _EXPONENTS:
        for beta in (0.0, 1 - alpha):
            scale = (inputs**alpha / weights**beta).clamp(min=1e-4)
            scale = scale / (scale.amax() * scale.amin()).sqrt()
            if alpha or beta:
                yield alpha, beta, scale
