"""Inclusion proofs, held to a verifier that shares no code with what makes them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from monitor.audit_log.checkpoint import Signer
from monitor.audit_log.proof import prove
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.schema import database_path
from monitor.audit_log.store import AuditStore
from monitor.errors import AuditChainError, AuditError, NotFoundError
from monitor.records import Verdict

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))


# --- The independent verifier: RFC 9162, section 2.1.3.2, and nothing of ours. ---


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def verified_record(proof: dict[str, Any], public_key: str) -> dict[str, Any]:
    """The record of a proof that holds under this public key; ValueError otherwise."""
    statement = proof["checkpoint"].encode()
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        prefix = b"sae-monitor audit checkpoint v1\n"
        key.verify(bytes.fromhex(proof["signature"]), prefix + statement)
    except InvalidSignature:
        raise ValueError("the checkpoint is not signed by this key") from None
    checkpoint = json.loads(statement)
    body = proof["record"].encode()
    record = json.loads(body)
    index, size = proof["leaf_index"], proof["tree_size"]
    if size != checkpoint["sequence"] or index != record["sequence"] - 1 or index >= size:
        raise ValueError("the record's place is not one of the checkpoint's")
    if record["chain"] != checkpoint["chain"]:
        raise ValueError("the record is of another chain")
    record_prefix = b"sae-monitor audit record v1\n"
    node = sha256(b"\x00" + sha256(record_prefix + bytes.fromhex(proof["prev_hash"]) + body))
    first, last = index, size - 1
    for sibling in map(bytes.fromhex, proof["path"]):
        if last == 0:
            raise ValueError("the path is too long")
        if first % 2 or first == last:
            node = sha256(b"\x01" + sibling + node)
            while first and not first % 2:
                first, last = first // 2, last // 2
        else:
            node = sha256(b"\x01" + node + sibling)
        first, last = first // 2, last // 2
    if last or node.hex() != checkpoint["root"]:
        raise ValueError("the path does not lead to the checkpoint's root")
    return record


# --- The tests. ---


def record(name: str) -> AuditRecord:
    return AuditRecord(
        kind=RecordKind.DECISION,
        time_us=1,
        decision_id=name,
        verdict=Verdict.PASS,
        content={"policy": "default"},
    )


@pytest.fixture
def signer() -> Signer:
    return Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def write(url: str, signer: Signer | None, batches: list[int], *, last: bool = True) -> None:
    store = AuditStore(url, "main", signer=signer, checkpoint_records=10)
    number = 0
    for size in batches:
        store.commit(store.link([record(f"d{number + place}") for place in range(size)]))
        number += size
    if last:
        store.commit(store.link_checkpoint())
    store.close()


def test_every_decision_of_a_log_is_proven(url: str, signer: Signer) -> None:
    write(url, signer, [3, 9, 1, 12, 4])
    for number in range(29):
        proof = json.loads(json.dumps(prove(url, f"d{number}")))
        found = verified_record(proof, signer.public_key)
        assert (found["decision_id"], found["sequence"]) == (f"d{number}", number + 1)


def test_a_proof_with_anything_changed_does_not_hold(url: str, signer: Signer) -> None:
    write(url, signer, [12, 12])
    proof = prove(url, "d7")
    forged = proof["record"].replace('"pass"', '"flag"')
    flipped = ["0" * 64, *proof["path"][1:]]
    for change in (
        {"record": forged},
        {"leaf_index": 8},
        {"tree_size": 24},
        {"path": flipped},
        {"path": proof["path"][:-1]},
        {"path": [*proof["path"], "0" * 64]},
        {"prev_hash": "0" * 64},
        {"checkpoint": proof["checkpoint"].replace("main", "mine")},
    ):
        with pytest.raises(ValueError, match=r"the (record|path|checkpoint)"):
            verified_record({**proof, **change}, signer.public_key)
    with pytest.raises(ValueError, match="not signed by this key"):
        verified_record(proof, "0" * 63 + "1")


def test_a_decision_that_no_checkpoint_covers_yet_has_no_proof(url: str, signer: Signer) -> None:
    write(url, signer, [10, 3], last=False)
    assert prove(url, "d9")["tree_size"] == 10
    with pytest.raises(AuditError, match="no checkpoint covers record 12 yet"):
        prove(url, "d11")


def test_an_unknown_decision_is_not_found(url: str, signer: Signer) -> None:
    write(url, signer, [2])
    with pytest.raises(NotFoundError, match="none of id 'other'"):
        prove(url, "other")


def test_nothing_is_proven_from_records_that_do_not_hold(url: str, signer: Signer) -> None:
    write(url, signer, [10])
    connection = sqlite3.connect(database_path(url))
    connection.execute("UPDATE audit_records SET body = X'7b7d' WHERE sequence = 3")
    connection.commit()
    connection.close()
    with pytest.raises(AuditChainError, match="record 3"):
        prove(url, "d7")


def test_the_committed_proof_holds() -> None:
    vector = VECTORS["proof"]
    found = verified_record(vector["proof"], vector["public_key"])
    assert found["decision_id"] == vector["decision_id"]


def test_the_committed_proof_is_what_is_made_today(url: str, signer: Signer) -> None:
    store = AuditStore(url, "main", signer=signer, clock=lambda: 1_700_000_000.0)
    store.commit(store.link([record(f"d{number}") for number in range(5)]))
    store.commit(store.link_checkpoint())
    store.close()
    vector = VECTORS["proof"]
    assert prove(url, vector["decision_id"]) == vector["proof"]
    assert signer.public_key == vector["public_key"]
