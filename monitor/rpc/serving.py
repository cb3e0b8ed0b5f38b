"""The pipeline that answers now, if any; what the servicers share with the server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from monitor.errors import NotFoundError, NotReadyError
from monitor.metrics import Metrics, Rejection

if TYPE_CHECKING:  # a servicer needs its methods only; importing it would bring torch
    from monitor.pipeline import Pipeline


class Serving:
    """Starts without a pipeline, gets one when the model is loaded, and ends by draining."""

    def __init__(
        self, metrics: Metrics, *, audit_url: str | None = None, audit_chain: str = "main"
    ) -> None:
        """`audit_url` is of the log that AuditService reads; it reads none where it is None."""
        self.audit_chain = audit_chain
        self._audit_url = audit_url
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
    def audit_url(self) -> str:
        """The log that AuditService reads; NotFoundError where there is none to read."""
        if self._audit_url is None:
            raise NotFoundError(
                "audit log: found none served here, expected a server that keeps one and either "
                "listens on this machine alone or has audit_rpc on"
            )
        return self._audit_url

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
