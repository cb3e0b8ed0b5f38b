"""Which aggregate tells harmful texts from benign ones, short, hidden in long ones, and streamed?

    python benchmarks/aggregation.py --data rows.jsonl --work DIR [--long 200] [--tokens 2048,8192]

Token logits of the rows come from the bundle's own heads and are kept in --work. A long text is a
harmful (or benign) row with tokens of other benign rows before and behind it: logits of each row on
its own, joined, so that only the aggregate sees the length. Printed for each aggregate: AUROC and
the true-positive rate at 1 % false positives, overall (each cluster's scores by their benign tail,
the largest of them), and how many tokens a stream needs until it is above that threshold.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monitor.cli.common import bundle_folder
from monitor.config import default_cache_dir
from monitor.evaluation.figures import positives_of
from monitor.local import load_local, local_pipeline
from monitor.served import Served
from monitor.traces import Trace, TraceStore, request_of, trace_texts
from sae_core.aggregation import AggregateSpec, Aggregator
from sae_core.calibration import Tail
from sae_core.evaluation.comparison import compare
from sae_core.evaluation.data import LabelledText, read_labelled

SPECS = {
    "max": {"kind": "max"},
    "mean": {"kind": "mean"},
    **{f"ema, alpha {a}": {"kind": "ema", "alpha": a} for a in (0.05, 0.1, 0.2)},
    **{
        f"rolling mean of {w}": {"kind": "max_rolling_mean", "window": w}
        for w in (4, 8, 16, 32, 64)
    },
    **{f"top {k} mean": {"kind": "top_k_mean", "k": k} for k in (4, 8, 16)},
    **{
        f"{k} of {w}": {"kind": "k_of_window", "k": k, "window": w}
        for k, w in ((4, 16), (8, 16), (16, 32))
    },
}
N_RESAMPLES = 200
Logits = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--rows", type=int, default=0, help="a seeded sample of so many; 0 is all")
    parser.add_argument("--long", type=int, default=200, help="long texts of each label")
    parser.add_argument("--tokens", default="2048,8192", help="of long texts")
    arguments = parser.parse_args()
    rows = list(read_labelled(arguments.data))
    rng = np.random.default_rng(0)
    if arguments.rows:
        chosen = np.sort(rng.choice(len(rows), min(arguments.rows, len(rows)), replace=False))
        rows = [rows[i] for i in chosen]
    served = load_local(bundle_folder(arguments.bundle), model=None, cache=default_cache_dir())
    logits = asyncio.run(_logits(served, rows, arguments.work))
    harmful = positives_of(rows, None)
    print(f"{platform.machine()}, {served.bundle.label}, {harmful.sum()} harmful rows, ")
    print(f"{(~harmful).sum()} benign rows of {arguments.data.name}, seed 0\n")
    _table("as they are", logits, harmful)
    for n_tokens in map(int, arguments.tokens.split(",")):
        long, labels = _long(logits, harmful, arguments.long, n_tokens, rng)
        _table(f"hidden in {n_tokens} tokens", long, labels)


async def _logits(served: Served, rows: Sequence[LabelledText], work: Path) -> list[Logits]:
    """The logits of every row's scored tokens."""
    found = []
    async with local_pipeline(lambda: served) as pipeline:
        with TraceStore(work, served.logits_key) as store:
            requests = [request_of(row) for row in rows]
            async for _, trace in trace_texts(pipeline, requests, store):
                found.append(_scored(trace))
    return found


def _scored(trace: Trace) -> Logits:
    return trace.logits[[i for i, stage in enumerate(trace.stages) if stage is not None]]


def _long(
    logits: Sequence[Logits],
    harmful: NDArray[np.bool_],
    n: int,
    n_tokens: int,
    rng: np.random.Generator,
) -> tuple[list[Logits], NDArray[np.bool_]]:
    """Rows of both labels, each somewhere among tokens of other benign rows."""
    texts, labels = [], []
    benign = np.flatnonzero(~harmful)
    for label in (True, False):
        for i in rng.choice(np.flatnonzero(harmful == label), n):
            room = max(n_tokens - len(logits[i]), 0)
            around = [logits[int(i)][:0]]
            while sum(map(len, around)) < room:
                around.append(logits[int(rng.choice(benign))])
            padding = np.concatenate(around)[:room]
            at = int(rng.integers(room + 1))
            texts.append(np.concatenate((padding[:at], logits[i], padding[at:])))
            labels.append(label)
    return texts, np.array(labels)


def _table(title: str, texts: Sequence[Logits], harmful: NDArray[np.bool_]) -> None:
    print(f"{title}: {len(texts)} texts, median {np.median([len(t) for t in texts]):.0f} tokens\n")
    print("| aggregate | AUROC | TPR at 1 % FPR | tokens until then, median | state, numbers |")
    print("|---|---|---|---|---|")
    n_clusters = texts[0].shape[1]
    for name, said in SPECS.items():
        spec = AggregateSpec(min_evidence_tokens=0, **said)  # type: ignore[arg-type]
        aggregator = Aggregator([spec] * n_clusters)
        running = [aggregator.update(aggregator.start(), t)[:, :, 0] for t in texts]
        final = np.array([r[-1] for r in running])
        tail = Tail.of(final[~harmful])
        levels = tail.levels(final)
        figures = compare({name: levels}, harmful, n_resamples=N_RESAMPLES).figures[name]
        ordered = np.sort(levels[~harmful])
        threshold = ordered[len(ordered) - 1 - int(0.01 * len(ordered))]
        delays = [
            int(np.argmax(tail.levels(r) > threshold)) + 1
            for r, level, label in zip(running, levels, harmful, strict=True)
            if label and level > threshold
        ]
        tpr = float((levels[harmful] > threshold).mean())
        cell = f"{tpr:.3f}"
        if figures.tpr_at_1pct is not None:
            cell += f" [{figures.tpr_at_1pct.low:.3f}, {figures.tpr_at_1pct.high:.3f}]"
        a = figures.auroc
        size = {"max": 1, "mean": 1, "ema": 1, "top_k_mean": spec.k}.get(spec.kind, spec.window)
        median = f"{np.median(delays):.0f}" if delays else "-"
        print(
            f"| {name} | {a.value:.3f} [{a.low:.3f}, {a.high:.3f}] | {cell} | {median} | {size} |"
        )
    print()


if __name__ == "__main__":
    main()
