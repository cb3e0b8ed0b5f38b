"""The scorer against an independent slow oracle, on a tiny model of every family.

The oracle shares no code with it: a plain Hugging Face forward pass over one text at a time, the
whole SAE in NumPy, one latent after the other, and the heads' formulas as written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_core.activation_source import GivenActivations
from sae_core.errors import HeadError, HookPointError, ScorerError, ShapeError, TokenError
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint, ModulePath
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.processing import DEFAULT_PROCESSING
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.sae import SAE
from sae_core.scorer import Scorer, SegmentScores
from sae_core.testing.models import D_MODEL, FAMILIES, tiny_model_folder
from sae_core.testing.planted import planted_sae

EARLY, LATE, LAST = (
    HookPoint(0, "resid_post"),
    HookPoint(1, "resid_post"),
    HookPoint(2, "resid_pre"),
)
SAES = {
    "early": (EARLY, planted_sae(D_MODEL, 96, architecture="topk", seed=1)),
    "late": (LATE, planted_sae(D_MODEL, 64, architecture="jumprelu", seed=2)),
    "last": (LAST, planted_sae(D_MODEL, 48, architecture="batchtopk", seed=3)),
    "relu": (LATE, planted_sae(D_MODEL, 40, architecture="relu", seed=4)),
}
UNDECIDED = 1e-4
"""A latent this close to its gate may round to either side; its token is not compared."""


def term(sae: str, latent_id: int, weight: float, scale: float) -> LatentTerm:
    return LatentTerm(sae=sae, latent_id=latent_id, weight=weight, scale=scale, label="")


def clusters() -> list[Cluster]:
    rng = np.random.default_rng(0)
    return [
        Cluster(
            id="fused",
            latents=tuple(
                term(sae, int(i), float(rng.normal()), float(rng.uniform(0.5, 3)))
                for sae, n in (("early", 96), ("late", 64), ("last", 48), ("relu", 40))
                for i in rng.choice(n, 5, replace=False)
            ),
            dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
            dense_bias=0.4,
            dense_hook_point=str(LATE),
            fusion_sae=0.6,
            fusion_dense=1.1,
            fusion_bias=-2.3,
        ),
        Cluster(
            id="clip",
            latents=(term("late", 3, 2.0, 0.5), term("early", 7, -1.0, 2.0)),
            transform="clip",
            dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
            dense_hook_point=str(LAST),
        ),
        Cluster(
            id="step",
            latents=(term("last", 5, 1.5, 1.0), term("early", 7, 1.0, 1.0)),
            transform="step",
        ),
    ]


def heads() -> ClusterHeads:
    return ClusterHeads(clusters(), list(SAES))


class Oracle:
    """Expected logits of one text, and which of its tokens float32 can decide."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            states = self.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        resid = {
            str(h): states[h.layer + (h.site == "resid_post")][0].numpy()
            for h in (EARLY, LATE, LAST)
        }
        n = len(token_ids)
        acts, decided = {}, np.ones(n, bool)
        wanted = heads().latent_ids
        for sae_id, (hook_point, sae) in SAES.items():
            acts[sae_id] = np.zeros((n, sae.config.d_sae))
            for t, x in enumerate(resid[str(hook_point)].astype(float)):
                acts[sae_id][t], margin = encode(sae, x)
                decided[t] &= margin[list(wanted[sae_id])].min() > UNDECIDED
        logits = np.zeros((n, len(clusters()), 3))
        for c, cluster in enumerate(clusters()):
            for t in range(n):
                sae_logit = sum(
                    latent.weight
                    * {"identity": a, "clip": min(a, 1.0), "step": float(a > 0)}[cluster.transform]
                    for latent in cluster.latents
                    for a in [acts[latent.sae][t, latent.latent_id] / latent.scale]
                )
                dense = 0.0
                if cluster.dense_weight is not None:
                    x = resid[str(cluster.dense_hook_point)][t].astype(float)
                    dense = float(cluster.dense_weight.astype(float) @ x) + cluster.dense_bias
                fused = cluster.fusion_bias + cluster.fusion_sae * sae_logit
                logits[t, c] = fused + cluster.fusion_dense * dense, dense, sae_logit
        return logits, decided


def encode(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All latents of one token, and how far each one is from its gate."""
    w = sae.weights
    if sae.config.apply_b_dec_to_input:
        x = x - w.b_dec.double().numpy()
    h = np.array([x @ w.W_enc[:, j].double().numpy() for j in range(sae.config.d_sae)])
    h += w.b_enc.double().numpy()
    if sae.config.architecture == "topk":
        k = sae.config.k
        assert k is not None
        order = sorted(range(len(h)), key=lambda j: (-h[j], j))
        acts = np.zeros_like(h)
        acts[order[:k]] = np.maximum(h[order[:k]], 0)
        inside, outside = h[order[k - 1]], h[order[k]]
        return acts, np.abs(h - np.where(acts > 0, outside, inside))
    if w.threshold is None:
        return np.maximum(h, 0), np.full(len(h), np.inf)
    t = w.threshold.double().numpy()
    return np.where(h > t, np.maximum(h, 0), 0), np.abs(h - t)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp(request.param), request.param)


def load(folder: Path, *more: HookPoint) -> tuple[Scorer, LanguageModel]:
    model = load_language_model(folder, [EARLY, LATE, LAST, *more])
    return Scorer(model, load_tokenizer(folder), SAES, heads()), model


def texts(model: LanguageModel) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in (1, 9, 33, 20)]


def close(found: np.ndarray, expected: np.ndarray, decided: np.ndarray) -> bool:
    assert found.shape == expected.shape
    assert decided.mean() > 0.8
    gap = np.abs(found - expected)[decided]
    return bool((gap <= 1e-4 * np.maximum(1, np.abs(expected[decided]))).all())


def test_logits_equal_the_oracle_however_the_tokens_arrive(folder: Path) -> None:
    scorer, model = load(folder)
    expected_of = Oracle(folder)
    rows = texts(model)
    expected = [expected_of(ids) for ids in rows]

    together = scorer.step([Segment(scorer.open_stream(), ids) for ids in rows])
    for scores, (logits, decided) in zip(together.segments, expected, strict=True):
        assert close(scores.logits, logits, decided)
    assert together.forward_seconds > 0
    assert together.encode_seconds > 0

    rng = np.random.default_rng(1)
    for ids, (logits, decided) in zip(rows, expected, strict=True):
        cuts = np.sort(rng.integers(0, len(ids) + 1, 4)).tolist()
        for sizes in ([len(ids)], [1] * len(ids), np.diff([0, *cuts, len(ids)]).tolist()):
            stream, start, parts = scorer.open_stream(), 0, []
            for size in sizes:
                part = ids[start : start + size]
                parts.append(scorer.step([Segment(stream, part)]).segments[0].logits)
                start += size
            assert close(np.concatenate(parts), logits, decided)
            assert stream.length == len(ids)


def test_streams_that_grow_in_one_batch_equal_the_oracle(folder: Path) -> None:
    scorer, model = load(folder)
    expected_of = Oracle(folder)
    rows = texts(model)
    streams = [scorer.open_stream() for _ in rows]
    parts: list[list[np.ndarray]] = [[] for _ in rows]
    rng = np.random.default_rng(2)
    while any(stream.length < len(ids) for stream, ids in zip(streams, rows, strict=True)):
        picked = [i for i in range(len(rows)) if rng.random() < 0.7]
        sizes = rng.integers(0, 8, len(picked)).tolist()
        segments = [
            Segment(streams[i], rows[i][streams[i].length : streams[i].length + size])
            for i, size in zip(picked, sizes, strict=True)
        ]
        for i, scores in zip(picked, scorer.step(segments).segments, strict=True):
            parts[i].append(scores.logits)
    for ids, chunks in zip(rows, parts, strict=True):
        assert close(np.concatenate(chunks), *expected_of(ids))


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("llama"), "llama")


def test_latent_acts_are_the_full_encoders_columns_in_head_order(one_folder: Path) -> None:
    scorer, model = load(one_folder)
    ids = texts(model)[2]
    scores = scorer.step([Segment(scorer.open_stream(), ids)]).segments[0]
    resid = model.step([Segment(model.open_stream(), ids)])
    expected = torch.cat(
        [
            sae.encode(resid[hook_point])[:, list(scorer.heads.latent_ids[sae_id])]
            for sae_id, (hook_point, sae) in SAES.items()
        ],
        dim=-1,
    )
    assert scores.latent_acts.shape == (len(ids), scorer.heads.n_latents)
    np.testing.assert_allclose(scores.latent_acts, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert (scores.latent_acts > 0).any()


def test_contributions_dense_and_bias_sum_to_the_fused_logit(one_folder: Path) -> None:
    scorer, model = load(one_folder)
    scores = scorer.step([Segment(scorer.open_stream(), texts(model)[2])]).segments[0]
    for c, cluster in enumerate(scorer.heads.clusters):
        parts = scorer.heads.contributions(c, scores.latent_acts).sum(axis=1)
        total = cluster.fusion_bias + cluster.fusion_dense * scores.logits[:, c, 1] + parts
        np.testing.assert_allclose(total, scores.logits[:, c, 0], rtol=1e-5, atol=1e-5)


def test_known_resid_scores_like_the_step_that_made_it(one_folder: Path) -> None:
    scorer, model = load(one_folder)
    ids = texts(model)[1]
    logits, acts = scorer.score_resid(model.step([Segment(model.open_stream(), ids)]))
    step = scorer.step([Segment(scorer.open_stream(), ids)]).segments[0]
    assert np.array_equal(logits, step.logits)
    assert np.array_equal(acts, step.latent_acts)


def as_given(resid: Mapping[HookPoint, torch.Tensor]) -> dict[HookPoint, np.ndarray]:
    """Tensors as a caller sends them: bfloat16 by its bits."""
    return {
        place: x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
        for place, x in resid.items()
    }


def test_given_activations_score_bit_for_bit_like_our_own_forward(folder: Path) -> None:
    scorer, model = load(folder)
    ids = texts(model)
    own = scorer.step([Segment(scorer.open_stream(), ids[2])]).segments[0]
    resid = model.step([Segment(model.open_stream(), ids[2])])
    source = GivenActivations(len(ids[2]), as_given(resid))
    whole, again = scorer.step([source.part(0, 33), source.part(0, 33)]).segments
    parts = [scorer.step([source.part(i, min(i + 7, 33))]).segments[0] for i in range(0, 33, 7)]
    mixed = scorer.step([source.part(0, 33), Segment(scorer.open_stream(), ids[2])])
    for found in (whole, again, *mixed.segments):
        assert np.array_equal(found.logits, own.logits)
        assert np.array_equal(found.latent_acts, own.latent_acts)
    in_parts = np.concatenate([part.logits for part in parts])
    np.testing.assert_allclose(in_parts, own.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_given_activations_are_scored_in_their_own_type(
    one_folder: Path, dtype: torch.dtype
) -> None:
    scorer, model = load(one_folder)
    ids = texts(model)[2]
    rounded = {
        place: x.to(dtype) for place, x in model.step([Segment(model.open_stream(), ids)]).items()
    }
    logits, acts = scorer.score_resid(rounded)
    given = GivenActivations(len(ids), as_given(rounded)).part(0, len(ids))
    found = scorer.step([given]).segments[0]
    assert np.array_equal(found.logits, logits)
    assert np.array_equal(found.latent_acts, acts)


def test_given_rows_that_are_not_finite_are_named_and_move_no_stream(one_folder: Path) -> None:
    scorer, model = load(one_folder)
    ids = texts(model)
    acts = as_given(model.step([Segment(model.open_stream(), ids[3])]))
    acts[LATE][17, 2] = np.inf
    stream = scorer.open_stream()
    parts = [Segment(stream, ids[1]), GivenActivations(20, acts).part(10, 20)]
    with pytest.raises(ScorerError, match="segment 1, position 17: .*blocks.1.hook_resid_post"):
        scorer.step(parts)
    assert stream.length == 0


def test_a_step_without_tokens_scores_nothing(one_folder: Path) -> None:
    scorer, _ = load(one_folder)
    scores = scorer.step([Segment(scorer.open_stream(), [])]).segments
    assert [s.logits.shape for s in scores] == [(0, 3, 3)]
    assert scorer.step([]).segments == ()


class Poisoned(LanguageModel):
    """A language model whose residual stream is damaged at one row of the batch."""

    def __init__(self, model: LanguageModel, row: int, value: float) -> None:
        self.__dict__.update(model.__dict__)
        self.row, self.value = row, value

    def step(self, segments: Sequence[Segment]) -> dict[HookPoint, torch.Tensor]:
        resid = super().step(segments)
        resid[LATE][self.row, 3] = self.value
        return resid


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_resid_names_segment_and_position_and_moves_no_stream(
    one_folder: Path, value: float
) -> None:
    healthy, model = load(one_folder)
    ids = texts(model)
    streams = [healthy.open_stream() for _ in range(2)]
    healthy.step([Segment(streams[1], ids[1])])
    scorer = Scorer(Poisoned(model, 33 + 4, value), healthy.tokenizer, SAES, heads())
    segments = [Segment(streams[0], ids[2]), Segment(streams[1], ids[3])]
    with pytest.raises(ScorerError, match="segment 1, position 13: .*blocks.1.hook_resid_post"):
        scorer.step(segments)
    assert [s.length for s in streams] == [0, 9]
    again = healthy.step(segments).segments
    assert [len(s.logits) for s in again] == [33, 20]


def test_logits_that_overflow_are_refused(one_folder: Path) -> None:
    _, model = load(one_folder)
    weight = np.full(D_MODEL, 3e38, np.float32)
    loud = ClusterHeads([Cluster(id="loud", dense_weight=weight, dense_hook_point=str(LATE))], [])
    scorer = Scorer(model, load_tokenizer(one_folder), {}, loud)
    with pytest.raises(ScorerError, match="segment 0, position 0: logits of cluster 'loud' are"):
        scorer.step([Segment(scorer.open_stream(), [5, 6])])


def test_a_token_outside_the_vocabulary_moves_no_stream(one_folder: Path) -> None:
    scorer, model = load(one_folder)
    streams = [scorer.open_stream() for _ in range(2)]
    with pytest.raises(TokenError):
        scorer.step([Segment(streams[0], [5]), Segment(streams[1], [model.config.vocab_size])])
    assert [s.length for s in streams] == [0, 0]


def test_parts_that_do_not_fit_are_refused(one_folder: Path) -> None:
    model, tokenizer = load_language_model(one_folder, [EARLY]), load_tokenizer(one_folder)
    narrow = planted_sae(D_MODEL - 1, 20, architecture="relu", seed=0)
    small = planted_sae(D_MODEL, 20, architecture="relu", seed=0)
    one = ClusterHeads([Cluster(id="x", latents=(term("a", 20, 1.0, 1.0),))], ["a"])
    with pytest.raises(
        HeadError, match=r"SAEs given are \['b'\], the heads were built for \['a'\]"
    ):
        Scorer(model, tokenizer, {"b": (EARLY, small)}, one)
    with pytest.raises(ShapeError, match="d_in is 31, the model's blocks.0.hook_resid_post is 32"):
        Scorer(model, tokenizer, {"a": (EARLY, narrow)}, one)
    with pytest.raises(HeadError, match="cluster 'x': latent 20 of SAE 'a', expected 0 to 19"):
        Scorer(model, tokenizer, {"a": (EARLY, small)}, one)
    dense = Cluster(id="y", dense_weight=np.ones(D_MODEL, np.float32), dense_hook_point=str(LATE))
    with pytest.raises(HookPointError, match="cluster 'y' reads blocks.1.hook_resid_post, the mod"):
        Scorer(model, tokenizer, {}, ClusterHeads([dense], []))


def test_each_reader_is_as_wide_as_the_place_it_reads(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "llama", head_dim=12)
    heads_out, neurons = HookPoint(1, "z"), ModulePath("layers.0.mlp.down_proj", "input")
    model, tokenizer = load_language_model(folder, [heads_out, neurons]), load_tokenizer(folder)
    sae = planted_sae(48, 20, architecture="relu", seed=0)
    weight = np.linspace(-1, 1, 64, dtype=np.float32)
    cluster = Cluster(
        id="x",
        latents=tuple(term("z", i, 2.0, 1.0) for i in range(20)),
        dense_weight=weight,
        dense_hook_point=str(neurons),
    )
    scorer = Scorer(model, tokenizer, {"z": (heads_out, sae)}, ClusterHeads([cluster], ["z"]))
    ids = [5, 6, 7, 8]
    scores = scorer.step([Segment(scorer.open_stream(), ids)]).segments[0].logits[:, 0]
    acts = model.step([Segment(model.open_stream(), ids)])
    latents = [encode(sae, x)[0].sum() for x in acts[heads_out].double().numpy()]
    expected = np.stack([acts[neurons].double().numpy() @ weight, 2.0 * np.array(latents)], -1)
    assert np.abs(expected).min() > 0
    assert np.allclose(scores[:, 1:], expected, atol=1e-5)
    with pytest.raises(ShapeError, match=r"d_in is 48, the model's layers\.0\..*input is 64 wide"):
        Scorer(model, tokenizer, {"z": (neurons, sae)}, ClusterHeads([cluster], ["z"]))
    short = Cluster(id="y", dense_weight=weight, dense_hook_point=str(heads_out))
    with pytest.raises(HeadError, match=r"has 64 entries, blocks\.1\.attn\.hook_z is 48 wide"):
        Scorer(model, tokenizer, {}, ClusterHeads([short], []))


def test_segment_scores_do_not_share_memory(one_folder: Path) -> None:
    scorer, model = load(one_folder)
    rows = texts(model)
    scores: tuple[SegmentScores, ...] = scorer.step(
        [Segment(scorer.open_stream(), ids) for ids in rows]
    ).segments
    assert all(s.logits.base is None and s.latent_acts.base is None for s in scores)


def test_saes_at_many_sites_share_one_forward_that_ends_at_the_deepest(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "gemma3")
    places = {
        "pre": HookPoint(0, "resid_pre"),
        "mid": HookPoint(1, "resid_mid"),
        "attn": HookPoint(0, "attn_out"),
        "mlp": HookPoint(1, "mlp_out"),
        "normalized": HookPoint(1, "mlp_normalized"),
        "path": ModulePath("model.layers.0.post_feedforward_layernorm", "output"),
    }
    model = load_language_model(folder, places.values())
    assert model.config.n_layers == 2
    saes = {
        name: (place, planted_sae(D_MODEL, 24, architecture="relu", seed=n))
        for n, (name, place) in enumerate(places.items())
    }
    all_latents = tuple(term(name, i, 1.0, 1.0) for name in saes for i in range(24))
    heads = ClusterHeads([Cluster(id="x", latents=all_latents)], list(saes))
    scorer = Scorer(model, load_tokenizer(folder), saes, heads)
    passes: list[str] = []
    module = model._module
    module.register_forward_pre_hook(lambda *_: passes.append("model"))
    blocks = module.layers  # type: ignore[union-attr]
    blocks[1].register_forward_hook(lambda *_: passes.append("block 1 ended"))
    acts = scorer.step([Segment(scorer.open_stream(), [5, 6, 7])]).segments[0].latent_acts
    assert passes == ["model"]  # resid_mid, the MLP and its norm come before the block's end
    read = model.step([Segment(model.open_stream(), [5, 6, 7])])
    expected = [
        [encode(sae, x)[0] for x in read[place].double().numpy()] for place, sae in saes.values()
    ]
    assert (acts > 0).any(axis=0).reshape(6, 24).any(axis=1).all()
    np.testing.assert_allclose(acts, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-5)


def test_sae_of_a_processed_model_reads_what_it_was_trained_on(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "gpt2")
    z, post = HookPoint(1, "z"), HookPoint(1, "resid_post")
    model = load_language_model(folder, [z, post])
    plain = {"z": (z, planted_sae(D_MODEL, 24, architecture="relu", seed=1))}
    plain["post"] = post, planted_sae(D_MODEL, 24, architecture="relu", seed=2)
    latents = tuple(term(name, i, 1.0, 1.0) for name in plain for i in range(24))
    heads = ClusterHeads([Cluster(id="x", latents=latents)], list(plain))
    saes = {
        name: (place, sae.replaced(card=replace(sae.card, processing="default")))
        for name, (place, sae) in plain.items()
    }
    scorer = Scorer(model, load_tokenizer(folder), saes, heads)
    read = model.step([Segment(model.open_stream(), [5, 6, 7])])
    x = {
        name: model.processed_shift(place, DEFAULT_PROCESSING)(read[place])
        for name, (place, _) in plain.items()
    }
    assert not torch.allclose(x["z"], read[z], atol=1e-3)
    assert torch.allclose(x["post"], read[post] - read[post].mean(-1, keepdim=True), atol=1e-6)
    acts = scorer.step([Segment(scorer.open_stream(), [5, 6, 7])]).segments[0].latent_acts
    expected = [plain[name][1].encode(x[name]).numpy() for name in plain]
    np.testing.assert_allclose(acts, np.concatenate(expected, axis=1), rtol=1e-5, atol=1e-5)
    raw = GivenActivations(3, as_given(read))
    assert np.array_equal(scorer.step([raw.part(0, 3)]).segments[0].latent_acts, acts)


def test_centred_sae_is_refused_where_nothing_is_centred(one_folder: Path) -> None:
    model = load_language_model(one_folder, [EARLY])
    sae = planted_sae(D_MODEL, 20, architecture="relu", seed=0)
    centred = sae.replaced(config=replace(sae.config, center_input=True))
    heads = ClusterHeads([Cluster(id="x", latents=(term("a", 3, 1.0, 1.0),))], ["a"])
    with pytest.raises(HookPointError, match="root mean square and is never centred"):
        Scorer(model, load_tokenizer(one_folder), {"a": (EARLY, centred)}, heads)


def test_sae_of_one_head_reads_its_own_columns(tmp_path: Path) -> None:
    folder, z = tiny_model_folder(tmp_path, "gpt2"), HookPoint(0, "z")
    model = load_language_model(folder, [z])
    sae = planted_sae(D_MODEL // 2, 20, architecture="relu", seed=0)
    second = sae.replaced(config=replace(sae.config, head_index=1))
    latents = tuple(term("a", i, 1.0, 1.0) for i in range(20))
    heads = ClusterHeads([Cluster(id="x", latents=latents)], ["a"])
    scorer = Scorer(model, load_tokenizer(folder), {"a": (z, second)}, heads)
    acts = scorer.step([Segment(scorer.open_stream(), [5, 6])]).segments[0].latent_acts
    read = model.step([Segment(model.open_stream(), [5, 6])])[z]
    np.testing.assert_allclose(acts, sae.encode(read[:, D_MODEL // 2 :]).numpy(), rtol=1e-5)
    third = sae.replaced(config=replace(sae.config, head_index=2))
    with pytest.raises(ShapeError, match=r"d_in is 16, the model's blocks\.0\.attn\.hook_z is 32"):
        Scorer(model, load_tokenizer(folder), {"a": (z, third)}, heads)
