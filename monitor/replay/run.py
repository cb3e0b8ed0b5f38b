"""A replay from its inputs to its manifest: plan, resume, drive, count.

    inputs -> survey -> segments -> [engine: rows -> decisions -> parts] -> manifest

The same command in the same folder goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from monitor.errors import SettingsError
from monitor.replay.manifest import Manifest, PartRecord, State, load_manifest, locked
from monitor.replay.rows import Progress, Segment
from monitor.replay.scorer import Job, Loading, open_scorer
from monitor.run_facts import run_facts
from monitor.served import Served

PART_ROWS = 10_000
"""Default rows of a part: what a killed run does again, at most, for each scorer."""

OnPart = Callable[[PartRecord], None]
OnRows = Callable[[int], None]
"""Told how many more rows are scored, for progress."""


class Engine(Protocol):
    """What scores segments: this process, or actors in others."""

    name: str

    def facts(self, job: Job, progress: Progress) -> Mapping[str, Any]:
        """Loads what scores and tells what it is, as `run_facts`; the same for every segment."""
        ...

    def run(self, job: Job, segments: Sequence[Segment], on_part: OnPart, on_rows: OnRows) -> None:
        """Scores the segments; hands each one's part over as it is written, in any order."""
        ...

    def close(self) -> None:
        """Lets go of what was loaded."""
        ...


class LocalEngine:
    """A scorer in this process."""

    name = "local"

    def __init__(self, loading: Loading) -> None:
        self._loading = loading
        self._served: Served | None = None

    def facts(self, job: Job, progress: Progress) -> Mapping[str, Any]:
        """See `Engine`."""
        self._served = self._loading.load(progress)
        return run_facts(self._served, max_step_tokens=job.max_step_tokens)

    def run(self, job: Job, segments: Sequence[Segment], on_part: OnPart, on_rows: OnRows) -> None:
        """See `Engine`; parts come in order."""
        assert self._served is not None, "facts comes first"
        asyncio.run(self._run(self._served, job, segments, on_part, on_rows))

    def close(self) -> None:
        """See `Engine`."""
        if self._served is not None:
            self._served.close()

    @staticmethod
    async def _run(
        served: Served,
        job: Job,
        segments: Sequence[Segment],
        on_part: OnPart,
        on_rows: OnRows,
    ) -> None:
        async with open_scorer(job, served) as scorer:
            async for part in scorer.parts(segments, on_rows):
                on_part(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A replay that is done."""

    manifest: Manifest
    n_kept: int
    """Parts of an earlier run that were verified and not made again."""
    damaged: Sequence[str]
    """Parts of an earlier run that were not as they had been written, and were made again."""


def replay(
    job: Job,
    engine: Engine,
    *,
    part_rows: int = PART_ROWS,
    progress: Progress = lambda what, share: None,
) -> Replayed:
    """Replays every row of the job's inputs that has no part yet.

    Stopped by KeyboardInterrupt, the manifest says `interrupted` and names the parts that are done.

    Args:
        part_rows: rows of a part.

    Raises:
        SettingsError: the folder is of another run, which is named; or cannot be written.
        MonitorError: an input cannot be read, or what scores cannot be loaded.
    """
    if part_rows < 1 or job.max_step_tokens < 1:
        raise SettingsError(
            f"--part-rows, --max-step-tokens: found {part_rows} and {job.max_step_tokens}, "
            "expected at least 1"
        )
    with locked(job.out):
        earlier = load_manifest(job.out)
        if earlier is not None:
            known = earlier.inputs + [{}] * len(job.inputs)
            pinned = [
                one.pinned(identity) for one, identity in zip(job.inputs, known, strict=False)
            ]
            job = replace(job, inputs=pinned)
        segments, identities = _survey(job, part_rows, progress)
        try:
            manifest = Manifest(
                inputs=identities,
                settings={"part_rows": part_rows, "policy": job.policy},
                facts=dict(engine.facts(job, progress)),
                engine=engine.name,
                n_segments=len(segments),
            )
            damaged: list[str] = []
            if earlier is not None:
                earlier.check_same(manifest, job.out)
                damaged = earlier.damaged(job.out, progress)
                manifest.parts = earlier.parts
            n_kept = len(manifest.parts)
            # What an input held when it was first read is what counts from here on.
            job = replace(
                job,
                inputs=[
                    one.pinned(identity)
                    for one, identity in zip(job.inputs, identities, strict=True)
                ],
            )
            _drive(job, engine, manifest, segments, progress)
        finally:
            engine.close()
    return Replayed(manifest=manifest, n_kept=n_kept, damaged=damaged)


def _survey(
    job: Job, part_rows: int, progress: Progress
) -> tuple[list[Segment], list[dict[str, Any]]]:
    segments: list[Segment] = []
    identities = []
    for number, one in enumerate(job.inputs):
        survey = one.survey(part_rows, progress)
        identities.append(survey.identity)
        for start, n_rows in survey.starts:
            segments.append(Segment(index=len(segments), input=number, start=start, n_rows=n_rows))
    return segments, identities


def _drive(
    job: Job, engine: Engine, manifest: Manifest, segments: Sequence[Segment], progress: Progress
) -> None:
    """Scores what has no part yet, and keeps the manifest up to date."""
    left = [segment for segment in segments if segment.index not in manifest.parts]
    n_left = sum(segment.n_rows for segment in left)
    n_done = 0

    def on_part(part: PartRecord) -> None:
        if part.index in manifest.parts:
            return
        manifest.parts[part.index] = part
        manifest.save(job.out)

    def on_rows(n: int) -> None:
        nonlocal n_done
        n_done += n
        progress(f"replaying, {n_done:,} of {n_left:,} rows", n_done / n_left)

    manifest.save(job.out)
    try:
        if left:
            progress(f"replaying {n_left:,} rows", 0.0)
            engine.run(job, left, on_part, on_rows)
    except KeyboardInterrupt:
        manifest.state = State.INTERRUPTED
        manifest.save(job.out)
        raise
    finally:
        manifest.remove_strays(job.out)
    absent = [segment.index for segment in left if segment.index not in manifest.parts]
    if absent:
        raise SettingsError(
            f"engine {engine.name}: found no part of {len(absent)} segments, expected one of each"
        )
    manifest.state = State.DONE
    manifest.save(job.out)
