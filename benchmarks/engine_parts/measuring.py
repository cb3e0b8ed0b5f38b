"""Medians, spreads, and sides that take turns, so that noise hits all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
LEAST_ROUNDS = 2
SILENCE_SECONDS = 2.0
"""Between two lines of progress on rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one part of the benchmark found."""

    ratios: dict[str, float | None]
    """By key of the result; None where it could not be measured here."""
    details: dict[str, Any]
    """Everything behind the ratios, as JSON."""
    lines: list[str] = field(default_factory=list)
    """For a person, under the part's title."""


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


def timed(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    title: str, sides: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """The seconds of every side, one after the other, round by round.

    A first round warms up and is not counted. No new round begins once `seconds` are over, but
    there are never fewer than two.
    """
    for name, side in sides.items():
        say(f"{title}: warming up, {name}")
        side()
    told, ends = 0.0, time.monotonic() + seconds
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > ends:
            say(f"{title}: {seconds:.0f} s are over after {number} rounds")
            break
        if time.monotonic() > told + SILENCE_SECONDS:
            told = time.monotonic()
            say(f"{title}: round {number + 1} of {rounds}")
        for name, side in sides.items():
            found[name].append(side())
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most, as JSON."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(above) / statistics.median(below)


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Spread of the ratio round by round: a pair was measured one side after the other."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank: a value that was measured, never one in between."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def show(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """`median [min, max]`."""
    middle, low, high = (scale * f(values) for f in (statistics.median, min, max))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine() -> dict[str, Any]:
    """What this runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
