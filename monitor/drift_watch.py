"""Compares the decisions that were made with what was calibrated, a window of them at a time.

A cluster that leaves its bounds is stale until `WINDOWS_TO_RETURN` windows in a row have found it
within them: one window that happens to be calm is not enough.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from monitor.baselines import ZONES, Expected
from monitor.metrics import Metrics
from monitor.records import Decision, Verdict
from monitor.served import Served
from monitor.staleness import StaleBy
from sae_core.drift import (
    FALSE_ALARMS,
    RateWatch,
    RatioShift,
    drifted_latents,
    ratio_shift,
    score_shift,
)
from sae_core.vitals import TextVitals

log = structlog.get_logger(__name__)

WINDOWS_TO_RETURN = 2
MASS_SHARE = 0.25
"""Of what a cluster's latents gave its score in calibration: where latents with more than this have
drifted, the cluster has left its bounds."""
NAMED_LATENTS = 5
"""In a message; GetCluster has them all."""


@dataclass(slots=True)
class _Window:
    """Sums over the decisions of one window."""

    firings: NDArray[np.float64]
    n_tokens: int = 0
    n_decisions: int = 0
    ratios: dict[str, tuple[list[float], list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: ([], []))
    )
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, decision: Decision, vitals: TextVitals) -> None:
        self.firings += vitals.firings
        self.n_tokens += vitals.n_tokens
        self.n_decisions += 1
        self._ratio("registered_l0", vitals.firings.sum(), vitals.n_tokens)
        for sae, fit in vitals.fits.items():
            self._ratio(f"l0:{sae}", fit.n_active, fit.n_tokens)
            if math.isfinite(fit.fvu):
                self._ratio(f"fvu:{sae}", fit.error, fit.variance)
        for result in decision.clusters:
            if math.isfinite(result.fused):
                self.scores[result.cluster].append(result.fused)

    def _ratio(self, signal: str, numerator: float, denominator: float) -> None:
        numerators, denominators = self.ratios[signal]
        numerators.append(float(numerator))
        denominators.append(float(denominator))


class DriftWatch:
    """The watch over one served bundle that has a baseline; call it from the event loop.

    Args:
        window: decisions of one window.
    """

    def __init__(
        self, served: Served, expected: Expected, metrics: Metrics, *, window: int
    ) -> None:
        self.n_windows = 0
        """Windows that have ended."""
        self.drifted: dict[tuple[str, int], int] = {}
        """By SAE and latent, those that fired too often (1) or too seldom (-1) in the last one."""
        self._served = served
        self._expected = expected
        self._rates_live: dict[tuple[str, int], float] = {}
        self._metrics = metrics.liveness.drift(expected.baseline.ratios)
        self._size = window
        self._window = self._new_window()
        self._clusters = {c.id: c for c in served.bundle.spec.clusters if c.id in expected.scores}
        self._rates = {
            (cluster, zone): bound
            for cluster in self._clusters
            if cluster not in served.uncalibrated_reasons
            for zone, bound in expected.rates[cluster].items()
        }
        self._rates |= {("", zone): bound for zone, bound in expected.verdicts.items()}
        self._watches = self._new_watches()
        self._calm: dict[tuple[str, StaleBy], int] = {}

    def latent_drift(self, sae: str, latent: int) -> tuple[int, float | None]:
        """As `LatentInfo.drift` and `.live_rate`, in the last window that has ended."""
        return self.drifted.get((sae, latent), 0), self._rates_live.get((sae, latent))

    def observe(self, decision: Decision, vitals: TextVitals) -> None:
        """Takes one decision, made under any policy on our own forward pass."""
        if not vitals.n_tokens:
            return
        self._window.add(decision, vitals)
        if decision.anomaly is not None:
            self._metrics.anomaly(decision.anomaly)
        self._count_rates(decision)
        self._metrics.progress(self._window.n_decisions)
        if self._window.n_decisions >= self._size:
            self._judge()
            self._window, self._watches = self._new_window(), self._new_watches()

    def _new_window(self) -> _Window:
        return _Window(np.zeros(len(self._expected.baseline.latents)))

    def _new_watches(self) -> dict[tuple[str, str], RateWatch]:
        alpha = FALSE_ALARMS / max(len(self._rates), 1)
        return {key: RateWatch(bound, alpha=alpha) for key, bound in self._rates.items()}

    def _count_rates(self, decision: Decision) -> None:
        """Looks after every decision; what is found stands at once."""
        verdicts = {result.cluster: result.verdict for result in decision.clusters}
        looked_at = decision.policy == self._expected.policy
        for (cluster, zone), watch in self._watches.items():
            if not looked_at or watch.is_off:
                continue
            verdict = verdicts[cluster] if cluster else decision.verdict
            least = Verdict.FLAG if zone == "flag" else Verdict.ALERT
            if not watch.add(verdict.rank >= least.rank):
                continue
            reason = (
                f"{zone} in {watch.n_hits} of {watch.n} decisions, calibrated below "
                f"{watch.bound:.2%}"
            )
            self._metrics.outside(f"{zone}_rate", True)
            if cluster:
                self._stale(cluster, StaleBy.RATE, reason)
            else:
                log.warning("verdicts_above_calibrated_rate", reason=reason)

    def _judge(self) -> None:
        self.n_windows += 1
        fit = self._judge_ratios()
        latents = self._judge_latents()
        scores = self._judge_scores()
        rate = {
            cluster: "still above the calibrated rate"
            for (cluster, _), watch in self._watches.items()
            if cluster and watch.is_off
        }
        for zone in ZONES:
            is_off = any(w.is_off for (_, name), w in self._watches.items() if name == zone)
            self._metrics.outside(f"{zone}_rate", is_off)
        found = {
            StaleBy.FIT: fit,
            StaleBy.LATENTS: latents,
            StaleBy.SCORES: scores,
        }
        for by, reasons in found.items():
            for cluster in self._clusters:
                self._settle(cluster, by, reasons.get(cluster, ""))
        for cluster in self._clusters:
            self._settle(cluster, StaleBy.RATE, rate.get(cluster, ""))
        self._metrics.window_ended()

    def _judge_ratios(self) -> dict[str, str]:
        """registered_l0, and the L0 and FVU of each SAE."""
        expected = self._expected.baseline.ratios
        alpha = FALSE_ALARMS / len(expected)
        reasons: dict[str, str] = {}
        for signal, was in expected.items():
            shift = ratio_shift(*self._window.ratios[signal], was, alpha=alpha)
            if shift is None:
                continue
            self._metrics.ratio(signal, shift.relative)
            self._metrics.outside(signal, shift.is_off)
            if shift.is_off:
                reasons |= dict.fromkeys(self._readers(signal), _ratio_reason(signal, shift, was))
        return reasons

    def _readers(self, signal: str) -> Iterator[str]:
        """Clusters that read an SAE of this signal; all that read any for registered_l0."""
        sae = signal.partition(":")[2]
        for name, cluster in self._clusters.items():
            if any(not sae or latent.sae == sae for latent in cluster.latents):
                yield name

    def _judge_latents(self) -> dict[str, str]:
        baseline = self._expected.baseline
        found = drifted_latents(baseline, self._window.firings, self._window.n_tokens)
        rates = (self._window.firings / self._window.n_tokens).tolist()
        self._rates_live = dict(zip(baseline.latents, rates, strict=True))
        pairs = zip(baseline.latents, found.tolist(), strict=True)
        self.drifted = {latent: sign for latent, sign in pairs if sign}
        n_up = sum(sign > 0 for sign in self.drifted.values())
        self._metrics.latents(up=n_up, down=len(self.drifted) - n_up)
        self._metrics.outside("latents", bool(self.drifted))
        if self.drifted:
            log.warning("latents_drifted", latents=self._names(list(self.drifted)))
        means = dict(zip(baseline.latents, baseline.distance.mean.tolist(), strict=True))
        reasons: dict[str, str] = {}
        for name, cluster in self._clusters.items():
            mass = {
                (t.sae, t.id): abs(t.weight) * means[t.sae, t.id] / t.scale for t in cluster.latents
            }
            mine = [latent for latent in mass if latent in self.drifted]
            share = sum(mass[latent] for latent in mine) / max(sum(mass.values()), 1e-12)
            # What newly fires had no mass in calibration, and may have all of it now.
            if share > MASS_SHARE or len(mine) > MASS_SHARE * max(len(mass), 1):
                reasons[name] = (
                    f"{len(mine)} of {len(mass)} latents, with {share:.0%} of its SAE score, fire "
                    f"at other rates: {self._names(mine)}"
                )
        return reasons

    def _names(self, latents: list[tuple[str, int]]) -> str:
        shown = [
            f"{sae}/{latent} {'more' if self.drifted[sae, latent] > 0 else 'less'}"
            for sae, latent in latents[:NAMED_LATENTS]
        ]
        return ", ".join([*shown, *(["..."] if len(latents) > NAMED_LATENTS else [])])

    def _judge_scores(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        alpha = FALSE_ALARMS / max(len(self._clusters), 1)
        for cluster in self._clusters:
            bins = self._expected.scores[cluster]
            shift = score_shift(bins, bins.counts(self._window.scores[cluster]), alpha=alpha)
            if shift is None:
                continue
            self._metrics.score_shift(cluster, shift.psi)
            if shift.is_off:
                reasons[cluster] = f"population stability index {shift.psi:.2f}"
        self._metrics.outside("scores", bool(reasons))
        return reasons

    def _settle(self, cluster: str, by: StaleBy, reason: str) -> None:
        """What a whole window says; back within bounds only after several in a row."""
        if reason:
            if not (by is StaleBy.RATE and self._served.plan.staleness.holds(cluster, by)):
                self._stale(cluster, by, reason)
            self._calm[cluster, by] = 0
        elif self._served.plan.staleness.holds(cluster, by):
            self._calm[cluster, by] = self._calm.get((cluster, by), 0) + 1
            if self._calm[cluster, by] >= WINDOWS_TO_RETURN:
                self._served.plan.staleness.say(cluster, by, "")

    def _stale(self, cluster: str, by: StaleBy, reason: str) -> None:
        self._calm[cluster, by] = 0
        self._served.plan.staleness.say(cluster, by, reason)


def _ratio_reason(signal: str, shift: RatioShift, was: float) -> str:
    return f"{signal} is {shift.ratio:.3g}, was {was:.3g} in calibration"
