from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from monitor.bundle_spec import BundleSpec
from monitor.evidence import SLICE_TOKENS, ClusterPlan, Evidence, aggregate_specs
from monitor.policy import Policy
from monitor.records import Coverage, Stage, UnscoredReason, Verdict
from sae_core.aggregation import Aggregator
from sae_core.heads import Cluster, ClusterHeads, LatentTerm

AGGREGATES = (
    {"kind": "max_rolling_mean", "window": 4, "min_evidence_tokens": 2},
    {"kind": "max", "min_evidence_tokens": 0},
    {"kind": "mean", "min_evidence_tokens": 0},
    {"kind": "ema", "alpha": 0.3, "min_evidence_tokens": 0},
    {"kind": "max_rolling_mean", "window": 3, "min_evidence_tokens": 50},
    {"kind": "max_window_mean", "window": 8, "min_evidence_tokens": 0},
)
LATENTS = ((0, 3), (3, 7), (1,), (0, 1, 7), (5,), (3,))
FUSION = {"sae": 0.7, "dense": 1.3, "bias": -0.4}


@pytest.fixture
def plan() -> ClusterPlan:
    clusters = [
        {
            "id": f"c{i}",
            "title": "t",
            "severity": "warning",
            "stages": ["prompt"] if i == 1 else ["prompt", "completion"],
            "latents": [{"sae": "a", "id": n, "weight": 0.5 + n, "scale": 2.0} for n in latents],
            "fusion": FUSION,
            "aggregate": aggregate,
            "thresholds": {"flag": 1.0, "alert": 2.5, "clear": 0.5},
        }
        for i, (aggregate, latents) in enumerate(zip(AGGREGATES, LATENTS, strict=True))
    ]
    spec = BundleSpec.model_validate(
        {
            "name": "s",
            "version": 1,
            "model": {"id": "m"},
            "saes": {"a": {"path": "a", "hook_point": "blocks.0.hook_resid_post"}},
            "clusters": clusters,
            "policies": {"default": {}},
        }
    )
    heads = ClusterHeads(
        [
            Cluster(
                id=c.id,
                latents=tuple(
                    LatentTerm(
                        sae=t.sae, latent_id=t.id, weight=t.weight, scale=t.scale, label=t.label
                    )
                    for t in c.latents
                ),
                transform="identity",
                dense_weight=None,
                dense_bias=0.0,
                dense_hook_point=None,
                fusion_sae=c.fusion.sae,
                fusion_dense=c.fusion.dense,
                fusion_bias=c.fusion.bias,
            )
            for c in spec.clusters
        ],
        ["a"],
    )
    return ClusterPlan(
        spec=spec,
        heads=heads,
        aggregator=Aggregator(aggregate_specs(spec)),
        calibrated=(False,) * len(clusters),
        benign_p=lambda index, score: None,
    )


class Tokens:
    """Random engine output whose fused logits really are the heads' sum."""

    def __init__(self, plan: ClusterPlan, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = rng.integers(0, 99, n).tolist()
        self.stages = [
            None if i == 0 else (Stage.PROMPT if i < n // 2 else Stage.COMPLETION) for i in range(n)
        ]
        sparse = rng.random((n, plan.heads.n_latents)) < 0.3
        self.acts = (rng.exponential(1.5, sparse.shape) * sparse).astype(np.float32)
        self.logits = np.zeros((n, plan.n_clusters, 3), np.float32)
        self.logits[:, :, 1] = rng.normal(0, 2, (n, plan.n_clusters))
        for i in range(plan.n_clusters):
            shares = plan.heads.contributions(i, self.acts).sum(axis=1)
            self.logits[:, i, 2] = shares / FUSION["sae"]
            self.logits[:, i, 0] = shares + FUSION["dense"] * self.logits[:, i, 1] + FUSION["bias"]

    def feed(self, evidence: Evidence, start: int, stop: int) -> list[Any]:
        part = slice(start, stop)
        return evidence.add(self.ids[part], self.stages[part], self.logits[part], self.acts[part])


def evidence_of(plan: ClusterPlan) -> Evidence:
    return Evidence(plan, Policy("default", plan.spec))


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_give_the_same_bits(plan: ClusterPlan, chunk: int) -> None:
    tokens = Tokens(plan, 60)
    whole, pieces = evidence_of(plan), evidence_of(plan)
    crossings = tokens.feed(whole, 0, 60)
    pieced: list[Any] = []
    for start in range(0, 60, chunk):
        pieced += tokens.feed(pieces, start, min(start + chunk, 60))
    crossings += whole.close()
    pieced += pieces.close()
    assert whole.results(attribution=True) == pieces.results(attribution=True)
    assert sorted(crossings, key=str) == sorted(pieced, key=str)
    assert len(crossings) > 0


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_less_than_a_window_is_judged_when_its_turn_ends(plan: ClusterPlan, chunk: int) -> None:
    """A prompt of six tokens, a completion of six; the last cluster's window is of eight."""
    tokens = Tokens(plan, 12)
    tokens.stages[:] = [Stage.PROMPT] * 6 + [Stage.COMPLETION] * 6
    tokens.logits[:] = 0.0
    tokens.logits[:, 5] = 2.6
    evidence = evidence_of(plan)
    opened: list[tuple[str, Any, int | None]] = []
    for start in range(0, 12, chunk):
        opened += [
            (c.cluster, c.stage, c.position) for c in tokens.feed(evidence, start, start + chunk)
        ]
    assert opened == [("c5", Stage.PROMPT, 5)]
    assert evidence.results()[5].fused == pytest.approx(2.6)
    closed = [(c.cluster, c.stage, c.position) for c in evidence.close()]
    assert closed == [("c5", Stage.COMPLETION, 11)]
    assert evidence.close() == []


async def test_slices_give_the_same_bits_and_let_the_loop_go_on(plan: ClusterPlan) -> None:
    n = 4 * SLICE_TOKENS + 7
    tokens = Tokens(plan, n)
    whole, sliced = evidence_of(plan), evidence_of(plan)
    crossings = tokens.feed(whole, 0, n)
    turns: list[int] = []

    async def look() -> None:
        while True:
            turns.append(sliced.n_tokens)
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    found = await sliced.add_in_slices(tokens.ids, tokens.stages, tokens.logits, tokens.acts)
    looking.cancel()
    assert turns == [SLICE_TOKENS * i for i in range(1, 5)]
    assert sorted(found, key=str) == sorted(crossings, key=str)
    assert whole.results(attribution=True) == sliced.results(attribution=True)
    assert whole.coverage() == sliced.coverage()


def test_going_back_is_as_if_the_rest_had_never_come(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 60)
    straight, back = evidence_of(plan), evidence_of(plan)
    for start in range(0, 33, 5):
        tokens.feed(straight, start, min(start + 5, 33))
    tokens.feed(back, 0, 20)
    tokens.feed(back, 20, 60)
    back.truncate(33)
    assert back.n_tokens == 33
    assert back.token_ids() == tokens.ids[:33]
    scores = [
        (r.fused, r.dense, r.sae, r.stage, r.attribution)
        for r in straight.results(attribution=True)
    ]
    again = [
        (r.fused, r.dense, r.sae, r.stage, r.attribution) for r in back.results(attribution=True)
    ]
    assert scores == again


def test_attribution_sums_to_the_score(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 60)
    evidence = evidence_of(plan)
    tokens.feed(evidence, 0, 60)
    for result in evidence.results(attribution=True):
        explained = result.attribution
        assert explained is not None
        total = explained.dense + explained.bias + explained.gate
        total += sum(latent.contribution for latent in explained.latents)
        assert total == pytest.approx(result.fused, rel=1e-5, abs=1e-5)
        shares = [abs(latent.contribution) for latent in explained.latents]
        assert shares == sorted(shares, reverse=True)
        for latent in explained.latents:
            assert all(
                explained.window_start <= p < explained.window_stop for p in latent.positions
            )


def test_a_score_held_by_the_gate_says_so(plan: ClusterPlan) -> None:
    evidence = evidence_of(plan)
    Tokens(plan, 60).feed(evidence, 0, 60)
    held = evidence.results(attribution=True)[4]
    assert held.fused == 0.0
    assert held.attribution is not None
    assert held.attribution.gate < 0


def test_a_cluster_scores_only_the_stages_it_watches(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 60)
    evidence = evidence_of(plan)
    tokens.feed(evidence, 0, 60)
    prompt_only = evidence.results()[1]
    assert prompt_only.stage is Stage.PROMPT
    assert prompt_only.fused == pytest.approx(float(tokens.logits[1:30, 1, 0].max()))
    best = max(tokens.logits[1:, 1, 0])
    assert best >= prompt_only.fused


def test_excluded_tokens_never_enter_a_score(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 10)
    tokens.logits[0] = 1e6
    evidence = evidence_of(plan)
    tokens.feed(evidence, 0, 10)
    assert all(result.fused < 1e5 for result in evidence.results())


def test_coverage_adds_up(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 20)
    evidence = evidence_of(plan)
    tokens.feed(evidence, 0, 8)
    evidence.skip(tokens.ids[8:12], tokens.stages[8:12], UnscoredReason.OVERLOAD)
    tokens.feed(evidence, 12, 20)
    assert evidence.coverage() == Coverage(
        received=20,
        scored=15,
        unscored={UnscoredReason.EXCLUDED: 1, UnscoredReason.OVERLOAD: 4},
    )
    by_stage = evidence.stage_coverage()
    assert by_stage[Stage.PROMPT].received == 9
    assert by_stage[Stage.PROMPT].scored == 7
    assert by_stage[Stage.COMPLETION].unscored == {UnscoredReason.OVERLOAD: 2}


def test_coverage_goes_back_too(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 20)
    straight, back = evidence_of(plan), evidence_of(plan)
    for evidence in (straight, back):
        tokens.feed(evidence, 0, 8)
        evidence.skip(tokens.ids[8:10], tokens.stages[8:10], UnscoredReason.OVERLOAD)
    back.skip(tokens.ids[10:14], tokens.stages[10:14], UnscoredReason.DEADLINE)
    tokens.feed(back, 14, 20)
    back.truncate(10)
    assert back.coverage() == straight.coverage()
    assert back.stage_coverage() == straight.stage_coverage()


def test_token_scores_carry_positions_and_gaps(plan: ClusterPlan) -> None:
    tokens = Tokens(plan, 12)
    evidence = evidence_of(plan)
    tokens.feed(evidence, 0, 5)
    evidence.skip(tokens.ids[5:8], tokens.stages[5:8], UnscoredReason.OVERLOAD)
    tokens.feed(evidence, 8, 12)
    scores = evidence.tokens(3, 10, [f"t{i}" for i in range(3, 10)])
    assert [s.position for s in scores] == list(range(3, 10))
    assert [s.text for s in scores] == [f"t{i}" for i in range(3, 10)]
    assert scores[0].fused == tuple(float(v) for v in tokens.logits[3, :, 0])
    assert np.isnan(scores[2].fused).all()
    assert scores[5].sae == tuple(float(v) for v in tokens.logits[8, :, 2])


@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_a_part_of_the_token_ids_is_that_part_of_all(plan: ClusterPlan, chunk: int) -> None:
    tokens = Tokens(plan, 40)
    evidence = evidence_of(plan)
    for start in range(0, 40, chunk):
        tokens.feed(evidence, start, min(start + chunk, 40))
    assert evidence.token_ids() == tokens.ids
    for start in range(41):
        for stop in range(start, 41):
            assert evidence.token_ids(start, stop) == tokens.ids[start:stop]


def test_the_newest_tokens_of_a_long_stream_are_found_without_a_look_at_the_others(
    plan: ClusterPlan,
) -> None:
    class Watched(list[Any]):
        looks = 0

        def __getitem__(self, index: Any) -> Any:
            self.looks += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            self.looks += len(self)
            return super().__iter__()

    tokens = Tokens(plan, 600)
    evidence = evidence_of(plan)
    for start in range(600):
        tokens.feed(evidence, start, start + 1)
    blocks = evidence._blocks = Watched(evidence._blocks)
    assert [t.token_id for t in evidence.tokens(598, 600, ["a", "b"])] == tokens.ids[598:]
    assert evidence.token_ids(598, 600) == tokens.ids[598:]
    assert 0 < blocks.looks < 50


RULE = {
    "id": "moment",
    "severity": "critical",
    "all": [{"cluster": "c5", "above": 0.5}, {"cluster": "c0", "below": "flag"}],
}


def with_rule(plan: ClusterPlan) -> ClusterPlan:
    content = plan.spec.model_dump(mode="json")
    return replace(plan, spec=BundleSpec.model_validate({**content, "rules": [RULE]}))


@pytest.mark.parametrize("chunk", [1, 5, 30])
@pytest.mark.parametrize("seed", range(6))
def test_rules_of_a_stream_are_asked_after_every_token(
    plan: ClusterPlan, chunk: int, seed: int
) -> None:
    """However it is cut, it says what judging after each token says."""
    plan = with_rule(plan)
    tokens = Tokens(plan, 30, seed)
    policy = Policy("default", plan.spec)
    by_token = Evidence(plan, policy)
    expected = []
    for position in range(30):
        tokens.feed(by_token, position, position + 1)
        expected += [(c.cluster, position, c.score) for c in by_token.judge()[1]]
    stream = Evidence(plan, policy, rules_each_token=True)
    found = []
    for start in range(0, 30, chunk):
        crossings = tokens.feed(stream, start, start + chunk)
        found += [(c.cluster, c.position, c.score) for c in crossings if c.stage is None]
    assert found == expected
    assert stream.judge()[0].rules == by_token.judge()[0].rules


def test_a_rule_that_held_for_a_moment_stays_with_the_decision(plan: ClusterPlan) -> None:
    plan = with_rule(plan)
    tokens = Tokens(plan, 20)
    tokens.stages[:] = [Stage.PROMPT] * 20
    tokens.logits[:] = 1.0  # c5 is above its limit, c0 flags from its fourth token on
    tokens.logits[:5, 0] = 0.25
    policy = Policy("default", plan.spec)
    whole, stream = Evidence(plan, policy), Evidence(plan, policy, rules_each_token=True)
    tokens.feed(whole, 0, 20)
    crossings = tokens.feed(stream, 0, 20)
    assert [(c.cluster, c.position) for c in crossings if c.stage is None] == [("rule:moment", 0)]
    assert whole.judge()[0].rules == ()
    judgement, new = stream.judge()
    assert [rule.rule for rule in judgement.rules] == ["moment"]
    assert (judgement.verdict, new) == (Verdict.ALERT, [])
    stream.truncate(10)
    assert [rule.rule for rule in stream.judge()[0].rules] == ["moment"]


@pytest.mark.parametrize("index", [0, 2, 3, 5])
def test_token_latents_are_the_terms_of_the_tokens_that_made_the_score(
    plan: ClusterPlan, index: int
) -> None:
    tokens = Tokens(plan, 40)
    evidence = evidence_of(plan)
    tokens.feed(evidence, 0, 40)
    found = evidence.token_latents([f"c{index}"])[f"c{index}"]
    why = evidence.results(attribution=True)[index].attribution
    assert why is not None
    assert found.latents == tuple(("a", latent) for latent in LATENTS[index])
    assert (found.positions[0], found.positions[-1] + 1) == (why.window_start, why.window_stop)
    rows = tokens.logits[found.positions, index].astype(float)
    rest = FUSION["dense"] * rows[:, 1] + FUSION["bias"]
    assert found.contributions.sum(axis=1) + rest == pytest.approx(rows[:, 0], abs=1e-5)
    assert evidence_of(plan).token_latents(["c0"]) == {}
