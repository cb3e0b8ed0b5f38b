"""What does it cost to carry given activations to the server, and would shared memory be faster?

Sends float32 rows with the real client to the real servicer and buffer, in a process of its own
and behind a pipeline that scores nothing, over TCP loopback and over a unix socket. Beside it the
least that shared memory would cost: the caller's copy into a segment, a bare round trip, and the
server's check for NaN in place. For scale, the time that the default bundle takes to score as many
rows of 640.

    python benchmarks/activation_transport.py [--rounds 7] [--score]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np

from monitor.activations import ActivationsBuffer
from monitor.client import MonitorClient
from monitor.metrics import Metrics
from monitor.records import (
    Action,
    ActivationsChunk,
    ActivationsOpen,
    Coverage,
    Decision,
    Mode,
    Overall,
    Provenance,
    Timings,
    Verdict,
)
from monitor.rpc import servicers
from monitor.rpc.interceptors import Edge
from monitor.rpc.serving import Serving
from sae_core.hook_points import parse_hook_point

HOOK_POINT = "blocks.8.hook_resid_post"
SHAPES = [(1024, 640), (8192, 640), (1024, 4096), (8192, 4096)]


class NoScoring:
    """A pipeline that takes activations and answers at once."""

    async def score_activations(
        self, opened: ActivationsOpen, chunks: AsyncIterator[ActivationsChunk], **options: object
    ) -> Decision:
        """Checks and puts together, as the real one does."""
        widths = {parse_hook_point(HOOK_POINT): opened.tensors[0].width}
        buffer = ActivationsBuffer(opened, widths)
        async for chunk in chunks:
            buffer.take(chunk)
        buffer.finish()
        return Decision(
            decision_id="",
            verdict=Verdict.PASS,
            action=Action.ALLOW,
            mode=Mode.MONITOR,
            policy="default",
            overall=Overall(fused=0.0, dense=0.0, sae=0.0),
            clusters=(),
            rules=(),
            alerts=(),
            coverage=Coverage(received=opened.n_tokens, scored=opened.n_tokens),
            timings=Timings(),
            provenance=Provenance(
                model="",
                model_digest="",
                tokenizer_fingerprint="",
                bundle="",
                bundle_digest="",
                dtype="",
                backend="",
                server_version="",
            ),
        )


def serve(told: Connection, socket: str) -> None:
    """The server process: says its address, ends when told anything."""

    async def run() -> None:
        metrics = Metrics("none")
        serving = Serving(metrics)
        serving.open(cast(Any, NoScoring()))
        server = grpc.aio.server(
            interceptors=[Edge(metrics)], options=[("grpc.max_receive_message_length", 4 << 20)]
        )
        servicers.register(server, serving, metrics)
        port = server.add_insecure_port("127.0.0.1:0")
        server.add_insecure_port(socket)
        await server.start()
        told.send(f"127.0.0.1:{port}")
        await asyncio.to_thread(told.recv)
        await server.stop(0)

    asyncio.run(run())


def main() -> None:
    """Prints one row for each shape and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--score", action="store_true", help="also time the default bundle")
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, python {platform.python_version()}, grpc {grpc.__version__}", end=", ")
    print(f"median [min, max] of {options.rounds} rounds, milliseconds\n")
    print(f"{'rows x width':<14}{'MB':>6}{'TCP':>24}{'unix socket':>24}{'shared memory':>24}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        socket = f"unix:{folder}/m.sock"
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, socket))
        process.start()
        with MonitorClient(ours.recv()) as tcp, MonitorClient(socket) as unix:
            for n_rows, width in SHAPES:
                acts = np.random.default_rng(0).normal(size=(n_rows, width)).astype(np.float32)
                cells = [
                    timed(options.rounds, lambda acts=acts: send(tcp, acts)),
                    timed(options.rounds, lambda acts=acts: send(unix, acts)),
                    timed_in_memory(options.rounds, unix, acts),
                ]
                print(f"{n_rows} x {width:<7}{acts.nbytes / 1e6:>6.1f}", *cells, sep="")
        ours.send("over")
        process.join()
    if options.score:
        score()


def send(client: MonitorClient, acts: np.ndarray) -> None:
    """One whole call."""
    client.score_activations({HOOK_POINT: acts}, model_digest="", timeout=60)


def timed(rounds: int, work: Callable[[], None]) -> str:
    """Median, least and most of the rounds; the first, which warms up, is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        seconds.append((time.perf_counter() - began) * 1e3)
    return cell(seconds[1:])


def cell(milliseconds: list[float]) -> str:
    """As one column."""
    spread = f"[{min(milliseconds):.1f}, {max(milliseconds):.1f}]"
    return f"{statistics.median(milliseconds):.1f} {spread}".rjust(24)


def timed_in_memory(rounds: int, client: MonitorClient, acts: np.ndarray) -> str:
    """Copy, round trip of one row, check in place; the segment is made once and used again."""
    segment = SharedMemory(create=True, size=acts.nbytes)

    def work() -> None:
        shared: np.ndarray = np.ndarray(acts.shape, acts.dtype, buffer=segment.buf)
        np.copyto(shared, acts)
        send(client, acts[:1])
        assert np.isfinite(shared).all()

    try:
        return timed(rounds, work)
    finally:
        segment.close()
        segment.unlink()


def score() -> None:
    """The default bundle's SAEs and heads over random rows, without a forward pass."""
    from monitor.cli.common import bundle_folder
    from monitor.config import default_cache_dir
    from monitor.local import load_local
    from sae_core.activation_source import GivenActivations

    served = load_local(Path(bundle_folder("default")), model=None, cache=default_cache_dir())
    widths = served.scorer.language_model.widths
    for n_rows in (1024, 8192):
        acts = {
            place: np.random.default_rng(0).normal(size=(n_rows, width)).astype(np.float32)
            for place, width in widths.items()
        }
        source = GivenActivations(n_rows, acts)

        def work(source: GivenActivations = source) -> None:
            for start in range(0, source.n_tokens, 2048):
                stop = min(start + 2048, source.n_tokens)
                served.scorer.step([source.part(start, stop)])

        print(f"scoring {n_rows} x 640 with {served.bundle.label}: {timed(3, work).strip()}")


if __name__ == "__main__":
    main()
