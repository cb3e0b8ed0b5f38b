"""A pipeline in this process, without network or audit log: what `sae-monitor score` runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from monitor.audit_log.writer import AuditLog
from monitor.bundle import load_bundle
from monitor.engine import Engine
from monitor.fidelity import gate
from monitor.metrics import Metrics
from monitor.model_store import Progress, find_model
from monitor.pipeline import Pipeline
from monitor.records import ServerLimits
from monitor.sae_store import find_saes
from monitor.served import Served, load_served

UNBOUNDED = 2**31 - 1
"""Offline work is bounded by its caller, which awaits each result."""


def load_local(
    folder: Path,
    *,
    model: Path | None,
    cache: Path,
    device: str = "cpu",
    dtype: str = "float32",
    check_fit: bool = True,
    progress: Progress = lambda what, share: None,
) -> Served:
    """The bundle in `folder` with its model and SAEs, loaded.

    See `load_bundle`, `find_model` and `find_saes`; and `fidelity.gate`, whose UnfitError comes
    unless `check_fit` is off.
    """
    bundle = load_bundle(folder)
    saes = find_saes(bundle, cache=cache, progress=progress)
    found = find_model(bundle, override=model, cache=cache, progress=progress)
    served = load_served(bundle, found.folder, found.digest, saes, device=device, dtype=dtype)
    if check_fit:
        gate(served)
    return served


@asynccontextmanager
async def local_pipeline(
    load: Callable[[], Served], *, max_step_tokens: int = 2048
) -> AsyncIterator[Pipeline]:
    """An offline pipeline over what `load` gives; its engine stops with the context."""
    served = load()
    engine = Engine(
        served.scorer,
        max_step_tokens=max_step_tokens,
        max_queue_tokens=UNBOUNDED,
        reuse_key=served.reuse_key,
    )
    audit_log = AuditLog.open("sqlite://", level="none")
    audit_log.start()
    engine.start()
    try:
        yield Pipeline(
            served=served,
            engine=engine,
            audit_log=audit_log,
            metrics=Metrics(
                model=served.provenance.model, clusters=served.cluster_infos(), rules={}
            ),
            limits=ServerLimits(
                max_message_bytes=UNBOUNDED,
                max_request_tokens=served.scorer.language_model.config.max_positions,
                max_queue_tokens=UNBOUNDED,
                max_streams=UNBOUNDED,
            ),
            offline=True,
        )
    finally:
        engine.stop()
        await audit_log.close()
