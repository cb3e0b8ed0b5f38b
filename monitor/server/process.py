"""One server from start to stop, and the process around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from monitor.audit_log.record import RecordKind
from monitor.audit_log.writer import AuditLog
from monitor.bundle import load_bundle
from monitor.config import ServeSettings, configure_logging, unknown_variables
from monitor.errors import AuditError, BundleError, UnfitError
from monitor.fidelity import check_fidelity
from monitor.metrics import Component
from monitor.model_store import Progress
from monitor.ops import ComponentState, ops_app
from monitor.pipeline import Pipeline
from monitor.records import AuditLevel
from monitor.rpc.serving import Serving
from monitor.run_facts import run_facts
from monitor.served import Served
from monitor.server.liveness import Liveness
from monitor.server.parts import (
    build_pipeline,
    in_daemon_thread,
    load_model,
    make_metrics,
    open_audit_log,
)
from monitor.server.wires import GrpcWire, OpsWire

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
"""How often readiness is looked at and the event loop's lag is measured."""

CLOCK_TICKS = 100
"""Ticks a second in /proc (USER_HZ, fixed by the Linux ABI)."""

IMPORTED = time.monotonic()

LAST_WORDS_SECONDS = 1.0
"""What RPCs get to write their last message once all work is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a server says when it is ready."""

    listen: str
    """The gRPC addresses, several separated by commas."""
    ops_listen: str | None
    bundle: str
    """name@version."""
    ready_seconds: float
    """Since the server was told to start; see `run_server` for a process's own."""


class MonitorServer:
    """One server. `start` it, use it, `stop` it; in one event loop."""

    def __init__(
        self,
        settings: ServeSettings,
        bundle_folder: Path,
        progress: Progress = lambda what, share: None,
    ) -> None:
        self.settings = settings
        self._progress = progress
        self._bundle = load_bundle(bundle_folder)
        self.metrics = make_metrics(self._bundle)
        self.pipeline: Pipeline | None = None
        self.liveness: Liveness | None = None
        self._audit_log: AuditLog | None = None
        self._serving: Serving | None = None
        self._grpc: GrpcWire | None = None
        self._ops: OpsWire | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._unfit = ""
        self._served: Served | None = None

    async def start(self) -> Ready:
        """Listens, then loads; answers /livez and refuses RPCs as not ready meanwhile.

        Raises:
            UnfitError: an SAE does not fit; the server stays up and not ready, and says why.
            MonitorError: an address, the bundle, the model or the audit log cannot be had; what
                was started by then is stopped.
        """
        started = time.monotonic()
        try:
            self._serving = Serving(
                self.metrics,
                audit_url=self._served_audit_url(),
                audit_chain=self.settings.audit_chain,
            )
            self._grpc = GrpcWire(self.settings, self._serving, self.metrics)
            listening = await self._grpc.start()
            ops_address = self.settings.ops_address()
            if ops_address is not None:
                app = ops_app(self.metrics, ready=self.components, live=self._is_live)
                self._ops = OpsWire(ops_address, app)
                await self._ops.start()
            self._audit_log = open_audit_log(self.settings, self.metrics)
            self._watchdog = asyncio.create_task(self._watch())
            served = await in_daemon_thread(
                lambda: load_model(self.settings, self._bundle, self._progress)
            )
            self._served = served
            await self._check_fidelity(served)
            self.pipeline = build_pipeline(self.settings, served, self._audit_log, self.metrics)
            await self._record(RecordKind.SERVER_START)
            self.liveness = Liveness(self.settings, self.pipeline)
            self._serving.open(self.pipeline)
            self.liveness.start()
            await self._tell()
        except UnfitError:
            raise  # stays up, so that probes and operators are told what is wrong
        except BaseException:
            await self.stop(0.0)
            raise
        ready = Ready(
            listen=",".join(str(address) for address in listening),
            ops_listen=None if self._ops is None else str(self._ops.address),
            bundle=self._bundle.label,
            ready_seconds=time.monotonic() - started,
        )
        for address in listening:
            if not address.is_local:
                log.warning("listening_beyond_this_machine", listen=str(address), encrypted=False)
        self._warn_of_audit()
        for cluster, reason in served.uncalibrated_reasons.items():
            log.warning("cluster_uncalibrated", cluster=cluster, reason=reason)
        model = served.scorer.language_model.config
        log.info(
            "computes_by",
            backend=served.provenance.backend,
            dtype=served.provenance.dtype,
            products=model.products,
            attention=model.attention,
            rows=model.rows,
        )
        log.info("ready", **asdict(ready))
        return ready

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drains and stops: refuses new work, ends streams with their summary, lets requests
        finish within the grace, flushes the audit log.
        """
        grace = self.settings.grace_seconds if grace_seconds is None else grace_seconds
        deadline = time.monotonic() + grace
        if self._serving is not None:
            self._serving.drain()
        if self.pipeline is not None:
            self.pipeline.draining = True
        if self._grpc is not None:
            await self._grpc.drain_health()
        if self.pipeline is not None:
            await self.pipeline.end_detached()
        while self._n_running() and time.monotonic() < deadline and not self._hurry.is_set():
            await asyncio.sleep(0.01)
        if self._n_running():
            log.warning("grace_over", running=self._n_running())
        if self._grpc is not None:
            await self._grpc.stop(0.0 if self._n_running() else LAST_WORDS_SECONDS)
        if self._watchdog is not None:
            self._watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watchdog
        if self.liveness is not None:
            await self.liveness.stop()
        if self.pipeline is not None:
            await self.pipeline.end_detached()  # those whose call was cut off just now
            await asyncio.to_thread(self.pipeline.engine.stop)
            await self._record(RecordKind.SERVER_STOP)
        if self._served is not None:
            await asyncio.to_thread(self._served.close)
        if self._audit_log is not None:
            await self._audit_log.close()
        if self._ops is not None:
            await self._ops.stop()

    def hurry(self) -> None:
        """Ends the grace that a running `stop` gives."""
        self._hurry.set()

    def components(self) -> list[ComponentState]:
        """Readiness by part."""
        loading = "" if self.pipeline is not None else self._unfit or "still loading"
        engine = self.pipeline is not None and self.pipeline.engine.alive
        failure = "" if self.pipeline is None else self.pipeline.engine.failure
        audit = self._audit_log is not None and self._audit_log.healthy
        draining = self._serving is not None and self._serving.is_draining
        parts = {
            Component.REGISTRY: (True, ""),
            Component.SAE: (self.pipeline is not None, loading),
            Component.MODEL: (engine, loading or failure or "the engine thread is not running"),
            Component.AUDIT: (audit, "the audit log cannot be written"),
        }
        for component, (ready, _) in parts.items():
            self.metrics.component_ready(component, ready)
        states = [
            ComponentState(component=component, ready=ready, reason="" if ready else reason)
            for component, (ready, reason) in parts.items()
        ]
        server = ComponentState(
            component="server", ready=not draining, reason="draining" if draining else ""
        )
        canaries = None if self.liveness is None else self.liveness.state()
        return [*states, server, *([] if canaries is None else [canaries])]

    def _served_audit_url(self) -> str | None:
        """The log that callers may read: others' decisions are in it."""
        settings = self.settings
        local = all(address.is_local for address in settings.listen_addresses())
        served = settings.audit_rpc == "on" or (settings.audit_rpc == "local" and local)
        return settings.audit if served and settings.audit_level is not AuditLevel.NONE else None

    def _warn_of_audit(self) -> None:
        """Says loudly what an operator may not have meant."""
        settings = self.settings
        if settings.audit_level is AuditLevel.NONE:
            log.warning("no_audit_log", consequence="decisions are not recorded")
            return
        assert self._audit_log is not None
        levels = {
            name: self._audit_log.level_for(policy.audit_level)
            for name, policy in self._bundle.spec.policies.items()
        }
        clear = [name for name, level in levels.items() if level.rank > AuditLevel.SCORES.rank]
        if clear and settings.audit_keys is None and settings.audit_keys_file is None:
            log.error(
                "audit_not_encrypted",
                policies=clear,
                consequence="what people write is stored in the clear",
                expected="audit_keys_file or SAEMONITOR_AUDIT_KEYS, or audit_level scores",
            )

    async def _check_fidelity(self, served: Served) -> None:
        if self.settings.fidelity == "off":
            return
        try:
            judged = await in_daemon_thread(lambda: check_fidelity(served, explain=False))
        except BundleError as error:
            if self.settings.fidelity == "gate":
                raise
            log.warning("sae_not_checked", reason=str(error))
            return
        for one in judged:
            log.info("sae_measured", sae=one.sae, fits=one.fits, **asdict(one.measured))
        if all(one.fits for one in judged):
            return
        await self._stay_closed("; ".join(one.message for one in judged if not one.fits))
        judged = await in_daemon_thread(lambda: check_fidelity(served))
        unfit = [one.message for one in judged if not one.fits]
        for message in unfit:
            log.error("sae_unfit", message=message)
        if self.settings.fidelity == "gate":
            await self._stay_closed("; ".join(unfit))
            raise UnfitError(self._unfit)
        self._unfit = ""

    async def _stay_closed(self, reason: str) -> None:
        """Tells everybody who asks why the server is not ready."""
        self._unfit = reason
        if self._serving is not None:
            self._serving.stay_closed(reason)
        await self._tell()

    def _is_live(self) -> list[ComponentState]:
        # That this runs at all shows that the event loop does.
        alive = self.pipeline is None or self.pipeline.engine.alive
        stopping = self._serving is not None and self._serving.is_draining
        failure = "" if self.pipeline is None else self.pipeline.engine.failure
        reason = "" if alive or stopping else failure or "the engine thread has died"
        return [
            ComponentState(component="event_loop", ready=True),
            ComponentState(component="engine", ready=alive or stopping, reason=reason),
        ]

    def _n_running(self) -> int:
        if self.pipeline is None:
            return 0
        return self.pipeline.n_requests + self.pipeline.n_streams

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(TICK_SECONDS)
            self.metrics.loop_lag(max(0.0, loop.time() - before - TICK_SECONDS))
            await self._tell()

    async def _tell(self) -> None:
        states = self.components()
        if self._grpc is not None:
            await self._grpc.tell_health(all(state.ready for state in states))

    async def _record(self, kind: RecordKind) -> None:
        """The server's own life in the audit log; a log that cannot be written is told, no more."""
        if self._audit_log is None or self.pipeline is None:
            return
        content = run_facts(self.pipeline.served, max_step_tokens=self.settings.max_step_tokens)
        try:
            await self._audit_log.append_event(kind, content)
        except AuditError as error:
            log.error("audit_failed", kind=kind.value, error=str(error))


def run_server(
    settings: ServeSettings,
    bundle_folder: Path,
    progress: Progress = lambda what, share: None,
) -> None:
    """Serves until SIGTERM or SIGINT; prints one JSON line on stdout when ready.

    The first signal drains, the second ends the grace.

    Raises:
        MonitorError: it could not start.
    """
    configure_logging(settings.log_level, settings.log_json)
    unknown = unknown_variables()
    if unknown:
        log.warning("unknown_variables", names=unknown)
    asyncio.run(_serve(settings, bundle_folder, progress))


async def _serve(settings: ServeSettings, bundle_folder: Path, progress: Progress) -> None:
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    server = MonitorServer(settings, bundle_folder, progress)
    starting = asyncio.create_task(server.start())
    if not await _first(starting, told_to_stop):
        starting.cancel()  # stops what it has started
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return
    try:
        ready = starting.result()
    except UnfitError:
        await told_to_stop.wait()
        await server.stop()
        raise
    line = {**asdict(ready), "ready_seconds": round(_process_seconds(), 3)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    await told_to_stop.wait()
    log.info("stopping", grace_seconds=settings.grace_seconds)
    told_to_stop.clear()
    stopping = asyncio.create_task(server.stop())
    if not await _first(stopping, told_to_stop):
        server.hurry()
    await stopping
    log.info("stopped")


async def _first(task: asyncio.Task[object], event: asyncio.Event) -> bool:
    """Whether the task ended before the event was set."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return task.done()


def _process_seconds() -> float:
    """Seconds since this process started, imports included (CPU clocks would miss the waiting)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.monotonic() - IMPORTED
    return uptime - int(fields[19]) / CLOCK_TICKS
