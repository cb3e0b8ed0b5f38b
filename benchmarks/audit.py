"""How many decisions a second does the audit log take, beside a bare INSERT loop?

Both write the same rows through SQLAlchemy into SQLite (WAL, synchronous=FULL), both in groups of
the same size. The bare loop has its rows ready: no JSON, no hashes, no chain, no checkpoints, no
queue. Prints the rate of each run, the medians, and the CPU time a record takes: on a machine that
others use, the rate on a core of its own would be its inverse.

    python -m benchmarks.audit [--records N] [--tokens N] [--runs N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import sqlalchemy
from sqlalchemy import insert

from monitor.audit_log import schema
from monitor.audit_log.record import Observed
from monitor.audit_log.store import AuditStore
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.records import (
    Action,
    ClusterResult,
    Coverage,
    Decision,
    Mode,
    Overall,
    Provenance,
    Severity,
    Stage,
    Timings,
    UnscoredReason,
    Verdict,
)

N_CLUSTERS = 10
"""As many as the default bundle has."""


def example(chance: np.random.Generator) -> Decision:
    """A decision that passes, with scores of its own."""
    scores = chance.normal(-3, 2, (N_CLUSTERS, 3)).astype(np.float32).astype(float)
    clusters = tuple(
        ClusterResult(
            cluster=f"cluster_{index}",
            fused=float(row[0]),
            dense=float(row[1]),
            sae=float(row[2]),
            verdict=Verdict.PASS,
            severity=Severity.WARNING,
            stage=Stage.PROMPT,
            first_crossing=None,
            calibrated=True,
            benign_p=0.25,
        )
        for index, row in enumerate(scores)
    )
    return Decision(
        decision_id="",
        verdict=Verdict.PASS,
        action=Action.ALLOW,
        mode=Mode.MONITOR,
        policy="default",
        overall=Overall(fused=-1.5, dense=-1.25, sae=-0.75),
        clusters=clusters,
        rules=(),
        alerts=(),
        coverage=Coverage(received=60, scored=59, unscored={UnscoredReason.EXCLUDED: 1}),
        timings=Timings(forward_seconds=0.0123, total_seconds=0.0234),
        provenance=Provenance(
            model="google/gemma-3-270m",
            model_digest="a" * 64,
            tokenizer_fingerprint="b" * 64,
            bundle="gemma3-270m-default@1",
            bundle_digest="c" * 64,
            dtype="float32",
            backend="torch",
            server_version="0.1.0",
        ),
    )


def decisions(n: int) -> list[Decision]:
    """Decisions with ids of their own, made before the clock runs."""
    chance = np.random.default_rng(0)
    some = [example(chance) for _ in range(256)]
    ids = chance.bytes(16 * n).hex()
    return [
        replace(some[number % 256], decision_id=ids[32 * number : 32 * number + 32])
        for number in range(n)
    ]


def observed(n_tokens: int) -> Observed | None:
    """The scores of a text's tokens; None for none."""
    if not n_tokens:
        return None
    logits = np.random.default_rng(1).normal(-4, 2, (n_tokens, N_CLUSTERS, 3)).astype(np.float32)
    names = tuple(f"cluster_{index}" for index in range(N_CLUSTERS))
    trace = TokenTrace(clusters=names, stages=(Stage.PROMPT,) * n_tokens, logits=logits)
    return Observed(trace=trace)


async def through_the_log(url: str, work: list[Decision], seen: Observed | None) -> float:
    """Seconds from the first append until the last record is on disk."""
    log = AuditLog.open(url)
    log.start()
    started = time.perf_counter()
    for number, decision in enumerate(work):
        await log.append_decision(decision, input_digest="e" * 64, observed=seen)
        if number % 64 == 0:  # as between two requests
            await asyncio.sleep(0)
    await log.close(timeout_seconds=600.0)
    return time.perf_counter() - started


def bare(url: str, rows: list[dict[str, object]], group: int) -> float:
    """Seconds of INSERTs of rows that are ready, in groups."""
    AuditStore(url, "main").close()
    engine = schema.open_writer(url, "main")
    started = time.perf_counter()
    for start in range(0, len(rows), group):
        with engine.begin() as connection:
            connection.execute(insert(schema.records_table), rows[start : start + group])
    seconds = time.perf_counter() - started
    engine.dispose()
    return seconds


def stored_rows(url: str) -> list[dict[str, object]]:
    """What the log wrote, to be written again by the bare loop."""
    engine = schema.open_reader(url)
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.select(schema.records_table)).all()
    engine.dispose()
    return [dict(row._mapping) for row in rows]


def main() -> None:
    """Runs both, alternately."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=0, help="tokens of each decision's trace")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--group", type=int, default=512, help="rows of a bare commit")
    parser.add_argument("--folder", type=Path, default=None, help="where the databases lie")
    options = parser.parse_args()
    print(
        f"{platform.machine()} {platform.python_implementation()} {platform.python_version()}, "
        f"SQLAlchemy {sqlalchemy.__version__}, {options.records} records, "
        f"{options.tokens} tokens each"
    )
    work, seen = decisions(options.records), observed(options.tokens)
    rates: dict[str, list[float]] = {"log": [], "bare": []}
    cpu: dict[str, list[float]] = {"log": [], "bare": []}
    for _ in range(options.runs):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        url = f"sqlite:///{folder / 'log.db'}"
        before = time.process_time()
        rates["log"].append(len(work) / asyncio.run(through_the_log(url, work, seen)))
        cpu["log"].append((time.process_time() - before) / len(work))
        rows = stored_rows(url)
        before = time.process_time()
        seconds = bare(f"sqlite:///{folder / 'bare.db'}", rows, options.group)
        rates["bare"].append(len(rows) / seconds)
        cpu["bare"].append((time.process_time() - before) / len(rows))
        assert verify(url).records == len(work)
        shutil.rmtree(folder)
    for name, found in rates.items():
        runs = " ".join(f"{rate:.0f}" for rate in found)
        microseconds = statistics.median(cpu[name]) * 1e6
        print(
            f"{name:>5}: median {statistics.median(found):.0f} records/s ({runs}), "
            f"{microseconds:.0f} us of CPU a record, {min(cpu[name]) * 1e6:.0f} at best"
        )
    ratios = [log / bare for log, bare in zip(cpu["log"], cpu["bare"], strict=True)]
    print(f"ratio: the log takes {statistics.median(ratios):.2f} times the CPU of the bare loop")


if __name__ == "__main__":
    main()
