"""What others do to one decoder layer, in the same format, from the same moments: rivals of `quaver.awq_search`.

Each is an `awq.Search`: from the float32 layer, the moments of its groups' inputs and the type its norms are stored in
to INT4 weights. Written from the papers, with their own settings: what differs from the published code is said in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quaver.awq import Search
from quaver.awq_search import (
    Feed,
    Feedback,
    LayerSearch,
    Moment,
    absorbable,
    compensated,
    fold,
    nearest,
    row_errors,
    search_layer,
)
from quaver.int4 import GROUP, LEVELS, Int4Weight, representable
from quaver.model.layers import GROUPS, DecoderLayer, Group

_AWQ_RATIOS = tuple(index / 20 for index in range(20))
_AWQ_SHRINKS = tuple(1 - index / 20 for index in range(10))
_GPTQ_DAMPING = 0.01
_HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH, _HQQ_ROUNDS = 0.7, 10.0, 1.01, 20


def round_to_nearest(layer: DecoderLayer, moments: Mapping[str, Moment], norm_dtype: torch.dtype) -> LayerSearch:
    """Each weight to its nearest level, nothing else."""
    found = LayerSearch(layer, moments, norm_dtype, activation_aware=False)
    found.run(layer)
    return found


def gptq(layer: DecoderLayer, moments: Mapping[str, Moment], norm_dtype: torch.dtype) -> LayerSearch:
    """GPTQ (Frantar et al. 2023): inputs in the order of their power, the error of each made up for by those after it;
    groups by the inputs' own order and ranges settled before (`desc_act` with `static_groups`), damping 0.01."""

    def rounded(weight: Tensor, moment: Moment) -> Int4Weight:
        feedback, grid = Feedback.of(moment.second, _GPTQ_DAMPING), nearest(weight)
        return compensated(weight, moment.second, grid, feedback) if feedback else grid

    return _rounded(layer, moments, norm_dtype, rounded)


def hqq(layer: DecoderLayer, moments: Mapping[str, Moment], norm_dtype: torch.dtype) -> LayerSearch:
    """Half-quadratic quantization (Badri and Shaji 2023): zero points for the least error to the power of 0.7, no data.

    HQQ keeps them as fractions; here they are rounded at the end, as the format has it.
    """
    return _rounded(layer, moments, norm_dtype, lambda weight, _: half_quadratic(weight))


def half_quadratic(weight: Tensor) -> Int4Weight:
    """``weight`` [O, I] on 16 levels whose zero points half-quadratic splitting found."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = representable((high - low) / (LEVELS - 1))
    zeros, beta, least = -low / scales, _HQQ_BETA, groups.new_full((), torch.inf)
    best = zeros
    for _ in range(_HQQ_ROUNDS):
        values = (groups / scales + zeros).round().clamp(0, LEVELS - 1)
        error = groups - (values - zeros) * scales
        mean = error.abs().mean()
        if mean >= least:
            break
        least, best = mean, zeros
        kept = error.sign() * (error.abs() - error.abs().clamp(min=1e-9).pow(_HQQ_NORM - 1) / beta).relu()
        zeros = (values - (groups - kept) / scales).mean(-1, keepdim=True)
        beta *= _HQQ_GROWTH
    zeros = best.round().clamp(0, LEVELS - 1)
    values = ((groups / scales).round() + zeros).clamp(0, LEVELS - 1)
    return Int4Weight(values.flatten(1).to(torch.uint8), zeros[..., 0].to(torch.uint8), scales[..., 0])


def awq(layer: DecoderLayer, moments: Mapping[str, Moment], norm_dtype: torch.dtype) -> LayerSearch:
    """AWQ as AutoAWQ does it (Lin et al. 2023): 20 duo scales a group, found before any is folded, then clipping of all
    but queries and keys, both sides of a group alike and down to half, then rounding to nearest.

    Values feed the output linear only where heads are not shared. AutoAWQ judges queries, keys and values by what
    attention makes of them and the gates by what the MLP does, here by their own outputs; norms absorb scales without
    rounding, as in quaver.
    """
    found = LayerSearch(layer, moments, norm_dtype)
    groups = [g for g in GROUPS if Feed.of(layer, g).n_repeats == 1]
    scales = {group.name: _duo_scale(layer, group, moments[group.name], norm_dtype) for group in groups}
    for group in groups:
        fold(layer, group, scales[group.name])
    for group in GROUPS:
        second = moments[group.name].second
        inputs = (
            Feed.of(layer, group).spread(scales[group.name]) if group.name in scales else torch.ones_like(second[0])
        )
        for linear in group.linears:
            weight = layer.get_parameter(f"{linear}.weight").data
            if not linear.endswith(("q_proj", "k_proj")):
                weight = _clipped(weight, second / torch.outer(inputs, inputs))
            found.weights[linear] = _between(weight)
    return found


SEARCHES: dict[str, Search] = {
    "nearest": round_to_nearest,
    "hqq": hqq,
    "gptq": gptq,
    "awq": awq,
    "quaver": search_layer,
}
"""Every method by its name; ours last."""


def _rounded(
    layer: DecoderLayer,
    moments: Mapping[str, Moment],
    norm_dtype: torch.dtype,
    method: Callable[[Tensor, Moment], Int4Weight],
) -> LayerSearch:
    found = LayerSearch(layer, moments, norm_dtype)
    for group in GROUPS:
        for linear in group.linears:
            weight = layer.get_parameter(f"{linear}.weight").data
            found.weights[linear] = method(weight.clone(), moments[group.name])
    return found


def _between(weight: Tensor) -> Int4Weight:
    """``weight`` [O, I] to the nearest of 16 levels between the least and the most of each group, zero among them or
    not."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = representable((high - low).clamp(min=1e-5) / (LEVELS - 1))
    zeros = (-(low / scales).round()).clamp(0, LEVELS - 1)
    values = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, LEVELS - 1)
    return Int4Weight(values.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales)


def _duo_scale(layer: DecoderLayer, group: Group, moment: Moment, norm_dtype: torch.dtype) -> Tensor:
    weight = torch.cat([layer.get_parameter(f"{linear}.weight").data for linear in group.linears])
    parts = weight.abs().reshape(len(weight), -1, GROUP)
    large = (parts / (parts.amax(-1, keepdim=True) + 1e-6)).mean(0).reshape(-1)
    best, least = torch.ones_like(moment.size), torch.inf
    for ratio in _AWQ_RATIOS:
        scale = (moment.size**ratio / (large ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = absorbable(layer, group, scale / (scale.amax() * scale.amin()).sqrt(), norm_dtype)
        error = float(row_errors(_between(weight * scale).dequantize() / scale - weight, moment.second).sum())
        if error < least:
            best, least = scale, error
    return best


def _clipped(weight: Tensor, second: Tensor) -> Tensor:
    """``weight`` [O, I], each group clamped to the share of its largest value that leaves the least error there."""
    columns = []
    for start in range(0, weight.shape[1], GROUP):
        part, own = weight[:, start : start + GROUP], second[start : start + GROUP, start : start + GROUP]
        most, best = part.abs().amax(1, keepdim=True), part
        least = part.new_full((len(part),), torch.inf)
        for share in _AWQ_SHRINKS:
            tried = part.clamp(-share * most, share * most)
            error = row_errors(_between(tried).dequantize() - part, own)
            best = torch.where((error < least)[:, None], tried, best)
            least = torch.minimum(error, least)
        columns.append(best)
    return torch.cat(columns, 1)
