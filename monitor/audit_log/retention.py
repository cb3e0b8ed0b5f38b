"""Deleting old records on purpose, so that what is left still proves itself.

Records go by whole periods between checkpoints. The checkpoints stay, and a statement that says up
to which of them the chain was pruned: `audit verify` goes on from there, and an inclusion proof of
a deleted record that somebody kept still holds against its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, delete, insert
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log import reader
from monitor.audit_log.checkpoint import PRUNING_PREFIX, Signer, Statement
from monitor.audit_log.schema import (
    open_pruner,
    open_reader,
    prunings_table,
    reason,
    records_table,
    shown,
)
from monitor.audit_log.verify import check_checkpoint
from monitor.errors import AuditError, SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was deleted of one chain."""

    chain: str
    records: int
    through: int
    """Sequence of the last record deleted, now or before; 0 where none ever was."""


def prune(
    url: str,
    *,
    before_us: int,
    signer: Signer | None,
    clock: Callable[[], float],
) -> list[Pruned]:
    """Delete every period all of whose records are older than `before_us`, in every chain.

    A period is deleted in one transaction, so that one who is interrupted leaves a log that
    verifies. The last record of a chain stays. Servers may write meanwhile.

    Raises:
        SettingsError: a chain's checkpoints are signed and no signer is given.
        AuditError: the log cannot be written.
    """
    engine = open_pruner(url)
    try:
        return [
            _prune_chain(engine, chain, before_us, signer, clock) for chain in reader.chains(engine)
        ]
    except SQLAlchemyError as error:
        raise AuditError(f"audit log {shown(url)} cannot be pruned: {reason(error)}") from error
    finally:
        engine.dispose()


def export_checkpoints(url: str) -> Iterator[Statement]:
    """Every stored checkpoint, chain by chain, in order."""
    engine = open_reader(url)
    try:
        for chain in reader.chains(engine):
            for row in reader.checkpoints(engine, chain):
                yield Statement.read(row.body, row.signature)
    finally:
        engine.dispose()


def _prune_chain(
    engine: Engine,
    chain: str,
    before_us: int,
    signer: Signer | None,
    clock: Callable[[], float],
) -> Pruned:
    with engine.connect() as connection:
        last = reader.head(connection, chain)
        pruned = reader.pruning(connection, chain)
    through = 0 if pruned is None else int(pruned.sequence)
    records = 0
    for checkpoint in list(reader.checkpoints(engine, chain)):
        if last is None or checkpoint.sequence >= last.sequence:
            break
        if checkpoint.latest_us >= before_us:
            break
        if checkpoint.sequence <= through:
            continue
        head, frontier = check_checkpoint(checkpoint, None)
        if checkpoint.signature is not None and signer is None:
            raise SettingsError(
                f"chain {chain!r}: its checkpoints are signed, expected the signing key "
                "(--signing-key) to prune it"
            )
        statement = Statement.make(
            PRUNING_PREFIX,
            chain=chain,
            frontier=frontier,
            head_hash=head.hash,
            time_us=round(clock() * 1e6),
            signer=signer,
        )
        with engine.begin() as connection:
            records += _delete_period(connection, statement)
        through = statement.sequence
    return Pruned(chain=chain, records=records, through=through)


def _delete_period(connection: Connection, statement: Statement) -> int:
    prunings, records = prunings_table, records_table
    connection.execute(delete(prunings).where(prunings.c.chain == statement.chain))
    connection.execute(
        insert(prunings).values(
            chain=statement.chain,
            sequence=statement.sequence,
            body=statement.body,
            signature=statement.signature,
        )
    )
    gone = connection.execute(
        delete(records).where(
            records.c.chain == statement.chain, records.c.sequence <= statement.sequence
        )
    )
    return gone.rowcount
