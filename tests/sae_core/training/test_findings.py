from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_core.evaluation.data import LabelledText
from sae_core.sae import SAE
from sae_core.sae_config import SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.training.activations import TrainingError
from sae_core.training.discovery import ClusterPlan, SilencePlan, text_acts
from sae_core.training.examples import ResidualSet
from sae_core.training.findings import (
    DiscoverySettings,
    RiskFindings,
    SilentFindings,
    find_latents,
    find_silent,
)

D = 120
PLANTED = tuple(range(8))
"""Each fires in most harmful texts of every data set."""
DATA_SET, LENGTH, KEYWORD = 20, 21, 22
PLAN = ClusterPlan(id="a", title="A", severity="warning", categories=("a",))
SETTINGS = DiscoverySettings(n_halves=20, min_stability=0.6, n_candidates=60)


def _sae() -> SAE:
    """Latent i is dimension i where it exceeds one half."""
    return SAE(
        SAEConfig(architecture="jumprelu", d_in=D, d_sae=D),
        SAEWeights(
            W_enc=torch.eye(D),
            b_enc=torch.zeros(D),
            W_dec=torch.eye(D),
            b_dec=torch.zeros(D),
            threshold=torch.full((D,), 0.5),
        ),
    )


def _texts(*, signal: bool, seed: int = 0) -> tuple[list[LabelledText], ResidualSet]:
    """Texts of six data sets, four of them with harmful texts; every latent fires at random.

    Without `signal` labels say nothing. With it the planted latents go with harm; one more goes
    with one large harmful data set, one with length (harmful texts are longer), one with a keyword.
    """
    rng = np.random.default_rng(seed)
    rows, parts = [], []
    for index in range(600):
        source = index % 6
        is_harmful = source < 4 and bool(rng.random() < (0.9 if source == 0 else 0.5))
        n = int(rng.integers(6, 14)) + (6 if is_harmful and signal else 0)
        resid = np.where(rng.random((n, D)) < 0.02, 1.0, 0.0).astype(np.float32)
        words = "some plain words"
        if signal:
            if is_harmful:
                for latent in PLANTED:
                    if rng.random() < 0.5:
                        resid[rng.integers(0, n), latent] = 3.0
            if source == 0 and is_harmful:
                resid[:, DATA_SET] = 2.0
            resid[:, LENGTH] = 0.1 * n
            if rng.random() < (0.6 if is_harmful else 0.1):
                words = "a bomb"
                resid[0, KEYWORD] = 3.0
        rows.append(
            LabelledText(
                text=words,
                is_harmful=is_harmful,
                category="a" if is_harmful else "benign_hard",
                source=f"s{source}",
            )
        )
        parts.append(resid)
    starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    resid = np.concatenate(parts)
    return rows, ResidualSet(resid, (np.arange(len(resid)) % 50).astype(np.int32), starts)


def _find(
    rows: list[LabelledText], texts: ResidualSet, settings: DiscoverySettings = SETTINGS
) -> RiskFindings:
    sae = _sae()
    acts = text_acts(sae, texts)
    return find_latents(sae, rows, texts, acts, PLAN, lambda ids: [f" w{i}" for i in ids], settings)


@pytest.fixture(scope="module")
def found() -> RiskFindings:
    return _find(*_texts(signal=True))


def test_planted_latents_are_found_and_hardly_any_other(found: RiskFindings) -> None:
    used = {latent.latent_id for latent in found.used}
    assert used >= set(PLANTED)
    assert len(used - set(PLANTED)) <= 1


def test_without_signal_almost_nothing_passes_the_false_discovery_rate() -> None:
    counts = [_find(*_texts(signal=False, seed=seed)).n_found for seed in range(1, 6)]
    assert sum(counts) <= 2


def test_a_looser_false_discovery_rate_lets_more_through() -> None:
    rows, texts = _texts(signal=False, seed=7)
    loose = _find(rows, texts, replace(SETTINGS, false_discovery_rate=0.999))
    assert loose.n_found > _find(rows, texts).n_found


@pytest.mark.parametrize(
    ("latent_id", "flag"), [(DATA_SET, "data_set"), (LENGTH, "length"), (KEYWORD, "keyword")]
)
def test_a_shortcut_is_flagged_and_not_used(found: RiskFindings, latent_id: int, flag: str) -> None:
    latent = {latent.latent_id: latent for latent in found.latents}[latent_id]
    assert flag in latent.audit.flags
    assert latent.weight == 0


def test_the_data_set_without_which_a_latent_is_lost_is_named(found: RiskFindings) -> None:
    latent = {latent.latent_id: latent for latent in found.latents}[DATA_SET]
    assert latent.audit.left_out_source == "s0"
    assert latent.audit.left_out < latent.audit.auroc


def test_examples_show_the_token_where_the_latent_is_strongest(found: RiskFindings) -> None:
    latent = found.used[0]
    acts = [example.act for example in latent.examples]
    assert acts == sorted(acts, reverse=True)
    assert acts[0] == 3.0
    assert all(example.is_harmful for example in latent.examples)
    assert all(example.token.startswith(" w") for example in latent.examples)


def test_too_few_texts_are_refused_by_name() -> None:
    rows, texts = _texts(signal=True)
    few = ClusterPlan(id="b", title="B", severity="warning", categories=("b",))
    sae = _sae()
    with pytest.raises(TrainingError, match=r"risk b: found 0 texts of it"):
        find_latents(sae, rows, texts, text_acts(sae, texts), few, lambda ids: [""] * len(ids))


SILENCE = SilencePlan(id="s", event=("benign_hard",), reference=("a",))


def test_latents_go_silent_where_the_sides_are_changed(found: RiskFindings) -> None:
    """What fires on the risk is what goes silent without it; nothing fires less on the risk."""
    rows, texts = _texts(signal=True)
    sae = _sae()
    acts = text_acts(sae, texts)

    def silent(plan: SilencePlan) -> SilentFindings:
        return find_silent(
            sae, rows, texts, acts, plan, lambda ids: [f" w{i}" for i in ids], SETTINGS
        )

    one = silent(SILENCE)
    clear = {x.found.latent_id for x in one.latents if not x.found.audit.flags}
    assert clear >= set(PLANTED)
    assert (one.n_event, one.n_reference) == (found.n_benign, found.n_positive)
    # Larger on the longer texts of the reference, and active in every text.
    assert LENGTH in {latent.latent_id for latent in found.latents}
    assert all(x.fires_on_reference > x.fires_on_event for x in one.latents)
    planted = [x for x in one.latents if x.found.latent_id in PLANTED]
    assert all(x.fires_on_reference > x.fires_on_event + 0.2 for x in planted)
    assert all(x.found.weight == 0 for x in one.latents)
    gaps = [x.fires_on_reference - x.fires_on_event for x in one.latents]
    assert gaps == sorted(gaps, reverse=True)
    other = silent(SilencePlan(id="s", event=("a",), reference=("benign_hard",)))
    assert not {x.found.latent_id for x in other.latents} & set(PLANTED)


def test_too_few_texts_of_an_event_are_refused_by_name() -> None:
    rows, texts = _texts(signal=True)
    sae = _sae()
    plan = SilencePlan(id="s", event=("nothing",), reference=("a",))
    with pytest.raises(TrainingError, match=r"silence s: found 0 texts of its event and \d+ of"):
        find_silent(sae, rows, texts, text_acts(sae, texts), plan, lambda ids: [""] * len(ids))
