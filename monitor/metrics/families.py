"""What metrics are made of: families with kept children, and two collectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Child = TypeVar("Child", Counter, Gauge, Histogram)


class AuditCounts(Protocol):
    """Where the audit log stands; counts are since the start."""

    @property
    def written(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def last_sync_timestamp(self) -> float: ...
    @property
    def uncovered(self) -> int: ...
    @property
    def checkpoint_failures(self) -> int: ...
    @property
    def last_checkpoint_timestamp(self) -> float: ...
    @property
    def last_checkpoint_signed(self) -> bool: ...


class PageCounts(Protocol):
    """Where the pages of keys and values stand."""

    @property
    def own(self) -> int: ...
    @property
    def shared(self) -> int: ...
    @property
    def free(self) -> int: ...


class CacheCounts(Protocol):
    """Where the cache of keys and values stands; counts are since the start."""

    @property
    def sessions(self) -> int: ...
    @property
    def session_bytes(self) -> int: ...
    @property
    def evicted_for_memory(self) -> int: ...
    @property
    def evicted_at_close(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...
    @property
    def prefix_blocks(self) -> int: ...
    @property
    def prefix_bytes(self) -> int: ...
    @property
    def prefix_evictions(self) -> int: ...
    @property
    def reused_tokens(self) -> int: ...
    @property
    def pages(self) -> PageCounts | None:
        """None where there are none."""


class Family(Generic[Child]):
    """One metric whose children are made once and kept: `.labels()` costs more than counting.

    Called with label values, it gives the child; those fixed at birth come first.
    """

    def __init__(self, metric: Child, fixed: tuple[str, ...]) -> None:
        self._metric: Child = metric
        self._fixed = fixed
        self._children: dict[tuple[str, ...], Child] = {}

    def __call__(self, *labels: str) -> Child:
        child = self._children.get(labels)
        if child is None:
            values = (*self._fixed, *labels)
            child = self._metric.labels(*values) if values else self._metric
            self._children[labels] = child
        return child

    def prepare(self, *label_sets: Iterable[str]) -> None:
        """Makes every child of the sets' product."""
        for labels in product(*label_sets):
            self(*labels)


class Maker:
    """Makes metrics in one registry: prefixed, with or without the `model` label."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._fixed = (model,)

    def register(self, collector: Collector) -> None:
        self._registry.register(collector)

    def counter(self, name: str, text: str, *labels: str) -> Family[Counter]:
        metric = Counter(f"saemonitor_{name}", text, ("model", *labels), registry=self._registry)
        return Family(metric, self._fixed)

    def gauge(self, name: str, text: str, *labels: str) -> Family[Gauge]:
        metric = Gauge(f"saemonitor_{name}", text, ("model", *labels), registry=self._registry)
        return Family(metric, self._fixed)

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], *labels: str
    ) -> Family[Histogram]:
        names = ("model", *labels)
        metric = Histogram(
            f"saemonitor_{name}", text, names, registry=self._registry, buckets=buckets
        )
        return Family(metric, self._fixed)

    def plain_gauge(self, name: str, text: str, *labels: str) -> Family[Gauge]:
        return Family(Gauge(f"saemonitor_{name}", text, labels, registry=self._registry), ())

    def plain_histogram(self, name: str, text: str, buckets: Sequence[float]) -> Family[Histogram]:
        metric = Histogram(f"saemonitor_{name}", text, registry=self._registry, buckets=buckets)
        return Family(metric, ())

    def grpc_counter(self, name: str, text: str, *labels: str) -> Family[Counter]:
        return Family(Counter(name, text, labels, registry=self._registry), ())

    def grpc_histogram(
        self, name: str, text: str, buckets: Sequence[float], *labels: str
    ) -> Family[Histogram]:
        metric = Histogram(name, text, labels, registry=self._registry, buckets=buckets)
        return Family(metric, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoAudit:
    written: int = 0
    failed: int = 0
    dropped: int = 0
    pending: int = 0
    pending_bytes: int = 0
    sequence: int = 0
    last_sync_timestamp: float = 0.0
    uncovered: int = 0
    checkpoint_failures: int = 0
    last_checkpoint_timestamp: float = 0.0
    last_checkpoint_signed: bool = False


class AuditCollector(Collector):
    """The audit log's own counts, read when Prometheus asks."""

    def __init__(self) -> None:
        self.read: Callable[[], AuditCounts] = _NoAudit

    def collect(self) -> Iterator[Metric]:
        now = self.read()
        records = CounterMetricFamily(
            "saemonitor_audit_records", "Audit records by result", labels=["result"]
        )
        records.add_metric(["written"], now.written)
        records.add_metric(["failed"], now.failed)
        yield records
        yield CounterMetricFamily(
            "saemonitor_audit_dropped", "Audit records that will never be stored", now.dropped
        )
        for name, text, value in (
            ("pending_records", "Audit records not yet on disk", now.pending),
            ("pending_bytes", "Memory that these take, about", now.pending_bytes),
            ("sequence", "Sequence number of the last audit record on disk", now.sequence),
            ("last_sync_timestamp_seconds", "Time of the last commit", now.last_sync_timestamp),
            ("uncovered_records", "Audit records that no checkpoint covers yet", now.uncovered),
        ):
            yield GaugeMetricFamily(f"saemonitor_audit_{name}", text, value)
        yield CounterMetricFamily(
            "saemonitor_audit_checkpoint_failures",
            "Checkpoints that could not be made or stored",
            now.checkpoint_failures,
        )
        checkpoint = GaugeMetricFamily(
            "saemonitor_audit_last_checkpoint_timestamp_seconds",
            "Time of the last checkpoint, and whether it is signed",
            labels=["signed"],
        )
        signed = "true" if now.last_checkpoint_signed else "false"
        checkpoint.add_metric([signed], now.last_checkpoint_timestamp)
        yield checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoCache:
    sessions: int = 0
    session_bytes: int = 0
    evicted_for_memory: int = 0
    evicted_at_close: int = 0
    recomputed_tokens: int = 0
    prefix_blocks: int = 0
    prefix_bytes: int = 0
    prefix_evictions: int = 0
    reused_tokens: int = 0
    pages: PageCounts | None = None


class CacheCollector(Collector):
    """The counts of the cache of keys and values, read when Prometheus asks."""

    def __init__(self, model: str) -> None:
        self.read: Callable[[], CacheCounts] = _NoCache
        self._model = model

    def collect(self) -> Iterator[Metric]:
        now = self.read()
        for name, text, value in (
            ("session_cache_sessions", "Open streams", now.sessions),
            ("session_cache_bytes", "Bytes of their keys and values", now.session_bytes),
            ("prefix_cache_blocks", "Blocks of 32 tokens kept for reuse", now.prefix_blocks),
            ("prefix_cache_bytes", "Bytes of those blocks", now.prefix_bytes),
        ):
            gauge = GaugeMetricFamily(f"saemonitor_{name}", text, labels=["model"])
            gauge.add_metric([self._model], value)
            yield gauge
        if now.pages is not None:
            pages = GaugeMetricFamily(
                "saemonitor_cache_pages",
                "Pages of keys and values: of one stream, of kept blocks too, or held by nobody",
                labels=["model", "state"],
            )
            pages.add_metric([self._model, "own"], now.pages.own)
            pages.add_metric([self._model, "shared"], now.pages.shared)
            pages.add_metric([self._model, "free"], now.pages.free)
            yield pages
        evictions = CounterMetricFamily(
            "saemonitor_session_cache_evictions",
            "Streams whose keys and values were dropped",
            labels=["model", "reason"],
        )
        evictions.add_metric([self._model, "memory"], now.evicted_for_memory)
        evictions.add_metric([self._model, "closed"], now.evicted_at_close)
        yield evictions
        for name, text, value in (
            (
                "session_cache_recomputed_tokens",
                "Tokens that went through the model again, as their memory was dropped",
                now.recomputed_tokens,
            ),
            (
                "prefix_cache_reused_tokens",
                "Tokens that a kept block spared the model",
                now.reused_tokens,
            ),
            ("prefix_cache_evictions", "Kept blocks that were dropped", now.prefix_evictions),
        ):
            counter = CounterMetricFamily(f"saemonitor_{name}", text, labels=["model"])
            counter.add_metric([self._model], value)
            yield counter


class Scrape(Collector):
    """A registry as it is shown: less `_created`, which doubles a scrape and which nobody reads.

    OpenMetrics forbids a sum where a bucket is negative, and a count without a sum; the client
    library leaves out the sum only, so the count goes here. The `+Inf` bucket holds the same.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            hidden = ["_created"]
            has_sum = any(sample.name.endswith("_sum") for sample in metric.samples)
            if metric.type == "histogram" and not has_sum:
                hidden.append("_count")
            metric.samples = [s for s in metric.samples if not s.name.endswith(tuple(hidden))]
            yield metric
