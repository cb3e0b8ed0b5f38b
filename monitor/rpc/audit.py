"""AuditService: the audit log, read to callers; every read runs beside the event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import grpc

from monitor.audit_log import lookup
from monitor.audit_log.query import Filter, rows
from monitor.errors import InvalidRequestError
from monitor.rpc.convert.enums import SEVERITIES, VERDICTS
from monitor.rpc.serving import Serving
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

PAGE_RECORDS = 64
"""Read in one go before they are sent."""

MAX_SEQUENCE = 2**53
"""Beyond what a record can hold in its JSON."""
MAX_SECONDS = 253_402_300_800.0
"""The year 10000; a database's whole numbers end later."""

_VERDICT_OF = {number: verdict for verdict, number in VERDICTS.items()}
_SEVERITY_OF = {number: severity for severity, number in SEVERITIES.items()}


class AuditService(pb_grpc.AuditServiceServicer):
    """Reads the audit log."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetRecord(
        self,
        request: pb.GetRecordRequest,
        context: grpc.aio.ServicerContext[pb.GetRecordRequest, pb.GetRecordResponse],
    ) -> pb.GetRecordResponse:
        """One decision's record."""
        url = self._serving.audit_url
        if not request.decision_id:
            raise InvalidRequestError("decision_id", "none", "a decision's id")
        row = await asyncio.to_thread(lookup.stored_decision, url, request.decision_id)
        record = _record_to_wire(row)
        record.trace = row.trace or b""
        return pb.GetRecordResponse(record=record)

    async def QueryRecords(  # type: ignore[override]  # a coroutine that writes, not a generator
        self,
        request: pb.QueryRecordsRequest,
        context: grpc.aio.ServicerContext[pb.QueryRecordsRequest, pb.QueryRecordsResponse],
    ) -> None:
        """Every record that matches; a coroutine, so that a cancellation ends it at once."""
        found = rows(
            self._serving.audit_url,
            _filter_from_wire(request),
            limit=request.limit or None,
            newest_first=request.newest_first,
        )
        while page := await asyncio.to_thread(lambda: list(itertools.islice(found, PAGE_RECORDS))):
            for row, _ in page:
                await context.write(pb.QueryRecordsResponse(record=_record_to_wire(row)))

    async def GetCheckpoint(
        self,
        request: pb.GetCheckpointRequest,
        context: grpc.aio.ServicerContext[pb.GetCheckpointRequest, pb.GetCheckpointResponse],
    ) -> pb.GetCheckpointResponse:
        """A chain's last checkpoint."""
        chain = request.chain or self._serving.audit_chain
        statement = await asyncio.to_thread(lookup.last_checkpoint, self._serving.audit_url, chain)
        return pb.GetCheckpointResponse(
            chain=statement.chain,
            sequence=statement.sequence,
            root=statement.root,
            checkpoint=statement.body.decode(),
            signature=statement.signature or "",
        )

    async def VerifyRange(
        self,
        request: pb.VerifyRangeRequest,
        context: grpc.aio.ServicerContext[pb.VerifyRangeRequest, pb.VerifyRangeResponse],
    ) -> pb.VerifyRangeResponse:
        """Part of a chain, verified; the work ends with the call."""
        first, last = request.first_sequence, request.last_sequence
        if max(first, last) > MAX_SEQUENCE:
            raise InvalidRequestError(
                "first_sequence, last_sequence", str(max(first, last)), f"at most {MAX_SEQUENCE}"
            )
        if last and last < first:
            raise InvalidRequestError("last_sequence", str(last), f"at least {first}, or 0")
        gone = threading.Event()
        try:
            found = await asyncio.to_thread(
                lookup.verify_range,
                self._serving.audit_url,
                request.chain or self._serving.audit_chain,
                first,
                last,
                gone.is_set,
            )
        finally:
            gone.set()
        return pb.VerifyRangeResponse(
            first_sequence=found.first,
            last_sequence=found.head.sequence,
            head_hash=found.head.hash,
            checkpoints=found.checkpoints,
        )


def _filter_from_wire(request: pb.QueryRecordsRequest) -> Filter:
    for field, known in (("verdict", _VERDICT_OF), ("severity", _SEVERITY_OF)):
        number = getattr(request, field)
        if number and number not in known:
            raise InvalidRequestError(field, str(number), "one of its enum, or none")
    for field in ("since", "until"):
        moment = getattr(request, field)
        if not abs(moment) <= MAX_SECONDS:
            raise InvalidRequestError(field, str(moment), "Unix seconds of the years 1 to 9999")
    return Filter(
        verdict=_VERDICT_OF.get(request.verdict),
        severity=_SEVERITY_OF.get(request.severity),
        cluster=request.cluster or None,
        caller_hmac=request.caller_hmac or None,
        since=request.since if request.HasField("since") else None,
        until=request.until if request.HasField("until") else None,
    )


def _record_to_wire(row: Any) -> pb.AuditRecord:
    return pb.AuditRecord(
        chain=row.chain,
        sequence=row.sequence,
        body=row.body.decode(errors="replace"),
        hash=row.hash,
        prev_hash=row.prev_hash,
    )
