"""What a decoder computes a step on a CPU, compiled for this processor by numba: products, and whole positions.

PyTorch's own operators widen every weight to a float before it is multiplied. Here a 4-bit weight is multiplied as an
integer by activations of 16 bits, with a step a group of 128: their rounding is a twentieth of bfloat16's or less, and
the sum of a group is exact. All else is float32. Weights are given by their addresses, so that each layer may be stored
in its own way; whoever gives an address keeps the tensor alive. ``int4.compiled`` imports it where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

INT4, INT8, BFLOAT16 = 4, 8, 16
"""How a weight is stored: the first number of a matrix."""

_GROUP = 128
_WIDTH = 16
"""Bytes of packed weights, and activations, that one step of the inner loop reads."""
_LARGEST = 32767


def _compiler(*, parallel: bool) -> Callable[[Any], Any]:
    """numba's decorator. Sums may be taken in any order, which lets them be taken in vectors."""

    def compile_(function: FunctionType) -> Any:
        settings = {"fastmath": True, "boundscheck": False, "nogil": True, "parallel": parallel}
        # numba's cache tells functions apart by name and line alone: one that is compiled in both ways needs two names.
        named = FunctionType(function.__code__, function.__globals__, function.__name__)
        named.__qualname__ = f"{function.__qualname__}_{'shared' if parallel else 'alone'}"
        try:
            return numba.njit(cache=True, **settings)(named)
        except RuntimeError:  # There is no folder in which it could be kept.
            return numba.njit(**settings)(named)

    return compile_


_serial, _parallel = _compiler(parallel=False), _compiler(parallel=True)


def _dot_ir(context: Any, b: Any, signature: Any, args: Any) -> Any:
    """The code of ``_dot``: vectors of 16 integers, whose pairs of products are added at once where there is a way."""
    i8, i16, i32, i64, f32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
    bytes_, words, wide = ir.VectorType(i8, _WIDTH), ir.VectorType(i16, _WIDTH), ir.VectorType(i32, _WIDTH)
    ints, floats = ir.VectorType(i32, _WIDTH // 2), ir.VectorType(f32, _WIDTH // 2)
    kinds = (bytes_, i8, ir.HalfType(), words, i32, f32)
    packed, zeros, scales, x, sums, steps = (
        b.inttoptr(address, kind.as_pointer()) for address, kind in zip(args, kinds, strict=False)
    )
    even, odd, first = (ir.Constant(ints, list(ids)) for ids in (range(0, _WIDTH, 2), range(1, _WIDTH, 2), [0] * 8))

    def pairs(left: Any, right: Any) -> Any:
        product = b.mul(b.sext(left, wide), b.sext(right, wide))
        return b.add(b.shuffle_vector(product, product, even), b.shuffle_vector(product, product, odd))

    total = cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * (_WIDTH // 2)))
    n_steps = _GROUP // 2 // _WIDTH
    with cgutils.for_range(b, args[6]) as loop:
        group = loop.index
        zero = b.zext(b.load(b.gep(zeros, [group])), i32)
        # sum((q - z) * x) = sum(q * x) - z * sum(x), all whole numbers below 2**28.
        low = b.insert_element(first, b.neg(b.mul(zero, b.load(b.gep(sums, [group])))), i32(0))
        high = first
        weights, inputs = b.gep(packed, [b.mul(group, i64(n_steps))]), b.gep(x, [b.mul(group, i64(2 * n_steps))])
        for step in range(n_steps):
            both = b.zext(b.load(b.gep(weights, [i64(step)]), align=1), words)
            near = b.load(b.gep(inputs, [i64(step)]), align=2)
            far = b.load(b.gep(inputs, [i64(n_steps + step)]), align=2)
            low = b.add(low, pairs(b.and_(both, ir.Constant(words, [15] * _WIDTH)), near))
            high = b.add(high, pairs(b.lshr(both, ir.Constant(words, [4] * _WIDTH)), far))
        scale = b.fmul(b.fpext(b.load(b.gep(scales, [group])), f32), b.load(b.gep(steps, [group])))
        blank = ir.Constant(floats, ir.Undefined)
        scale = b.shuffle_vector(b.insert_element(blank, scale, i32(0)), blank, first)
        part = b.fmul(b.sitofp(b.add(low, high), floats), scale)
        b.store(b.fadd(b.load(total), part), total)
    name = f"llvm.vector.reduce.fadd.v{_WIDTH // 2}f32"
    reduce = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(f32, [f32, floats]), name)
    return b.call(reduce, [f32(0.0), b.load(total)], fastmath=("fast",))


@intrinsic  # type: ignore[untyped-decorator]
def _dot(context: Any, packed: Any, zeros: Any, scales: Any, x: Any, sums: Any, steps: Any, n_groups: Any) -> Any:
    """One row of a 4-bit weight times one row of activations, by the addresses of their first elements."""
    return types.float32(*[types.intp] * 7), _dot_ir


@intrinsic  # type: ignore[untyped-decorator]
def _int8_at(context: Any, address: Any, index: Any) -> Any:
    """Integer ``index`` of the int8 weights at ``address``, as a float32."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start = b.inttoptr(args[0], ir.IntType(8).as_pointer())
        return b.sitofp(b.sext(b.load(b.gep(start, [args[1]])), ir.IntType(32)), ir.FloatType())

    return types.float32(types.intp, types.intp), code


@intrinsic  # type: ignore[untyped-decorator]
def _bfloat16_at(context: Any, address: Any, index: Any) -> Any:
    """Number ``index`` of the bfloat16 weights at ``address``, as a float32."""

    def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
        start, i32 = b.inttoptr(args[0], ir.IntType(16).as_pointer()), ir.IntType(32)
        wide = b.shl(b.zext(b.load(b.gep(start, [args[1]])), i32), i32(16))
        return b.bitcast(wide, ir.FloatType())

    return types.float32(types.intp, types.intp), code


@_serial
def _round(x: Any, n: Any, whole: Any, sums: Any, steps: Any) -> None:
    """``x`` [n] as 16-bit integers, with a step a group; and the sums of each group's integers."""
    for group in range(n // _GROUP):
        largest = np.float32(0)
        for i in range(group * _GROUP, (group + 1) * _GROUP):
            largest = max(largest, abs(x[i]))
        steps[group] = largest / np.float32(_LARGEST)
        inverse = np.float32(_LARGEST) / largest if largest > 0 else np.float32(0)
        total = np.int32(0)
        for i in range(group * _GROUP, (group + 1) * _GROUP):
            whole[i] = np.int16(np.rint(x[i] * inverse))
            total += np.int32(whole[i])
        sums[group] = total


@_serial
def _times(matrix: Any, first: Any, last: Any, x: Any, rounded: Any, y: Any) -> None:
    """Outputs ``first`` to ``last`` of a matrix times ``x``, or times its ``rounded`` form, into ``y``.

    ``matrix``: how it is stored, and the addresses of its weights, scales and zeros.
    """
    kind, weights, scales, zeros, n = matrix[0], matrix[1], matrix[2], matrix[3], len(x)
    if kind == INT4:
        whole, sums, steps = rounded
        n_groups = n // _GROUP
        inputs, totals, sizes = whole.ctypes.data, sums.ctypes.data, steps.ctypes.data
        for out in range(first, last):
            start = out * n_groups
            y[out] = _dot(weights + out * (n // 2), zeros + start, scales + 2 * start, inputs, totals, sizes, n_groups)
    elif kind == INT8:
        for out in range(first, last):
            start, total = weights + out * n, np.float32(0)
            for i in range(n):
                total += _int8_at(start, i) * x[i]
            y[out] = total * _bfloat16_at(scales, out)
    else:
        for out in range(first, last):
            start, total = weights + 2 * out * n, np.float32(0)
            for i in range(n):
                total += _bfloat16_at(start, i) * x[i]
            y[out] = total


@_serial
def _norm(x: Any, n: Any, gain: Any, eps: Any, y: Any) -> None:
    total = np.float32(0)
    for i in range(n):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(n) + eps)
    for i in range(n):
        y[i] = x[i] * scale * gain[i]


@_serial
def _turn(x: Any, cos: Any, sin: Any) -> None:
    """Turns one head by its position, in place (see layers.Rotary)."""
    half = len(x) // 2
    for i in range(half):
        left, right = x[i], x[half + i]
        x[i] = left * cos[i] - right * sin[i]
        x[half + i] = right * cos[half + i] + left * sin[half + i]


@_serial
def _attend(query: Any, keys: Any, values: Any, n: Any, scores: Any, y: Any) -> None:
    """What one head's ``query`` finds in the first ``n`` of ``keys`` and ``values``."""
    size = len(query)
    scale, largest = np.float32(1) / np.sqrt(np.float32(size)), np.float32(-np.inf)
    for position in range(n):
        total = np.float32(0)
        for i in range(size):
            total += query[i] * keys[position, i]
        scores[position] = total * scale
        largest = max(largest, scores[position])
    total = np.float32(0)
    for position in range(n):
        scores[position] = np.exp(scores[position] - largest)
        total += scores[position]
    y[:] = 0
    for position in range(n):
        share = scores[position] / total
        for i in range(size):
            y[i] += share * values[position, i]


@_serial
def _heads(
    heads: Any, n_heads: Any, keys: Any, values: Any, first: Any, last: Any, gains: Any, eps: Any, turns: Any,
    position: Any, room: Any,
) -> None:  # fmt: skip
    """Kv heads ``first`` to ``last`` of one position: norms, turns, the cache, attention.

    ``heads`` [H + 2 H', d] are queries, keys and values; the queries become what their heads find. ``keys`` and
    ``values`` are a layer's cache [H', C, d].
    """
    n_kv, (cos, sin) = len(keys), turns
    for head in range(first, last):
        key = keys[head, position]
        _norm(heads[n_heads + head], len(key), gains[1], eps, key)
        _turn(key, cos, sin)
        for i in range(len(key)):
            values[head, position, i] = heads[n_heads + n_kv + head, i]
        for index in range(n_heads * head // n_kv, n_heads * (head + 1) // n_kv):
            query = heads[index]
            _norm(query, len(query), gains[0], eps, query)
            _turn(query, cos, sin)
            _attend(query, keys[head], values[head], position + 1, room[index], query)


@_serial
def _project(m: Any, first: Any, last: Any, x: Any, rounded: Any, y: Any, ends: Any) -> None:
    """Outputs ``first`` to ``last`` of queries, keys and values, which end in ``y`` at ``ends``."""
    start = 0
    for index in range(3):
        one, other = max(first, start), min(last, ends[index])
        if one < other:
            _times(m[index], one - start, other - start, x, rounded, y[start:])
        start = ends[index]


@_serial
def _gated(m: Any, first: Any, last: Any, x: Any, rounded: Any, gate: Any, up: Any) -> None:
    """Values ``first`` to ``last`` of the gated half of the feed-forward block, into ``gate``."""
    _times(m[4], first, last, x, rounded, gate)
    _times(m[5], first, last, x, rounded, up)
    for i in range(first, last):
        gate[i] = gate[i] / (np.float32(1) + np.exp(-gate[i])) * up[i]


@_serial
def _add(matrix: Any, first: Any, last: Any, x: Any, rounded: Any, y: Any, total: Any) -> None:
    """Adds outputs ``first`` to ``last`` of a matrix to ``total``, by way of ``y``."""
    _times(matrix, first, last, x, rounded, y)
    for i in range(first, last):
        total[i] += y[i]


def _step(
    layers: Any, gains: Any, head_gains: Any, eps: Any, turns: Any, keys: Any, values: Any, row: Any, position: Any,
    x: Any, normed: Any, heads: Any, inner: Any, rounded: Any, room: Any, n: Any,
) -> None:  # fmt: skip
    """One position of one row through all ``layers``, shared by ``n`` threads; ``normed`` becomes the hidden state."""
    (whole, sums, steps), (gate, up), n_kv, n_heads = rounded, inner, keys.shape[2], len(room)
    flat = heads.reshape(heads.size)
    found, d = flat[: n_heads * heads.shape[1]], len(x)
    ends = (len(found), len(found) + n_kv * heads.shape[1], len(flat))
    for layer in range(len(layers)):
        m, k, v = layers[layer], keys[layer, row], values[layer, row]
        _norm(x, d, gains[layer, 0], eps, normed)
        _round(normed, d, whole, sums, steps)
        for part in numba.prange(n):
            _project(m, len(flat) * part // n, len(flat) * (part + 1) // n, normed, rounded, flat, ends)
        for part in numba.prange(n):
            first, last = n_kv * part // n, n_kv * (part + 1) // n
            _heads(heads, n_heads, k, v, first, last, head_gains[layer], eps, turns, position, room)
        _round(found, len(found), whole, sums, steps)
        for part in numba.prange(n):
            _add(m[3], d * part // n, d * (part + 1) // n, found, rounded, normed, x)
        _norm(x, d, gains[layer, 1], eps, normed)
        _round(normed, d, whole, sums, steps)
        for part in numba.prange(n):
            _gated(m, len(gate) * part // n, len(gate) * (part + 1) // n, normed, rounded, gate, up)
        _round(gate, len(gate), whole, sums, steps)
        for part in numba.prange(n):
            _add(m[6], d * part // n, d * (part + 1) // n, gate, rounded, normed, x)
    _norm(x, d, gains[len(layers), 0], eps, normed)


def _product(matrix: Any, xs: Any, ys: Any, rounded: Any, n: Any) -> None:
    """The products of the rows ``xs`` with a matrix, shared by ``n`` threads."""
    whole, sums, steps = rounded
    for row in range(len(xs)):
        x, y = xs[row], ys[row]
        if matrix[0] == INT4:
            _round(x, len(x), whole, sums, steps)
        for part in numba.prange(n):
            _times(matrix, len(y) * part // n, len(y) * (part + 1) // n, x, rounded, y)


_step_alone, _step_shared = _serial(_step), _parallel(_step)
_product_alone, _product_shared = _serial(_product), _parallel(_product)


def matrix(kind: int, weights: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None) -> tuple[int, ...]:
    """How a weight is stored and where, as four numbers; whoever uses them keeps the tensors alive.

    INT4: ``weights`` [out, in / 128, 64] uint8, whose byte i of a group holds its input i in the low half and input
    64 + i in the high one; ``scales`` float16 and ``zeros`` uint8, both [out, in / 128]. INT8: int8 [out, in] and
    ``scales`` bfloat16 [out]. BFLOAT16: [out, in].
    """
    held = (weights, scales, zeros)
    assert all(tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu") for tensor in held)
    return kind, *(0 if tensor is None else tensor.data_ptr() for tensor in held)


def product(x: Tensor, stored: tuple[int, ...], n_out: int) -> Tensor:
    """The product [rows, out] of ``x`` [rows, in] with a ``stored`` matrix, in the dtype of ``x``."""
    wide, y = x.float().contiguous().numpy(), torch.empty(len(x), n_out)
    given = np.array(stored, np.int64), wide, y.numpy(), _rounded(x.shape[1])
    n_threads = threads()
    if n_threads == 1:
        _product_alone(*given, 1)
    else:
        _product_shared(*given, n_threads)
    return y.to(x.dtype)


def _rounded(n: int) -> tuple[Any, Any, Any]:
    """Room for ``n`` rounded activations, the sums of their groups, and their steps."""
    return np.empty(n, np.int16), np.empty(n // _GROUP, np.int32), np.empty(n // _GROUP, np.float32)


class Stack:
    """A stack of decoder layers that takes one position at a time, with room for all it computes on the way."""

    def __init__(
        self, layers: Any, gains: Tensor, head_gains: Tensor, eps: float, shape: tuple[int, int, int, int]
    ) -> None:
        """``layers`` [L][7] matrices: queries, keys, values, output, gate, up, down.

        ``gains`` [L + 1, 2, D] of the norms, the last norm's in the last row;
        ``head_gains`` [L, 2, d] of the query's and the key's norms; ``shape``: heads, kv heads, feed-forward size, and
        the positions that there is room for.
        """
        (n_heads, n_kv, n_inner, capacity), size = shape, head_gains.shape[2]
        self._layers, self._eps = np.array(layers, np.int64), np.float32(eps)
        self._gains, self._head_gains = gains.float().contiguous().numpy(), head_gains.float().contiguous().numpy()
        self._x, self._normed = (np.empty(gains.shape[2], np.float32) for _ in range(2))
        self._heads = np.empty((n_heads + 2 * n_kv, size), np.float32)
        self._inner = np.empty(n_inner, np.float32), np.empty(n_inner, np.float32)
        self._rounded = _rounded(max(n_heads * size, n_inner, len(self._x)))
        self._room = np.empty((n_heads, capacity), np.float32)
        # A step lets go of Python's own lock, and there is one room.
        self._lock = Lock()

    def step(
        self, x: Tensor, turns: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], row: int, position: int
    ) -> Tensor:
        """The hidden state [D], float32, of the input ``x`` [D] at ``position`` of a ``row`` of the cache's.

        ``turns``: cosines and sines [d] of the position; ``cache``: keys and values [L, B, H, C, d], float32. Raises
        IndexError for a position beyond the cache.
        """
        cos, sin = (turn.numpy() for turn in turns)
        keys, values = (part.numpy() for part in cache)
        if position >= min(keys.shape[3], self._room.shape[1]):
            raise IndexError(f"position {position} is beyond a cache of {keys.shape[3]}")
        given = (
            self._layers, self._gains, self._head_gains, self._eps, (cos, sin), keys, values, row, position, self._x,
            self._normed, self._heads, self._inner, self._rounded, self._room,
        )  # fmt: skip
        n_threads = threads()
        with self._lock:
            self._x[:] = x.float().numpy()
            if n_threads == 1:
                _step_alone(*given, 1)
            else:
                _step_shared(*given, n_threads)
            return torch.from_numpy(self._normed.copy())


@cache
def _most_threads() -> int:
    """How many threads may share a step: one where numba has its own pool, slow and not for several callers."""
    n_threads = int(numba.get_num_threads())  # This starts them.
    return n_threads if numba.threading_layer() != "workqueue" else 1


def threads() -> int:
    """As many threads as PyTorch uses, so that ``torch.set_num_threads`` holds for all."""
    n_threads = torch.get_num_threads()
    return min(n_threads, _most_threads()) if n_threads > 1 else 1
