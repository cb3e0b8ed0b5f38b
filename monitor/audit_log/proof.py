"""Proof that one decision is in the log, for somebody who has nothing but a checkpoint.

A proof holds the record, its place, the audit path of RFC 6962 section 2.1.1, and the first
checkpoint that covers it. Whoever trusts that checkpoint, by its signature or because they kept a
copy, needs no other record: tests/monitor/audit_log/test_proof.py has a verifier of forty lines
that shares no code with this one.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log import reader
from monitor.audit_log.checkpoint import Statement
from monitor.audit_log.merkle import inclusion_path, leaf_hash
from monitor.audit_log.record import RecordKind
from monitor.audit_log.schema import open_reader, reason, records_table, shown
from monitor.audit_log.verify import check_checkpoint, check_row, first_base
from monitor.errors import AuditChainError, AuditError, NotFoundError

PROOF_VERSION = 1


def prove(url: str, decision_id: str) -> dict[str, Any]:
    """The inclusion proof of a decision, as JSON has it.

    The records between the checkpoints before and after it are verified on the way.

    Raises:
        NotFoundError: no such decision is stored.
        AuditError: no checkpoint covers it yet.
        AuditChainError: a record on the way does not hold.
    """
    engine = open_reader(url)
    table = records_table
    try:
        with engine.connect() as connection:
            found = connection.execute(
                select(table).where(
                    table.c.decision_id == decision_id, table.c.kind == RecordKind.DECISION.value
                )
            ).one_or_none()
            if found is None:
                raise NotFoundError(f"decision: found none of id {decision_id!r} in {shown(url)}")
            before = reader.checkpoint_near(connection, found.chain, found.sequence - 1)
            covering = reader.checkpoint_covering(connection, found.chain, found.sequence)
        if covering is None:
            raise AuditError(
                f"decision {decision_id!r}: no checkpoint covers record {found.sequence} yet; "
                "the server makes one soon, and one when it stops"
            )
        head, frontier = first_base(engine, found.chain)
        if before is not None and before.sequence > head.sequence:
            head, frontier = check_checkpoint(before, None)
        leaves = []
        for row in reader.rows(engine, found.chain, head.sequence):
            if row.sequence > covering.sequence:
                break
            head = check_row(row, head)
            leaves.append(leaf_hash(bytes.fromhex(head.hash)))
        _, whole = check_checkpoint(covering, None)
        if frontier.extended(leaves) != whole:
            raise AuditChainError(
                f"chain {found.chain!r}, checkpoint {covering.sequence}: root: its records give "
                "another",
                chain=found.chain,
                sequence=covering.sequence,
            )
        path = inclusion_path(frontier, leaves, found.sequence - 1)
    except SQLAlchemyError as error:
        raise AuditError(f"audit log {shown(url)} cannot be read: {reason(error)}") from error
    finally:
        engine.dispose()
    return {
        "version": PROOF_VERSION,
        "record": found.body.decode(),
        "prev_hash": found.prev_hash,
        "leaf_index": found.sequence - 1,
        "tree_size": whole.size,
        "path": [node.hex() for node in path],
        **Statement.read(covering.body, covering.signature).to_json(),
    }
