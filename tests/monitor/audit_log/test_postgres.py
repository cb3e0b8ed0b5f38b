"""The log in a real PostgreSQL: the same chain, several writers, and a database that goes away."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import create_engine, inspect, text

from monitor.audit_log import migrations, schema
from monitor.audit_log.checkpoint import Signer
from monitor.audit_log.proof import prove
from monitor.audit_log.query import query
from monitor.audit_log.retention import prune
from monitor.audit_log.store import AuditStore
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditChainError, AuditError
from monitor.records import Decision, Verdict

MakeDecision = Callable[..., Decision]
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(b"1" * 32))
_names = itertools.count()


def _helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "audit_postgres", Path(__file__).parent / "postgres.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    helper = _helper()
    folder = helper.binaries()
    if folder is None or importlib.util.find_spec("psycopg") is None:
        reason = "postgres or psycopg is not installed (tests/install_tools.sh, extra postgres)"
        if request.config.getoption("--require-tools"):
            pytest.fail(reason)
        pytest.skip(reason)
    running = helper.PostgresServer(folder)
    yield running
    running.remove()


@pytest.fixture
def pg_url(server: Any) -> str:
    return str(server.url(f"audit{next(_names)}"))


async def write(url: str, decision: MakeDecision, names: list[str], **options: Any) -> None:
    log = AuditLog.open(url, signer=SIGNER, checkpoint_records=5, **options)
    log.start()
    for name in names:
        verdict = Verdict.ALERT if "alert" in name else Verdict.PASS
        await log.append_decision(decision(name, verdict), input_digest=None)
    await log.close()


def change(url: str, statement: str) -> None:
    engine = create_engine(schema.parse_url(url))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


async def test_a_chain_is_written_verified_queried_proven_and_pruned(
    pg_url: str, decision: MakeDecision
) -> None:
    names = [f"d{number}" for number in range(12)] + ["alert-1"]
    clock = itertools.count(1000).__next__
    for part in (names[:7], names[7:]):
        await write(pg_url, decision, part, clock=lambda: float(clock()))
    (report,) = verify(pg_url, public_key=SIGNER.public_key).chains
    assert (report.records, report.signed > 0) == (13, True)
    assert [record["decision_id"] for record in query(pg_url)] == names
    (alert,) = query(pg_url, verdict=Verdict.ALERT, cluster="weapons")
    assert alert["decision_id"] == "alert-1"
    assert prove(pg_url, "d9")["leaf_index"] == 9
    (pruned,) = prune(pg_url, before_us=2**60, signer=SIGNER, clock=lambda: 1.0)
    assert pruned.records == 7
    assert verify(pg_url).chains[0].pruned == pruned.records
    await write(pg_url, decision, ["later"])
    assert verify(pg_url, public_key=SIGNER.public_key).chains[0].head.sequence == 14


async def test_several_instances_write_each_its_own_chain(
    pg_url: str, decision: MakeDecision
) -> None:
    await asyncio.gather(
        *(
            write(pg_url, decision, [f"{name}-alert-{number}" for number in range(20)], chain=name)
            for name in ("gpu-0", "gpu-1", "gpu-2")
        )
    )
    found = {chain.head.chain: chain.records for chain in verify(pg_url).chains}
    assert found == {"gpu-0": 20, "gpu-1": 20, "gpu-2": 20}


def test_a_second_writer_of_a_chain_is_refused_until_the_first_goes(pg_url: str) -> None:
    first = AuditStore(pg_url, "main")
    with pytest.raises(AuditError, match="chain 'main' is being written by another process"):
        AuditStore(pg_url, "main")
    AuditStore(pg_url, "other").close()
    first.close()
    AuditStore(pg_url, "main").close()


def test_a_password_is_never_shown(server: Any) -> None:
    url = str(server.url(f"audit{next(_names)}")).replace("test@", "test:hunter2@") + "-absent"
    with pytest.raises(AuditError, match="does not exist") as caught:
        AuditStore(url, "main")
    assert "hunter2" not in str(caught.value)


async def test_a_database_that_goes_and_comes_back_gets_what_waited(
    server: Any, pg_url: str, decision: MakeDecision
) -> None:
    log = AuditLog.open(pg_url)
    log.start()
    assert await log.append_decision(decision("a", Verdict.ALERT), input_digest=None) == 1
    server.kill()
    try:
        with pytest.raises(AuditError, match="cannot be written"):
            await log.append_decision(decision("b", Verdict.ALERT), input_digest=None)
        assert not log.healthy
    finally:
        server.start()
    assert await log.append_decision(decision("c", Verdict.ALERT), input_digest=None) == 3
    assert log.healthy
    await log.close()
    assert [record["decision_id"] for record in query(pg_url)] == ["a", "b", "c"]
    assert verify(pg_url).records == 3


async def test_a_database_turned_read_only_is_said_and_gets_what_waited(
    pg_url: str, decision: MakeDecision
) -> None:
    def read_only(statement: str) -> None:
        engine = create_engine(schema.parse_url(pg_url), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"ALTER SYSTEM {statement}"))
            connection.execute(text("SELECT pg_reload_conf()"))
        engine.dispose()

    log = AuditLog.open(pg_url)
    log.start()
    names = (f"d{number}" for number in itertools.count())
    read_only("SET default_transaction_read_only = on")
    try:
        with pytest.raises(AuditError, match="cannot be written: .*read-only transaction"):
            while True:  # until the reload has reached the writer's session
                await log.append_decision(decision(next(names), Verdict.ALERT), input_digest=None)
        assert not log.healthy
    finally:
        read_only("RESET default_transaction_read_only")
    last = await log.append_decision(decision(next(names), Verdict.ALERT), input_digest=None)
    assert log.healthy
    await log.close()
    stored = [record["decision_id"] for record in query(pg_url)]
    assert stored == [f"d{number}" for number in range(len(stored))]
    assert verify(pg_url).records == last == len(stored)


async def test_a_change_is_found_and_named(pg_url: str, decision: MakeDecision) -> None:
    await write(pg_url, decision, ["d1", "d2", "d3"])
    change(pg_url, "UPDATE audit_records SET verdict = 'alert' WHERE sequence = 2")
    with pytest.raises(AuditChainError, match=r"record 2 \(decision 'd2'\): column verdict"):
        verify(pg_url)


def test_a_reader_cannot_write(pg_url: str) -> None:
    AuditStore(pg_url, "main").close()
    engine = schema.open_reader(pg_url)
    with pytest.raises(Exception, match="read-only"), engine.begin() as connection:
        connection.execute(text("DELETE FROM audit_records"))
    engine.dispose()


async def test_a_log_of_layout_1_is_brought_up_to_date(pg_url: str, decision: MakeDecision) -> None:
    engine = create_engine(schema.parse_url(pg_url))
    with engine.begin() as connection:
        migrations.STEPS[0](connection)
        connection.execute(text("UPDATE audit_schema SET version = 1"))
    with pytest.raises(AuditError, match="found schema version 1, expected 2; audit migrate"):
        verify(pg_url)
    await write(pg_url, decision, ["d1"])
    assert verify(pg_url).records == 1
    with engine.connect() as connection:
        for table in schema.metadata.tables.values():
            stored = {column["name"] for column in inspect(connection).get_columns(table.name)}
            assert stored == set(table.columns.keys())
    engine.dispose()


async def test_bodies_are_the_same_bytes_as_in_sqlite(
    pg_url: str, url: str, decision: MakeDecision
) -> None:
    for each in (pg_url, url):
        await write(each, decision, ["d1", "alert-2"], clock=lambda: 1000.0)
    assert json.dumps(list(query(pg_url))) == json.dumps(list(query(url)))
