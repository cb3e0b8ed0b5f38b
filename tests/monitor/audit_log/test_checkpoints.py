"""Checkpoints: when they are made, what they catch, and what pruning leaves."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from monitor.audit_log.checkpoint import Signer, Statement, load_signer, new_signing_key
from monitor.audit_log.proof import prove
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.retention import export_checkpoints, prune
from monitor.audit_log.schema import database_path
from monitor.audit_log.store import AuditStore
from monitor.audit_log.verify import read_kept, verify
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditChainError, AuditError, SettingsError
from monitor.records import Decision, Verdict

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(b"1" * 32))
STRANGER = Signer(Ed25519PrivateKey.from_private_bytes(b"2" * 32))


def records(start: int, stop: int) -> list[AuditRecord]:
    return [
        AuditRecord(
            kind=RecordKind.DECISION,
            time_us=number * 1_000_000,
            decision_id=f"d{number}",
            verdict=Verdict.PASS,
            content={},
        )
        for number in range(start, stop)
    ]


def fill(url: str, signer: Signer | None = SIGNER, n_records: int = 45) -> None:
    """Records d1 to d<n>, a second apart, with a checkpoint after every ten."""
    store = AuditStore(url, "main", signer=signer, checkpoint_records=10, clock=lambda: 100.0)
    for start in range(1, n_records + 1, 10):
        store.commit(store.link(records(start, min(start + 10, n_records + 1))))
    store.close()


def change(url: str, statement: str, values: tuple[object, ...] = ()) -> None:
    connection = sqlite3.connect(database_path(url))
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def kept(url: str) -> list[Statement]:
    return read_kept("\n".join(json.dumps(one.to_json()) for one in export_checkpoints(url)))


def test_a_checkpoint_comes_after_so_many_records_and_on_closing(url: str) -> None:
    fill(url)
    assert [one.sequence for one in export_checkpoints(url)] == [10, 20, 30, 40]
    (report,) = verify(url, public_key=SIGNER.public_key).chains
    assert (report.checkpoints, report.signed, report.records) == (4, 4, 45)


async def test_a_checkpoint_comes_after_some_time_without_another_record(
    url: str, decision: Callable[..., Decision]
) -> None:
    log = AuditLog.open(url, checkpoint_seconds=0.05)
    log.start()
    await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
    while not list(export_checkpoints(url)):
        await asyncio.sleep(0.01)
    await log.close()
    assert [one.sequence for one in export_checkpoints(url)] == [1]


def test_a_reopened_chain_goes_on_with_the_same_tree(url: str) -> None:
    for start in range(1, 400, 37):
        store = AuditStore(url, "main", signer=SIGNER, checkpoint_records=50)
        store.commit(store.link(records(start, start + 37)))
        store.close()
    assert verify(url, public_key=SIGNER.public_key).records == 407


def test_a_public_key_wants_every_checkpoint_signed_by_it(url: str, tmp_path: Path) -> None:
    fill(url)
    with pytest.raises(AuditChainError, match="checkpoint 10: signature: it is not one by"):
        verify(url, public_key=STRANGER.public_key)
    unsigned = f"sqlite:///{tmp_path / 'unsigned.db'}"
    fill(unsigned, signer=None)
    assert verify(unsigned).chains[0].signed == 0
    with pytest.raises(AuditChainError, match="signature: found none, expected one by"):
        verify(unsigned, public_key=SIGNER.public_key)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("time_us", 1),
        ("frontier", b"x" * 64),
        ("frontier", b""),
        ("signature", "00" * 64),
        ("body", b"{}"),
        ("body", b"junk"),
    ],
)
def test_a_change_to_a_checkpoint_is_found(url: str, column: str, value: object) -> None:
    fill(url)
    change(url, f"UPDATE audit_checkpoints SET {column} = ? WHERE sequence = 20", (value,))
    with pytest.raises(AuditError, match="checkpoint"):
        verify(url)


def test_a_checkpoint_of_another_history_is_found(url: str, tmp_path: Path) -> None:
    fill(url)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    store = AuditStore(other, "main", signer=SIGNER, checkpoint_records=10)
    store.commit(store.link(records(101, 111)))
    store.close()
    with pytest.raises(AuditChainError, match="record 10: checkpoint head"):
        verify(url, kept=kept(other))


def test_a_log_rewritten_whole_is_found_by_checkpoints_kept_elsewhere(
    url: str, tmp_path: Path
) -> None:
    fill(url)
    elsewhere = kept(url)
    assert verify(url, kept=elsewhere).kept_elsewhere == 4
    forged = f"sqlite:///{tmp_path / 'forged.db'}"
    store = AuditStore(forged, "main", signer=SIGNER, checkpoint_records=10)
    store.commit(store.link([*records(1, 7), *records(8, 47)]))
    store.close()
    assert verify(forged, public_key=SIGNER.public_key).records == 45
    with pytest.raises(AuditChainError, match="record 10: checkpoint head"):
        verify(forged, kept=elsewhere)
    empty = f"sqlite:///{tmp_path / 'empty.db'}"
    AuditStore(empty, "main").close()
    with pytest.raises(AuditChainError, match="found none, expected 10 records"):
        verify(empty, kept=elsewhere)


def test_records_cut_off_with_their_checkpoints_are_found_by_those_kept_elsewhere(
    url: str,
) -> None:
    fill(url)
    elsewhere = kept(url)
    change(url, "DELETE FROM audit_records WHERE sequence > 25")
    change(url, "DELETE FROM audit_checkpoints WHERE sequence > 25")
    assert verify(url).records == 25
    with pytest.raises(AuditChainError, match="record 26: found none, expected records up to 40"):
        verify(url, kept=elsewhere)


def test_pruning_deletes_whole_periods_and_the_rest_verifies(url: str) -> None:
    fill(url)
    elsewhere, proof = kept(url), prove(url, "d25")
    (pruned,) = prune(url, before_us=29_000_000, signer=SIGNER, clock=lambda: 200.0)
    assert (pruned.records, pruned.through) == (20, 20)
    (report,) = verify(url, public_key=SIGNER.public_key, kept=elsewhere).chains
    assert (report.pruned, report.records, report.checkpoints) == (20, 25, 4)
    assert prove(url, "d25") == proof
    (again,) = prune(url, before_us=29_000_000, signer=SIGNER, clock=lambda: 200.0)
    assert (again.records, again.through) == (0, 20)


def test_the_last_record_stays_and_the_chain_goes_on_after_pruning(url: str) -> None:
    fill(url, n_records=40)
    prune(url, before_us=2**60, signer=SIGNER, clock=lambda: 200.0)
    store = AuditStore(url, "main", signer=SIGNER)
    store.commit(store.link(records(41, 61)))
    store.close()
    (report,) = verify(url, public_key=SIGNER.public_key).chains
    assert (report.pruned, report.records, report.head.sequence) == (30, 30, 60)


def test_pruning_while_a_server_writes_leaves_its_chain_whole(url: str) -> None:
    fill(url)
    store = AuditStore(url, "main", signer=SIGNER)
    prune(url, before_us=2**60, signer=SIGNER, clock=lambda: 200.0)
    store.commit(store.link(records(46, 50)))
    store.close()
    assert verify(url, public_key=SIGNER.public_key).chains[0].head.sequence == 49


def test_a_signed_log_is_not_pruned_without_its_key(url: str) -> None:
    fill(url)
    with pytest.raises(SettingsError, match="expected the signing key"):
        prune(url, before_us=2**60, signer=None, clock=lambda: 200.0)
    assert verify(url).records == 45


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("DELETE FROM audit_prunings", "record 1: sequence: found 21, expected 1"),
        ("UPDATE audit_prunings SET sequence = 30", "record 30: pruning"),
        ("UPDATE audit_prunings SET signature = NULL", "signature: found none"),
        ("DELETE FROM audit_checkpoints WHERE sequence = 20", "record 20: pruning"),
        ("DELETE FROM audit_records WHERE sequence < 31", "record 21: sequence: found 31"),
    ],
)
def test_what_was_not_pruned_by_the_operator_is_found(url: str, statement: str, found: str) -> None:
    fill(url)
    prune(url, before_us=29_000_000, signer=SIGNER, clock=lambda: 200.0)
    change(url, statement)
    with pytest.raises(AuditChainError, match=found):
        verify(url)


def test_a_signing_key_comes_from_a_file(tmp_path: Path) -> None:
    pem, public_key = new_signing_key()
    path = tmp_path / "key.pem"
    path.write_bytes(pem)
    assert load_signer(path).public_key == public_key
    path.write_text("no key")
    with pytest.raises(SettingsError, match="expected Ed25519 in PEM"):
        load_signer(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_signer(tmp_path / "absent.pem")


@pytest.mark.parametrize("line", ["junk", "[]", '{"checkpoint": 3}', '{"checkpoint": "{}"}'])
def test_what_is_no_checkpoint_is_refused(line: str) -> None:
    with pytest.raises(AuditError, match="checkpoint"):
        read_kept(line)
