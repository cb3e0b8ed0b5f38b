"""Labelled texts to the latents of each risk: found, audited, grouped, weighted, with examples.

    text means -> latent_tests -> false discoveries controlled -> stability_selection
               -> shortcut_audit -> those not flagged: group_latents, weights, labels, examples

Flagged latents are kept in the findings, with what speaks against them, and get no weight.

The inverse question, which latents go silent, is the same with the sides changed, and gives none a
weight: a cluster's are not negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from sae_core.evaluation.data import LabelledText
from sae_core.sae import SAE
from sae_core.training.activations import TrainingError
from sae_core.training.discovery import ClusterPlan, SilencePlan, TextActs, latent_labels
from sae_core.training.examples import ResidualSet
from sae_core.training.latent_examples import Example, strongest_examples
from sae_core.training.latent_groups import group_latents
from sae_core.training.latent_tests import latent_tests, stability_selection
from sae_core.training.nuisance import RowGroups, latent_weights
from sae_core.training.shortcut_audit import LatentAudit, audit_data, audit_latents
from sae_core.training.token_features import latent_acts_of, latent_scales, text_means

SCALE_QUANTILE = 0.9
TokenTexts = Callable[[Sequence[int]], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverySettings:
    """What counts as found."""

    false_discovery_rate: float = 0.01
    n_candidates: int = 256
    """Of the latents found, the strongest by AUROC, which stability selection chooses among."""
    min_stability: float = 0.7
    """Share of halves of the texts that must select a latent."""
    n_halves: int = 40
    n_latents: int = 32
    """Latents that a risk keeps."""
    min_positive: int = 20
    """Texts that a risk needs to be looked for."""
    n_examples: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.false_discovery_rate < 1:
            raise TrainingError(
                f"false_discovery_rate is {self.false_discovery_rate}, expected between 0 and 1"
            )
        if not 0.5 < self.min_stability <= 1:
            raise TrainingError(f"min_stability is {self.min_stability}, expected in (0.5, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLatent:
    """One latent of one risk and all that is known of it."""

    latent_id: int
    mean_difference: float
    auroc: float
    q_value: float
    stability: float
    """Share of halves of the texts in which a sparse model selected it."""
    audit: LatentAudit
    group: int
    """Latents of one number belong together, within the risk."""
    weight: float
    """0 where it is not used."""
    scale: float
    label: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskFindings:
    """What was found for one risk."""

    plan: ClusterPlan
    n_positive: int
    n_benign: int
    n_found: int
    """Latents below the false discovery rate."""
    n_candidates: int
    """Of these, how many stability selection chose among."""
    expected_false: float
    """Bound on the selected latents that are of no use."""
    latents: tuple[FoundLatent, ...]
    """Selected ones: those in use first, each part by weight, then by stability."""

    @property
    def used(self) -> tuple[FoundLatent, ...]:
        """Those with weight."""
        return tuple(latent for latent in self.latents if latent.weight > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentLatent:
    """A latent that fires in more texts of the reference than of the event."""

    found: FoundLatent
    """AUROC and mean difference are those of the reference over the event; the weight is 0."""
    fires_on_reference: float
    """Share of its texts in which the latent is active."""
    fires_on_event: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentFindings:
    """What goes silent where, as `RiskFindings` has it."""

    plan: SilencePlan
    n_reference: int
    n_event: int
    n_found: int
    n_candidates: int
    expected_false: float
    latents: tuple[SilentLatent, ...]
    """Selected ones, by how much larger the share is on the reference."""


class _Contrast(NamedTuple):
    n_found: int
    n_candidates: int
    expected_false: float
    latents: tuple[FoundLatent, ...]


def find_latents(
    sae: SAE,
    rows: Sequence[LabelledText],
    texts: ResidualSet,
    acts: TextActs,
    plan: ClusterPlan,
    token_texts: TokenTexts,
    settings: DiscoverySettings = DiscoverySettings(),
) -> RiskFindings:
    """The latents of one risk.

    Raises:
        TrainingError: Fewer texts of the risk, or benign ones, than `settings.min_positive`.
    """
    is_positive = np.array([plan.has(row) for row in rows])
    is_benign = np.array([not row.is_harmful for row in rows])
    n_positive, n_benign = int(is_positive.sum()), int(is_benign.sum())
    if min(n_positive, n_benign) < settings.min_positive:
        raise TrainingError(
            f"risk {plan.id}: found {n_positive} texts of it and {n_benign} benign, "
            f"expected at least {settings.min_positive} of each"
        )
    contrast = _contrast(
        sae, rows, texts, acts, is_positive, is_benign, token_texts, settings, weighs=True
    )
    return RiskFindings(plan=plan, n_positive=n_positive, n_benign=n_benign, **contrast._asdict())


def find_silent(
    sae: SAE,
    rows: Sequence[LabelledText],
    texts: ResidualSet,
    acts: TextActs,
    plan: SilencePlan,
    token_texts: TokenTexts,
    settings: DiscoverySettings = DiscoverySettings(),
) -> SilentFindings:
    """The latents that go silent in the texts of one kind, beside those of another.

    Raises:
        TrainingError: Fewer texts of either kind than `settings.min_positive`.
    """
    on_event = np.array([row.category in plan.event for row in rows])
    on_reference = np.array([row.category in plan.reference for row in rows])
    n_event, n_reference = int(on_event.sum()), int(on_reference.sum())
    if min(n_event, n_reference) < settings.min_positive:
        raise TrainingError(
            f"silence {plan.id}: found {n_event} texts of its event and {n_reference} of its "
            f"reference, expected at least {settings.min_positive} of each"
        )
    contrast = _contrast(
        sae, rows, texts, acts, on_reference, on_event, token_texts, settings, weighs=False
    )
    latents = [
        SilentLatent(
            found=latent,
            fires_on_reference=float(acts.fires[on_reference, latent.latent_id].mean()),
            fires_on_event=float(acts.fires[on_event, latent.latent_id].mean()),
        )
        for latent in contrast.latents
    ]
    # What only fires less strongly, or in a smaller part of longer texts, is not silent.
    latents = [one for one in latents if one.fires_on_event < one.fires_on_reference]
    latents.sort(key=lambda one: one.fires_on_event - one.fires_on_reference)
    return SilentFindings(
        plan=plan,
        n_reference=n_reference,
        n_event=n_event,
        n_found=contrast.n_found,
        n_candidates=contrast.n_candidates,
        expected_false=contrast.expected_false,
        latents=tuple(latents),
    )


def _contrast(
    sae: SAE,
    rows: Sequence[LabelledText],
    texts: ResidualSet,
    acts: TextActs,
    is_positive: Bool[ndarray, " n_texts"],
    is_negative: Bool[ndarray, " n_texts"],
    token_texts: TokenTexts,
    settings: DiscoverySettings,
    *,
    weighs: bool,
) -> _Contrast:
    """The latents that are larger on the positive texts; with `weighs` those in use get weights."""
    tests = latent_tests(acts.mean, is_positive, is_negative)
    found = np.flatnonzero(tests.q_value <= settings.false_discovery_rate)
    candidates = found[np.argsort(-tests.auroc[found], kind="stable")[: settings.n_candidates]]
    chosen = np.flatnonzero(is_positive | is_negative)
    mine = [rows[int(i)] for i in chosen]
    positive = is_positive[chosen]
    groups = RowGroups.of([row.source for row in mine], positive)
    means = acts.mean[np.ix_(chosen, candidates)]
    if not len(candidates):
        return _Contrast(0, 0, 0.0, ())
    stability = stability_selection(
        means,
        positive.astype(np.float32),
        groups.weight.astype(np.float32),
        groups.group_of,
        n_halves=settings.n_halves,
        seed=settings.seed,
    )
    kept = np.flatnonzero(stability.share >= settings.min_stability)
    lengths = np.diff(texts.starts)[chosen]
    audits = audit_latents(means[:, kept], audit_data(mine, positive, lengths))
    ids = candidates[kept]
    token_acts = latent_acts_of(sae, texts, ids.tolist())
    scale = latent_scales(token_acts, SCALE_QUANTILE)
    clear = np.array([not audit.flags for audit in audits], np.bool_)
    weight = np.zeros(len(ids))
    if weighs and clear.any():
        terms = np.minimum(token_acts[:, clear] / scale[clear], 1.0)
        scaled = text_means(terms, texts.starts)[chosen]
        weight[clear] = latent_weights(scaled, groups, n_latents=settings.n_latents)
    group_of = _group_numbers(sae, ids, acts.fires[np.ix_(chosen, ids)])
    names = _labels(token_acts, texts, token_texts)
    latents = [
        FoundLatent(
            latent_id=int(latent_id),
            mean_difference=float(tests.mean_difference[latent_id]),
            auroc=float(tests.auroc[latent_id]),
            q_value=float(tests.q_value[latent_id]),
            stability=float(stability.share[kept[i]]),
            audit=audits[i],
            group=int(group_of[i]),
            weight=float(weight[i]),
            scale=float(scale[i]),
            label=names[i],
            examples=strongest_examples(
                token_acts[:, i], texts, rows, token_texts, n_examples=settings.n_examples
            ),
        )
        for i, latent_id in enumerate(ids)
    ]
    latents.sort(key=lambda latent: (-latent.weight, -latent.stability, latent.latent_id))
    return _Contrast(
        len(found),
        len(candidates),
        stability.expected_false(settings.min_stability),
        tuple(latents),
    )


def _group_numbers(sae: SAE, ids: ndarray, fires: ndarray) -> ndarray:
    directions = None if sae.weights.W_dec is None else sae.weights.W_dec[ids].float().numpy()
    numbers = np.zeros(len(ids), np.int64)
    for number, group in enumerate(group_latents(directions, fires), start=1):
        numbers[list(group)] = number
    return numbers


def _labels(token_acts: ndarray, texts: ResidualSet, token_texts: TokenTexts) -> tuple[str, ...]:
    unique, where = np.unique(texts.token_ids, return_inverse=True)
    names = np.array([token_texts([int(i)])[0] for i in unique])
    return latent_labels(token_acts, names[where].tolist())
