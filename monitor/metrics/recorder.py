"""Metrics: what the server, the pipeline and the RPCs tell, one short method each."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from monitor.metrics.families import (
    AuditCollector,
    AuditCounts,
    CacheCollector,
    CacheCounts,
    Maker,
    Scrape,
)
from monitor.metrics.labels import (
    GRPC_CODES,
    LATENCY,
    MAX_CLUSTERS,
    NO_STAGE,
    OTHER,
    REQUESTS,
    SCORE,
    STEPS,
    TOKENS,
    Component,
    FailOpen,
    Outcome,
    Rejection,
    RequestKind,
    Resume,
    RpcMethod,
)
from monitor.metrics.liveness import LivenessMetrics
from monitor.records import (
    Action,
    Alert,
    ClusterInfo,
    Decision,
    Mode,
    Provenance,
    Severity,
    Stage,
    StepFailure,
    Timings,
    UnscoredReason,
)

BUILD_LABELS = ("version", "python", "torch")
MODEL_LABELS = (
    *("model", "model_digest", "bundle", "bundle_digest"),
    *("hook_points", "dtype", "backend"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposition:
    """One scrape."""

    body: bytes
    content_type: str


class Metrics:
    """Everything that is counted, for one served model and its bundle.

    Args:
        model: the served model's id, the `model` label of every domain series.
        clusters: the registered clusters.
        rules: severity of each joint rule, by rule id.
        registry: where to register; a new one by default.
    """

    def __init__(
        self,
        model: str,
        clusters: Sequence[ClusterInfo] = (),
        rules: Mapping[str, Severity] | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._clusters = {cluster.cluster: cluster for cluster in clusters[:MAX_CLUSTERS]}
        self._rules = {f"rule:{rule}": severity for rule, severity in (rules or {}).items()}
        make = Maker(self.registry, model)

        self._received = make.counter("tokens_received", "Tokens that arrived", "stage")
        self._scored = make.counter("tokens_scored", "Tokens that got scores", "stage")
        self._unscored = make.counter(
            "tokens_unscored", "Tokens that got no score", "stage", "reason"
        )
        self._fail_open = make.counter("fail_open", "Answers allowed without scoring", "reason")

        self._requests = make.counter("requests", "Requests and streams", "stage", "outcome")
        self._streams = make.gauge("streams_active", "Open streams")()
        self._detached = make.gauge("streams_detached", "Streams that wait to be reopened")()
        self._resumes = make.counter(
            "stream_resumes", "Streams reopened, given up, or not found", "outcome"
        )
        self._rejections = make.counter("rejections", "Requests refused unscored", "reason")
        self._score_lag = make.histogram(
            "score_lag_seconds", "From a token's arrival to its score's sending", LATENCY, "stage"
        )
        self._steps = make.histogram("step_seconds", "Time of one request by step", LATENCY, "step")

        self._batch_requests = make.histogram("batch_requests", "Segments of one step", REQUESTS)()
        self._batch_tokens = make.histogram("batch_tokens", "Tokens of one step", TOKENS)()
        self._step_failures = make.counter(
            "step_failures", "Steps of the engine that failed, those tried again included", "reason"
        )
        self._queue_tokens = make.gauge("queue_tokens", "Tokens that wait for the engine")()
        self._queue_capacity = make.gauge("queue_capacity_tokens", "Tokens that may wait")()
        self._in_flight = make.gauge("requests_in_flight", "Requests being answered")()
        self._cache = CacheCollector(model)
        self.registry.register(self._cache)

        self._cluster_score = make.histogram(
            "cluster_score", "Scores, 0 at flag and 1 at alert", SCORE, "cluster", "stage"
        )
        self._alerts = make.counter("alerts", "Alerts", "cluster", "stage", "severity")
        self._verdicts = make.counter("verdicts", "Actions asked for", "action", "mode")

        self._audit_sync = make.plain_histogram("audit_sync_seconds", "Time of one commit", LATENCY)
        self._audit = AuditCollector()
        self.registry.register(self._audit)

        self._ready = make.plain_gauge("component_ready", "1 where a part is ready", "component")
        self._loop_lag = make.plain_histogram(
            "event_loop_lag_seconds", "How late the event loop's watchdog ran", LATENCY
        )
        self._build = make.plain_gauge("build_info", "The build; 1", *BUILD_LABELS)
        self._model_info = make.plain_gauge("model_info", "What is served; 1", *MODEL_LABELS)
        ProcessCollector(registry=self.registry)

        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._rpc_started = make.grpc_counter("grpc_server_started", "RPCs started", *rpc)
        self._rpc_handled = make.grpc_counter(
            "grpc_server_handled", "RPCs ended, by code", *rpc, "grpc_code"
        )
        self._rpc_received = make.grpc_counter("grpc_server_msg_received", "Messages read", *rpc)
        self._rpc_sent = make.grpc_counter("grpc_server_msg_sent", "Messages written", *rpc)
        self._rpc_seconds = make.grpc_histogram(
            "grpc_server_handling_seconds", "Time of unary RPCs", LATENCY, *rpc
        )
        self.liveness = LivenessMetrics(make, model, self._cluster_label)
        self._make_series(clusters)

    def _make_series(self, clusters: Sequence[ClusterInfo]) -> None:
        self._received.prepare(Stage)
        self._scored.prepare(Stage)
        self._unscored.prepare(Stage, UnscoredReason)
        self._fail_open.prepare(FailOpen)
        self._requests.prepare(RequestKind, Outcome)
        self._resumes.prepare(Resume)
        self._rejections.prepare(Rejection)
        self._score_lag.prepare(RequestKind)
        self._steps.prepare(STEPS)
        self._step_failures.prepare(StepFailure)
        self._verdicts.prepare(Action, Mode)
        self._ready.prepare(Component)
        for cluster in clusters:
            name = self._cluster_label(cluster.cluster)
            self._cluster_score.prepare([name], cluster.stages)
            self._alerts.prepare([name], cluster.stages, [cluster.severity])
        for rule, severity in self._rules.items():
            self._alerts.prepare([rule], [*Stage, NO_STAGE], [severity])

    def _cluster_label(self, cluster: str) -> str:
        known = cluster in self._clusters or cluster in self._rules
        return cluster if known else OTHER

    def tokens_received(self, stage: Stage, n: int) -> None:
        """Counts tokens that should be scored, on arrival."""
        self._received(stage).inc(n)

    def tokens_scored(self, stage: Stage, n: int) -> None:
        """Counts tokens that got scores."""
        self._scored(stage).inc(n)

    def tokens_unscored(self, stage: Stage, reason: UnscoredReason, n: int) -> None:
        """Counts tokens that should have been scored and were not."""
        self._unscored(stage, reason).inc(n)

    def failed_open(self, reason: str) -> None:
        """Counts an answer that allowed what nobody scored or recorded; a `FailOpen`."""
        self._fail_open(FailOpen(reason)).inc()

    def request_finished(self, kind: str, outcome: str) -> None:
        """Counts a request or stream at its end; a `RequestKind` and an `Outcome`."""
        self._requests(RequestKind(kind), Outcome(outcome)).inc()

    def stream_opened(self) -> None:
        """Counts a stream in."""
        self._streams.inc()

    def stream_closed(self) -> None:
        """Counts it out."""
        self._streams.dec()

    def streams_detached(self, n: int) -> None:
        """Says how many streams wait to be reopened."""
        self._detached.set(n)

    def stream_resume(self, outcome: Resume) -> None:
        """Counts a stream that was reopened, given up, or not found."""
        self._resumes(outcome).inc()

    def rejected(self, reason: str) -> None:
        """Counts a request that was refused before any work; a `Rejection`."""
        self._rejections(Rejection(reason)).inc()

    def score_lag(self, kind: str, seconds: float) -> None:
        """One observation a reply: the age of the oldest token whose score it brings."""
        self._score_lag(RequestKind(kind)).observe(seconds)

    def _observe_timings(self, timings: Timings) -> None:
        for step, seconds in zip(
            STEPS,
            (
                timings.tokenize_seconds,
                timings.queue_seconds,
                timings.forward_seconds,
                timings.encode_seconds,
                timings.score_seconds,
                timings.audit_seconds,
            ),
            strict=True,
        ):
            if seconds > 0:
                self._steps(step).observe(seconds)

    def observe_batch(self, n_requests: int, n_tokens: int) -> None:
        """One step of the engine; may be called from its thread."""
        self._batch_requests.observe(n_requests)
        self._batch_tokens.observe(n_tokens)

    def step_failed(self, failure: StepFailure) -> None:
        """Counts a step that failed; may be called from the engine's thread."""
        self._step_failures(failure).inc()

    def watch_queue(
        self,
        tokens: Callable[[], float],
        capacity_tokens: Callable[[], float],
        in_flight: Callable[[], float],
    ) -> None:
        """Reads the queue itself at every scrape."""
        self._queue_tokens.set_function(tokens)
        self._queue_capacity.set_function(capacity_tokens)
        self._in_flight.set_function(in_flight)

    def watch_cache(self, read: Callable[[], CacheCounts]) -> None:
        """Reads where the streams' keys and values stand at every scrape."""
        self._cache.read = read

    def observe_decision(self, decision: Decision) -> None:
        """Counts one decision: its scores, verdict and timings; its alerts were counted before."""
        for result in decision.clusters:
            cluster = self._clusters.get(result.cluster)
            if cluster is None or result.stage is None or not math.isfinite(result.fused):
                continue
            scale = cluster.alert - cluster.flag
            if scale > 0:
                self._cluster_score(cluster.cluster, result.stage).observe(
                    (result.fused - cluster.flag) / scale
                )
        self._verdicts(decision.action, decision.mode).inc()
        self._observe_timings(decision.timings)

    def observe_alerts(self, alerts: Iterable[Alert]) -> None:
        """Counts alerts when they are raised, each with its decision id as exemplar."""
        for alert in alerts:
            label = self._cluster_label(alert.cluster)
            self._alerts(label, alert.stage or NO_STAGE, alert.severity).inc(
                exemplar={"decision_id": alert.decision_id}
            )

    def watch_audit(self, read: Callable[[], AuditCounts]) -> None:
        """Reads where the audit log stands at every scrape."""
        self._audit.read = read

    def audit_synced(self, seconds: float) -> None:
        """One commit of the audit log."""
        self._audit_sync().observe(seconds)

    def component_ready(self, component: Component, is_ready: bool) -> None:
        """Says whether a part is ready; all are 0 at first."""
        self._ready(component).set(is_ready)

    def loop_lag(self, seconds: float) -> None:
        """One observation of the watchdog."""
        self._loop_lag().observe(seconds)

    def describe(self, provenance: Provenance, hook_points: Sequence[str], torch: str) -> None:
        """Sets build_info and model_info; call once, when everything is loaded."""
        self._build(provenance.server_version, platform.python_version(), torch).set(1)
        self._model_info(
            provenance.model,
            provenance.model_digest,
            provenance.bundle,
            provenance.bundle_digest,
            ",".join(hook_points),
            provenance.dtype,
            provenance.backend,
        ).set(1)

    def rpc_prepare(self, rpc: RpcMethod) -> None:
        """Makes the series of one method, every code included."""
        labels = (rpc.kind, rpc.service, rpc.method)
        for family in (self._rpc_started, self._rpc_received, self._rpc_sent):
            family(*labels)
        for code in GRPC_CODES:
            self._rpc_handled(*labels, code)
        if rpc.kind == "unary":
            self._rpc_seconds(*labels)

    def rpc_started(self, rpc: RpcMethod) -> None:
        """Counts an RPC in."""
        self._rpc_started(rpc.kind, rpc.service, rpc.method).inc()

    def rpc_handled(self, rpc: RpcMethod, code: str, seconds: float) -> None:
        """Counts an RPC out; `code` is one of GRPC_CODES."""
        self._rpc_handled(rpc.kind, rpc.service, rpc.method, code).inc()
        if rpc.kind == "unary":
            self._rpc_seconds(rpc.kind, rpc.service, rpc.method).observe(seconds)

    def rpc_message_received(self, rpc: RpcMethod) -> None:
        """Counts a message read."""
        self._rpc_received(rpc.kind, rpc.service, rpc.method).inc()

    def rpc_message_sent(self, rpc: RpcMethod) -> None:
        """Counts a message written."""
        self._rpc_sent(rpc.kind, rpc.service, rpc.method).inc()

    def render(self, accept: str = "") -> Exposition:
        """Prometheus text, or OpenMetrics (with exemplars) where the Accept header asks for it."""
        encode, content_type = choose_encoder(accept)
        return Exposition(body=encode(Scrape(self.registry)), content_type=content_type)
