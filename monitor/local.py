"""A pipeline in this process, without network or audit log: what `sae-monitor score` runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from monitor.audit_log.writer import AuditLog
from monitor.bundle import load_bundle
from monitor.engine import Engine, placement
from monitor.fidelity import calibrated_first, gate, load_fitting
from monitor.graph_store import GraphPlace
from monitor.metrics import Metrics
from monitor.model_store import Progress, find_model
from monitor.parity import QUANTIZED, admit_quantized
from monitor.pipeline import Pipeline
from monitor.records import ServerLimits
from monitor.sae_store import find_saes
from monitor.served import Served, backend_name, load_served
from sae_core.language_model.products import Products

UNBOUNDED = 2**31 - 1
"""Offline work is bounded by its caller, which awaits each result."""


def load_local(
    folder: Path,
    *,
    model: Path | None,
    cache: Path,
    device: str = "cpu",
    dtype: str = "float32",
    gpus: int = 1,
    tensor_parallel: int = 1,
    products: Products = "auto",
    graph: GraphPlace | None = None,
    check_fit: bool = True,
    progress: Progress = lambda what, share: None,
) -> Served:
    """The bundle in `folder` with its model and SAEs, loaded.

    See `load_bundle`, `find_model`, `find_saes` and `load_served`; and `fidelity.gate`, whose
    UnfitError comes unless `check_fit` is off; and `parity.admit_quantized` for int8.
    """
    bundle = load_bundle(folder)
    saes = find_saes(bundle, cache=cache, progress=progress)
    found = find_model(bundle, override=model, cache=cache, progress=progress)
    device, dtypes = placement(device, dtype, "torch" if graph is None else "onnx")

    dtypes = calibrated_first(
        bundle,
        dtypes,
        model_digest=found.digest,
        backend=backend_name(device, tensor_parallel=tensor_parallel, graph=graph),
    )

    def load(dtype: str) -> Served:
        return load_served(
            bundle,
            found.folder,
            found.digest,
            saes,
            device=device,
            dtype=dtype,
            gpus=gpus,
            tensor_parallel=tensor_parallel,
            products=products,
            graph=graph,
            progress=progress,
        )

    served = load_fitting(load, dtypes, check=check_fit)
    if check_fit:
        gate(served)
    if dtype == QUANTIZED:
        admit_quantized(served)
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
