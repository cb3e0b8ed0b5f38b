"""Does the engine reach the numbers that were set for it?

Gemma 3 270M read after layer 9 by an SAE of 16,384 latents of which 64 are registered in 8 clusters
with dense heads. All figures come from one run and are ratios of sides that took turns, as other
work on a machine moves absolute ones. Peers run in environments of their own, which the first run
installs (some minutes); a later one takes about a quarter of an hour on two cores. Nothing is
asserted: a table shows each figure beside what is aimed at.

    python benchmarks/engine.py [--json FILE] [--quick] [--backends torch,onnx] [--threads N]

The JSON file has one key for each figure, null where it was not measured, and `details`.
`--quick` shows that all of it runs: a tiny random model, few tokens, no peers from other
environments; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout's own packages win

import engine_parts  # noqa: F401 - says how OpenMP waits, before torch is imported
import torch
import transformers
from engine_parts import service, streams, throughput
from engine_parts.measuring import STARTED, Measured, machine, say
from engine_parts.ours import Ours, load_ours
from engine_parts.peers import Peer, write_texts
from engine_parts.setting import QUICK, Setting, Sizes, real_setting, tiny_setting, wide_setting
from environments import CACHE, peer_python, versions


class Target(NamedTuple):
    """One figure and what it should be."""

    key: str
    bound: float
    at_least: bool
    meaning: str


TARGETS = (
    Target("fp32_over_saelens_documented", 15, True, "ours in float32 over SAELens as documented"),
    Target("auto_over_saelens_documented", 20, True, "ours with --dtype auto over the same"),
    Target("fp32_over_saelens_best", 3.5, True, "ours in float32 over SAELens at its best"),
    Target("auto_over_saelens_best", 5, True, "ours with --dtype auto over the same"),
    Target("gemm_share", 0.6, True, "share of the best matrix-product rate in prefill"),
    Target("overhead_share", 0.05, False, "share of a step beside the bare forward"),
    Target("packed_over_padded", 2, True, "mixed lengths over one padded batch"),
    Target("streams64_share", 0.5, True, "64 streams, a token each, over prefill"),
    Target("flat_cost_ratio", 1.3, False, "a token late in a stream over an early one"),
    Target("prefix_ratio", 0.1, False, "second request of a prefix over the first"),
    Target("rpc_overhead_p99_ms", 5, False, "ms of a call beside the forward, 99th percentile"),
    Target("rss_over_budget", 1.25, False, "peak memory over weights in use and cache budget"),
)


def main() -> None:
    """Parses the flags, measures every part in turn, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--backends", default="torch,onnx", help="several by commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="of every comparison, at most")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = replace(sizes, rounds=options.rounds)
    facts = machine() | {
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sizes": "quick" if options.quick else "full",
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="engine-") as name:
        parts = measure(options, Path(name), sizes, facts)
    facts |= {"load_at_end": machine()["load"], "seconds": time.monotonic() - STARTED}
    report(parts, facts)
    if options.json:
        details: dict[str, Any] = {name: part.details for name, part in parts.items()}
        ratios = {key: value for part in parts.values() for key, value in part.ratios.items()}
        ordered = {target.key: ratios[target.key] for target in TARGETS}
        text = json.dumps(ordered | {"details": {"facts": facts, **details}}, indent=1)
        options.json.write_text(text + "\n")


def measure(
    options: argparse.Namespace, folder: Path, sizes: Sizes, facts: dict[str, Any]
) -> dict[str, Measured]:
    """Every part, by title."""
    pythons = {"transformers": sys.executable}
    if not options.quick:
        pythons |= {name: peer_python(name) for name in ("nnsight", "saelens")}
        facts["saelens"] = versions(
            pythons["saelens"], "sae-lens", "transformer-lens", "torch", "transformers"
        )
        facts["nnsight"] = versions(pythons["nnsight"], "nnsight", "torch", "transformers")
    say("writing an SAE and a bundle")
    setting = (tiny_setting if options.quick else real_setting)(folder, sizes)
    mixed = throughput.mixed_lengths(setting)
    write_texts(setting, folder, mixed)
    parts: dict[str, Measured] = {}
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        plain, picked, missing = load_ours(setting, options.backends.split(","), runner)
        if not plain or not picked:
            raise SystemExit("\n".join(["no backend could be loaded:", *missing]))
        for ours in dict.fromkeys((*plain, *picked)):
            stack.callback(ours.close)
        with started(pythons, plain[0], setting, folder, options.threads) as peers:
            part = throughput.prefill(plain, picked, peers, setting, folder, options.threads)
            part.lines.extend(missing)
            parts["prefill"] = part
            peer = next(peer for peer in peers if peer.kind == "transformers")
            # From here on what a server runs unless it is told otherwise: the first of --backends.
            chosen = picked[0]
            parts["overhead"] = throughput.overhead(chosen, setting)
            parts["mixed lengths"] = throughput.packed(chosen, peer, mixed, setting)
        parts["streams"] = streams.streams(chosen, setting)
        parts["flat cost"] = streams.long_streams(chosen, setting)
        parts["shared prefix"] = streams.shared_prefix(chosen, setting)
        backend = chosen.name.split()[0]
    wide = wide_setting(folder / "wide", sizes)
    parts["call"] = service.call_overhead(wide, options.threads)
    default = replace(sizes, d_sae=8192, n_latents=243, n_clusters=10)  # as the default bundle has
    larger = service.call_overhead(wide_setting(folder / "default", default), options.threads)
    parts["call"].details["as_the_default_bundle"] = larger.details
    parts["call"].lines.extend(larger.lines)
    parts["memory"] = service.server_memory(setting, options.threads, backend)
    return parts


@contextmanager
def started(
    pythons: dict[str, str], ours: Ours, setting: Setting, folder: Path, threads: int
) -> Iterator[list[Peer]]:
    """The peers' processes, ended with the context."""
    with ExitStack() as stack:
        peers = []
        for kind, python in pythons.items():
            peer = Peer(kind, python, ours, setting, folder, threads)
            stack.callback(peer.close)
            peers.append(peer)
        yield peers


def report(parts: dict[str, Measured], facts: dict[str, Any]) -> None:
    """What a person reads: every part's lines, then the table of figures."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for title, part in parts.items():
        print(f"\n{title}")
        for line in part.lines:
            print(f"  {line}")
    found = {key: value for part in parts.values() for key, value in part.ratios.items()}
    print(f"\n{'figure':<31}{'found':>9}{'aimed at':>12}  {'reached':<9}")
    for target in TARGETS:
        value = found[target.key]
        bound = f"{'>=' if target.at_least else '<='} {target.bound:g}"
        if value is None:
            shown, reached = "-", "-"
        else:
            shown = f"{value:.3g}"
            is_reached = value >= target.bound if target.at_least else value <= target.bound
            reached = "yes" if is_reached else "NO"
        print(f"{target.key:<31}{shown:>9}{bound:>12}  {reached:<9}{target.meaning}")
    print(f"\n{facts['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
