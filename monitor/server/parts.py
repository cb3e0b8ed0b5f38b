"""What is loaded and built behind the wires."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from monitor.audit_log.checkpoint import load_signer
from monitor.audit_log.sealing import KeyRing
from monitor.audit_log.writer import AuditLog
from monitor.bundle import Bundle
from monitor.config import ServeSettings
from monitor.engine import Engine, placement
from monitor.errors import SettingsError
from monitor.fidelity import calibrated_first, load_fitting
from monitor.graph_store import GraphPlace
from monitor.metrics import Metrics
from monitor.model_store import Progress, find_model
from monitor.parity import QUANTIZED, admit_quantized
from monitor.pipeline import Pipeline
from monitor.records import ServerLimits
from monitor.sae_store import find_saes
from monitor.served import Served, backend_name, load_served

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
    signing_key = settings.audit_signing_key_file
    audit_log = AuditLog.open(
        settings.audit,
        level=settings.audit_level,
        on_full=settings.on_full,
        hash_key=_read_key("audit_hash_key_file", settings.audit_hash_key_file),
        keys=audit_keys(settings),
        chain=settings.audit_chain,
        signer=None if signing_key is None else load_signer(signing_key),
        queue_records=settings.audit_queue_records,
        queue_bytes=settings.audit_queue_bytes,
        checkpoint_records=settings.audit_checkpoint_records,
        checkpoint_seconds=settings.audit_checkpoint_seconds,
        on_sync=metrics.audit_synced,
    )
    audit_log.start()
    metrics.watch_audit(audit_log.statistics)
    return audit_log


def audit_keys(settings: ServeSettings) -> KeyRing | None:
    """What seals the audit log's tokens and texts, if anything does.

    Raises:
        SettingsError: the keys cannot be read.
    """
    if settings.audit_keys is not None:
        return KeyRing.parse(settings.audit_keys.get_secret_value(), "audit_keys")
    stored = _read_key("audit_keys_file", settings.audit_keys_file)
    if stored is None:
        return None
    return KeyRing.parse(stored.decode(errors="replace"), f"{settings.audit_keys_file}")


def load_model(settings: ServeSettings, bundle: Bundle, progress: Progress) -> Served:
    """Finds and loads the bundle's model, SAEs and heads; takes seconds, or minutes the first time.

    Raises:
        ModelStoreError, SAEStoreError, BundleError, SettingsError: see `find_model`, `find_saes`
            and `load_served`; SettingsError also where int8 changes verdicts.
    """
    device, dtypes = placement(settings.device, settings.dtype, settings.backend)
    graph = None
    if settings.backend == "onnx":
        graph = GraphPlace(cache=settings.cache_dir, folder=settings.onnx)
    saes = find_saes(bundle, cache=settings.cache_dir, progress=progress)
    found = find_model(bundle, override=settings.model, cache=settings.cache_dir, progress=progress)

    dtypes = calibrated_first(
        bundle,
        dtypes,
        model_digest=found.digest,
        backend=backend_name(device, tensor_parallel=settings.tensor_parallel, graph=graph),
    )

    def load(dtype: str) -> Served:
        return load_served(
            bundle,
            found.folder,
            found.digest,
            saes,
            device=device,
            dtype=dtype,
            gpus=settings.gpus,
            tensor_parallel=settings.tensor_parallel,
            graph=graph,
            progress=progress,
        )

    served = load_fitting(load, dtypes, check=settings.fidelity != "off")
    if settings.dtype == QUANTIZED:
        admit_quantized(served)
    return served


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
        fit_share=0.0 if served.expected is None else settings.drift_sample_share,
        on_step=lambda step: metrics.observe_batch(step.n_segments, step.n_tokens),
        on_failure=metrics.step_failed,
        failure=lambda: served.scorer.language_model.failure,
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
            resume_seconds=settings.resume_seconds,
        ),
        max_detached_streams=settings.max_detached_streams,
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


def _read_key(setting: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {path}: {error.strerror}") from None
