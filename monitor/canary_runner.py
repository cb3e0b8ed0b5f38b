"""Runs the bundle's canaries through the engine that serves, at start and on a timer.

They wait behind all traffic and read no prefix that traffic has left. They are no traffic: no
decision, no token count, no alert, no audit record of their own. What they find goes to the metrics
and to the book of stale clusters, whose changes are on record; a record of each run would soon
outnumber the decisions, and would only say that nothing has changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import numpy as np
import structlog

from monitor.canaries import CanaryScores, ClusterReport, judge_canaries
from monitor.canary_spec import Canary
from monitor.engine import Engine
from monitor.errors import DeadlineError, MonitorError, NotReadyError, QueueFullError
from monitor.evidence import Evidence
from monitor.inputs import InputReader
from monitor.metrics import Metrics
from monitor.records import ScoreRequest
from monitor.served import Served
from monitor.staleness import StaleBy
from monitor.work_queue import Priority
from sae_core.score_cache import OwnForward

log = structlog.get_logger(__name__)

LEAST_PATIENCE_SECONDS = 60.0
"""What a run gets at least before it counts as not run, however short the interval."""


async def score_canaries(
    served: Served,
    engine: Engine,
    reader: InputReader,
    canaries: Sequence[Canary],
    *,
    deadline: float | None = None,
) -> tuple[CanaryScores, ...]:
    """Scores every canary, as its text would be scored for a caller under the default policy.

    Args:
        deadline: on the clock of time.monotonic.

    Raises:
        QueueFullError, DeadlineError, NotReadyError: the engine had no time for them; nothing is
            known of the canaries.
    """

    async def score(canary: Canary) -> CanaryScores:
        request = ScoreRequest(text=canary.text, stage=canary.stage)
        tokens = await asyncio.to_thread(reader.read, request)
        stream = engine.open_stream(reuses=False)
        try:
            result = await engine.score(
                OwnForward(stream, tokens.token_ids), priority=Priority.REPLAY, deadline=deadline
            )
        finally:
            engine.close_stream(stream)
        evidence = Evidence(served.plan, served.policies["default"])
        await evidence.add_in_slices(
            tokens.token_ids, tokens.stages, result.logits, result.latent_acts
        )
        evidence.close()
        counted = result.latent_acts[[stage is not None for stage in tokens.stages]]
        return CanaryScores(
            canary=canary,
            clusters=evidence.results(),
            totals=counted.sum(axis=0, dtype=np.float64),
            firings=np.count_nonzero(counted, axis=0),
        )

    async def told(canary: Canary) -> CanaryScores:
        try:
            return await score(canary)
        except (QueueFullError, DeadlineError, NotReadyError):
            raise
        except MonitorError as error:
            nothing = np.zeros(0)
            return CanaryScores(
                canary=canary,
                clusters=(),
                totals=nothing,
                firings=nothing.astype(np.int64),
                failure=str(error),
            )

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(told(canary)) for canary in canaries]
    return tuple(task.result() for task in tasks)


class CanaryWatch:
    """The canaries of one served bundle, run again and again.

    Args:
        seconds: from one run to the next.
    """

    def __init__(
        self,
        served: Served,
        engine: Engine,
        reader: InputReader,
        metrics: Metrics,
        *,
        seconds: float,
    ) -> None:
        self.failed: Mapping[str, ClusterReport] | None = None
        """Clusters that failed in the last run; None before the first."""
        self._served = served
        self._engine = engine
        self._reader = reader
        self._metrics = metrics.liveness
        self._seconds = seconds
        self._metrics.canaries_expected(
            [cluster.id for cluster in served.bundle.spec.clusters], seconds
        )

    @property
    def problem(self) -> str:
        """What is wrong after the last run, or that there was none; empty where all is well."""
        if self.failed is None:
            return "the canaries have not run yet"
        return "; ".join(f"{name}: {r.problems[0]}" for name, r in self.failed.items())

    async def run_for_ever(self) -> None:
        """Runs until it is cancelled; an error of one run is logged, and ends that run alone."""
        while True:
            began = time.monotonic()
            try:
                await self.run()
            except Exception:
                log.exception("canaries_broke")
            await asyncio.sleep(max(0.0, began + self._seconds - time.monotonic()))

    async def run(self) -> bool:
        """One run; whether it could be completed, whatever it found."""
        canaries = self._served.bundle.canaries
        deadline = time.monotonic() + max(self._seconds, LEAST_PATIENCE_SECONDS)
        try:
            scored = await score_canaries(
                self._served, self._engine, self._reader, canaries, deadline=deadline
            )
        except ExceptionGroup as group:
            not_run, others = group.split((QueueFullError, DeadlineError, NotReadyError))
            if others is not None or not_run is None:
                raise
            log.warning("canaries_not_run", reason=str(not_run.exceptions[0]))
            return False
        self._tell(judge_canaries(self._served, scored))
        return True

    def _tell(self, reports: Mapping[str, ClusterReport]) -> None:
        failed = {name: report for name, report in reports.items() if not report.passed}
        staleness = self._served.plan.staleness
        for cluster, report in reports.items():
            self._metrics.canary_judged(cluster, report.passed, report.deviation)
            more = len(report.problems) - 1
            reason = "" if report.passed else report.problems[0]
            staleness.say(
                cluster, StaleBy.CANARY, f"{reason} (and {more} more)" if more > 0 else reason
            )
            if not report.passed and cluster not in (self.failed or ()):  # once, not every run
                log.error("canary_failed", cluster=cluster, problems=report.problems)
        if self.failed and not failed:
            log.info("canaries_pass_again")
        self.failed = failed
        self._metrics.canaries_ran(time.time())
