"""What does a text cost whose beginning was seen before?

A request with a prefix that an earlier one had; a conversation that grows and is sent whole each
time, with and without reuse; a stream that was evicted. Prints times, ratios and forward tokens.

    python benchmarks/reuse.py [--bundle default] [--prefix 1000] [--rest 20] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from monitor.cli.common import bundle_folder
from monitor.config import default_cache_dir
from monitor.engine import Engine
from monitor.local import UNBOUNDED, load_local
from monitor.served import Served
from monitor.work_queue import Priority
from sae_core.score_cache import OwnForward


def main() -> None:
    """Parses the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--prefix", type=int, default=1000)
    parser.add_argument("--rest", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    served = load_local(
        bundle_folder(options.bundle), model=options.model, cache=default_cache_dir()
    )
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, ", end="")
    print(f"python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, float32, {served.bundle.label}\n")
    asyncio.run(measure(served, options.prefix, options.rest, options.rounds))


async def measure(served: Served, n_prefix: int, n_rest: int, rounds: int) -> None:
    """Every question, `rounds` times with other tokens."""
    rng = np.random.default_rng(0)
    sharing, alone = start(served, served.reuse_key), start(served, None)

    def ids(n: int) -> list[int]:
        drawn = rng.integers(0, served.vocab_size, n).tolist()
        return [0 if i in served.tokenizer.special_ids else i for i in drawn]

    await score(sharing, ids(64))
    first, second, same, evicted = [], [], [], []
    for _ in range(rounds):
        prefix = ids(n_prefix)
        first.append(await score(sharing, prefix + ids(n_rest)))
        text = prefix + ids(n_rest)
        second.append(await score(sharing, text))
        same.append(await score(sharing, text))
    print(f"{n_prefix} shared tokens and {n_rest} others, seconds, median [spread] of {rounds}")
    show("first request", first)
    show("second, same prefix", second, first)
    show("the same text again", same, first)

    for engine, name in ((sharing, "with reuse"), (alone, "without")):
        text, turns = ids(n_prefix), range(n_prefix // 20, n_prefix + 1, n_prefix // 20)
        before = engine.cache().reused_tokens
        seconds = [await score(engine, text[:n]) for n in turns]
        n_run = sum(turns) - (engine.cache().reused_tokens - before)
        print(f"\ntext grown to {n_prefix} tokens in {len(turns)} requests, {name}")
        print(f"  sent {sum(turns)}, forward {n_run}, {sum(seconds):.2f} s", end="")
        print(f", last request {seconds[-1]:.3f} s")

    tiny = Engine(served.scorer, max_queue_tokens=UNBOUNDED, max_cache_bytes=0)
    tiny.start()
    for _ in range(rounds):
        stream = tiny.open_stream()
        await tiny.score(stream, ids(n_prefix), priority=Priority.PROMPT)
        began = time.perf_counter()
        await tiny.score(stream, ids(1), priority=Priority.PROMPT)
        evicted.append(time.perf_counter() - began)
    print()
    show(f"1 token after {n_prefix} evicted", evicted)
    for engine in (sharing, alone, tiny):
        engine.stop()


def start(served: Served, key: str | None) -> Engine:
    """An engine that runs."""
    engine = Engine(served.scorer, max_queue_tokens=UNBOUNDED, reuse_key=key)
    engine.start()
    return engine


async def score(engine: Engine, token_ids: list[int]) -> float:
    """Seconds of one request."""
    began = time.perf_counter()
    stream = engine.open_stream()
    await engine.score(OwnForward(stream, token_ids), priority=Priority.PROMPT)
    engine.close_stream(stream)
    return time.perf_counter() - began


def show(name: str, seconds: list[float], reference: list[float] | None = None) -> None:
    """One line of the table."""
    spread = f"[{min(seconds):.3f}, {max(seconds):.3f}]"
    ratio = ""
    if reference is not None:
        ratio = f"{statistics.median(seconds) / statistics.median(reference):8.1%} of the first"
    print(f"  {name:<30}{statistics.median(seconds):8.3f} {spread:<18}{ratio}")


if __name__ == "__main__":
    main()
