"""What `AuditService` answers, as records, and what is asked of it.

Nothing that comes back has been verified by the client: `StoredRecord.is_whole` looks at one record
alone, a checkpoint at its own signature.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from monitor.audit_log.chain import record_hash
from monitor.audit_log.checkpoint import CHECKPOINT_PREFIX, Statement
from monitor.errors import InvalidRequestError
from monitor.records import Severity, Verdict
from monitor.rpc.convert.enums import SEVERITIES, VERDICTS
from protos.saemonitor.v1 import monitor_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """One record of the audit log, as it is stored."""

    chain: str
    sequence: int
    """Its place in the chain, from 1."""
    body: str
    """Canonical JSON (RFC 8785), the text that `hash` is over."""
    hash: str
    prev_hash: str
    trace: bytes
    """Every token's scores, which `monitor.audit_log.trace.decode_trace` reads; only from
    `audit_record`, and empty where the level keeps none."""

    @property
    def content(self) -> dict[str, Any]:
        """The body, parsed."""
        return dict(json.loads(self.body))

    @property
    def is_whole(self) -> bool:
        """Whether `hash` is the one that `body` and `prev_hash` give."""
        return record_hash(self.prev_hash, self.body.encode()) == self.hash


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRange:
    """Part of a chain that the server has found to hold."""

    first_sequence: int
    """At or before the one asked for: where the checkpoint before it leaves off."""
    last_sequence: int
    head_hash: str
    """The hash of the last record."""
    checkpoints: int
    """Those met on the way, all of which hold."""


def query_request(
    *,
    verdict: Verdict | str | None,
    severity: Severity | str | None,
    cluster: str | None,
    caller_hmac: str | None,
    since: float | None,
    until: float | None,
    limit: int | None,
    newest_first: bool,
) -> pb.QueryRecordsRequest:
    """The arguments of `audit_records` on the wire; InvalidRequestError for what cannot be sent."""
    if limit is not None and not 1 <= limit < 2**32:
        raise InvalidRequestError("limit", str(limit), f"1 to {2**32 - 1}, or none")
    request = pb.QueryRecordsRequest(
        cluster=cluster or "",
        caller_hmac=caller_hmac or "",
        limit=limit or 0,
        newest_first=newest_first,
    )
    if verdict is not None:
        if verdict not in set(Verdict):
            raise InvalidRequestError("verdict", repr(verdict), ", ".join(Verdict))
        request.verdict = VERDICTS[Verdict(verdict)]
    if severity is not None:
        if severity not in set(Severity):
            raise InvalidRequestError("severity", repr(severity), ", ".join(Severity))
        request.severity = SEVERITIES[Severity(severity)]
    if since is not None:
        request.since = since
    if until is not None:
        request.until = until
    return request


def range_request(chain: str | None, first: int | None, last: int | None) -> pb.VerifyRangeRequest:
    """The arguments of `verify_audit` on the wire; InvalidRequestError for what cannot be sent."""
    for name, sequence in (("first_sequence", first), ("last_sequence", last)):
        if sequence is not None and not 1 <= sequence < 2**53:
            raise InvalidRequestError(name, str(sequence), f"1 to {2**53 - 1}, or none")
    return pb.VerifyRangeRequest(
        chain=chain or "", first_sequence=first or 0, last_sequence=last or 0
    )


def record_from_wire(wire: pb.AuditRecord) -> StoredRecord:
    """Field by field."""
    return StoredRecord(
        chain=wire.chain,
        sequence=wire.sequence,
        body=wire.body,
        hash=wire.hash,
        prev_hash=wire.prev_hash,
        trace=wire.trace,
    )


def checkpoint_from_wire(wire: pb.GetCheckpointResponse, public_key: str | None) -> Statement:
    """The statement; AuditChainError where its signature is not one by this key."""
    statement = Statement.read(wire.checkpoint.encode(), wire.signature or None)
    statement.check_signature(CHECKPOINT_PREFIX, public_key)
    return statement


def range_from_wire(wire: pb.VerifyRangeResponse) -> VerifiedRange:
    """Field by field."""
    return VerifiedRange(
        first_sequence=wire.first_sequence,
        last_sequence=wire.last_sequence,
        head_hash=wire.head_hash,
        checkpoints=wire.checkpoints,
    )
