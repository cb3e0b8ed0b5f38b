"""What is loaded and built behind the wires."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from monitor.audit_log.writer import AuditLog
from monitor.bundle import Bundle
from monitor.config import ServeSettings
from monitor.engine import Engine, placement
from monitor.errors import SettingsError
from monitor.metrics import Metrics
from monitor.model_store import Progress, find_model
from monitor.pipeline import Pipeline
from monitor.records import ServerLimits
from monitor.sae_store import find_saes
from monitor.served import Served, load_served

Loaded = TypeVar("Loaded")


def make_metrics(bundle: Bundle) -> Metrics:
    """Metrics with every series that the bundle can have; the model need not be loaded yet."""
    return Metrics(
        model=bundle.spec.model.id,
        clusters=bundle.cluster_infos({}),
        rules={rule.id: rule.severity for rule in bundle.spec.rules},
    )


def open_audit_log(settings: ServeSettings, metrics: Metrics) -> AuditLog:
    """The audit log, writing; call inside the event loop.

    Raises:
        SettingsError, AuditError: it cannot be opened, or the key file cannot be read.
    """
    audit_log = AuditLog.open(
        settings.audit,
        level=settings.audit_level,
        on_full=settings.on_full,
        caller_key=_read_key(settings.audit_caller_key_file),
        on_sync=metrics.audit_synced,
    )
    audit_log.start()
    metrics.watch_audit(audit_log.statistics)
    return audit_log


def load_model(settings: ServeSettings, bundle: Bundle, progress: Progress) -> Served:
    """Finds and loads the bundle's model, SAEs and heads; takes seconds, or minutes the first time.

    Raises:
        ModelStoreError, SAEStoreError, BundleError, SettingsError: see `find_model`, `find_saes`
            and `load_served`.
    """
    device, dtype = placement(settings.device, settings.dtype)
    saes = find_saes(bundle, cache=settings.cache_dir, progress=progress)
    found = find_model(bundle, override=settings.model, cache=settings.cache_dir, progress=progress)
    return load_served(bundle, found.folder, found.digest, saes, device=device, dtype=dtype)


def build_pipeline(
    settings: ServeSettings, served: Served, audit_log: AuditLog, metrics: Metrics
) -> Pipeline:
    """The pipeline over a running engine."""
    engine = Engine(
        served.scorer,
        max_step_tokens=settings.max_step_tokens,
        max_queue_tokens=settings.max_queue_tokens,
        max_cache_bytes=settings.max_cache_bytes,
        reuse_key=served.reuse_key if settings.prefix_reuse else None,
        on_step=lambda step: metrics.observe_batch(step.n_segments, step.n_tokens),
    )
    max_positions = served.scorer.language_model.config.max_positions
    pipeline = Pipeline(
        served=served,
        engine=engine,
        audit_log=audit_log,
        metrics=metrics,
        limits=ServerLimits(
            max_message_bytes=settings.max_message_bytes,
            max_request_tokens=min(settings.max_request_tokens, max_positions),
            max_queue_tokens=settings.max_queue_tokens,
            max_streams=settings.max_streams,
        ),
        stream_interval_seconds=settings.stream_reply_interval_ms / 1000,
    )
    metrics.watch_queue(
        lambda: engine.queue_tokens,
        lambda: engine.max_queue_tokens,
        lambda: pipeline.n_requests + pipeline.n_streams,
    )
    metrics.watch_cache(engine.cache)
    torch = importlib.metadata.version("torch")
    metrics.describe(served.provenance, served.hook_points, torch)
    engine.start()
    return pipeline


async def in_daemon_thread(load: Callable[[], Loaded]) -> Loaded:
    """Runs a long load beside the event loop; a process that has to stop does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Loaded] = loop.create_future()

    def resolve(result: Loaded | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a result where there is no error

    def run() -> None:
        try:
            outcome: tuple[Loaded | None, Exception | None] = load(), None
        except Exception as error:
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(resolve, *outcome)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future


def _read_key(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(
            f"audit_caller_key_file: cannot read {path}: {error.strerror}"
        ) from None
