"""What watches the monitor itself while it serves: canaries, drift, and who is told of them."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from monitor.audit_log.chain import Json
from monitor.audit_log.record import RecordKind
from monitor.canary_runner import CanaryWatch
from monitor.config import ServeSettings
from monitor.drift_watch import DriftWatch
from monitor.errors import AuditError
from monitor.ops import ComponentState
from monitor.pipeline import Pipeline
from monitor.records import Decision
from sae_core.vitals import TextVitals

log = structlog.get_logger(__name__)


class Liveness:
    """The watch over one pipeline; `start` it in the event loop, `stop` it before the engine."""

    def __init__(self, settings: ServeSettings, pipeline: Pipeline) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._timer: asyncio.Task[None] | None = None
        self._recording: set[asyncio.Task[None]] = set()
        self.canaries: CanaryWatch | None = None
        self._drift: DriftWatch | None = None
        served = pipeline.served
        staleness = served.plan.staleness
        staleness.on_change = self._stale_changed
        clusters = [cluster.id for cluster in served.bundle.spec.clusters]
        pipeline.metrics.liveness.watch_staleness(clusters, staleness.__contains__)
        if served.expected is not None:
            self._drift = DriftWatch(
                served, served.expected, pipeline.metrics, window=settings.drift_window
            )
            pipeline.observe = self._observe
            pipeline.latent_drift = self._drift.latent_drift
        if settings.canary_seconds and served.bundle.canaries:
            self.canaries = CanaryWatch(
                served,
                pipeline.engine,
                pipeline.reader,
                pipeline.metrics,
                seconds=settings.canary_seconds,
            )

    def start(self) -> None:
        """Runs the canaries for the first time, beside the traffic, and then on their timer."""
        bundle = self._pipeline.served.bundle
        if self._pipeline.served.expected is None:
            log.warning("no_baseline", reason=self._pipeline.served.no_baseline)
        if self.canaries is not None:
            self._timer = asyncio.create_task(self.canaries.run_for_ever())
            if bundle.canary_expectation is None:
                log.warning("canaries_not_measured", expected="sae-monitor bundle measure")
        elif not bundle.canaries:
            log.warning("no_canaries", consequence="nothing proves that alerts would still come")

    async def stop(self) -> None:
        """Ends what runs, and returns when all that was found is on record."""
        if self._timer is not None:
            self._timer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._timer
        await asyncio.gather(*self._recording)

    def state(self) -> ComponentState | None:
        """The canaries as a part that readiness waits for; None where it does not."""
        if self.canaries is None or not self._settings.canary_readiness:
            return None
        problem = self.canaries.problem
        return ComponentState(component="canaries", ready=not problem, reason=problem)

    def _observe(self, decision: Decision, vitals: TextVitals) -> None:
        """Hands a decision to the watch; what goes wrong there is not the caller's trouble."""
        assert self._drift is not None
        try:
            self._drift.observe(decision, vitals)
        except Exception:
            log.exception("drift_watch_broke")

    def _stale_changed(self, cluster: str, reasons: tuple[str, ...]) -> None:
        if reasons:
            log.warning("cluster_stale", cluster=cluster, reasons=reasons)
        else:
            log.info("cluster_within_bounds", cluster=cluster)
        task = asyncio.create_task(self._record(cluster, reasons))
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    async def _record(self, cluster: str, reasons: tuple[str, ...]) -> None:
        content: dict[str, Json] = {
            "bundle_digest": self._pipeline.served.provenance.bundle_digest,
            "cluster": cluster,
            "stale": bool(reasons),
            "reasons": list(reasons),
        }
        try:
            await self._pipeline.audit_log.append_event(RecordKind.CLUSTER_STALE, content)
        except AuditError as error:
            log.error("audit_failed", kind=RecordKind.CLUSTER_STALE.value, error=str(error))
