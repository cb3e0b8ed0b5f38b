"""The pipeline that answers now, if any; what the servicers share with the server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from monitor.errors import NotReadyError
from monitor.metrics import Metrics, Rejection

if TYPE_CHECKING:  # a servicer needs its methods only; importing it would bring torch
    from monitor.pipeline import Pipeline


class Serving:
    """Starts without a pipeline, gets one when the model is loaded, and ends by draining."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pipeline: Pipeline | None = None
        self._draining = asyncio.Event()
        self._why_not = "still loading its model"

    @property
    def pipeline(self) -> Pipeline:
        """Who answers; NotReadyError before there is one and while the server drains."""
        if self._draining.is_set():
            self._metrics.rejected(Rejection.DRAINING)
            raise NotReadyError("server: draining, expected a server that takes new work")
        if self._pipeline is None:
            self._metrics.rejected(Rejection.NOT_READY)
            raise NotReadyError(f"server: {self._why_not}, expected a server that is ready")
        return self._pipeline

    @property
    def is_draining(self) -> bool:
        """Whether new work is refused and streams are being ended."""
        return self._draining.is_set()

    def open(self, pipeline: Pipeline) -> None:
        """From now on this pipeline answers."""
        self._pipeline = pipeline

    def stay_closed(self, reason: str) -> None:
        """There will be no pipeline; every caller is told why."""
        self._why_not = reason

    def drain(self) -> None:
        """From now on new work is refused, and open streams end with their summary."""
        self._draining.set()

    async def drained(self) -> None:
        """Returns when `drain` has been called."""
        await self._draining.wait()
