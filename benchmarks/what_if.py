"""How long does `what-if` take on a million stored decisions, and where does the time go?

Writes synthetic decisions with the traces of ten clusters into SQLite, as the audit log does, and
exports them to Parquet. Then compares a changed bundle with its own on one core, from the log and
from the export, and prints the share of reading and decoding, aggregating and deciding. A sample of
the same decisions is judged by a plain loop over the server's own aggregator and policy; its time
and its alerts are held against ours. Seconds are of CPU, as other work on the machine is not ours.

    python -m benchmarks.what_if [--records N] [--tokens N] [--folder DIR] [--log-records N]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import sqlalchemy
from sqlalchemy import insert

from benchmarks.audit import N_CLUSTERS, decisions
from monitor.audit_log import schema
from monitor.audit_log.export import export
from monitor.audit_log.logged_traces import LoggedTraces
from monitor.audit_log.query import Filter
from monitor.audit_log.record import Observed, decision_record
from monitor.audit_log.store import AuditStore
from monitor.audit_log.trace import TokenTrace, decode_trace, encode_trace
from monitor.bundle_spec import BundleSpec, validate_spec
from monitor.evidence import aggregate_specs
from monitor.policy import Policy
from monitor.records import AuditLevel, Decision, Stage, Verdict
from monitor.what_if.comparison import Comparison
from monitor.what_if.settings import changed_spec
from sae_core.aggregation import Aggregator

DIGEST = "c" * 64
"""The bundle that `benchmarks.audit` names in its decisions."""
N_TEXTS = 20_000
"""Traces that differ; more decisions than that share them."""
NAIVE = 2000
"""Decisions of the plain loop."""
CHANGE = {"clusters": {"*": {"thresholds": {"alert": 3.0}, "aggregate": {"window": 12}}}}


class Timed(NamedTuple):
    """Seconds of CPU of one run: other work on the machine does not count."""

    read: float
    aggregate: float
    decide: float

    def line(self, name: str, n: int) -> str:
        """What is printed."""
        total = sum(self)
        shares = ", ".join(f"{word} {part / total:.0%}" for word, part in self._asdict().items())
        return f"{name}: {total:.1f} s, {n / total:,.0f} decisions/s ({shares})"


def bundle() -> BundleSpec:
    """Ten clusters as the default bundle has them: means of 16 tokens, fused of both sources."""
    clusters = [
        {
            "id": f"cluster_{index}",
            "title": "synthetic",
            "severity": "warning",
            "dense_head": "head",
            "fusion": {"sae": 0.5, "dense": 0.5, "bias": 0.0},
            "thresholds": {"flag": 2.0, "alert": 3.5, "clear": 1.0},
        }
        for index in range(N_CLUSTERS)
    ]
    content = {
        "name": "synthetic",
        "version": 1,
        "model": {"id": "synthetic"},
        "dense_heads": {"head": {"hook_point": "blocks.0.hook_resid_post"}},
        "clusters": clusters,
        "policies": {"default": {}},
    }
    return validate_spec(content, "synthetic")


def texts(n: int, n_tokens: int) -> list[TokenTrace]:
    """Traces of about `n_tokens`: most far below the thresholds, one text in ten near them."""
    chance = np.random.default_rng(0)
    names = tuple(f"cluster_{index}" for index in range(N_CLUSTERS))
    traces = []
    for number in range(n):
        length = int(chance.integers(n_tokens // 2, n_tokens + n_tokens // 2 + 1))
        level = np.full((N_CLUSTERS, 1), -4.0)
        if number % 10 == 0:
            level[chance.integers(N_CLUSTERS)] = chance.uniform(1, 4)
        logits = chance.normal(level, 1.5, (length, N_CLUSTERS, 3)).astype(np.float32)
        stages = (None, *(Stage.PROMPT,) * (length // 2), *(Stage.COMPLETION,) * length)[:length]
        traces.append(TokenTrace(clusters=names, stages=stages, logits=logits))
    return traces


def stored(work: Iterator[Decision], traces: list[TokenTrace]) -> Iterator[dict[str, object]]:
    """Rows of the log. The chain is left out: what-if does not look at it."""
    encoded = [encode_trace(trace) for trace in traces]
    bodies = []
    for trace, decision in zip(traces, work, strict=False):
        record = decision_record(
            decision,
            level=AuditLevel.SCORES,
            time_us=0,
            input_digest="e" * 64,
            observed=Observed(trace=trace),
        )
        bodies.append(record)
    number = 0
    while True:
        record = bodies[number % len(bodies)]
        body = record.body("main", number + 1)
        decision_id = f"{number:032x}"
        body |= {"decision_id": decision_id, "time_us": number}
        yield {
            "chain": "main",
            "sequence": number + 1,
            "kind": "decision",
            "decision_id": decision_id,
            "time": body["time"],
            "time_us": number,
            "verdict": body["verdict"],
            "body": orjson.dumps(body, option=orjson.OPT_SORT_KEYS),
            "prev_hash": "0" * 64,
            "hash": "0" * 64,
            "severity": None,
            "caller_hmac": None,
            "trace": encoded[number % len(bodies)],
            "sealed": None,
        }
        number += 1


def write(url: str, rows: Iterator[dict[str, object]], n: int) -> None:
    """Puts rows into a log that has its tables."""
    AuditStore(url, "main").close()
    engine = schema.open_writer(url, "main")
    for start in range(0, n, 2000):
        part = [next(rows) for _ in range(start, min(start + 2000, n))]
        with engine.begin() as connection:
            connection.execute(insert(schema.records_table), part)
    engine.dispose()


def compared(
    place: str | Path, champion: BundleSpec, challenger: BundleSpec, until: float | None = None
) -> tuple[Timed, Comparison]:
    """One run, with its parts timed."""
    comparison = Comparison(champion, challenger, {})
    traces = LoggedTraces(
        place,
        bundle_digest=DIGEST,
        clusters=[cluster.id for cluster in champion.clusters],
        policies=comparison.policies,
        sources=comparison.sources,
        wanted=Filter(until=until),
    )
    read = aggregate = decide = 0.0
    batches = iter(traces)
    while True:
        times = [time.process_time()]
        batch = next(batches, None)
        times.append(time.process_time())
        read += times[1] - times[0]
        if batch is None:
            return Timed(read, aggregate, decide), comparison
        scores = comparison.score(batch)
        times.append(time.process_time())
        comparison.decide(batch, scores)
        times.append(time.process_time())
        aggregate += times[2] - times[1]
        decide += times[3] - times[2]


def by_hand(traces: list[TokenTrace], specs: list[BundleSpec]) -> tuple[float, list[int]]:
    """Seconds of a plain loop a decision, and the alerts under each bundle."""
    encoded = [encode_trace(trace) for trace in traces]
    alerts = [0 for _ in specs]
    started = time.process_time()
    for stored_trace in encoded:
        trace = decode_trace(stored_trace).trace
        for place, spec in enumerate(specs):
            policy, aggregator = Policy("default", spec), Aggregator(aggregate_specs(spec))
            state = policy.start()
            scores = np.full((N_CLUSTERS, 3), np.nan)
            for stage in Stage:
                rows = [i for i, found in enumerate(trace.stages) if found is stage]
                evidence = aggregator.start()
                running = aggregator.update(evidence, trace.logits[rows])
                policy.advance(state, stage, rows, running)
                scores = np.fmax(scores, aggregator.score(evidence))
            alerts[place] += policy.judge(state, scores).verdict is Verdict.ALERT
    return (time.process_time() - started) / len(encoded), alerts


def main() -> None:
    """Writes the data, then runs each way of reading it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=32, help="of a decision, in the mean")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the data lie")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(
        f"{platform.machine()} {platform.python_implementation()} {platform.python_version()}, "
        f"NumPy {np.__version__}, SQLAlchemy {sqlalchemy.__version__}, one core; "
        f"{options.records:,} decisions of {options.tokens} tokens, {N_CLUSTERS} clusters"
    )
    champion = bundle()
    challenger = changed_spec(champion, [CHANGE])
    some = texts(min(N_TEXTS, options.records), options.tokens)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    url, path = f"sqlite:///{folder / 'log.db'}", folder / "log.parquet"
    try:
        write(url, stored(iter(decisions(len(some))), some), options.records)
        started = time.perf_counter()
        export(url, path, Filter())
        size = {p.name: p.stat().st_size / 1e9 for p in (folder / "log.db", path)}
        print(f"{size} GB; export {time.perf_counter() - started:.0f} s")
        for name, place in (("log", url), ("export", path)):
            for _ in range(options.runs):
                timed, comparison = compared(place, champion, challenger)
                print(timed.line(name, comparison.n))
        overall = comparison.changes()[0]["alert"]
        print(f"alerts {overall.champion} -> {overall.challenger}, uncertain {overall.uncertain}")
        seconds, alerts = by_hand(some[:NAIVE], [champion, challenger])
        ratio = seconds * comparison.n / sum(timed)
        print(f"plain loop: {seconds * 1e6:.0f} us a decision, {ratio:.0f} times the export's")
        same = compared(url, champion, challenger, until=NAIVE / 1e6)[1].changes()[0]["alert"]
        found = [same.champion, same.challenger]
        print(f"alerts of its {NAIVE} decisions {alerts}, ours {found}, {same.uncertain} uncertain")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
