"""Compiled loops over rows: what torch and plain arithmetic give, whatever is computed beside."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from sae_core.hook_points import HookPoint
from sae_core.language_model import compiled_rows
from sae_core.language_model.compiled_rows import (
    attend_single_rows,
    choose_rows,
    compile_norms,
    compile_rotations,
)
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.span_attention import Terms
from sae_core.language_model.token_streams import PLACE_FIELDS
from sae_core.testing.models import FAMILIES, N_LAYERS

LAST = HookPoint(2, "resid_post")
NO_ROTATION = ("gpt2", "opt")
NO_RMS_NORM = ("gpt2", "gpt_neox", "opt", "phi")
DTYPES = (torch.float32, torch.bfloat16)

numba = pytest.importorskip("numba", reason="numba is not installed (extra cpu)")


def grown(model: LanguageModel, texts: list[list[int]]) -> Tensor:
    """The texts side by side: some tokens of each at once, then one of each in every step, and
    now and then several of one beside them."""
    streams = [model.open_stream() for _ in texts]
    parts: list[list[Tensor]] = [[] for _ in texts]
    at = [0] * len(texts)
    step = 0
    while any(at[i] < len(text) for i, text in enumerate(texts)):
        wanted = [5 if (step + i) % 7 == 0 else 1 for i in range(len(texts))]
        pieces = [
            text[at[i] : at[i] + n] for i, (text, n) in enumerate(zip(texts, wanted, strict=True))
        ]
        resid = model.step([Segment(s, piece) for s, piece in zip(streams, pieces, strict=True)])[
            LAST
        ]
        for i, rows in enumerate(resid.split([len(piece) for piece in pieces])):
            parts[i].append(rows)
            at[i] += len(pieces[i])
        step += 1
    return torch.cat([torch.cat(rows) for rows in parts])


def some_texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, 300, n).tolist() for n in (90, 41, 66, 1, 75)]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_rows_give_the_activations_of_torch(
    family: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "WORTH_KEYS", 0)
    folder, texts = folder_of(family), some_texts()
    found = load_language_model(folder, [LAST], rows="compiled")
    assert found.config.rows == "compiled"
    expected = load_language_model(folder, [LAST], rows="torch")
    torch.testing.assert_close(grown(found, texts), grown(expected, texts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "phi"])
def test_in_bfloat16_they_are_as_near_to_float32_as_torch(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    folder, texts = folder_of(family), some_texts()
    exact = grown(load_language_model(folder, [LAST], rows="torch"), texts)
    off = {}
    for rows in ("compiled", "torch"):
        model = load_language_model(folder, [LAST], dtype=torch.bfloat16, rows=rows)
        off[rows] = (grown(model, texts).float() - exact).square().mean().sqrt()
    assert off["compiled"] <= 1.1 * off["torch"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rms_norm_of_a_family_is_compiled(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    module = load_language_model(folder_of(family), [LAST], rows="torch").module
    norms = [m for m in module.modules() if type(m).__name__.endswith("RMSNorm")]
    assert bool(norms) == (family not in NO_RMS_NORM)
    assert compile_norms(module) == len(norms)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 640])
def test_a_norm_is_that_of_the_module(
    kind: type[nn.Module], dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "WORTH_THREADS", 0)
    torch.manual_seed(0)
    holder = nn.ModuleList([kind(width, eps=1e-6)]).requires_grad_(False).to(dtype)
    holder[0].weight.copy_(torch.randn(width))
    wide = 3 * torch.randn(1, 33, 4, width, dtype=dtype)
    inputs = {
        "in rows": wide,
        "heads first": wide.transpose(1, 2),
        "with gaps": torch.randn(1, 33, 4, width + 3, dtype=dtype)[..., 2:-1],
        "columns": torch.randn(width, 12).to(dtype).T,
        "no rows": wide[:, :0],
    }
    expected = {name: holder[0](x) for name, x in inputs.items()}
    assert compile_norms(holder) == 1
    for name, x in inputs.items():
        before, found = x.clone(), holder[0](x)
        assert found.shape == x.shape, name
        assert torch.equal(x, before), name
        # bfloat16: at most the last bit, where the sum of squares was added in another order.
        rtol = 2e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, expected[name], rtol=rtol, atol=1e-6, msg=name)
        assert (found == expected[name]).float().mean() > 0.3 or not x.numel(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    holder = nn.ModuleList([LlamaRMSNorm(8)]).requires_grad_(False).to(dtype)
    assert compile_norms(holder) == 1
    x = torch.ones(3, 8, dtype=dtype)
    x[1, 4] = float("nan")
    x[2, 4] = float("inf")
    out = holder[0](x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert out[2, 4].isnan()  # infinity by infinity, as torch has it


def test_another_type_than_the_weights_is_left_to_torch() -> None:
    holder = nn.ModuleList([LlamaRMSNorm(8)]).requires_grad_(False)
    compile_norms(holder)
    x = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(holder[0](x.to(dtype)), LlamaRMSNorm(8)(x.to(dtype)))


def test_a_norm_of_another_formula_is_left_alone() -> None:
    class CubedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            normed: Tensor = super().forward(hidden_states)
            return normed**3

    class ParameterFreeRMSNorm(nn.Module):
        eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x

    class OutsideRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            root = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
            normed: Tensor = hidden_states / (root + self.variance_epsilon)
            return normed

    others = [ParameterFreeRMSNorm(), LlamaRMSNorm(8).double(), OutsideRMSNorm(8)]
    holder = nn.ModuleList([CubedRMSNorm(8), *others])
    assert compile_norms(holder.requires_grad_(False)) == 0
    x = torch.randn(2, 8)
    torch.testing.assert_close(holder[0](x), LlamaRMSNorm(8)(x) ** 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_heads", [1, 3])
def test_a_rotation_is_that_of_the_module(
    dtype: torch.dtype, n_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "WORTH_THREADS", 0)
    rotate = compiled_rows._compiled_rotation(apply_rotary_pos_emb)
    assert rotate is not None
    q = torch.randn(1, 40, n_heads, 16).to(dtype).transpose(1, 2)
    k = torch.randn(1, 40, 2, 16).to(dtype).transpose(1, 2)
    angles = 9 * torch.randn(1, 40, 16)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected_pair = apply_rotary_pos_emb(q, k, cos, sin)
    for found, expected in zip(rotate(q, k, cos, sin), expected_pair, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # Heads that lie one behind the other, half of the width, and an odd one: torch's.
    odd = torch.randn(1, 40, n_heads, 7).to(dtype).transpose(1, 2)
    for other in (q.contiguous(), q[..., :8], odd):
        turns = [t[..., : other.shape[-1]].contiguous() for t in (cos, sin)]
        found, _ = rotate(other, other, *turns)
        expected, _ = apply_rotary_pos_emb(other, other, *turns)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_rotation_of_another_kind_is_left_alone() -> None:
    def interleaved(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        del cos, sin, unsqueeze_dim
        return q.flip(-1), k.flip(-1)

    assert compiled_rows._compiled_rotation(interleaved) is None
    assert compiled_rows._compiled_rotation(None) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_rotary_family_is_given_it(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    module = load_language_model(folder_of(family), [LAST], rows="torch").module
    assert compile_rotations(module) == (0 if family in NO_ROTATION else N_LAYERS)


@st.composite
def batches(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int | None, float, int]:
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    dims = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    past = tuple(draw(st.lists(st.integers(0, 60), min_size=1, max_size=9)))
    window = draw(st.none() | st.integers(1, 30))
    softcap = draw(st.sampled_from([0.0, 5.0]))
    return (n_kv_heads, group, *dims), past, window, softcap, draw(st.integers(0, 2**31))


def attended(
    shape: tuple[int, ...],
    past: tuple[int, ...],
    window: int | None,
    softcap: float,
    seed: int,
    dtype: torch.dtype,
    only: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """What the loop gives for rows of a batch, and what plain float64 does."""
    n_kv_heads, group, key_dim, value_dim = shape
    n, generator = len(past), torch.Generator().manual_seed(seed)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    # Rows of the batch lie between others, and heads beside each other as a projection leaves them.
    query = some(2 * n, n_kv_heads * group, key_dim).transpose(0, 1)
    key, value = some(n_kv_heads, 2 * n, key_dim), some(2 * n, n_kv_heads, value_dim)
    value = value.transpose(0, 1)
    firsts = [p // 3 for p in past]  # what lies before has been dropped
    if window is not None:
        firsts = [min(first, max(0, p + 1 - window)) for first, p in zip(firsts, past, strict=True)]
    else:
        firsts = [0] * n
    buffers = [(some(n_kv_heads, 70, key_dim), some(n_kv_heads, 70, value_dim)) for _ in range(n)]
    places = np.zeros((n, PLACE_FIELDS), np.int64)
    for i, (keys, values) in enumerate(buffers):
        addresses = keys.data_ptr(), values.data_ptr()
        places[i] = *addresses, keys.stride(0), values.stride(0), firsts[i], window or 0
    rows = np.arange(n) * 2 + 1
    terms = Terms(key_dim**-0.5, window, softcap or None)
    mixed = torch.zeros(2 * n, n_kv_heads * group, value_dim, dtype=dtype)
    positions = np.array(past)
    attend_single_rows(query, key, value, rows[only], positions[only], places[only], terms, mixed)
    expected = torch.zeros(mixed.shape, dtype=torch.float64)
    for i in range(n)[only]:
        row, own = int(rows[i]), past[i] - firsts[i]
        keys, values = (t.double() for t in buffers[i])
        assert torch.equal(buffers[i][0][:, own], key[:, row])
        assert torch.equal(buffers[i][1][:, own], value[:, row])
        seen = slice(0 if window is None else max(0, own + 1 - window), own + 1)
        for head in range(n_kv_heads * group):
            scores = keys[head // group, seen] @ query[head, row].double() * terms.scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            expected[row, head] = scores.softmax(0) @ values[head // group, seen]
    return mixed, expected


@settings(max_examples=80, deadline=None)
@given(batches())
def test_single_rows_attend_as_plain_arithmetic_does(
    batch: tuple[tuple[int, ...], tuple[int, ...], int | None, float, int],
) -> None:
    mixed, expected = attended(*batch, dtype=torch.float32)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=2e-6)
    mixed, expected = attended(*batch, dtype=torch.bfloat16)
    torch.testing.assert_close(mixed.double(), expected, rtol=2**-8, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(batches(), st.integers(0, 8), st.sampled_from(DTYPES))
def test_the_bits_of_a_row_do_not_depend_on_its_company(
    batch: tuple[tuple[int, ...], tuple[int, ...], int | None, float, int],
    which: int,
    dtype: torch.dtype,
) -> None:
    which %= len(batch[1])
    together, _ = attended(*batch, dtype=dtype)
    alone, _ = attended(*batch, dtype=dtype, only=slice(which, which + 1))
    row = 2 * which + 1
    assert torch.equal(together[row], alone[row])


def test_threads_share_rows_by_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert compiled_rows._bounds(np.array([5, 5, 5]), worth=100) == [0, 3]
        assert compiled_rows._bounds(np.array([5, 5, 5]), worth=0) == [0, 1, 2, 3]
        assert compiled_rows._bounds(np.array([100, 1, 1]), worth=0) == [0, 1, 1, 3]
        batch = (2, 2, 16, 16), (60, 3, 0, 44, 59, 8, 8), None, 0.0, 1
        alone, _ = attended(*batch, dtype=torch.float32)
        monkeypatch.setattr(compiled_rows, "WORTH_KEYS", 0)
        shared, _ = attended(*batch, dtype=torch.float32)
        assert torch.equal(alone, shared)
    finally:
        torch.set_num_threads(before)


def test_rows_are_compiled_where_it_is_worth_it_and_can_be(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_language_model(folder_of("llama"), [LAST]).module
    assert choose_rows(module, torch.float32, "auto", "auto") == "torch"  # a tiny model
    monkeypatch.setattr(compiled_rows, "WORTH_TIMING", 0)
    assert choose_rows(module, torch.float32, "auto", "auto") == "compiled"
    assert choose_rows(module, torch.float32, "auto", "torch") == "torch"
    assert choose_rows(module, torch.float16, "auto", "auto") == "torch"
    assert choose_rows(module, torch.float32, "torch", "auto") == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", True)
        assert choose_rows(module, torch.float32, "auto", "auto") == "torch"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)  # there, but its import fails
        patch.setattr(compiled_rows, "find_spec", lambda _name: object())
        assert choose_rows(module, torch.float32, "auto", "auto") == "torch"
    monkeypatch.setattr(compiled_rows, "find_spec", lambda _name: None)
    assert choose_rows(module, torch.float32, "auto", "auto") == "torch"


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "mistral", "llama"])
def test_a_stream_of_pasted_rows_keeps_its_windows(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    model = load_language_model(folder_of(family), [LAST], rows="compiled")
    text = some_texts()[0][:50]
    whole, pasted = model.open_stream(), model.open_stream()
    expected = model.step([Segment(whole, text[:40])])[LAST]
    pasted.paste_rows(0, [whole.copy_rows(0, 32)])
    found = [model.step([Segment(pasted, [token_id])])[LAST] for token_id in text[32:40]]
    torch.testing.assert_close(torch.cat(found), expected[32:], rtol=1e-5, atol=1e-5)
