"""Proof that the stored log is the one that was written, or the first record where it is not.

Every record is checked in order: its sequence follows the one before, `prev_hash` is the hash of
the one before, `hash` is the hash of its body, its columns say what its body says, and what lies
beside it has the digests that the body names. Every checkpoint on the way must give the Merkle root
and the head of the records up to it, and bear the signature that it should. Memory is bounded: a
page of records, and a few hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Row, func, select

from monitor.audit_log import reader
from monitor.audit_log.chain import FIRST_SEQUENCE, genesis_hash, record_hash
from monitor.audit_log.checkpoint import CHECKPOINT_PREFIX, PRUNING_PREFIX, Statement
from monitor.audit_log.merkle import Frontier, leaf_hash
from monitor.audit_log.record import iso_time
from monitor.audit_log.schema import open_reader, records_table, shown
from monitor.errors import AuditChainError, AuditError

COLUMNS_IN_BODY = ("chain", "sequence", "kind", "decision_id", "time", "time_us", "verdict")
COLUMNS_SOMETIMES_IN_BODY = ("severity", "caller_hmac")
"""Null where the body does not have them."""
COLUMNS_BESIDE_BODY = ("trace", "sealed")
PROGRESS_RECORDS = 1000
CLOCK_STEP_US = 10_000_000
"""How far a record's time may lie before that of the one before it and count as waiting in line."""

NOT_PROVEN = (
    "records removed from the end with their checkpoints, or a log written anew by somebody who "
    "can sign, show only against checkpoints that were kept elsewhere (audit checkpoints export)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHead:
    """Where a chain stands: sequence 0 and the genesis hash before its first record."""

    chain: str
    sequence: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainReport:
    """One chain that holds from its first record to its head."""

    head: ChainHead
    records: int
    pruned: int
    """Records deleted on purpose at its beginning, which their checkpoints stand for."""
    checkpoints: int
    signed: int
    """How many of these are signed."""
    clock_steps: int
    """Records whose time lies more than ten seconds before that of the record before."""
    first_time: str
    last_time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """A log in which every record verifies."""

    path: str
    chains: tuple[ChainReport, ...]
    kept_elsewhere: int = 0
    """Checkpoints given from outside that the log agrees with."""
    not_proven: str = NOT_PROVEN
    """What this proof does not cover, in a sentence for whoever reads the result."""

    @property
    def records(self) -> int:
        """Records verified, all chains together."""
        return sum(chain.records for chain in self.chains)


def verify(
    url: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    public_key: str | None = None,
    kept: Sequence[Statement] = (),
) -> AuditReport:
    """The log's heads once every record holds; AuditChainError names the first that does not.

    A log that is being written is verified up to a record that was the head when its last page was
    read.

    Args:
        progress: called with records verified and records stored.
        public_key: of the signer, in hexadecimal; every checkpoint must then bear its signature.
            Without it a checkpoint's own key is taken, or none.
        kept: checkpoints that were exported earlier; the log must agree with each.
    """
    engine = open_reader(url)
    try:
        names = reader.chains(engine)
        for statement in kept:
            if statement.chain not in names:
                raise AuditChainError(
                    f"chain {statement.chain!r}: found none, expected {statement.sequence} records "
                    "by a checkpoint that was kept elsewhere",
                    chain=statement.chain,
                )
        with engine.connect() as connection:
            total = connection.execute(select(func.count()).select_from(records_table)).scalar_one()
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None and done % PROGRESS_RECORDS == 0:
                progress(done, max(total, done))

        reports = []
        for name in names:
            mine = [statement for statement in kept if statement.chain == name]
            reports.append(_verify_chain(engine, name, public_key, mine, step))
        if progress is not None:
            progress(done, max(total, done))
        return AuditReport(path=shown(url), chains=tuple(reports), kept_elsewhere=len(kept))
    finally:
        engine.dispose()


def start_of(chain: str) -> ChainHead:
    """The head of a chain that has no record yet."""
    return ChainHead(chain=chain, sequence=FIRST_SEQUENCE - 1, hash=genesis_hash(chain))


def first_base(
    engine: Engine, chain: str, public_key: str | None = None
) -> tuple[ChainHead, Frontier]:
    """What the first stored record follows: the genesis, or the checkpoint of the last pruning.

    AuditChainError where the pruning does not hold, or its checkpoint is not there.
    """
    with engine.connect() as connection:
        row = reader.pruning(connection, chain)
        if row is None:
            return start_of(chain), Frontier()
        checkpoint = reader.checkpoint_near(connection, chain, row.sequence)
    statement = Statement.read(row.body, row.signature)
    statement.check_signature(PRUNING_PREFIX, public_key)
    if checkpoint is None or checkpoint.sequence != row.sequence or statement.chain != chain:
        raise _broken(chain, row.sequence, None, "pruning", "no checkpoint of its own", "one")
    head, frontier = check_checkpoint(checkpoint, public_key)
    if (statement.sequence, statement.root, statement.head_hash) != (
        head.sequence,
        frontier.root().hex(),
        head.hash,
    ):
        raise _broken(chain, row.sequence, None, "pruning", statement.root, frontier.root().hex())
    return head, frontier


def check_checkpoint(row: Row[Any], public_key: str | None) -> tuple[ChainHead, Frontier]:
    """A stored checkpoint that agrees with itself: the head and the frontier that it stands for."""
    statement = Statement.read(row.body, row.signature)
    statement.check_signature(CHECKPOINT_PREFIX, public_key)
    found = (row.chain, row.sequence, row.time_us)
    stated = (statement.chain, statement.sequence, statement.time_us)
    if found != stated:
        raise _broken(row.chain, row.sequence, None, "checkpoint", found, stated)
    try:
        frontier = Frontier.from_bytes(row.sequence, row.frontier)
    except ValueError as error:
        raise _broken(
            row.chain, row.sequence, None, "checkpoint", str(error), "a frontier"
        ) from None
    root = frontier.root().hex()
    if root != statement.root:
        raise _broken(row.chain, row.sequence, None, "checkpoint root", statement.root, root)
    head = ChainHead(chain=row.chain, sequence=row.sequence, hash=statement.head_hash)
    return head, frontier


def check_against_checkpoint(
    row: Row[Any], head: ChainHead, frontier: Frontier, public_key: str | None
) -> None:
    """AuditChainError unless a stored checkpoint says what the records up to this head say."""
    stated, stored_frontier = check_checkpoint(row, public_key)
    for what, found, expected in (
        ("sequence", stated.sequence, head.sequence),
        ("head_hash", stated.hash, head.hash),
        ("root", stored_frontier.root().hex(), frontier.root().hex()),
    ):
        if found != expected:
            raise _broken(head.chain, stated.sequence, None, f"checkpoint {what}", found, expected)
    if stored_frontier != frontier:
        raise _broken(head.chain, head.sequence, None, "checkpoint frontier", "another", "its own")


def _verify_chain(
    engine: Engine,
    chain: str,
    public_key: str | None,
    kept: Sequence[Statement],
    step: Callable[[], None],
) -> ChainReport:
    head, frontier = base, base_frontier = first_base(engine, chain, public_key)
    marks = _Marks(engine, chain, public_key, kept)
    marks.skip_before(base.sequence)
    marks.check(head, frontier)
    first_time = last_time = ""
    last_us, clock_steps = None, 0
    after = None  # records before the base are read too, and refused
    while True:
        for row in reader.rows(engine, chain, after):
            head = check_row(row, head)
            frontier = frontier.extended([leaf_hash(bytes.fromhex(head.hash))])
            marks.check(head, frontier)
            clock_steps += last_us is not None and row.time_us < last_us - CLOCK_STEP_US
            last_time, last_us = row.time, row.time_us
            first_time = first_time or row.time
            step()
        # A checkpoint beyond the head may be newer than the last page of records.
        if after == head.sequence or not marks.speaks_beyond(head):
            break
        after = head.sequence
    marks.finish(head)
    return ChainReport(
        head=head,
        records=head.sequence - base.sequence,
        pruned=base_frontier.size,
        checkpoints=marks.n_checkpoints,
        signed=marks.n_signed,
        clock_steps=clock_steps,
        first_time=first_time,
        last_time=last_time,
    )


class _Marks:
    """The checkpoints of one chain, stored and kept elsewhere, met in order of sequence."""

    def __init__(
        self, engine: Engine, chain: str, public_key: str | None, kept: Sequence[Statement]
    ) -> None:
        self.n_checkpoints = 0
        self.n_signed = 0
        self._chain = chain
        self._public_key = public_key
        self._stored = reader.checkpoints(engine, chain)
        self._next = next(self._stored, None)
        self._kept = sorted(kept, key=lambda statement: statement.sequence)
        for statement in self._kept:
            statement.check_signature(CHECKPOINT_PREFIX, public_key)

    def skip_before(self, sequence: int) -> None:
        """Those of pruned records: they are signed, and what was kept must be among them."""
        roots: dict[int, str] = {}
        wanted = {statement.sequence for statement in self._kept}
        while self._next is not None and self._next.sequence < sequence:
            head, frontier = check_checkpoint(self._next, self._public_key)
            if head.sequence in wanted:
                roots[head.sequence] = frontier.root().hex()
            self._count()
        while self._kept and self._kept[0].sequence < sequence:
            statement = self._kept.pop(0)
            found = roots.get(statement.sequence)
            if found != statement.root:
                raise self._disagrees(statement.sequence, "root", found, statement.root)

    def check(self, head: ChainHead, frontier: Frontier) -> None:
        """Whatever stands at this head must say what the records say."""
        while self._next is not None and self._next.sequence <= head.sequence:
            check_against_checkpoint(self._next, head, frontier, self._public_key)
            self._count()
        while self._kept and self._kept[0].sequence <= head.sequence:
            statement = self._kept.pop(0)
            if statement.head_hash != head.hash:
                raise self._disagrees(head.sequence, "head", head.hash, statement.head_hash)
            if statement.root != frontier.root().hex():
                found = frontier.root().hex()
                raise self._disagrees(head.sequence, "root", found, statement.root)

    def speaks_beyond(self, head: ChainHead) -> bool:
        """Whether a stored checkpoint is of records that have not been met."""
        return self._next is not None and self._next.sequence > head.sequence

    def finish(self, head: ChainHead) -> None:
        """No checkpoint may speak of records that are not there."""
        beyond = [] if self._next is None else [int(self._next.sequence)]
        beyond += [statement.sequence for statement in self._kept]
        if beyond:
            raise AuditChainError(
                f"chain {self._chain!r}, record {head.sequence + 1}: found none, expected records "
                f"up to {max(beyond)}, of which a checkpoint speaks",
                chain=self._chain,
                sequence=head.sequence + 1,
            )

    def _count(self) -> None:
        assert self._next is not None
        self.n_checkpoints += 1
        self.n_signed += self._next.signature is not None
        self._next = next(self._stored, None)

    def _disagrees(
        self, sequence: int, what: str, found: object, expected: object
    ) -> AuditChainError:
        return _broken(self._chain, sequence, None, f"checkpoint {what}", found, expected)


def check_rows(stored: Iterable[Row[Any]], head: ChainHead) -> ChainHead:
    """The head after these rows, which follow `head`; AuditChainError at the first that fails."""
    for row in stored:
        head = check_row(row, head)
    return head


def check_row(row: Row[Any], head: ChainHead) -> ChainHead:
    """The head after this row, which must be the one that follows `head`."""
    expected = head.sequence + 1
    if row.sequence != expected:
        raise _broken(head.chain, expected, None, "sequence", row.sequence, expected)

    def broken(what: str, found: object, expected: object) -> AuditChainError:
        return _broken(head.chain, row.sequence, row.decision_id, what, found, expected)

    if row.prev_hash != head.hash:
        raise broken("prev_hash", row.prev_hash, head.hash)
    computed = record_hash(head.hash, row.body)
    if row.hash != computed:
        raise broken("hash", row.hash, computed)
    try:
        body = dict(json.loads(row.body))
    except (ValueError, TypeError):
        raise broken("body", "no JSON object", "a JSON object") from None
    for column in COLUMNS_IN_BODY:
        if column not in body or row._mapping[column] != body[column]:
            raise broken(f"column {column}", row._mapping[column], body.get(column))
    for column in COLUMNS_SOMETIMES_IN_BODY:
        if row._mapping[column] != body.get(column):
            raise broken(f"column {column}", row._mapping[column], body.get(column))
    for column in COLUMNS_BESIDE_BODY:
        stored = row._mapping[column]
        found = None if stored is None else hashlib.sha256(stored).hexdigest()
        stated = None if column not in body else body[column]["sha256"]
        if found != stated:
            raise broken(f"column {column}, sha256", found, stated)
    if row.time != iso_time(row.time_us):
        raise broken("time", row.time, iso_time(row.time_us))
    return ChainHead(chain=head.chain, sequence=row.sequence, hash=row.hash)


def read_kept(text: str) -> list[Statement]:
    """Checkpoints as `audit checkpoints export` wrote them, one a line."""
    statements = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            statements.append(Statement.from_json(json.loads(line)))
        except ValueError as error:
            raise AuditError(f"checkpoints, line {number}: no JSON: {error}") from None
    return statements


def _broken(
    chain: str, sequence: int, decision_id: str | None, what: str, found: object, expected: object
) -> AuditChainError:
    decision = "" if decision_id is None else f" (decision {decision_id!r})"
    return AuditChainError(
        f"chain {chain!r}, record {sequence}{decision}: {what}: found {found!r}, "
        f"expected {expected!r}",
        chain=chain,
        sequence=sequence,
        decision_id=decision_id,
    )
