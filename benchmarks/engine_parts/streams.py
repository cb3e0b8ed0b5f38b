"""Many streams that gain a token now and then, long ones, and texts that begin alike."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_parts.measuring import (
    Measured,
    in_turns,
    paired,
    percentile,
    ratio,
    say,
    show,
    spread,
    timed,
)
from engine_parts.ours import Ours, score_all
from engine_parts.setting import Setting
from monitor.engine import Engine, Priority
from sae_core.score_cache import OwnForward, ScoredStream

LOADS = (0.5, 0.8)
"""Shares of capacity at which the lag is measured."""


def streams(ours: Ours, setting: Setting) -> Measured:
    """One token of each of many streams a round, against prefill; fairness; lag under load."""
    return ours.runner.run(_streams(ours, setting))


async def _streams(ours: Ours, setting: Setting) -> Measured:
    sizes = setting.sizes
    texts = setting.batch()
    rng = np.random.default_rng(3)
    engine = ours.new_engine(reuse=True)
    try:
        async with _grown(engine, sizes.n_streams, setting) as opened:
            prefill, tokens = await _against_prefill(ours, engine, opened, texts, setting, rng)
            n_prefill = sum(map(len, texts))
            prefill_rates = [n_prefill / s for s in prefill]
            rates = [sizes.n_streams / s for s in tokens]
            capacity = statistics.median(rates)
            lags = {}
            for load in LOADS:
                say(f"streams: open-loop load at {load:.0%} of {capacity:.0f} tokens/s")
                lags[f"{load:.0%}"] = await _open_loop(
                    engine, opened, load * capacity, sizes.load_seconds, setting, rng
                )
        say(f"streams: {sizes.n_many} streams at once")
        async with _grown(engine, sizes.n_many, setting) as opened:
            many = await _all_at_once(engine, opened, sizes.load_seconds, setting, rng)
    finally:
        engine.stop()
    lines = [
        f"{sizes.n_streams} streams of {sizes.context} tokens, one each a round: "
        f"{show(rates, digits=0)} tokens/s; prefill {show(prefill_rates, digits=0)}",
        *(
            f"lag at {load} ({lag['tokens_per_second']:.0f} tokens/s): p50 {lag['p50_ms']:.1f} ms, "
            f"p99 {lag['p99_ms']:.1f} ms, {lag['late']} of {lag['sent']} sent late"
            for load, lag in lags.items()
        ),
        f"{sizes.n_many} streams as fast as they go: {many['tokens_per_second']:.0f} tokens/s, the "
        f"slowest stream got {many['least_over_most']:.0%} of the fastest one's tokens, at most "
        f"{many['most_waiting']} tokens waited, "
        f"{many['cache_bytes'] / 1e6:.0f} MB of keys and values",
    ]
    return Measured(
        ratios={"streams64_share": capacity / statistics.median(prefill_rates)},
        details={
            "tokens_per_second": spread(rates),
            "prefill_tokens_per_second": spread(prefill_rates),
            "lag": lags,
            "many": many,
            "side": ours.name,
            "counted": "at the engine, prefix reuse on; lag from a token's place in a fixed "
            "schedule to its score, also where it was sent late",
        },
        lines=lines,
    )


@asynccontextmanager
async def _grown(
    engine: Engine, n_streams: int, setting: Setting
) -> AsyncIterator[list[ScoredStream]]:
    """Open streams with the same context, which only the first one has to compute."""
    (context,) = setting.texts([setting.sizes.context], seed=4)
    opened = [engine.open_stream() for _ in range(n_streams)]
    try:
        for stream in opened:
            await _score(engine, stream, context, Priority.PROMPT)
        yield opened
    finally:
        for stream in opened:
            engine.close_stream(stream)


async def _score(
    engine: Engine,
    stream: ScoredStream,
    token_ids: Sequence[int],
    priority: Priority = Priority.COMPLETION,
) -> None:
    await engine.score(OwnForward(stream, token_ids), priority=priority)


async def _against_prefill(
    ours: Ours,
    engine: Engine,
    opened: Sequence[ScoredStream],
    texts: list[list[int]],
    setting: Setting,
    rng: np.random.Generator,
) -> tuple[list[float], list[float]]:
    """Seconds of whole texts, and of one token of every stream, in turns."""
    prefill: list[float] = []
    rounds: list[float] = []
    ends = time.monotonic() + setting.sizes.seconds / 4
    for number in range(setting.sizes.rounds + 1):
        if number > 2 and time.monotonic() > ends:
            break
        say(f"streams: round {number} of {setting.sizes.rounds} (0 warms up)")
        began = time.perf_counter()
        await score_all(ours.engine, texts)
        took = [time.perf_counter() - began]
        for _ in range(setting.sizes.stream_rounds):
            ids = rng.choice(setting.token_ids, len(opened)).tolist()
            began = time.perf_counter()
            await asyncio.gather(
                *(_score(engine, s, [i]) for s, i in zip(opened, ids, strict=True))
            )
            took.append(time.perf_counter() - began)
        if number:
            prefill.append(took[0])
            rounds += took[1:]
    return prefill, rounds


@dataclass(slots=True)
class _Load:
    """What an open-loop load has seen."""

    lags: list[float]
    late: int = 0
    """Tokens whose turn came while the stream's last one had no score yet."""


async def _open_loop(
    engine: Engine,
    opened: Sequence[ScoredStream],
    rate: float,
    seconds: float,
    setting: Setting,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Tokens on a fixed schedule, whatever comes back; lag counts from a token's place in it."""
    interval = len(opened) / rate
    n_each = max(2, round(seconds / interval))
    load = _Load([])
    start = time.perf_counter() + 0.05

    async def one(number: int, stream: ScoredStream, ids: list[int]) -> None:
        for turn, token_id in enumerate(ids):
            due = start + (turn + number / len(opened)) * interval
            wait = due - time.perf_counter()
            load.late += wait < 0
            await asyncio.sleep(max(0.0, wait))
            await _score(engine, stream, [token_id])
            load.lags.append(time.perf_counter() - due)

    drawn = rng.choice(setting.token_ids, (len(opened), n_each)).tolist()
    await asyncio.gather(*(one(n, s, drawn[n]) for n, s in enumerate(opened)))
    took = time.perf_counter() - start
    return {
        "asked_tokens_per_second": rate,
        "tokens_per_second": len(load.lags) / took,
        "p50_ms": percentile(load.lags, 50) * 1e3,
        "p99_ms": percentile(load.lags, 99) * 1e3,
        "most_ms": max(load.lags) * 1e3,
        "sent": len(load.lags),
        "late": load.late,
    }


async def _all_at_once(
    engine: Engine,
    opened: Sequence[ScoredStream],
    seconds: float,
    setting: Setting,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Every stream sends its next token when it has the last one's score."""
    counts = [0] * len(opened)
    most_waiting = 0
    ends = time.perf_counter() + seconds
    drawn = rng.choice(setting.token_ids, (len(opened), 64)).tolist()

    async def one(number: int, stream: ScoredStream) -> None:
        nonlocal most_waiting
        while counts[number] == 0 or time.perf_counter() < ends:
            await _score(engine, stream, [drawn[number][counts[number] % 64]])
            counts[number] += 1
            most_waiting = max(most_waiting, engine.queue_tokens)

    began = time.perf_counter()
    await asyncio.gather(*(one(n, s) for n, s in enumerate(opened)))
    return {
        "tokens_per_second": sum(counts) / (time.perf_counter() - began),
        "least_over_most": min(counts) / max(counts),
        "least": min(counts),
        "most": max(counts),
        "most_waiting": most_waiting,
        "cache_bytes": engine.cache().session_bytes + engine.cache().prefix_bytes,
    }


def long_streams(ours: Ours, setting: Setting) -> Measured:
    """What tokens cost early and late in a stream, in pieces of 1 and of 16."""
    sizes = setting.sizes
    engine = ours.new_engine(reuse=True)
    rng = np.random.default_rng(5)
    opened = {name: engine.open_stream() for name in ("early", "late")}

    def piece(name: str, n: int) -> float:
        ids = rng.choice(setting.token_ids, n).tolist()
        return timed(lambda: ours.runner.run(_score(engine, opened[name], ids)))

    try:
        for name, n_before in (("early", sizes.early), ("late", sizes.late)):
            say(f"flat cost: growing a stream to {n_before} tokens")
            (context,) = setting.texts([n_before], seed=6)
            ours.runner.run(_score(engine, opened[name], context, Priority.PROMPT))
        found = {
            n: in_turns(
                f"flat cost, pieces of {n}",
                {name: lambda name=name, n=n: piece(name, n) for name in opened},
                rounds=sizes.pieces,
                seconds=sizes.seconds / 8,
            )
            for n in (1, 16)
        }
    finally:
        for stream in opened.values():
            engine.close_stream(stream)
        engine.stop()
    ratios = {n: ratio(seconds["late"], seconds["early"]) for n, seconds in found.items()}
    return Measured(
        ratios={"flat_cost_ratio": max(ratios.values())},
        details={
            "by_piece": {str(n): value for n, value in ratios.items()},
            "seconds": {
                f"{name}, {n}": spread(values)
                for n, seconds in found.items()
                for name, values in seconds.items()
            },
            "counted": "the larger of the ratios of both piece lengths",
            "side": ours.name,
        },
        lines=[
            f"pieces of {n}: around {sizes.late} {show(seconds['late'], 1e3)} ms, "
            f"around {sizes.early} {show(seconds['early'], 1e3)} ms, {ratios[n]:.2f}"
            for n, seconds in found.items()
        ],
    )


def shared_prefix(ours: Ours, setting: Setting) -> Measured:
    """A second request that begins as the first one did."""
    sizes = setting.sizes
    engine = ours.new_engine(reuse=True)
    seeds = iter(range(100, 1000))
    prefix: list[int] = []

    async def request(token_ids: list[int]) -> None:
        stream = engine.open_stream()
        try:
            await _score(engine, stream, token_ids, Priority.PROMPT)
        finally:
            engine.close_stream(stream)

    def first() -> float:
        (text,) = setting.texts([sizes.prefix + sizes.rest], seed=next(seeds))
        prefix[:] = text[: sizes.prefix]
        return timed(lambda: ours.runner.run(request(text)))

    def second() -> float:
        (rest,) = setting.texts([sizes.rest], seed=next(seeds))
        return timed(lambda: ours.runner.run(request(prefix + rest)))

    try:
        seconds = in_turns(
            "shared prefix",
            {"first": first, "second": second},
            rounds=sizes.rounds,
            seconds=sizes.seconds / 8,
        )
    finally:
        engine.stop()
    return Measured(
        ratios={"prefix_ratio": ratio(seconds["second"], seconds["first"])},
        details={
            "paired": paired(seconds["second"], seconds["first"]),
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "side": ours.name,
        },
        lines=[
            f"{sizes.prefix} shared tokens and {sizes.rest} others: first "
            f"{show(seconds['first'], 1e3)} ms, second {show(seconds['second'], 1e3)} ms"
        ],
    )
