"""Metrics of live traffic beside the calibration's; there only where there is a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from monitor.metrics.families import Maker
from monitor.records import Anomaly

ANOMALY = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
"""Spreads above the mean of benign texts."""
ANOMALY_SIGNALS = ("registered_l0", "distance", "l0", "fvu")
CHECKS = ("latents", "scores", "flag_rate", "alert_rate")


class DriftMetrics:
    """What the watch for drift tells.

    Args:
        ratios: the signals of the baseline that are ratios, such as fvu:<SAE>.
        label: a cluster's label.
    """

    def __init__(self, make: Maker, ratios: Iterable[str], label: Callable[[str], str]) -> None:
        self._label = label
        self._windows = make.counter("drift_windows", "Windows of traffic that were judged")()
        self._progress = make.gauge("drift_window_decisions", "Decisions in the open window")()
        self._outside = make.gauge(
            "drift_outside_bounds", "1 where the last window lay outside its bounds", "signal"
        )
        self._ratio = make.gauge(
            "drift_ratio", "The last window's value over that of calibration", "signal"
        )
        self._latents = make.gauge(
            "drift_latents", "Registered latents that fire at another rate", "direction"
        )
        self._shift = make.gauge(
            "cluster_score_shift", "Population stability index of a cluster's scores", "cluster"
        )
        self._anomaly = make.histogram(
            "anomaly_zscore", "How unusual texts are, in spreads of benign ones", ANOMALY, "signal"
        )
        self._outside.prepare([*CHECKS, *ratios])
        self._anomaly.prepare(ANOMALY_SIGNALS)

    def window_ended(self) -> None:
        """Counts a window."""
        self._windows.inc()

    def progress(self, n_decisions: int) -> None:
        """How full the open window is."""
        self._progress.set(n_decisions)

    def outside(self, signal: str, is_outside: bool) -> None:
        """Whether a signal lies outside its bounds."""
        self._outside(signal).set(is_outside)

    def ratio(self, signal: str, relative: float) -> None:
        """A signal over what it was in calibration."""
        self._ratio(signal).set(relative)

    def latents(self, *, up: int, down: int) -> None:
        """How many registered latents fire more, and less, than they did."""
        self._latents("up").set(up)
        self._latents("down").set(down)

    def score_shift(self, cluster: str, psi: float) -> None:
        """How far a cluster's scores are distributed otherwise."""
        self._shift(self._label(cluster)).set(psi)

    def anomaly(self, anomaly: Anomaly) -> None:
        """One decision's z-scores."""
        for signal in ANOMALY_SIGNALS:
            value = getattr(anomaly, signal)
            if value is not None:
                self._anomaly(signal).observe(value)
