"""A real server in a process of its own: what a call costs beside the forward, and memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_parts.measuring import Measured, percentile, say, spread
from engine_parts.setting import Setting
from monitor.client import AsyncMonitorClient, MonitorClient

ROOT = Path(__file__).resolve().parent.parent.parent
UPLOADS = 16
"""Streams that send their context at the same time."""
TIMEOUT_SECONDS = 600.0
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server process that is ready."""

    pid: int
    listen: str

    def memory(self, field: str) -> int:
        """Bytes by /proc/PID/status, such as VmHWM (peak resident) or RssAnon."""
        return memory(Path(f"/proc/{self.pid}/status").read_text(), field)


def memory(status: str, field: str) -> int:
    """Bytes of one field of a process's status."""
    for line in status.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/PID/status: found no {field}, expected Linux")


@contextmanager
def serving(setting: Setting, threads: int, *flags: str) -> Iterator[Server]:
    """`sae-monitor serve` on the setting's bundle, stopped at the end."""
    say(f"starting a server on {setting.model.name}")
    command = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, "-m", "monitor", "serve"]
    command += ["--bundle", str(setting.bundle), "--fidelity", "off", "--audit-level", "none"]
    command += ["--listen", "127.0.0.1:0", "--ops-listen", "off", "--log-level", "warning", *flags]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                errors.seek(0)
                raise SystemExit(f"the server ended with code {process.wait()}:\n{errors.read()}")
            yield Server(pid=process.pid, listen=json.loads(line)["listen"])
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def call_overhead(setting: Setting, threads: int) -> Measured:
    """A unary call of many tokens less its forward pass, as the client's clock has it.

    The model is one cheap block of the real width, so that hundreds of calls end in time; encoding,
    heads, evidence, policy and both ends of the wire are what they are on a real one.
    """
    sizes = setting.sizes
    totals: list[float] = []
    beside: list[float] = []
    parts: dict[str, list[float]] = {"encode": [], "score": [], "wire and the rest": []}
    with (
        serving(setting, threads, "--no-prefix-reuse") as server,
        MonitorClient(server.listen, timeout_seconds=TIMEOUT_SECONDS) as client,
    ):
        fingerprint = client.info().provenance.tokenizer_fingerprint
        warm_up = 10
        texts = setting.texts([sizes.rpc_tokens] * (sizes.rpc_calls + warm_up), seed=7)
        say(f"call overhead: {sizes.rpc_calls} calls of {sizes.rpc_tokens} tokens")
        for number, text in enumerate(texts):
            began = time.perf_counter()
            decision = client.score(token_ids=text, tokenizer_fingerprint=fingerprint)
            took = time.perf_counter() - began
            if number < warm_up:
                continue
            timings = decision.timings
            totals.append(took)
            beside.append(took - timings.forward_seconds)
            parts["encode"].append(timings.encode_seconds)
            parts["score"].append(timings.score_seconds)
            parts["wire and the rest"].append(
                beside[-1] - timings.encode_seconds - timings.score_seconds
            )
    milliseconds = {f"p{p}": percentile(beside, p) * 1e3 for p in (50, 90, 99)}
    shares = ", ".join(
        f"{name} {percentile(values, 50) * 1e3:.2f}" for name, values in parts.items()
    )
    return Measured(
        ratios={"rpc_overhead_p99_ms": milliseconds["p99"]},
        details={
            "beside_forward_ms": milliseconds,
            "total_ms": {f"p{p}": percentile(totals, p) * 1e3 for p in (50, 99)},
            "parts_ms": {name: spread([v * 1e3 for v in values]) for name, values in parts.items()},
            "calls": len(beside),
            "latents": sizes.n_latents,
            "clusters": sizes.n_clusters,
            "counted": "client's wall clock less the reply's forward seconds; random ids, prefix "
            "reuse off, one block of the real width",
        },
        lines=[
            f"{len(beside)} calls of {sizes.rpc_tokens} tokens, {sizes.n_clusters} clusters, "
            f"{sizes.n_latents} latents: p50 {milliseconds['p50']:.2f}, "
            f"p90 {milliseconds['p90']:.2f}, p99 {milliseconds['p99']:.2f} ms beside the forward",
            f"of it, medians in ms: {shares}",
        ],
    )


def server_memory(setting: Setting, threads: int, backend: str) -> Measured:
    """Peak resident memory of a server whose budget of keys and values is full, under load."""
    baseline = _imports()
    sizes, budget = setting.sizes, setting.sizes.cache_bytes
    flags = ("--backend", backend, "--max-cache-bytes", str(budget))
    with serving(setting, threads, *flags) as server:
        with MonitorClient(server.listen) as client:
            dtype = client.info().provenance.dtype
        loaded = server.memory("VmHWM")
        asyncio.run(_fill(server, setting))
        peak = server.memory("VmHWM")
    scoring = 4 * (sizes.n_latents * (setting.d_in + 2) + sizes.n_clusters * (setting.d_in + 1))
    weights = setting.weights_in_use() * BYTES[dtype] + scoring
    allowed = weights + budget
    return Measured(
        ratios={"rss_over_budget": peak / allowed},
        details={
            "peak_bytes": peak,
            "weights_in_use_bytes": weights,
            "budget_bytes": budget,
            "after_loading_bytes": loaded,
            "imports_bytes": baseline,
            "without_imports": (peak - baseline) / allowed,
            "streams_held": sizes.held_streams,
            "dtype": dtype,
            "counted": "VmHWM of the server process over weights in use (embedding, needed blocks, "
            "registered latents, heads) plus the budget of keys and values; imports are in it, "
            "their share is stated beside it",
        },
        lines=[
            f"peak {peak / 1e6:.0f} MB with {sizes.held_streams} streams held; weights in use "
            f"{weights / 1e6:.0f} MB, budget {budget / 1e6:.0f} MB",
            f"of the peak, {baseline / 1e6:.0f} MB are interpreter and imports; without them "
            f"{(peak - baseline) / allowed:.2f}; after loading {loaded / 1e6:.0f} MB",
        ],
    )


def _imports() -> int:
    """Peak resident memory of a process that imports the server and does nothing."""
    code = "import monitor.server.process; print(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return memory(done.stdout, "VmHWM")


async def _fill(server: Server, setting: Setting) -> None:
    """Opens streams until the budget is surely full, then sends whole texts beside them.

    The streams share one context, so that keys and values are copied and not computed each time.
    """
    sizes = setting.sizes
    (context,) = setting.texts([sizes.held_context], seed=8)
    gate = asyncio.Semaphore(UPLOADS)
    async with AsyncMonitorClient(server.listen, timeout_seconds=TIMEOUT_SECONDS) as client:
        fingerprint = (await client.info()).provenance.tokenizer_fingerprint
        say(f"memory: filling {sizes.cache_bytes / 1e6:.0f} MB of keys and values")
        async with AsyncExitStack() as stack:

            async def hold() -> None:
                async with gate:
                    stream = await stack.enter_async_context(
                        client.stream(tokenizer_fingerprint=fingerprint, timeout=TIMEOUT_SECONDS)
                    )
                    await stream.send(token_ids=context)
                    await stream.flush()
                    async for update in stream:
                        if update.processed_index >= len(context):
                            break

            await asyncio.gather(*(hold() for _ in range(sizes.held_streams)))
            say("memory: whole texts beside them")
            texts: list[Any] = setting.texts([sizes.rpc_tokens] * 8, seed=9)
            await asyncio.gather(
                *(client.score(token_ids=t, tokenizer_fingerprint=fingerprint) for t in texts)
            )
