"""What the default bundle says of itself; no model is loaded."""

from __future__ import annotations

from collections import Counter

import pytest

from monitor.bundle import Bundle, load_bundle
from monitor.canaries import n_held
from monitor.cli.common import DEFAULT_BUNDLE
from monitor.records import Verdict
from sae_core.baseline import Baseline
from sae_core.training.build import BUNDLE_PROBES


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(DEFAULT_BUNDLE)


def test_it_is_sealed_and_calibrated(bundle: Bundle) -> None:
    assert bundle.sealed
    artefact = bundle.calibration["calibration/default.json"]
    assert artefact["calibrated"] is True
    assert {c.calibration for c in bundle.spec.clusters} == {"calibration/default.json"}


def test_every_cluster_has_a_canary_that_must_raise_it(bundle: Bundle) -> None:
    raised = Counter(canary.cluster for canary in bundle.canaries)
    assert all(raised[cluster.id] for cluster in bundle.spec.clusters)
    assert sum(canary.verdict is Verdict.PASS for canary in bundle.canaries) >= 5
    assert any(canary.verdict is Verdict.ALERT for canary in bundle.canaries)


def test_every_canary_was_measured_and_holds_with_room_for_rounding(bundle: Bundle) -> None:
    expected = bundle.canary_expectation
    assert expected is not None
    limits = {c.id: c.thresholds for c in bundle.spec.clusters}
    for canary in bundle.canaries:
        fused = {name: one.fused for name, one in expected.scores[canary.id].items()}
        assert fused.keys() == limits.keys()
        if canary.cluster is None:
            assert all(score < limits[name].flag - 0.3 for name, score in fused.items()), canary.id
        else:
            least = getattr(limits[canary.cluster], canary.verdict.value)
            assert fused[canary.cluster] > least + 0.3, canary.id
    held, every = n_held(expected)
    assert held > 0.6 * every


def test_most_registered_latents_fire_on_the_probe_texts(bundle: Bundle) -> None:
    assert bundle.probes == BUNDLE_PROBES
    firings: list[int] = []
    for bands in bundle.fidelity.values():
        assert isinstance(bands["firings"], dict)
        firings += bands["firings"].values()
    assert sum(count == 0 for count in firings) < 0.15 * len(firings)


def test_the_baseline_is_of_the_registered_latents(bundle: Bundle) -> None:
    artefact = bundle.calibration["calibration/default.json"]
    baseline = Baseline.from_json(artefact["baseline"], "calibration/default.json")
    registered = sorted({(t.sae, t.id) for c in bundle.spec.clusters for t in c.latents})
    assert baseline.latents == tuple(registered)
    assert baseline.n_texts == artefact["n"]
    for sae_id in bundle.spec.saes:
        assert baseline.ratios[f"l0:{sae_id}"] > 0
        assert baseline.ratios[f"fvu:{sae_id}"] < 0.05
    scores = artefact["baseline"]["scores"]
    assert list(scores) == [cluster.id for cluster in bundle.spec.clusters]
    assert all(one != artefact["clusters"][name]["benign_scores"] for name, one in scores.items())
