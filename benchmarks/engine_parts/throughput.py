"""Prefill against peers and against the machine's limit; overhead; mixed lengths."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine_parts.measuring import (
    Measured,
    in_turns,
    paired,
    ratio,
    say,
    show,
    spread,
    timed,
)
from engine_parts.ours import Ours
from engine_parts.peers import Peer, compared
from engine_parts.products import flops, libraries
from engine_parts.setting import Setting
from monitor.engine import torch_dtype
from monitor.local import local_pipeline
from monitor.records import Decision, ScoreRequest
from sae_core.language_model.model import Segment

DOCUMENTED, BEST = "SAELens, run_with_cache_with_saes", "SAELens, run_with_cache to the layer"
PEER_NAMES = {
    ("transformers", "full"): "transformers, whole model with a hook",
    ("transformers", "cut"): "transformers, cut at the layer",
    ("nnsight", "trace"): "nnsight, trace stopped at the layer",
    ("saelens", "documented"): DOCUMENTED,
    ("saelens", "best"): BEST,
}


def prefill(
    plain: Sequence[Ours],
    picked: Sequence[Ours],
    peers: Sequence[Peer],
    setting: Setting,
    folder: Path,
    threads: int,
) -> Measured:
    """Tokens per second of whole texts: ours, every peer, and bare matrix products in between."""
    texts = setting.batch()
    n_texts, n_each = setting.sizes.batch
    n_tokens = n_texts * n_each
    kinds = {peer.kind: peer for peer in peers}
    sides: dict[str, Callable[[], float]] = {}
    for ours in dict.fromkeys((*plain, *picked)):
        sides[f"ours, {ours.name}"] = lambda ours=ours: ours.seconds(texts)
    for (kind, side), name in PEER_NAMES.items():
        if kind in kinds:
            sides[name] = lambda kind=kind, side=side: kinds[kind].run(side)
    shapes = setting.matrices()
    limits: dict[str, list[str]] = {}
    missing: list[str] = []
    for dtype in dict.fromkeys(ours.dtype for ours in (*plain, *picked)):
        passes, left_out = libraries(shapes, n_tokens, torch_dtype(dtype), threads)
        missing += left_out
        limits[dtype] = [f"products, {name}, {dtype}" for name in passes]
        sides |= dict(zip(limits[dtype], passes.values(), strict=True))
    seconds = in_turns("prefill", sides, rounds=setting.sizes.rounds, seconds=setting.sizes.seconds)

    def fastest(some: Sequence[Ours]) -> str:
        names = [f"ours, {ours.name}" for ours in some]
        return min(names, key=lambda name: statistics.median(seconds[name]))

    best_plain, best_auto = fastest(plain), fastest(picked)
    ratios: dict[str, float | None] = {}
    pairs: dict[str, Any] = {}
    for key, peer in (("documented", DOCUMENTED), ("best", BEST)):
        for prefix, name in (("fp32", best_plain), ("auto", best_auto)):
            ratios[f"{prefix}_over_saelens_{key}"] = None
            if peer in seconds:
                ratios[f"{prefix}_over_saelens_{key}"] = ratio(seconds[peer], seconds[name])
                pairs[f"{prefix}_over_saelens_{key}"] = paired(seconds[peer], seconds[name])
    auto = next(ours for ours in picked if f"ours, {ours.name}" == best_auto)
    limit = min(limits[auto.dtype], key=lambda name: statistics.median(seconds[name]))
    ratios["gemm_share"] = ratio(seconds[limit], seconds[best_auto])
    pairs["gemm_share"] = paired(seconds[limit], seconds[best_auto])

    checks = _checks(plain, kinds, setting, folder)
    work = flops(shapes, n_tokens)
    rows = {name: [n_tokens / s for s in some] for name, some in seconds.items()}
    gflops = {
        name: [work / s / 1e9 for s in some]
        for name, some in seconds.items()
        if name.startswith(("ours", "products"))
    }
    lines = [f"{n_texts} x {n_each} tokens, median [spread]"]
    for name, values in rows.items():
        if name in gflops:
            rate = f"{show(gflops[name])} GFLOP/s in the blocks' matrices"
        else:
            rate = f"ours are {ratio(seconds[name], seconds[best_plain]):.1f} times as fast"
        tokens = "" if name.startswith("products") else show(values, digits=0)
        lines.append(f"{name:<44}{tokens:>22}{' tokens/s' if tokens else '':<9}  {rate}")
    lines += [f"same scores, {name}: {check}" for name, check in checks.items()] + missing
    return Measured(
        ratios=ratios,
        details={
            "tokens_per_second": {name: spread(values) for name, values in rows.items()},
            "gflops": {name: spread(values) for name, values in gflops.items()},
            "paired": pairs,
            "fp32_side": best_plain,
            "auto_side": best_auto,
            "limit": limit,
            "checks": checks,
            "left_out": missing,
            "matrices": {f"{i}x{o}": count for (i, o), count in shapes.items()},
        },
        lines=lines,
    )


def _checks(
    plain: Sequence[Ours], kinds: dict[str, Peer], setting: Setting, folder: Path
) -> dict[str, Any]:
    """Every side's numbers against those of our first backend."""
    say("prefill: comparing what came out")
    checks: dict[str, Any] = {}
    for (kind, side), name in PEER_NAMES.items():
        if kind in kinds:
            saved = folder / f"{kind}-{side}.npz"
            kinds[kind].run(side, save=saved)
            checks[name] = compared(plain[0], setting, saved)
            saved.unlink()
    reference = np.concatenate([r.logits for r in plain[0].score(setting.batch())])
    for other in plain[1:]:
        logits = np.concatenate([r.logits for r in other.score(setting.batch())])
        off = np.abs(logits - reference) / np.maximum(1.0, np.abs(reference))
        checks[f"ours, {other.name}"] = {"logits_relative": float(off.max())}
    return checks


def overhead(ours: Ours, setting: Setting) -> Measured:
    """What the pipeline takes beside the bare truncated forward of the same tokens.

    Where forward and scoring are one graph no bare forward can be run: then it is what lies beside
    the forward that the replies state.
    """
    texts, model = setting.batch(), ours.language_model
    inside: list[float] = []

    def whole() -> float:
        seconds, decisions = ours.runner.run(_through_pipeline(ours, texts))
        inside.append(1 - sum(d.timings.forward_seconds for d in decisions) / seconds)
        return seconds

    def bare() -> float:
        assert model is not None
        segments = [Segment(model.open_stream(), text) for text in texts]
        return timed(lambda: model.step(segments))

    seconds = in_turns(
        "overhead",
        {"pipeline": whole} | ({} if model is None else {"bare forward": bare}),
        rounds=2 * setting.sizes.rounds,
        seconds=setting.sizes.seconds / 4,
    )
    del inside[0]  # of the round that warmed up
    shares, counted = inside, "pipeline less the forward that its replies state"
    if model is not None:
        pairs = zip(seconds["bare forward"], seconds["pipeline"], strict=True)
        shares = [1 - forward / pipeline for forward, pipeline in pairs]
        counted = "pipeline less bare truncated forward, one run after the other"
    return Measured(
        ratios={"overhead_share": statistics.median(shares)},
        details={
            "share": spread(shares),
            "beside_forward_in_the_same_run": spread(inside),
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "side": ours.name,
            "counted": counted,
        },
        lines=[
            *(f"{name} {show(values, digits=3)} s" for name, values in seconds.items()),
            f"share {show(shares, 100)} % ({counted}), {ours.name}",
            f"beside the forward of the same run {show(inside, 100)} %",
        ],
    )


async def _through_pipeline(ours: Ours, texts: list[list[int]]) -> tuple[float, list[Decision]]:
    served = ours.served
    requests = [
        ScoreRequest(token_ids=tuple(text), tokenizer_fingerprint=served.tokenizer.fingerprint)
        for text in texts
    ]
    async with local_pipeline(lambda: served) as pipeline:
        began = time.perf_counter()
        decisions = await asyncio.gather(*map(pipeline.score, requests))
        return time.perf_counter() - began, decisions


def mixed_lengths(setting: Setting) -> list[list[int]]:
    """Texts of uniformly mixed lengths, in no order."""
    shortest, longest = setting.sizes.mixed
    lengths = np.random.default_rng(2).integers(shortest, longest + 1, setting.sizes.n_mixed)
    return setting.texts(lengths.tolist(), seed=2)


def packed(
    ours: Ours, plain_transformers: Peer, mixed: list[list[int]], setting: Setting
) -> Measured:
    """Texts of mixed lengths, against Hugging Face's padded batches cut at the same layer."""
    seconds = in_turns(
        "mixed lengths",
        {
            "ours": lambda: ours.seconds(mixed),
            "padded": lambda: plain_transformers.run("padded"),
            "sorted": lambda: plain_transformers.run("sorted"),
        },
        rounds=min(3, setting.sizes.rounds),
        seconds=setting.sizes.seconds,
    )
    n_tokens = sum(map(len, mixed))
    rates = {name: [n_tokens / s for s in some] for name, some in seconds.items()}
    n_padded = len(mixed) * max(map(len, mixed))
    sort_ratio = ratio(seconds["sorted"], seconds["ours"])
    return Measured(
        ratios={"packed_over_padded": ratio(seconds["padded"], seconds["ours"])},
        details={
            "paired": paired(seconds["padded"], seconds["ours"]),
            "over_sorted_batches_of_8": sort_ratio,
            "tokens_per_second": {name: spread(values) for name, values in rates.items()},
            "tokens": n_tokens,
            "tokens_with_padding": n_padded,
            "side": ours.name,
        },
        lines=[
            f"{len(mixed)} texts, {n_tokens} tokens, {n_padded} with padding; tokens/s:",
            f"ours, {ours.name}: {show(rates['ours'], digits=0)}",
            f"transformers, one padded batch: {show(rates['padded'], digits=0)}",
            f"transformers, sorted, padded batches of 8: {show(rates['sorted'], digits=0)} "
            f"(ours are {sort_ratio:.2f} times as fast)",
        ],
    )
