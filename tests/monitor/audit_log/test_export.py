"""An export beside the same table made value by value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from monitor.audit_log import query as log_query
from monitor.audit_log.record import Asked, Observed, decision_record
from monitor.audit_log.schema import open_pruner, records_table
from monitor.audit_log.store import AuditStore
from monitor.audit_log.token_latents import TokenLatents
from monitor.audit_log.trace import TokenTrace, decode_numbers
from monitor.errors import AuditError
from monitor.records import AuditLevel, Decision, RuleResult, Severity, Stage, Verdict
from monitor.work_queue import Priority

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MakeDecision = Callable[..., Decision]
SOURCES = ("fused", "dense", "sae")


def observed(n_tokens: int, clusters: tuple[str, ...]) -> Observed:
    logits = np.random.default_rng(n_tokens).normal(0, 3, (n_tokens, len(clusters), 3))
    stages = tuple((None, Stage.PROMPT, Stage.COMPLETION)[place % 3] for place in range(n_tokens))
    return Observed(
        trace=TokenTrace(clusters=clusters, stages=stages, logits=logits.astype(np.float32))
    )


def write(url: str, decision: MakeDecision) -> None:
    """Decisions of two bundles, at two levels, with and without traces, callers, alerts, rules."""
    plain = decision("d1")
    weapons, fraud = plain.clusters
    odd = dataclasses.replace(weapons, cluster='od"d,\n\u00fc', fused=1e-7, dense=2.0**60, sae=-0.0)
    rule = RuleResult(rule="joint", severity=Severity.WARNING)
    unknown = dataclasses.replace(fraud, fused=math.nan, benign_p=None, stage=None)
    both = ("weapons", "fraud")
    shares = np.random.default_rng(0).normal(0, 2, (5, 12))
    latents = TokenLatents(
        latents=tuple(("l9", 7 * i) for i in range(12)),
        positions=np.arange(5),
        contributions=shares * (shares > 0),
    )
    explained = dataclasses.replace(observed(0, both), latents=dict.fromkeys(both, latents))
    kinds: list[tuple[Decision, AuditLevel, Observed | None, str | None]] = [
        (plain, AuditLevel.SCORES, observed(5, both), None),
        (decision("d2", Verdict.ALERT, 3.5), AuditLevel.SCORES, explained, "caller"),
        (decision("d3", Verdict.FLAG), AuditLevel.METADATA, observed(4, both), None),
        (dataclasses.replace(plain, decision_id="d4", clusters=(odd, unknown), rules=(rule,)),
         AuditLevel.SCORES, observed(7, ("odd",)), "caller"),
        (dataclasses.replace(plain, decision_id="d5", clusters=()), AuditLevel.SCORES, None, None),
        (dataclasses.replace(plain, decision_id="d6"), AuditLevel.SCORES, observed(2, both), None),
        (dataclasses.replace(plain, decision_id="d7"), AuditLevel.SCORES, observed(3, both), None),
    ]  # fmt: skip
    store = AuditStore(url, "main")
    store.commit(
        store.link(
            decision_record(
                one,
                level=level,
                time_us=number,
                input_digest="e" * 64,
                caller=caller,
                hash_key=None if caller is None else b"k" * 16,
                observed=seen,
                asked=None if caller is None else Asked(stage="prompt", priority=Priority.PROMPT),
            )
            for number, (one, level, seen, caller) in enumerate(kinds)
        )
    )
    store.close()
    engine = open_pruner(url)
    with engine.begin() as connection:
        damaged = update(records_table).where(records_table.c.decision_id == "d7")
        connection.execute(damaged.values(trace=b"damaged"))
    engine.dispose()


def number(value: float | None) -> float | None:
    return None if value is None else float(value)


def latents_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the record's own numbers say."""
    made = []
    for cluster, stored in sorted(body["token_latents"].items()) if "trace" in body else ():
        step = 2.0 ** stored["exponent"]
        for position, pairs, other in zip(
            stored["positions"], stored["tokens"], stored["others"], strict=True
        ):
            of_token = zip(pairs[::2], pairs[1::2], strict=True)
            named = [(*stored["latents"][place], number * step) for place, number in of_token]
            for sae, latent_id, contribution in [
                *named,
                *([(None, None, other * step)] * bool(other)),
            ]:
                made.append(
                    {"cluster": cluster, "position": position, "sae": sae, "latent_id": latent_id,
                     "contribution": contribution, "max_error": step / 2}
                )  # fmt: skip
    return made


def row_by_row(url: str, schema: Any) -> Any:
    """The same table from each record's own values."""
    made = []
    found = log_query.rows(url, log_query.Filter(), records_table.c.trace)
    for row, body in found:
        value = {**body, **body["provenance"], "time": row.time_us, "body": row.body.decode()}
        value |= {"hash": row.hash, "prev_hash": row.prev_hash, "trace": row.trace}
        value["input_hash"] = body.get("input_hmac", body.get("input_digest"))
        value["clusters"] = [
            {"cluster": name, **result, **{key: number(result.get(key)) for key in SOURCES}}
            for name, result in sorted(body["clusters"].items())
        ]
        value["token_latents"] = latents_of(body)
        value["rules"] = [rule["rule"] for rule in body["rules"]]
        value |= {f"tokens_{name}": body["coverage"][name] for name in ("received", "scored")}
        value |= {f"{name}_us": body["timings_us"][name] for name in ("total", "forward")}
        if row.trace == b"damaged":
            value["trace_clusters"] = ""
        elif row.trace is not None:
            numbers = decode_numbers(row.trace)
            value["trace_clusters"] = ",".join(numbers.clusters)
            value["trace_stages"] = numbers.stages.tobytes()
            value["trace_exponents"] = numbers.exponents.tobytes()
            for place, source in enumerate(SOURCES):
                value[f"trace_{source}"] = numbers.numbers[:, place].T.tobytes()
        made.append({name: value.get(name) for name in schema.names})
    return pa.Table.from_pylist(made, schema)


@pytest.mark.parametrize("group_records", [2, 8192])
def test_an_export_holds_what_its_records_hold(
    url: str,
    tmp_path: Path,
    decision: MakeDecision,
    group_records: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from monitor.audit_log import export

    write(url, decision)
    monkeypatch.setattr(export, "GROUP_RECORDS", group_records)
    target = tmp_path / "out.parquet"
    assert export.export(url, target, log_query.Filter()) == 7
    found = pq.read_table(target)
    expected = row_by_row(url, export.SCHEMA)
    assert found.schema.equals(export.SCHEMA)
    assert [len(latents) > 10 for latents in found["token_latents"].to_pylist()].count(True) == 1
    for name in found.column_names:
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    flagged = tmp_path / "flagged.parquet"
    assert export.export(url, flagged, log_query.Filter(cluster="weapons")) == 2


@pytest.mark.parametrize("body", [b"[1]", b"{", b'{"clusters": {}}{"clusters": {}}', b"\xff"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_body_that_is_no_decision_s_is_an_audit_error(
    url: str, tmp_path: Path, decision: MakeDecision, body: bytes, place: int
) -> None:
    from monitor.audit_log.export import export

    write(url, decision)
    engine = open_pruner(url)
    with engine.begin() as connection:
        changed = update(records_table).where(records_table.c.sequence == place + 1)
        connection.execute(changed.values(body=body))
    engine.dispose()
    with pytest.raises(AuditError, match="run audit verify"):
        export(url, tmp_path / "out.parquet", log_query.Filter())
    assert not list(tmp_path.glob("*out.parquet*"))
