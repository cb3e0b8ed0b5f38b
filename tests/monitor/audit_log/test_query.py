from __future__ import annotations

import pytest

from monitor.audit_log.query import query
from monitor.audit_log.reader import PAGE_RECORDS
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.store import AuditStore
from monitor.errors import AuditError
from monitor.records import Verdict


def ids(found: object) -> list[str]:
    return [record["decision_id"] for record in found]  # type: ignore[attr-defined]


def test_all_decisions_in_order_of_time(written_log: str) -> None:
    records = list(query(written_log))
    assert ids(records) == [f"d{number}" for number in range(1, 11)]
    assert [record["sequence"] for record in records] == list(range(1, 11))
    assert records[6]["verdict"] == "alert"
    assert records[6]["prev_hash"] == records[5]["hash"]


def test_by_verdict_cluster_and_decision(written_log: str) -> None:
    assert ids(query(written_log, verdict=Verdict.ALERT)) == ["d7"]
    assert ids(query(written_log, cluster="weapons")) == ["d4", "d7"]
    assert ids(query(written_log, cluster="fraud")) == []
    assert ids(query(written_log, cluster="unknown")) == []
    assert ids(query(written_log, decision_id="d3")) == ["d3"]
    assert ids(query(written_log, verdict=Verdict.FLAG, cluster="weapons")) == ["d4"]


def test_since_is_included_and_until_is_not(written_log: str) -> None:
    found = query(written_log, since=1_700_000_002, until=1_700_000_005)
    assert ids(found) == ["d3", "d4", "d5"]


def test_limit_and_newest_first(written_log: str) -> None:
    assert ids(query(written_log, limit=2)) == ["d1", "d2"]
    assert ids(query(written_log, limit=2, newest_first=True)) == ["d10", "d9"]
    assert ids(query(written_log, limit=0)) == []


@pytest.mark.parametrize("newest_first", [False, True])
def test_pages_join_without_a_gap_when_all_times_are_equal(url: str, newest_first: bool) -> None:
    store = AuditStore(url, "main")
    n_records = 2 * PAGE_RECORDS + 3
    event = AuditRecord(kind=RecordKind.SERVER_START, time_us=1, content={})
    store.commit(store.link([event] * n_records))
    store.close()
    found = [record["sequence"] for record in query(url, kind=None, newest_first=newest_first)]
    expected = list(range(1, n_records + 1))
    assert found == (expected[::-1] if newest_first else expected)


def test_records_of_other_kinds_on_demand(url: str) -> None:
    store = AuditStore(url, "main")
    event = AuditRecord(kind=RecordKind.SERVER_START, time_us=1, content={"pid": 7})
    store.commit(store.link([event]))
    store.close()
    assert list(query(url)) == []
    (record,) = query(url, kind=None)
    assert (record["kind"], record["pid"], record["decision_id"]) == ("server_start", 7, None)


def test_a_missing_log_is_an_error(tmp_path: object) -> None:
    with pytest.raises(AuditError, match="no such file"):
        list(query(f"sqlite:///{tmp_path}/absent.db"))
