"""Loops over rows that numba compiles for this processor: norms, rotations, single rows' attention.

What torch does in eight passes over a row, or in two products of one row each, is one pass here.
Arithmetic is float32; bfloat16 comes as its bits in uint16 and is rounded to even at the end. Each
row is computed by one thread in one order, so its bits do not depend on the others.

Importing this needs the package `numba`, so only `compiled_rows` does. Compiling takes a few
seconds in every process: numba's own cache cannot hold what calls such intrinsics.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload
from torch import Tensor

_AHEAD = 24
"""Rows between the one that is read and the one that memory is asked for."""

_LINE = 64
"""Bytes that memory sends at once."""

_REASSOCIATED = {"reassoc", "contract", "nsz"}
"""What lets a sum go into several lanes; infinities and NaN keep their meaning."""


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what compiled functions call; their types are those of the call."""
    # A type checker that tests put around it would not compile.
    compiled: Callable[..., Any] = njit(fastmath=_REASSOCIATED, error_model="numpy")(
        inspect.unwrap(function)
    )
    return compiled


def _intrinsic(function: Callable[..., Any]) -> Any:
    return intrinsic(inspect.unwrap(function))


@_intrinsic
def _float_of(_context, bits):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), inspect.unwrap(generate)


@_intrinsic
def _bits_of(_context, number):
    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), inspect.unwrap(generate)


@_intrinsic
def _pointer(_context, address):
    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), inspect.unwrap(generate)


@_intrinsic
def _prefetch(_context, address):
    def generate(_context, builder, _signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        whole = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, whole, whole, whole])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(function, [place, whole(0), whole(3), whole(1)])  # to read, keep, data

    return types.void(types.int64), inspect.unwrap(generate)


def _wide(x):
    """The float32 that a stored number is."""
    raise NotImplementedError


def _narrow(x, like):
    """A float32 as it is stored beside `like`."""
    raise NotImplementedError


@overload(_wide, inline="always")
def _wide_of_type(x):
    if x == types.uint16:
        return inspect.unwrap(lambda x: _float_of(np.uint32(x) << np.uint32(16)))
    return inspect.unwrap(lambda x: x)


@overload(_narrow, inline="always")
def _narrow_of_type(x, like):
    if like == types.uint16:
        return inspect.unwrap(_rounded)
    return inspect.unwrap(lambda x, like: x)


def _rounded(x, like):
    bits = _bits_of(x)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))  # NaN stays NaN
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16((bits + half) >> np.uint32(16))


@_compiled
def _exp(x):
    """exp of x <= 0 within 2e-7 of it, and of -87 below that; without a branch, for many lanes."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    scaled = x * np.float32(1.4426950408889634)
    whole = np.floor(scaled + np.float32(0.5))
    # The logarithm of 2 in two parts, so that the rest is exact to the last bit.
    rest = (x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * rest + np.float32(1.3981999507e-3)
    p = p * rest + np.float32(8.3334519073e-3)
    p = p * rest + np.float32(4.1665795894e-2)
    p = p * rest + np.float32(1.6666665459e-1)
    p = p * rest + np.float32(5.0000001201e-1)
    p = p * rest * rest + rest + np.float32(1.0)
    return p * _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


def _rows_at(address, n, width, like):
    """An array [n, width] of numbers as `like` is stored, where they are."""
    raise NotImplementedError


@overload(_rows_at, inline="always")
def _rows_of_type(address, n, width, like):
    if like == types.uint16:
        return inspect.unwrap(
            lambda address, n, width, like: carray(_pointer(address), (n, width), np.uint16)
        )
    return inspect.unwrap(
        lambda address, n, width, like: carray(_pointer(address), (n, width), np.float32)
    )


def _norm_rows(x_address, n, weight, eps, is_rounded_first, out_address, like):
    width = len(weight)
    x = _rows_at(x_address, n, width, like)
    out = _rows_at(out_address, n, width, like)
    for i in range(n):
        squares = np.float32(0.0)
        for j in range(width):
            number = _wide(x[i, j])
            squares += number * number
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        if is_rounded_first:
            for j in range(width):
                normed = _wide(_narrow(_wide(x[i, j]) * factor, like))
                out[i, j] = _narrow(normed * weight[j], like)
        else:
            for j in range(width):
                out[i, j] = _narrow(_wide(x[i, j]) * factor * weight[j], like)


def _rotate_rows(x_address, n, n_heads, width, cos_address, sin_address, out_address, like):
    half = width // 2
    x = _rows_at(x_address, n * n_heads, width, like)
    out = _rows_at(out_address, n * n_heads, width, like)
    cos = _rows_at(cos_address, n, width, like)
    sin = _rows_at(sin_address, n, width, like)
    for i in range(n * n_heads):
        token = i // n_heads
        for j in range(half):
            k = half + j
            a, b = _wide(x[i, j]), _wide(x[i, k])
            # Products are rounded before they are added, as torch's are.
            own = _wide(_narrow(a * _wide(cos[token, j]), like))
            other = _wide(_narrow(-b * _wide(sin[token, j]), like))
            out[i, j] = _narrow(own + other, like)
            own = _wide(_narrow(b * _wide(cos[token, k]), like))
            other = _wide(_narrow(a * _wide(sin[token, k]), like))
            out[i, k] = _narrow(own + other, like)


@_compiled
def _ask_for_rows(address, n_bytes):
    """Has memory send what will soon be read: rows of many streams lie far apart."""
    for offset in range(0, n_bytes, _LINE):
        _prefetch(address + offset)


@_compiled
def _score_keys(scaled, keys, first, scores):
    """Products of every head's query with the keys from `first` on, into `scores`."""
    group, key_dim = scaled.shape
    n_seen = scores.shape[1]
    row_bytes = key_dim * keys.itemsize
    address = keys.ctypes.data + first * row_bytes
    for t in range(0, n_seen - 3, 4):
        _ask_for_rows(address + (t + _AHEAD) * row_bytes, min(4, n_seen - t - _AHEAD) * row_bytes)
        k = first + t
        for g in range(0, group - 1, 2):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0.0)
            for d in range(key_dim):
                a, b = scaled[g, d], scaled[g + 1, d]
                k0, k1 = _wide(keys[k, d]), _wide(keys[k + 1, d])
                k2, k3 = _wide(keys[k + 2, d]), _wide(keys[k + 3, d])
                a0 += a * k0
                a1 += a * k1
                a2 += a * k2
                a3 += a * k3
                b0 += b * k0
                b1 += b * k1
                b2 += b * k2
                b3 += b * k3
            scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = a0, a1, a2, a3
            g += 1
            scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = b0, b1, b2, b3
        if group % 2:
            g = group - 1
            a0 = a1 = a2 = a3 = np.float32(0.0)
            for d in range(key_dim):
                a = scaled[g, d]
                a0 += a * _wide(keys[k, d])
                a1 += a * _wide(keys[k + 1, d])
                a2 += a * _wide(keys[k + 2, d])
                a3 += a * _wide(keys[k + 3, d])
            scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = a0, a1, a2, a3
    for t in range(n_seen - n_seen % 4, n_seen):
        for g in range(group):
            a0 = np.float32(0.0)
            for d in range(key_dim):
                a0 += scaled[g, d] * _wide(keys[first + t, d])
            scores[g, t] = a0


@_compiled
def _mix_values(weights, values, first, mixed):
    """Sums of the values from `first` on, by every head's weights, into `mixed`."""
    group, value_dim = mixed.shape
    n_seen = weights.shape[1]
    row_bytes = value_dim * values.itemsize
    address = values.ctypes.data + first * row_bytes
    mixed[:] = np.float32(0.0)
    for t in range(0, n_seen - 3, 4):
        _ask_for_rows(address + (t + _AHEAD) * row_bytes, min(4, n_seen - t - _AHEAD) * row_bytes)
        v = first + t
        for g in range(0, group - 1, 2):
            a0, a1, a2, a3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
            h = g + 1
            b0, b1, b2, b3 = weights[h, t], weights[h, t + 1], weights[h, t + 2], weights[h, t + 3]
            for d in range(value_dim):
                v0, v1 = _wide(values[v, d]), _wide(values[v + 1, d])
                v2, v3 = _wide(values[v + 2, d]), _wide(values[v + 3, d])
                mixed[g, d] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                mixed[h, d] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
        if group % 2:
            g = group - 1
            a0, a1, a2, a3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
            for d in range(value_dim):
                mixed[g, d] += (
                    a0 * _wide(values[v, d])
                    + a1 * _wide(values[v + 1, d])
                    + a2 * _wide(values[v + 2, d])
                    + a3 * _wide(values[v + 3, d])
                )
    for t in range(n_seen - n_seen % 4, n_seen):
        for g in range(group):
            a0 = weights[g, t]
            for d in range(value_dim):
                mixed[g, d] += a0 * _wide(values[first + t, d])


@_compiled
def _soften(scores, softcap):
    """Scores become weights, capped before where `softcap` is not 0; gives back the sum."""
    if softcap > np.float32(0.0):
        for t in range(len(scores)):
            scores[t] = softcap * np.float32(math.tanh(scores[t] / softcap))
    highest = scores[0]
    for t in range(1, len(scores)):
        highest = max(highest, scores[t])
    total = np.float32(0.0)
    for t in range(len(scores)):
        weight = _exp(scores[t] - highest)
        scores[t] = weight
        total += weight
    return total


def _attend_rows(query, key, value, rows, past, places, scaling, softcap, out):
    n_heads, key_dim = query.shape[0], query.shape[2]
    n_kv_heads, value_dim = value.shape[0], value.shape[2]
    group = n_heads // n_kv_heads
    scaled = np.empty((group, key_dim), np.float32)
    mixed = np.empty((group, value_dim), np.float32)
    for i in range(len(rows)):
        row = rows[i]
        own = past[i] - places[i, 4]
        first = 0 if places[i, 5] == 0 else max(0, own + 1 - places[i, 5])
        scores = np.empty((group, own + 1 - first), np.float32)
        for head in range(n_kv_heads):
            n_bytes = query.itemsize * head
            keys = carray(
                _pointer(places[i, 0] + n_bytes * places[i, 2]), (own + 1, key_dim), query.dtype
            )
            values = carray(
                _pointer(places[i, 1] + n_bytes * places[i, 3]), (own + 1, value_dim), query.dtype
            )
            keys[own] = key[head, row]
            values[own] = value[head, row]
            for g in range(group):
                for d in range(key_dim):
                    scaled[g, d] = _wide(query[head * group + g, row, d]) * scaling
            _score_keys(scaled, keys, first, scores)
            for g in range(group):
                share = np.float32(1.0) / _soften(scores[g], softcap)
                for t in range(scores.shape[1]):
                    scores[g, t] *= share
            _mix_values(scores, values, first, mixed)
            for g in range(group):
                for d in range(value_dim):
                    out[row, head * group + g, d] = _narrow(mixed[g, d], key[0, 0, 0])


def stored(x: Tensor) -> Any:
    """A CPU tensor's numbers as the loops take them: float32, or bfloat16's bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@cache
def norm_rows(dtype: torch.dtype) -> Callable[..., None]:
    """Compiles `(address of x [n, width], n, weight [width], eps, is_rounded_first, address of out
    [n, width], a number of their kind)`; weight is float32, rows follow each other.

    out = x / sqrt(mean(x^2) + eps) * weight; `is_rounded_first` rounds to x's type before the
    weight comes in, as Llama's does and Gemma's does not.
    """
    whole, real = types.int64, types.float32
    arguments = whole, whole, real[::1], real, types.boolean, whole, _number(dtype)
    return _compiled_for(types.void(*arguments), _norm_rows)


@cache
def rotate_rows(dtype: torch.dtype) -> Callable[..., None]:
    """Compiles `(address of x [n, n_heads, width], n, n_heads, width, addresses of cos [n, width],
    sin [n, width] and out, as x, a number of their kind)`; rows follow each other.

    The rotary embedding of rows whose first half turns against their second.
    """
    return _compiled_for(types.void(*[types.int64] * 7, _number(dtype)), _rotate_rows)


def zero(dtype: torch.dtype) -> Any:
    """A number as a tensor's are stored."""
    return np.uint16(0) if dtype == torch.bfloat16 else np.float32(0)


@cache
def attend_rows(dtype: torch.dtype) -> Callable[..., None]:
    """Compiles attention of single rows, each to its stream's buffers, which take the new row.

    `(query [n_heads, total, key_dim], key [n_kv_heads, total, key_dim], value [n_kv_heads, total,
    value_dim], rows [n], past [n], places [n, PLACE_FIELDS], scaling, softcap (0 for none), out
    [total, n_heads, value_dim])`; `rows` says which of the batch's, `past` their positions, and
    `places` is of `token_streams`.
    """
    number = _number(dtype)
    batch, integers = types.Array(number, 3, "A"), types.int64[::1]
    places = types.Array(types.int64, 2, "A")
    real = types.float32
    signature = types.void(
        batch, batch, batch, integers, integers, places, real, real, number[:, :, ::1]
    )
    return _compiled_for(signature, _attend_rows)


def _number(dtype: torch.dtype) -> Any:
    return types.uint16 if dtype == torch.bfloat16 else types.float32


def _compiled_for(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    compiled: Callable[..., None] = njit(
        signature, nogil=True, fastmath=_REASSOCIATED, error_model="numpy"
    )(inspect.unwrap(function))
    return compiled
