"""AuditService on a real server, through the stubs that any language's client has."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from monitor.audit_log.checkpoint import CHECKPOINT_PREFIX, Statement, new_signing_key
from monitor.audit_log.sealing import new_key
from monitor.audit_log.trace import decode_trace
from monitor.client import AsyncMonitorClient
from monitor.errors import AuditChainError, InvalidRequestError, NotFoundError
from monitor.records import Verdict
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc


@pytest.fixture
def signed(tmp_path: Path, serve: Any) -> Iterator[tuple[Any, str]]:
    """A server that keeps everything, seals it and signs; and its public key."""
    pem, public_key = new_signing_key()
    (tmp_path / "signing.pem").write_bytes(pem)
    (tmp_path / "keys").write_text(new_key("a"))
    changes = {
        "audit_level": "content",
        "audit_keys_file": tmp_path / "keys",
        "audit_signing_key_file": tmp_path / "signing.pem",
        "audit_checkpoint_records": 2,
    }
    with serve(**changes) as server:
        yield server, public_key


def stub(server: Any) -> Any:
    return pb_grpc.AuditServiceStub(grpc.insecure_channel(server.address))


def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_records_checkpoints_and_ranges_are_read(signed: tuple[Any, str]) -> None:
    server, public_key = signed
    with server.client() as client:
        alerts = [client.score(text="danger danger danger attack") for _ in range(3)]
    assert all(alert.verdict == "alert" for alert in alerts)
    audit = stub(server)

    record = audit.GetRecord(pb.GetRecordRequest(decision_id=alerts[1].decision_id)).record
    body = json.loads(record.body)
    assert (body["decision_id"], body["level"]) == (alerts[1].decision_id, "content")
    assert record.sequence == alerts[1].sequence
    decoded = decode_trace(record.trace)
    assert decoded.trace.clusters == tuple(c.cluster for c in alerts[1].clusters)
    scored = [stage for stage in decoded.trace.stages if stage is not None]
    assert len(scored) == alerts[1].coverage.scored

    found = list(audit.QueryRecords(pb.QueryRecordsRequest(verdict=pb.VERDICT_ALERT)))
    assert [json.loads(one.record.body)["decision_id"] for one in found] == [
        alert.decision_id for alert in alerts
    ]
    newest = pb.QueryRecordsRequest(limit=1, newest_first=True, since=0.0)
    (last,) = audit.QueryRecords(newest)
    assert last.record.sequence == alerts[2].sequence
    assert list(audit.QueryRecords(pb.QueryRecordsRequest(cluster="absent"))) == []
    assert list(audit.QueryRecords(pb.QueryRecordsRequest(until=0.0))) == []

    checkpoint = audit.GetCheckpoint(pb.GetCheckpointRequest())
    statement = Statement.read(checkpoint.checkpoint.encode(), checkpoint.signature)
    statement.check_signature(CHECKPOINT_PREFIX, public_key)
    assert (checkpoint.sequence, checkpoint.root) == (statement.sequence, statement.root)

    verified = audit.VerifyRange(pb.VerifyRangeRequest())
    assert (verified.first_sequence, verified.last_sequence) == (1, alerts[2].sequence)
    assert verified.head_hash == last.record.hash
    part = audit.VerifyRange(pb.VerifyRangeRequest(first_sequence=2, last_sequence=3))
    assert part.first_sequence <= 2
    assert part.last_sequence == 3


def test_the_client_reads_and_verifies(signed: tuple[Any, str]) -> None:
    server, public_key = signed
    with server.client() as client:
        alerts = [client.score(text="danger danger danger attack") for _ in range(3)]
        record = client.audit_record(alerts[1].decision_id)
        assert record.is_whole
        assert not dataclasses.replace(record, body=record.body + " ").is_whole
        assert record.content["decision_id"] == alerts[1].decision_id
        assert decode_trace(record.trace).trace.clusters
        found = list(client.audit_records(verdict="alert", since=0.0))
        assert [one.sequence for one in found] == [alert.sequence for alert in alerts]
        (last,) = client.audit_records(limit=1, newest_first=True)
        assert last.sequence == alerts[2].sequence
        assert list(client.audit_records(until=0.0)) == []
        assert list(client.audit_records(severity="info")) == []
        some = client.audit_records()
        assert next(some).sequence == alerts[0].sequence
        some.close()

        checkpoint = client.audit_checkpoint(public_key=public_key)
        assert checkpoint.sequence in (2, 4)
        _, other = new_signing_key()
        with pytest.raises(AuditChainError, match="signature"):
            client.audit_checkpoint(public_key=other)
        verified = client.verify_audit()
        assert (verified.last_sequence, verified.head_hash) == (last.sequence, last.hash)
        assert client.verify_audit(first_sequence=2, last_sequence=3).last_sequence == 3

        with pytest.raises(NotFoundError, match="'absent'"):
            client.audit_record("absent")
        with pytest.raises(InvalidRequestError, match="since"):
            list(client.audit_records(since=float("nan")))
        for wrong in ({"verdict": "bad"}, {"severity": "bad"}, {"limit": 0}):
            with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
                client.audit_records(**wrong)
        with pytest.raises(InvalidRequestError, match="first_sequence"):
            client.verify_audit(first_sequence=0)


async def test_the_asynchronous_client_reads_and_verifies(signed: tuple[Any, str]) -> None:
    server, public_key = signed
    async with AsyncMonitorClient(server.address, timeout_seconds=60) as client:
        alert = await client.score(text="danger danger danger attack")
        record = await client.audit_record(alert.decision_id)
        assert (record.is_whole, record.sequence) == (True, alert.sequence)
        found = [one async for one in client.audit_records(verdict=Verdict.ALERT)]
        assert [one.hash for one in found] == [record.hash]
        assert (await client.audit_checkpoint(public_key=public_key)).sequence == 2
        assert (await client.verify_audit()).last_sequence == record.sequence
        with pytest.raises(NotFoundError, match="'other'"):
            await client.audit_checkpoint("other")
        with pytest.raises(InvalidRequestError, match="since"):
            [one async for one in client.audit_records(since=float("nan"))]


def test_the_client_names_the_record_that_does_not_hold(signed: tuple[Any, str]) -> None:
    server, _ = signed
    connection = sqlite3.connect(server.server.settings.audit.removeprefix("sqlite:///"))
    connection.execute("UPDATE audit_records SET time_us = 1 WHERE sequence = 1")
    connection.commit()
    connection.close()
    with server.client() as client, pytest.raises(AuditChainError, match="record 1"):
        client.verify_audit()


def test_what_cannot_be_answered_has_its_code(signed: tuple[Any, str]) -> None:
    server, _ = signed
    audit = stub(server)
    unknown = pb.GetRecordRequest(decision_id="absent")
    for call, code, words in (
        (lambda: audit.GetRecord(unknown), grpc.StatusCode.NOT_FOUND, "none of id 'absent'"),
        (
            lambda: audit.GetRecord(pb.GetRecordRequest()),
            grpc.StatusCode.INVALID_ARGUMENT,
            "decision_id",
        ),
        (
            lambda: audit.GetCheckpoint(pb.GetCheckpointRequest(chain="other")),
            grpc.StatusCode.NOT_FOUND,
            "'other'",
        ),
        (
            lambda: audit.VerifyRange(pb.VerifyRangeRequest(first_sequence=5, last_sequence=2)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "last_sequence",
        ),
        (
            lambda: audit.VerifyRange(pb.VerifyRangeRequest(first_sequence=2**63)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "first_sequence",
        ),
        (
            lambda: audit.VerifyRange(pb.VerifyRangeRequest(first_sequence=9, last_sequence=9)),
            grpc.StatusCode.NOT_FOUND,
            "records",
        ),
        (
            lambda: list(audit.QueryRecords(pb.QueryRecordsRequest(since=float("nan")))),
            grpc.StatusCode.INVALID_ARGUMENT,
            "since",
        ),
        (
            lambda: list(audit.QueryRecords(pb.QueryRecordsRequest(verdict=9))),  # type: ignore[arg-type]
            grpc.StatusCode.INVALID_ARGUMENT,
            "verdict",
        ),
    ):
        found, details = code_of(call)
        assert found is code, details
        assert words in details


def test_a_changed_record_is_data_loss(signed: tuple[Any, str]) -> None:
    server, _ = signed
    connection = sqlite3.connect(server.server.settings.audit.removeprefix("sqlite:///"))
    connection.execute("UPDATE audit_records SET time_us = 1 WHERE sequence = 1")
    connection.commit()
    connection.close()
    code, details = code_of(lambda: stub(server).VerifyRange(pb.VerifyRangeRequest()))
    assert code is grpc.StatusCode.DATA_LOSS
    assert "record 1" in details


@pytest.mark.parametrize("changes", [{"audit_rpc": "off"}, {"audit_level": "none"}])
def test_a_log_that_is_not_served_is_not_found(serve: Any, changes: dict[str, str]) -> None:
    with serve(**changes) as server:
        code, details = code_of(lambda: stub(server).GetCheckpoint(pb.GetCheckpointRequest()))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "audit_rpc on" in details


def test_beyond_this_machine_it_is_served_only_when_asked_for(serve: Any) -> None:
    everywhere = ("127.0.0.1:0", "0.0.0.0:0")
    with serve(listen=everywhere) as server:
        code, _ = code_of(lambda: stub(server).VerifyRange(pb.VerifyRangeRequest()))
        assert code is grpc.StatusCode.NOT_FOUND
    with serve(listen=everywhere, audit_rpc="on") as server:
        assert stub(server).VerifyRange(pb.VerifyRangeRequest()).last_sequence >= 1


@pytest.mark.parametrize("level", ["scores", "tokens"])
def test_levels_without_a_key_are_said_loudly(serve: Any, level: str) -> None:
    with structlog.testing.capture_logs() as logs, serve(audit_level=level):
        pass
    said = [one["log_level"] for one in logs if one["event"] == "audit_not_encrypted"]
    assert said == ([] if level == "scores" else ["error"])
