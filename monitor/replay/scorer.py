"""`ReplayScorer`: segments of inputs to parts, through the pipeline that serves.

Built once in a process and fed segments: by `run` here, by Ray Data in each of its actors. The
engine always has work of several steps: the rows of the next segment are begun before the last ones
of this one are done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.errors import MonitorError, SettingsError
from monitor.graph_store import GraphPlace
from monitor.in_flight import in_order
from monitor.local import load_local, local_pipeline
from monitor.pipeline import Pipeline, Traced
from monitor.records import ScoreRequest
from monitor.replay.manifest import PartRecord
from monitor.replay.parts import PartRow, part_row, write_part
from monitor.replay.rows import Input, Progress, ReplayRow, Segment, Unreadable
from monitor.replay.summary import Summary
from monitor.run_facts import run_facts
from monitor.served import Served

STEPS_AHEAD = 4
"""Tokens handed to the engine, in steps: enough to fill each while rows are read and written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a bundle is loaded, in whichever process; see `load_local`."""

    bundle: Path
    model: Path | None = None
    cache: Path
    device: str = "auto"
    dtype: str = "auto"
    gpus: int = 1
    tensor_parallel: int = 1
    graph: GraphPlace | None = None
    check_fit: bool = True

    def load(self, progress: Progress = lambda what, share: None) -> Served:
        """The bundle, ready to score."""
        return load_local(
            self.bundle,
            model=self.model,
            cache=self.cache,
            device=self.device,
            dtype=self.dtype,
            gpus=self.gpus,
            tensor_parallel=self.tensor_parallel,
            graph=self.graph,
            check_fit=self.check_fit,
            progress=progress,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is replayed and where to; picklable."""

    inputs: Sequence[Input]
    out: Path
    policy: str = "default"
    """Judges rows that name none."""
    max_step_tokens: int = 2048


class ReplayScorer:
    """Scores segments and writes their parts; use `open_scorer`."""

    def __init__(self, job: Job, pipeline: Pipeline) -> None:
        self.facts: Mapping[str, Any] = run_facts(
            pipeline.served, max_step_tokens=job.max_step_tokens
        )
        self._job = job
        self._pipeline = pipeline

    async def parts(
        self, segments: Iterable[Segment], on_rows: Callable[[int], None] = lambda n: None
    ) -> AsyncIterator[PartRecord]:
        """Each segment's part, written, in order.

        Args:
            on_rows: told how many more rows are scored.

        Raises:
            SettingsError: an input has changed since its survey, or the folder cannot be written.
            NotReadyError: the engine died.
        """
        written: list[tuple[PartRow, Mapping[str, Any]]] = []
        async for (segment, row), outcome in in_order(
            self._rows(segments),
            lambda item: self._outcome(item[1]),
            budget=STEPS_AHEAD * self._job.max_step_tokens,
            size=lambda item: item[1].n_tokens,
        ):
            then = {} if row.original is None else row.original.facts
            written.append((part_row(row, outcome, dict(self.facts)), then))
            on_rows(1)
            if len(written) == segment.n_rows:
                name, digest, size = write_part(
                    self._job.out, segment.index, [row for row, _ in written]
                )
                yield PartRecord(
                    index=segment.index,
                    name=name,
                    sha256=digest,
                    bytes=size,
                    summary=Summary.of(written),
                )
                written = []

    def _rows(self, segments: Iterable[Segment]) -> Iterator[tuple[Segment, ReplayRow]]:
        for segment in segments:
            found = self._job.inputs[segment.input]
            n_rows = 0
            for row in found.rows(segment.start, segment.n_rows, policy=self._job.policy):
                n_rows += 1
                yield segment, row
            if n_rows != segment.n_rows:
                raise SettingsError(
                    f"input {segment.input + 1}: found {n_rows} rows in segment {segment.index}, "
                    f"expected {segment.n_rows}: it changed while it was replayed"
                )

    async def _outcome(self, row: ReplayRow) -> Traced | MonitorError | Unreadable:
        if not isinstance(row.request, ScoreRequest):
            return row.request
        try:
            return await self._pipeline.score_traced(
                row.request, stages=row.stages, as_stream=row.is_stream
            )
        except MonitorError as error:
            self._pipeline.engine.check_alive()  # a dead engine is not the row's fault
            return error


@asynccontextmanager
async def open_scorer(job: Job, served: Served) -> AsyncIterator[ReplayScorer]:
    """A scorer over a running engine; the engine stops with the context."""
    async with local_pipeline(lambda: served, max_step_tokens=job.max_step_tokens) as pipeline:
        yield ReplayScorer(job, pipeline)
