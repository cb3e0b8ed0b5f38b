"""Streams on a real engine in any order, against a slow oracle: the same logits and verdicts.

The thread batches what waits as it likes. The oracle is the whole Hugging Face model in float64
with its own eager attention over one text at a time; `tests/sae_core` has the finer interleavings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from monitor.engine import Engine, Priority
from monitor.errors import ActivationError
from monitor.local import load_local
from monitor.policy import FUSED
from monitor.records import Stage, Verdict
from monitor.testing import TRIGGER_WORDS, write_tiny_bundle
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.pages import PagePool
from sae_core.score_cache import OwnForward, ScoredStream
from sae_core.testing.attention import reference_kernel
from sae_core.testing.models import FAMILIES
from sae_core.testing.oracle import PlainModel

TOLERANCE = 1e-5
"""Relative to the largest logit of the text, or to 1: logits are sums of terms of that size."""
DANGER = 0
POISON = 299
"""A token whose embedding is made NaN: whoever sends it fails, and nobody else."""
LONGEST = 250


class Op(NamedTuple):
    """What one of the streams does next; those of one round wait for the engine together."""

    stream: int
    action: str
    n: int
    text: int


OPS = st.builds(
    Op,
    st.integers(0, 3),
    st.sampled_from(("send",) * 5 + ("back", "poison", "cancel", "close")),
    st.integers(1, 80),
    st.integers(0, 2),
)


@dataclass(eq=False)
class Stream:
    scored: ScoredStream
    text: list[int] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)


class World:
    """A bundle on a tiny model, and the oracle."""

    def __init__(self, folder: Path, family: str) -> None:
        bundle = write_tiny_bundle(folder, family)
        self.served = load_local(bundle, model=None, cache=folder, check_fit=False)
        model = self.served.scorer.language_model

        def poisoned(_module: object, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out.masked_fill((args[0] == POISON)[..., None], float("nan"))

        model._module.get_input_embeddings().register_forward_hook(poisoned)  # type: ignore[operator]
        tokenizer = self.served.tokenizer
        triggers = [tokenizer.encode(f" {word}", add_bos=False)[-1] for word in TRIGGER_WORDS]
        self.texts = np.random.default_rng(0).integers(3, POISON, (3, LONGEST))
        self.texts[1:, 40::67] = triggers[0]
        hook_point = parse_hook_point(self.served.hook_points[0])
        plain = PlainModel(folder / "model", hook_point.layer)

        def logits(token_ids: list[int]) -> tuple[Any, int]:
            resid, n_decided = plain(token_ids)
            return self.served.scorer.score_resid({hook_point: resid.float()})[0], n_decided

        self.logits = logits

    def verdict(self, logits: Any) -> Verdict | None:
        """Of the cluster `danger`; None where a threshold is too close to tell."""
        plan, policy = self.served.plan, self.served.policies["default"]
        running = plan.aggregator.update(plan.aggregator.start(), logits)
        limits = plan.spec.clusters[DANGER].thresholds
        fused = running[:, DANGER, FUSED]
        tolerance = TOLERANCE * np.abs(logits[:, DANGER]).max(initial=1.0)
        if min(np.abs(fused - t).min() for t in (limits.flag, limits.alert)) <= tolerance:
            return None
        state = policy.start()
        policy.advance(state, Stage.PROMPT, range(len(logits)), running)
        return state.clusters[DANGER].verdict


@pytest.fixture(scope="module")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    return cache(lambda family: World(tmp_path_factory.mktemp(family), family))


async def play(world: World, ops: list[Op], cache_tokens: int, reuses: bool) -> set[Verdict]:
    """Does what was drawn, and checks every text; returns the verdicts."""
    row_bytes = 2 * 2 * 2 * 4 * 16
    engine = Engine(
        world.served.scorer,
        max_step_tokens=48,
        max_cache_bytes=cache_tokens * row_bytes,
        reuse_key=world.served.reuse_key if reuses else None,
    )
    engine.start()
    streams = [Stream(engine.open_stream()) for _ in range(4)]
    try:
        while ops:
            turn: dict[int, Op] = {}
            while ops and ops[0].stream not in turn:
                op = ops.pop(0)
                turn[op.stream] = op
            await asyncio.gather(*(act(world, engine, streams, op) for op in turn.values()))
        verdicts = {check(world, stream) for stream in streams if stream.text}
        for stream in streams:
            engine.close_stream(stream.scored)
        counts = engine.cache()
        assert (counts.sessions, counts.session_bytes, engine.queue_tokens) == (0, 0, 0)
        assert engine.alive
    finally:
        await asyncio.to_thread(engine.stop)
    return {verdict for verdict in verdicts if verdict is not None}


async def act(world: World, engine: Engine, streams: list[Stream], op: Op) -> None:
    stream = streams[op.stream]
    if op.action == "close":
        check(world, stream)
        engine.close_stream(stream.scored)
        streams[op.stream] = Stream(engine.open_stream())
        return
    if op.action == "back":
        kept = len(stream.text) * (op.n % 4) // 4
        del stream.text[kept:], stream.logits[kept:]
        stream.scored.truncate(kept)
    start = len(stream.text)
    new = world.texts[op.text][start : start + op.n].tolist()
    if not new:
        return
    if op.action == "poison":
        new[len(new) // 2] = POISON
    call = asyncio.create_task(
        engine.score(OwnForward(stream.scored, new), priority=Priority(op.text))
    )
    if op.action == "cancel":
        await asyncio.sleep(0.001 * op.text)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        engine.close_stream(stream.scored)
        streams[op.stream] = Stream(engine.open_stream())
    elif op.action == "poison":
        with pytest.raises(ActivationError, match="not finite"):
            await call
        assert POISON not in stream.scored.token_ids
        stream.scored.truncate(start)
    else:
        stream.logits += list((await call).logits)
        stream.text += new
        assert stream.scored.token_ids == stream.text


def check(world: World, stream: Stream) -> Verdict | None:
    if not stream.text:
        return None
    expected, n = world.logits(stream.text)
    if not n:
        return None
    found, expected = np.stack(stream.logits)[:n], expected[:n]
    a, b = found[:, DANGER], expected[:, DANGER]
    assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max(initial=1.0)
    verdict = world.verdict(expected)
    assert verdict is None or verdict == world.verdict(found)
    return verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_any_interleaving_decides_as_the_oracle(
    family: str, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    model = world.served.scorer.language_model
    verdicts: set[Verdict] = set()

    @settings(
        max_examples=4,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        ops=st.lists(OPS, min_size=12, max_size=24),
        cache_tokens=st.sampled_from((0, 150, 10_000)),
        reuses=st.booleans(),
        pages=st.booleans(),
    )
    def any_ops(ops: list[Op], cache_tokens: int, reuses: bool, pages: bool) -> None:
        model.pool = PagePool(32) if pages else None
        model.kernel = reference_kernel
        # One text at least is read far enough to alert.
        ops = [*ops, *(Op(i, "send", 80, 1) for i in range(4))]
        verdicts.update(asyncio.run(play(world, ops, cache_tokens, reuses)))

    any_ops()
    assert Verdict.ALERT in verdicts
