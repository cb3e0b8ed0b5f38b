"""One packed step against the plain full model, for every family and every way to cut a text."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_core.errors import HookPointError, TokenError
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model import span_attention, token_streams
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.products import has_onednn
from sae_core.language_model.token_streams import KVStream
from sae_core.testing.models import D_MODEL, FAMILIES, MAX_POSITIONS, N_PIECES, tiny_model_folder

TOLERANCE = 1e-5
"""Relative to the largest value at the hook point; float32 rounding alone gives about 1e-6."""

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch was built without oneDNN")

LENGTHS = (1, 5, 21, 26)  # the sliding windows are 8 tokens wide

HookPointsOf = Callable[[str], list[HookPoint]]
OracleOf = Callable[[Path], Callable[[Sequence[int]], dict[HookPoint, Tensor]]]


def random_texts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(N_PIECES) for _ in range(length)] for length in lengths]


def run(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    chunk: Callable[[], int],
    *,
    together: bool = True,
) -> list[dict[HookPoint, Tensor]]:
    """Feeds all texts to their streams, `chunk()` tokens at a time in a shuffled order."""
    rng = random.Random(1)
    streams = [model.open_stream() for _ in texts]
    parts: list[dict[HookPoint, list[Tensor]]] = [{h: [] for h in model.hook_points} for _ in texts]
    while todo := [i for i, text in enumerate(texts) if streams[i].length < len(text)]:
        rng.shuffle(todo)
        batch = todo if together else todo[:1]
        segments = [
            Segment(streams[i], texts[i][streams[i].length : streams[i].length + chunk()])
            for i in batch
        ]
        resid = model.step(segments)
        row = 0
        for i, segment in zip(batch, segments, strict=True):
            for hook_point in model.hook_points:
                parts[i][hook_point].append(resid[hook_point][row : row + len(segment.token_ids)])
            row += len(segment.token_ids)
    return [{h: torch.cat(found[h]) for h in found} for found in parts]


def assert_same(found: dict[HookPoint, Tensor], expected: dict[HookPoint, Tensor]) -> None:
    for hook_point, resid in found.items():
        want = expected[hook_point]
        assert resid.shape == want.shape
        error = (resid - want).abs().amax(dim=-1) / want.abs().amax(dim=-1)
        assert error.max() < TOLERANCE, f"{hook_point}: {error.max():.1e}"


def chunking(name: str) -> tuple[Callable[[], int], bool]:
    rng = random.Random(2)
    return {
        "whole": (lambda: 1000, False),
        "token by token": (lambda: 1, False),
        "random chunks": (lambda: rng.randrange(1, 12), False),
        "batched whole": (lambda: 1000, True),
        "batched token by token": (lambda: 1, True),
        "batched random chunks": (lambda: rng.randrange(1, 12), True),
    }[name]


@pytest.mark.parametrize(
    "way",
    [
        "whole",
        "token by token",
        "random chunks",
        "batched whole",
        "batched token by token",
        "batched random chunks",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_equals_the_plain_full_model(
    family: str,
    way: str,
    folder_of: Callable[[str], Path],
    all_hook_points: HookPointsOf,
    oracle_of: OracleOf,
) -> None:
    folder, texts = folder_of(family), random_texts()
    oracle = oracle_of(folder)
    chunk, together = chunking(way)
    found = run(
        load_language_model(folder, all_hook_points(family)), texts, chunk, together=together
    )
    for resid, text in zip(found, texts, strict=True):
        assert_same(resid, oracle(text))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3", {"num_key_value_heads": 4}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
        ("opt", {"enable_bias": False}),
        ("phi", {"qk_layernorm": True}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": []}),
        ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
def test_variants_of_a_family_equal_the_plain_full_model(
    family: str, overrides: dict[str, object], tmp_path: Path, oracle_of: OracleOf
) -> None:
    folder = tiny_model_folder(tmp_path / "model", family, seed=3, **overrides)
    oracle, texts = oracle_of(folder), random_texts()
    model = load_language_model(folder, list(oracle([1])))
    chunk, together = chunking("batched random chunks")
    for resid, text in zip(run(model, texts, chunk, together=together), texts, strict=True):
        assert_same(resid, oracle(text))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_long_segments_are_masked_block_by_block(
    family: str,
    folder_of: Callable[[str], Path],
    oracle_of: OracleOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(span_attention, "QUERY_BLOCK", 7)
    folder, texts = folder_of(family), random_texts((61, 40))
    model = load_language_model(folder, [HookPoint(2, "resid_post")])
    oracle = oracle_of(folder)
    for resid, text in zip(run(model, texts, lambda: 23), texts, strict=True):
        assert_same(resid, oracle(text))


@needs_onednn
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [7, 16])
def test_attention_in_blocks_equals_the_plain_model(
    family: str,
    rows: int,
    folder_of: Callable[[str], Path],
    oracle_of: OracleOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(span_attention, "PRODUCT_ROWS", rows)
    monkeypatch.setattr(span_attention, "WORTH_BLOCKS", 0)
    folder, texts = folder_of(family), random_texts((61, 40))
    model = load_language_model(folder, [HookPoint(2, "resid_post")], attention="blocks")
    assert model.config.attention == "blocks"
    oracle = oracle_of(folder)
    for resid, text in zip(run(model, texts, lambda: 23), texts, strict=True):
        assert_same(resid, oracle(text))


def test_one_stream_may_have_several_segments_in_a_step(
    folder_of: Callable[[str], Path], oracle_of: OracleOf
) -> None:
    folder, (text, other) = folder_of("gemma3"), random_texts((20, 6))
    model = load_language_model(folder, [HookPoint(1, "resid_post")])
    stream, neighbour = model.open_stream(), model.open_stream()
    resid = model.step(
        [Segment(stream, text[:9]), Segment(neighbour, other), Segment(stream, text[9:])]
    )[HookPoint(1, "resid_post")]
    found = torch.cat([resid[:9], resid[15:]])
    assert_same({HookPoint(1, "resid_post"): found}, oracle_of(folder)(text))
    assert (stream.length, neighbour.length) == (20, 6)


def test_truncated_stream_goes_on_as_if_the_rest_had_never_been(
    folder_of: Callable[[str], Path], oracle_of: OracleOf
) -> None:
    folder, (text, other) = folder_of("gemma3"), random_texts((40, 25))
    model = load_language_model(folder, [HookPoint(2, "resid_post")])
    stream = model.open_stream()
    model.step([Segment(stream, text[:15] + other)])
    stream.truncate(15)
    found = model.step([Segment(stream, text[15:])])
    expected = oracle_of(folder)(text)[HookPoint(2, "resid_post")][15:]
    assert_same(found, {HookPoint(2, "resid_post"): expected})


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_window_bounds_what_a_long_stream_keeps_and_changes_nothing(
    folder_of: Callable[[str], Path],
    oracle_of: OracleOf,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(token_streams, "GO_BACK_TOKENS", 16)
    folder, (text,) = folder_of(family), random_texts((300,))
    hook_point = HookPoint(2, "resid_post")
    model = load_language_model(folder, [hook_point])
    stream = model.open_stream()
    parts = [
        model.step([Segment(stream, text[i : i + chunk])])[hook_point]
        for i in range(0, len(text), chunk)
    ]
    assert_same({hook_point: torch.cat(parts)}, oracle_of(folder)(text))
    rows = sorted(k.shape[1] for k in stream._keys if k is not None)
    window = 8
    assert rows[0] <= max(64, (window + 16) * 3 // 2, chunk + window + 16)
    assert family == "mistral" or rows[-1] >= 300


def test_going_back_over_a_window_is_exact_or_forgets_all(
    folder_of: Callable[[str], Path], oracle_of: OracleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_streams, "GO_BACK_TOKENS", 16)
    folder, (text, other) = folder_of("gemma3"), random_texts((200, 30))
    hook_point = HookPoint(2, "resid_post")
    model = load_language_model(folder, [hook_point])
    expected = oracle_of(folder)(text)[hook_point]
    outcomes = set()
    for back in (5, 16, 40, 120):
        stream = model.open_stream()
        ids = text[:150] + other
        for i in range(0, 150 + back, 5):
            model.step([Segment(stream, (ids + other * 4)[i : min(i + 5, 150 + back)])])
        stream.truncate(150)
        outcomes.add(stream.length)
        assert stream.length == (150 if back <= 16 else stream.length)
        found = model.step([Segment(stream, text[stream.length :])])[hook_point]
        assert_same({hook_point: found}, {hook_point: expected[-len(found) :]})
    assert outcomes == {0, 150}


def test_truncate_refuses_a_length_that_the_stream_does_not_have(
    folder_of: Callable[[str], Path],
) -> None:
    model = load_language_model(folder_of("llama"), [HookPoint(0, "resid_post")])
    stream = model.open_stream()
    model.step([Segment(stream, [1, 2, 3])])
    with pytest.raises(ValueError, match="found 4, expected 0 to the length 3"):
        stream.truncate(4)


def test_failed_forward_leaves_every_stream_as_it_was(
    folder_of: Callable[[str], Path], oracle_of: OracleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (text, other) = folder_of("mistral"), random_texts((90, 30))
    hook_point = HookPoint(2, "resid_post")
    model = load_language_model(folder, [hook_point])
    streams = [model.open_stream(), model.open_stream()]
    first = [Segment(streams[0], text[:10]), Segment(streams[1], other[:20])]
    second = [Segment(streams[0], text[10:]), Segment(streams[1], other[20:])]
    model.step(first)
    write = KVStream.write

    def out_of_memory_in_the_last_layer(
        self: KVStream, layer: int, start: int, keys: Tensor, values: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        if layer == 2 and self is streams[1]:
            raise MemoryError
        return write(self, layer, start, keys, values, window)

    with monkeypatch.context() as patch:
        patch.setattr(KVStream, "write", out_of_memory_in_the_last_layer)
        with pytest.raises(MemoryError):
            model.step(second)
    assert [stream.length for stream in streams] == [10, 20]
    again = model.step(second)[hook_point]
    oracle = oracle_of(folder)
    expected = torch.cat([oracle(text)[hook_point][10:], oracle(other)[hook_point][20:]])
    assert_same({hook_point: again}, {hook_point: expected})


def test_threads_may_step_at_the_same_time(
    folder_of: Callable[[str], Path], oracle_of: OracleOf
) -> None:
    folder, texts = folder_of("qwen3"), random_texts((33, 34, 35, 36))
    hook_points = [HookPoint(0, "resid_mid"), HookPoint(2, "resid_post")]
    model, oracle = load_language_model(folder, hook_points), oracle_of(folder)
    found: dict[int, dict[HookPoint, Tensor]] = {}

    def work(index: int) -> None:
        found[index] = run(model, [texts[index]], lambda: 4)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, text in enumerate(texts):
        assert_same(found[index], oracle(text))


def test_resid_is_the_callers_and_autograd_accepts_it(folder_of: Callable[[str], Path]) -> None:
    hook_point = HookPoint(0, "resid_post")
    model = load_language_model(folder_of("llama"), [hook_point])
    stream = model.open_stream()
    resid = model.step([Segment(stream, [1, 2, 3])])[hook_point]
    kept = resid.clone()
    weight = torch.ones(D_MODEL, requires_grad=True)
    (resid @ weight).sum().backward()
    model.step([Segment(stream, [4, 5])])
    assert not resid.is_inference()
    assert torch.equal(weight.grad, resid.sum(0))
    assert torch.equal(resid, kept)


def test_forward_stops_at_the_deepest_hook_point(folder_of: Callable[[str], Path]) -> None:
    model = load_language_model(folder_of("llama"), [HookPoint(1, "resid_mid")])
    ran: list[str] = []
    for name, module in model._module.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.step([Segment(model.open_stream(), [1, 2, 3])])
    assert "layers.1.self_attn" in ran
    assert "layers.0.mlp" in ran
    assert "layers.1.mlp" not in ran
    assert model.config.n_layers == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_the_last_block_are_read_before_they_are_mixed(
    family: str, folder_of: Callable[[str], Path], oracle_of: OracleOf
) -> None:
    hook_point, (text,) = HookPoint(1, "z"), random_texts((9,))
    model = load_language_model(folder_of(family), [hook_point])
    ran: list[str] = []
    for name, module in model._module.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    found = model.step([Segment(model.open_stream(), text)])
    assert_same(found, oracle_of(folder_of(family))(text))
    second = [name for name in ran if ".1." in name or name.startswith("h.1.")]
    assert any("proj" in name or "attn" in name or "query" in name for name in second)
    writes = ("o_proj", "out_proj", "dense", "attn.c_proj", "down_proj", "mlp", "fc1", "fc2")
    assert not any(name.endswith(writes) for name in second)


def test_pass_ends_at_whatever_is_reached_last(folder_of: Callable[[str], Path]) -> None:
    places = [HookPoint(1, "mlp_post"), HookPoint(1, "resid_pre"), HookPoint(0, "mlp_out")]
    model = load_language_model(folder_of("llama"), [*places, HookPoint(0, "embed")])
    ran: list[str] = []
    for name, module in model._module.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.step([Segment(model.open_stream(), [1, 2, 3])])
    assert "layers.1.mlp.up_proj" in ran
    assert "layers.1.mlp.down_proj" not in ran
    assert model.config.n_layers == 2


def test_every_hook_point_says_how_wide_it_is(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "llama", head_dim=12)
    names = {
        "hook_embed": D_MODEL,
        "blocks.1.hook_resid_mid": D_MODEL,
        "blocks.1.hook_attn_out": D_MODEL,
        "blocks.1.attn.hook_z": 4 * 12,
        "blocks.0.mlp.hook_post": 64,
        "model.layers.0.self_attn.o_proj.input": 4 * 12,
        "layers.0.self_attn.k_proj": 2 * 12,
    }
    hook_points = [parse_hook_point(name) for name in names]
    model = load_language_model(folder, hook_points)
    assert {str(h): width for h, width in model.widths.items()} == names
    for ids in ([], [4, 5, 6]):
        found = model.step([Segment(model.open_stream(), ids)])
        assert {str(h): list(t.shape) for h, t in found.items()} == {
            name: [len(ids), width] for name, width in names.items()
        }


@pytest.mark.parametrize("family", ["gemma3", "opt", "gpt2"])
def test_module_path_and_name_of_one_place_are_read_together(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    pairs = {
        "gemma3": {
            "model.layers.0.post_feedforward_layernorm.output": "blocks.0.hook_mlp_out",
            "model.layers.1.self_attn.o_proj.input": "blocks.1.attn.hook_z",
            "layers.1": "blocks.1.hook_resid_post",
        },
        "opt": {"decoder.layers.1.fc2.input": "blocks.1.mlp.hook_post"},
        "gpt2": {"h.0.mlp": "blocks.0.hook_mlp_out", "h.2.input": "blocks.2.hook_resid_pre"},
    }[family]
    hook_points = [parse_hook_point(name) for pair in pairs.items() for name in pair]
    model = load_language_model(folder_of(family), hook_points)
    found = model.step([Segment(model.open_stream(), [3, 1, 4, 1, 5])])
    assert list(found) == hook_points
    for path, name in zip(hook_points[::2], hook_points[1::2], strict=True):
        assert model.canonical(path) == name
        assert torch.equal(found[path], found[name])


@pytest.mark.parametrize(
    ("family", "path", "match"),
    [
        ("qwen3", "layers.0.self_attn.q_norm", r"shape \[1, 2, 4, 8\] for 2 tokens, expected one"),
        ("gpt2", "h.0.attn.attn_dropout", "its module did not run"),
        ("qwen3", "layers.0.self_attn.missing", "has no self_attn.missing"),
    ],
)
def test_path_that_is_not_one_row_a_token_is_refused(
    family: str, path: str, match: str, folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises(HookPointError, match=match):
        load_language_model(folder_of(family), [parse_hook_point(path)])


def test_no_tokens_give_no_rows(folder_of: Callable[[str], Path]) -> None:
    hook_point = HookPoint(0, "resid_post")
    model = load_language_model(folder_of("gpt2"), [hook_point])
    stream = model.open_stream()
    assert model.step([])[hook_point].shape == (0, D_MODEL)
    assert model.step([Segment(stream, [])])[hook_point].shape == (0, D_MODEL)
    assert model.step([Segment(stream, []), Segment(stream, [7])])[hook_point].shape == (1, D_MODEL)
    assert stream.length == 1


@pytest.mark.parametrize("bad", [-1, N_PIECES])
def test_token_id_outside_the_vocabulary_is_named(
    bad: int, folder_of: Callable[[str], Path]
) -> None:
    model = load_language_model(folder_of("gpt2"), [HookPoint(0, "resid_post")])
    good, stream = model.open_stream(), model.open_stream()
    model.step([Segment(stream, [3, 4])])
    with pytest.raises(
        TokenError, match=f"segment 1: found token id {bad} at position 4, expected 0 to 399"
    ):
        model.step([Segment(good, [1]), Segment(stream, [1, 2, bad])])
    assert (good.length, stream.length) == (0, 2)


def test_stream_longer_than_the_model_is_refused(folder_of: Callable[[str], Path]) -> None:
    model = load_language_model(folder_of("gpt2"), [HookPoint(0, "resid_post")])
    stream = model.open_stream()
    model.step([Segment(stream, [1] * MAX_POSITIONS)])
    with pytest.raises(TokenError, match="found 513 tokens in the stream, the model has 512"):
        model.step([Segment(stream, [1])])


def test_bfloat16_stays_near_float32(folder_of: Callable[[str], Path]) -> None:
    hook_point = HookPoint(2, "resid_post")
    texts = random_texts((30,))
    found = [
        run(load_language_model(folder_of("gemma2"), [hook_point], dtype=dtype), texts, lambda: 9)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    exact, rough = found[0][0][hook_point], found[1][0][hook_point]
    assert rough.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1)
    assert cosine.min() > 0.99  # 8 bits of mantissa through three random layers
