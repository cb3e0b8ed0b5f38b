"""Which work on single rows is compiled on the CPU, and how threads share it.

torch goes over a row eight times for an RMS norm and five times to turn it, and attends from a
single token in calls that cost as much as their numbers. `compiled_loops` does each in one pass,
where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from sae_core.language_model.products import WORTH_TIMING, Products
from sae_core.language_model.span_attention import Terms
from sae_core.language_model.span_workers import run_ranges

Rows = Literal["auto", "torch", "compiled"]
"""`auto` compiles where it can and the model is worth the seconds; the others are for tests."""

WORTH_THREADS = 200_000
"""Numbers of a norm from which on a second thread saves more than it takes to be woken."""

WORTH_KEYS = 1_000
"""Keys that single rows see together from which on threads share them."""

_ROTATION = "apply_rotary_pos_emb"
"""What transformers' attention calls the function that turns queries and keys."""

_DTYPES = (torch.float32, torch.bfloat16)


def choose_rows(module: nn.Module, dtype: torch.dtype, rows: Rows, products: Products) -> str:
    """Whether rows are compiled or torch's; for a module on the CPU that is not trained any more.

    Args:
        products: What was asked for there; torch alone means nothing but torch.
    """
    if rows == "auto" and (
        products == "torch" or sum(p.numel() for p in module.parameters()) < WORTH_TIMING
    ):
        return "torch"
    if rows == "torch" or dtype not in _DTYPES or not has_numba():
        return "torch"
    from sae_core.language_model import compiled_loops

    # Here, not while the first tokens wait.
    for loop in (compiled_loops.attend_rows, compiled_loops.norm_rows, compiled_loops.rotate_rows):
        loop(dtype)
    return "compiled"


def has_numba() -> bool:
    """Whether the loops can be compiled: numba is there, fits what else is, and is switched on."""
    if find_spec("numba") is None:
        return False
    try:
        from numba import config
    except ImportError:  # as it raises for a NumPy that it does not know
        return False
    return not config.DISABLE_JIT  # type: ignore[attr-defined]


def compile_norms(module: nn.Module) -> int:
    """Gives every RMS norm that is one of the known kinds the compiled loop; returns how many.

    The modules stay, with their weights and hooks; their `forward` is another.
    """
    return sum(
        _compile_norm(norm)
        for norm in module.modules()
        if type(norm).__name__.endswith("RMSNorm") and _has_plain_weight(norm)
    )


def compile_rotations(module: nn.Module) -> int:
    """Gives attention layers the compiled rotary embedding; returns how many.

    Their forward is still transformers' own code, with one function that it calls replaced, and
    only where that function does what the compiled one does.
    """
    n_compiled = 0
    for layer in module.modules():
        code = type(layer).forward
        if not isinstance(code, FunctionType) or _ROTATION not in code.__code__.co_names:
            continue
        rotate = _compiled_rotation(code.__globals__.get(_ROTATION))
        if rotate is not None:
            known = {**code.__globals__, _ROTATION: rotate}
            forward = FunctionType(
                code.__code__, known, code.__name__, code.__defaults__, code.__closure__
            )
            forward.__kwdefaults__ = code.__kwdefaults__
            layer.forward = MethodType(forward, layer)
            n_compiled += 1
    return n_compiled


def attend_single_rows(
    query: Float[Tensor, "n_heads total_tokens key_dim"],
    key: Float[Tensor, "n_kv_heads total_tokens key_dim"],
    value: Float[Tensor, "n_kv_heads total_tokens value_dim"],
    rows: NDArray[np.int64],
    past: NDArray[np.int64],
    places: NDArray[np.int64],
    terms: Terms,
    mixed: Float[Tensor, "total_tokens n_heads value_dim"],
) -> None:
    """Attention of some rows, each of a stream of its own whose buffers take the new row.

    Args:
        rows: Which of the batch's.
        past: Their positions.
        places: What `KVStream.places` says of this layer, a row each.
        mixed: Takes the result.
    """
    from sae_core.language_model import compiled_loops

    loop = compiled_loops.attend_rows(query.dtype)
    batch = [compiled_loops.stored(x) for x in (query, key, value)]
    out = compiled_loops.stored(mixed)
    scaling, softcap = np.float32(terms.scaling), np.float32(terms.softcap or 0.0)

    def attend(start: int, stop: int) -> None:
        part = slice(start, stop)
        loop(*batch, rows[part], past[part], places[part], scaling, softcap, out)

    n_keys = past - places[:, 4] + 1
    if terms.window is not None:
        n_keys = np.minimum(n_keys, terms.window)
    run_ranges(attend, _bounds(n_keys, worth=WORTH_KEYS))


def _bounds(cost: NDArray[np.int64], *, worth: int) -> list[int]:
    """Where the shares of as many threads as torch uses begin and end."""
    n_threads, spent = torch.get_num_threads(), np.cumsum(cost)
    if n_threads == 1 or spent[-1] < worth:
        return [0, len(cost)]
    goals = np.arange(1, n_threads) * (spent[-1] / n_threads)
    return [0, *(np.searchsorted(spent, goals) + 1).tolist(), len(cost)]


def _has_plain_weight(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and weight.dtype in _DTYPES
        and weight.device.type == "cpu"
        and sum(1 for _ in norm.parameters()) == 1
        and not any(True for _ in norm.children())
    )


@torch.inference_mode()
def _compile_norm(norm: Any) -> bool:
    """Whether it was done; it is not where no known kind gives what the module gives."""
    weight = norm.weight.detach()
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(eps, float):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, len(weight), generator=generator)
    # Small rows too: there `eps` decides.
    x = (x * torch.logspace(-5, 2, 16)[:, None]).to(weight.dtype)
    original = norm.forward
    expected = original(x).float()
    sizes = expected.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    tolerance = 2e-6 if x.dtype == torch.float32 else 1e-2
    off: dict[Callable[[Tensor], Tensor], float] = {}
    for shift in (0.0, 1.0):
        for is_rounded_first in (False, True):
            factors = weight.float() + shift
            forward = _norm_forward(factors, weight.dtype, eps, is_rounded_first, original)
            off[forward] = float(((forward(x).float() - expected).abs().amax(dim=1) / sizes).max())
    nearest = min(off, key=lambda forward: off[forward])
    if not off[nearest] <= tolerance:
        return False
    norm.forward = nearest
    return True


def _norm_forward(
    weight: Tensor,
    dtype: torch.dtype,
    eps: float,
    is_rounded_first: bool,
    original: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    from sae_core.language_model import compiled_loops

    width, factors, small = len(weight), weight.numpy(), np.float32(eps)
    loop, like = compiled_loops.norm_rows(dtype), compiled_loops.zero(dtype)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype or x.device.type != "cpu" or x.shape[-1] != width:
            return original(x)
        out = torch.empty_like(x)
        if x.stride() != out.stride() or x.stride(-1) != 1:  # gaps, or not row by row
            x = x.contiguous()
            out = torch.empty_like(x)
        begins, ends, row_bytes = x.data_ptr(), out.data_ptr(), width * x.itemsize

        def norm(start: int, stop: int) -> None:
            first = start * row_bytes
            n = stop - start
            loop(begins + first, n, factors, small, is_rounded_first, ends + first, like)

        _in_shares(norm, x.numel() // width, x.numel())
        return out

    return forward


Rotation = Callable[..., tuple[Tensor, Tensor]]


@cache
def _compiled_rotation(original: Rotation | None) -> Rotation | None:
    """The same of queries and keys as `original` gives; None where that is of another kind."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        assert original is not None
        if unsqueeze_dim != 1 or not _can_rotate(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 5, n, 8, generator=generator).transpose(1, 2) for n in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    try:
        expected = (original or rotate)(q, k, cos, sin)
    except (TypeError, RuntimeError, AssertionError):  # it takes something else
        return None
    found = rotate(q, k, cos, sin)
    is_same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    return rotate if is_same else None


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether all are of one kind, one row after the other."""
    dtype, turns = cos.dtype, cos.shape
    return (
        dtype in _DTYPES
        and cos.device.type == "cpu"
        and len(turns) == 3
        and turns[0] == 1
        and sin.shape == turns
        and sin.dtype == q.dtype == k.dtype == dtype
        and q.shape[0] == k.shape[0] == 1
        and q.shape[2:] == k.shape[2:] == turns[1:]
        and turns[2] % 2 == 0
        and cos.is_contiguous()
        and sin.is_contiguous()
        and q.transpose(1, 2).is_contiguous()
        and k.transpose(1, 2).is_contiguous()
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from sae_core.language_model import compiled_loops

    _, n_heads, n, width = x.shape
    loop, like = compiled_loops.rotate_rows(x.dtype), compiled_loops.zero(x.dtype)
    out = torch.empty(1, n, n_heads, width, dtype=x.dtype)
    of_x, of_cos, of_sin, of_out = (t.data_ptr() for t in (x, cos, sin, out))
    row_bytes = width * x.itemsize

    def rotate(start: int, stop: int) -> None:
        first, own = start * row_bytes, start * row_bytes * n_heads
        turns = of_cos + first, of_sin + first
        loop(of_x + own, stop - start, n_heads, width, *turns, of_out + own, like)

    _in_shares(rotate, n, x.numel())
    return out.transpose(1, 2)


def _in_shares(work: Callable[[int, int], None], n_rows: int, n_numbers: int) -> None:
    """Runs `work` on rows, in threads where that is worth it."""
    n_threads = torch.get_num_threads() if n_numbers >= WORTH_THREADS else 1
    if n_threads == 1:
        work(0, n_rows)
    else:
        run_ranges(work, [n_rows * n // n_threads for n in range(n_threads + 1)])
