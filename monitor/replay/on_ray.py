"""The scorer in a pool of Ray Data's actors, on this machine or on a cluster (extra `ray`).

An actor loads the bundle once, takes a segment at a time, reads its rows itself and writes its part
itself: what travels is where a segment begins, and what came of it. So inputs, keys and the output
folder must be where every node sees them. Ray Data holds back what no actor has room for, starts an
actor that died anew and gives its segment to another; a part that was written twice counts once.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import orjson
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from monitor.config import quiet_ray
from monitor.errors import MonitorError, SettingsError
from monitor.replay.compare import differing
from monitor.replay.manifest import PartRecord
from monitor.replay.rows import Progress, Segment
from monitor.replay.run import OnPart, OnRows
from monitor.replay.scorer import Job, Loading, open_scorer
from monitor.run_facts import run_facts
from sae_core.errors import SAECoreError

MAX_BLOCKS = 10_000
"""Of Ray Data's input: beyond this several segments share a task, and are tried again together."""
SEGMENTS_AHEAD = 2
"""Handed to an actor at a time: one in work, one so that it need not wait for the next."""

_REFUSALS = (MonitorError, SAECoreError)


class RayEngine:
    """The scorer in `actors` actors of the Ray cluster that RAY_ADDRESS names, else of a local one.

    Args:
        loading: how each actor loads the bundle; device and dtype are settled once, for all.
        gpus_per_actor: a whole number, or a fraction for several actors a GPU.
        cpus_per_actor: the threads that torch gets in each.
    """

    name = "ray"

    def __init__(
        self,
        loading: Loading,
        *,
        actors: int = 1,
        gpus_per_actor: float = 0.0,
        cpus_per_actor: float = 1.0,
    ) -> None:
        if actors < 1 or gpus_per_actor < 0 or cpus_per_actor <= 0:
            raise SettingsError(
                f"--actors, --gpus-per-actor, --cpus-per-actor: found {actors}, {gpus_per_actor:g} "
                f"and {cpus_per_actor:g}, expected at least 1, at least 0 and above 0"
            )
        self._loading = loading
        self._actors = actors
        self._cpus = cpus_per_actor
        self._gpus = gpus_per_actor
        self._facts: Mapping[str, Any] = {}
        self._is_mine = False
        """Whether the connection to Ray was made here."""

    def facts(self, job: Job, progress: Progress) -> Mapping[str, Any]:
        """See `Engine`; loads the bundle once on a worker, as an actor will have it."""
        progress("starting Ray", 0.0)
        self._connect()
        self._check_resources()
        progress("loading the bundle on a worker", 0.0)
        task = ray.remote(_facts).options(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0)
        try:
            found = ray.get(task.remote(self._loading, job.max_step_tokens))
        except RayError as error:
            raise SettingsError(f"engine ray: {_last_line(error)}") from error
        if isinstance(found, str):
            raise SettingsError(f"engine ray: {found}")
        device = found["backend"].split("-")[1]
        self._loading = replace(self._loading, device=device, dtype=found["dtype"])
        self._facts = found
        return self._facts

    def run(self, job: Job, segments: Sequence[Segment], on_part: OnPart, on_rows: OnRows) -> None:
        """See `Engine`.

        Raises:
            SettingsError: an actor cannot score, and says why, or actors died again and again.
        """
        items = [{"segment": json.dumps(asdict(segment))} for segment in segments]
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        done = ray.data.from_items(
            items, override_num_blocks=min(len(items), MAX_BLOCKS)
        ).map_batches(
            SegmentActor,
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(
                size=self._actors, max_tasks_in_flight_per_actor=SEGMENTS_AHEAD
            ),
            fn_constructor_args=(job, self._loading, self._facts),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise SettingsError(f"engine ray: {row['error']}")
                part = PartRecord.from_json(orjson.loads(row["part"]))
                on_part(part)
                on_rows(part.summary.rows)
        except RayError as error:
            raise SettingsError(f"engine ray: {_last_line(error)}") from error

    def close(self) -> None:
        """See `Engine`; a connection that was there before stays."""
        if self._is_mine:
            ray.shutdown()

    def _connect(self) -> None:
        if not ray.is_initialized():
            quiet_ray()
            try:
                ray.init(
                    include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise SettingsError(f"engine ray: no cluster to be had: {error}") from error
            self._is_mine = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def _check_resources(self) -> None:
        """Refuses what the cluster will never have, rather than wait for it."""
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, each in (("CPU", self._cpus), ("GPU", self._gpus)):
            needed = self._actors * each
            if there.get(name, 0.0) < needed:
                raise SettingsError(
                    f"--actors {self._actors}: found {there.get(name, 0):g} {name}s in the Ray "
                    f"cluster, expected at least {needed:g}"
                )


class SegmentActor:
    """What each actor is: a `ReplayScorer` that stays, fed a segment at a time."""

    def __init__(self, job: Job, loading: Loading, facts: Mapping[str, Any]) -> None:
        self._runner = asyncio.Runner()
        self._error = ""
        try:
            served = loading.load()
            self._opened = AsyncExitStack()  # kept: the engine stops when it goes
            entering = self._opened.enter_async_context(open_scorer(job, served))
            self._scorer = self._runner.run(entering)
            differs, _ = differing(facts, self._scorer.facts)
            if differs:
                self._error = f"{', '.join(differs)}: found another on a worker than on the first"
        except _REFUSALS as error:
            self._error = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A segment, as JSON, to its part's record, as JSON, or what is wrong."""
        parts, errors = [], []
        for item in batch["segment"]:
            part, error = b"", self._error
            if not error:
                try:
                    part = orjson.dumps(self._runner.run(self._part(json.loads(item))))
                except _REFUSALS as refusal:
                    error = str(refusal)
            parts.append(part.decode())
            errors.append(error)
        return {"part": np.array(parts, object), "error": np.array(errors, object)}

    async def _part(self, item: dict[str, Any]) -> PartRecord:
        segment = Segment(**{**item, "start": tuple(item["start"])})
        (part,) = [part async for part in self._scorer.parts([segment])]
        return part


def _facts(loading: Loading, max_step_tokens: int) -> Mapping[str, Any] | str:
    """What a worker would score with, or why it cannot."""
    try:
        served = loading.load()
    except _REFUSALS as error:
        return str(error)
    try:
        return run_facts(served, max_step_tokens=max_step_tokens)
    finally:
        served.close()


def _last_line(error: Exception) -> str:
    """What went wrong on a worker, without the way there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
