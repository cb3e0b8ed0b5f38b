"""Rows to the policy's decisions on them, as arrays; logits stay in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitor.judged import Judged, judge
from monitor.model_store import Progress
from monitor.pipeline import Pipeline
from monitor.policy import Policy
from monitor.records import ScoreRequest, Stage
from monitor.served import Served
from monitor.traces import TraceStore, request_of, trace_texts
from sae_core.evaluation.data import LabelledText


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The decisions on some texts; arrays have a row for each."""

    overall: NDArray[np.float64]
    """[n, 3]: the policy's one number from fused, dense, sae; minus infinity where none is."""
    scores: NDArray[np.float64]
    """[n, n_clusters, 3]; NaN where a cluster does not look at the text's stage."""
    verdict: NDArray[np.int64]
    """[n]: 0 pass, 1 flag, 2 alert."""
    n_tokens: NDArray[np.int64]
    """[n]: read by the model."""
    n_scored: NDArray[np.int64]
    seconds: NDArray[np.float64]
    flagged_at: tuple[int | None, ...]
    alerted_at: tuple[int | None, ...]

    def of(self, chosen: Sequence[int]) -> Scored:
        """Those of some of the texts."""
        return Scored(
            overall=self.overall[chosen],
            scores=self.scores[chosen],
            verdict=self.verdict[chosen],
            n_tokens=self.n_tokens[chosen],
            n_scored=self.n_scored[chosen],
            seconds=self.seconds[chosen],
            flagged_at=tuple(self.flagged_at[i] for i in chosen),
            alerted_at=tuple(self.alerted_at[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What scoring needs, once for all the texts of an evaluation."""

    served: Served
    pipeline: Pipeline
    store: TraceStore
    policy: Policy
    with_prompts: bool

    def request(self, row: LabelledText) -> ScoreRequest:
        """How the row is sent."""
        return request_of(row, with_prompt=self.with_prompts)

    async def score(
        self,
        rows: Sequence[LabelledText],
        *,
        what: str = "scoring",
        progress: Progress = lambda what, share: None,
    ) -> Scored:
        """Every row's decision; what was computed before is not computed again.

        Raises:
            InvalidRequestError: a text that cannot be scored, named by its place.
        """
        judged: list[Judged] = []
        tokens: list[int] = []
        seconds: list[float] = []
        requests = [self.request(row) for row in rows]
        async for index, trace in trace_texts(
            self.pipeline,
            requests,
            self.store,
            places=[row.place for row in rows],
            what=what,
            progress=progress,
        ):
            # The label of a completion that was read after its prompt says nothing of the prompt.
            stages = (Stage.COMPLETION,) if requests[index].messages else ()
            judged.append(judge(self.served, self.policy, trace, stages))
            tokens.append(len(trace.token_ids))
            seconds.append(trace.compute_seconds)
        overall = np.array([j.overall for j in judged]).reshape(-1, 3)
        return Scored(
            overall=np.where(np.isnan(overall), -np.inf, overall),
            scores=np.array([j.scores for j in judged]).reshape(-1, self.served.plan.n_clusters, 3),
            verdict=np.array([j.verdict.rank for j in judged], np.int64),
            n_tokens=np.array(tokens, np.int64),
            n_scored=np.array([j.n_scored for j in judged], np.int64),
            seconds=np.array(seconds),
            flagged_at=tuple(j.flagged_at for j in judged),
            alerted_at=tuple(j.alerted_at for j in judged),
        )
