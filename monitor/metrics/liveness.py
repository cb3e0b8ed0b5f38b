"""Metrics of what watches the monitor itself: the canaries, and clusters that left their bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from monitor.metrics.drift import DriftMetrics
from monitor.metrics.families import Maker


class StaleCollector(Collector):
    """Which clusters are stale, read when Prometheus asks."""

    def __init__(self, model: str) -> None:
        self.read: Callable[[], dict[str, bool]] = dict
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stale = GaugeMetricFamily(
            "saemonitor_cluster_stale",
            "1 where a cluster has left its bounds; it keeps scoring",
            labels=["model", "cluster"],
        )
        for cluster, is_stale in self.read().items():
            stale.add_metric([self._model, cluster], is_stale)
        yield stale


class LivenessMetrics:
    """What the canaries and the watch for drift tell.

    Args:
        label: a cluster's label; clusters beyond the limit share one.
    """

    def __init__(self, make: Maker, model: str, label: Callable[[str], str]) -> None:
        self._make = make
        self._label = label
        self._stale = StaleCollector(model)
        make.register(self._stale)
        self._interval = make.gauge(
            "canary_interval_seconds", "Time between two runs of the canaries; 0 for none"
        )()
        self._last_run = make.gauge(
            "canary_last_run_timestamp_seconds", "When the canaries last ran to their end"
        )()
        self._passed = make.gauge("canary_passed", "1 where the canaries went well", "cluster")
        self._failures = make.counter(
            "canary_failures", "Runs in which a cluster failed its canaries", "cluster"
        )
        self._deviation = make.gauge(
            "canary_score_deviation",
            "Farthest of a cluster's scores from what is expected, in tolerances",
            "cluster",
        )

    def watch_staleness(self, clusters: Sequence[str], is_stale: Callable[[str], bool]) -> None:
        """Reads which clusters are stale at every scrape."""

        def read() -> dict[str, bool]:
            found: dict[str, bool] = {}
            for cluster in clusters:
                label = self._label(cluster)
                found[label] = found.get(label, False) or is_stale(cluster)
            return found

        self._stale.read = read

    def drift(self, ratios: Iterable[str]) -> DriftMetrics:
        """The series of the watch for drift, from now on; see `DriftMetrics`."""
        return DriftMetrics(self._make, ratios, self._label)

    def canaries_expected(self, clusters: Sequence[str], seconds: float) -> None:
        """Says that the canaries are to run, and how often."""
        self._interval.set(seconds)
        for cluster in clusters:
            self._failures(self._label(cluster))

    def canary_judged(self, cluster: str, passed: bool, deviation: float) -> None:
        """How one cluster fared in a run."""
        label = self._label(cluster)
        self._passed(label).set(passed)
        self._deviation(label).set(deviation)
        if not passed:
            self._failures(label).inc()

    def canaries_ran(self, timestamp: float) -> None:
        """A run has ended."""
        self._last_run.set(timestamp)
