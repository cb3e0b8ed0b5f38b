"""Token logits of labelled texts, by the code that serves, kept on disk so that a rerun is cheap.

A trace depends on the model, the SAEs and the heads, not on aggregates and thresholds: evaluating
after a new calibration computes nothing again. What a run computed before it was stopped is there
for the next one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monitor.errors import InvalidRequestError, MonitorError
from monitor.in_flight import IN_FLIGHT, in_order
from monitor.model_store import Progress
from monitor.pipeline import Pipeline
from monitor.records import Message, ScoreRequest, Stage
from monitor.work_queue import Priority
from sae_core.evaluation.data import LabelledText
from sae_core.score_cache import OwnForward
from sae_core.vitals import TextVitals

_STAGES: tuple[Stage | None, ...] = (None, Stage.PROMPT, Stage.COMPLETION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One text's tokens and their logits."""

    token_ids: tuple[int, ...]
    stages: tuple[Stage | None, ...]
    logits: NDArray[np.float32]
    """[n_tokens, n_clusters, 3]: fused, dense, sae."""
    compute_seconds: float
    """Its share of forward pass, SAEs and heads, when it was computed."""
    vitals: TextVitals | None = None
    """What the text did to the SAEs, where that was asked for."""


def request_of(row: LabelledText, *, with_prompt: bool = False) -> ScoreRequest:
    """How a row is sent: its text in the stage of its kind.

    Args:
        with_prompt: send a completion as the answer to its prompt, under the chat template.
    """
    if row.kind == "completion" and with_prompt and row.prompt.strip():
        turns = (
            Message(role="user", content=row.prompt),
            Message(role="assistant", content=row.text),
        )
        return ScoreRequest(messages=turns)
    stage = Stage.COMPLETION if row.kind == "completion" else Stage.PROMPT
    return ScoreRequest(text=row.text, stage=stage)


class TraceStore:
    """Traces in one SQLite file.

    Args:
        folder: where the files are; one for each `key`.
        key: names all that logits depend on beside the text; see `Served.logits_key`.
        saes: those whose fit is measured, as `LiveFit.sae_ids`.
    """

    def __init__(self, folder: Path, key: str, saes: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{key[:32]}.sqlite"
        self._db = sqlite3.connect(self.path, timeout=60.0)
        self._saes = saes
        self._waiting: list[tuple[object, ...]] = []
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS trace (id TEXT PRIMARY KEY, token_ids BLOB, stages BLOB, "
            "logits BLOB, n_clusters INTEGER, seconds REAL, vitals BLOB)"
        )
        names = [row[1] for row in self._db.execute("PRAGMA table_info(trace)")]
        if "vitals" not in names:  # written before there were any
            self._db.execute("ALTER TABLE trace ADD COLUMN vitals BLOB")

    def __enter__(self) -> TraceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._db.close()

    def get(self, request: ScoreRequest) -> Trace | None:
        """What an earlier run computed, or None."""
        found = self._db.execute(
            "SELECT token_ids, stages, logits, n_clusters, seconds, vitals FROM trace WHERE id = ?",
            (_id(request),),
        ).fetchone()
        if found is None:
            return None
        token_ids, stages, logits, n_clusters, seconds, vitals = found
        return Trace(
            token_ids=tuple(np.frombuffer(token_ids, "<i4").tolist()),
            stages=tuple(_STAGES[i] for i in stages),
            logits=np.frombuffer(logits, "<f4").reshape(-1, n_clusters, 3),
            compute_seconds=seconds,
            vitals=None if vitals is None else TextVitals.from_bytes(vitals, self._saes),
        )

    def put(self, request: ScoreRequest, trace: Trace) -> None:
        """Keeps a trace; on disk with the next `flush` or the end of the context."""
        self._waiting.append(
            (
                _id(request),
                np.asarray(trace.token_ids, "<i4").tobytes(),
                bytes(_STAGES.index(stage) for stage in trace.stages),
                np.ascontiguousarray(trace.logits, "<f4").tobytes(),
                trace.logits.shape[1],
                trace.compute_seconds,
                None if trace.vitals is None else trace.vitals.to_bytes(),
            )
        )

    def flush(self) -> None:
        """Writes what was put to disk; another run on the same file waits no longer than this."""
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO trace VALUES (?, ?, ?, ?, ?, ?, ?)", self._waiting
            )
        self._waiting.clear()


async def trace_texts(
    pipeline: Pipeline,
    requests: Sequence[ScoreRequest],
    store: TraceStore,
    *,
    places: Sequence[str] = (),
    with_vitals: bool = False,
    what: str = "scoring",
    progress: Progress = lambda what, share: None,
) -> AsyncIterator[tuple[int, Trace]]:
    """The trace of every request with its index, in order; those that lack are computed.

    Args:
        places: where each request comes from, for messages.
        with_vitals: run the whole SAEs too, and compute again what was kept without.

    Raises:
        InvalidRequestError: a text that cannot be scored, named by its place.
    """
    shares = np.cumsum([_size(request) for request in requests], dtype=np.float64)
    n_new = 0

    async def found(index: int) -> tuple[Trace, bool]:
        known = store.get(requests[index])
        if known is not None and not (with_vitals and known.vitals is None):
            return known, False
        try:
            return await _compute(pipeline, requests[index], with_vitals), True
        except MonitorError as error:
            where = places[index] if places else f"text {index + 1}"
            raise InvalidRequestError(
                where, f"a text that is refused ({error})", "one that the model takes"
            ) from error

    try:
        async for index, (trace, is_new) in in_order(range(len(requests)), found):
            if is_new:
                store.put(requests[index], trace)
                n_new += 1
                if n_new % IN_FLIGHT == 0:
                    store.flush()
            progress(what, float(shares[index] / shares[-1]))
            yield index, trace
    finally:
        store.flush()


async def _compute(pipeline: Pipeline, request: ScoreRequest, with_vitals: bool) -> Trace:
    tokens = await asyncio.to_thread(pipeline.reader.read, request)
    stream = pipeline.engine.open_stream(reuses=not with_vitals)  # of reused tokens no fit is known
    try:
        result = await pipeline.engine.score(
            OwnForward(stream, tokens.token_ids),
            priority=Priority.REPLAY,
            measure_fit=with_vitals,
        )
    finally:
        pipeline.engine.close_stream(stream)
    vitals = None
    if with_vitals:
        acts = result.latent_acts[[stage is not None for stage in tokens.stages]]
        vitals = TextVitals(
            n_tokens=len(acts),
            firings=np.count_nonzero(acts, axis=0).astype(np.int64),
            totals=acts.sum(axis=0, dtype=np.float64),
            fits=result.fits,
        )
    return Trace(
        token_ids=tuple(tokens.token_ids),
        stages=tuple(tokens.stages),
        logits=result.logits,
        compute_seconds=result.forward_seconds + result.encode_seconds,
        vitals=vitals,
    )


def _size(request: ScoreRequest) -> int:
    return len(request.text or "".join(m.content for m in request.messages or ()))


def _id(request: ScoreRequest) -> str:
    turns = [[m.role, m.content] for m in request.messages or ()]
    said = json.dumps([request.text, turns, request.stage.value])
    return hashlib.sha256(said.encode()).hexdigest()
