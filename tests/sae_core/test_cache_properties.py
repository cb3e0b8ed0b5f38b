"""Streams that come, grow, go back, fail, lose their memory and go, in any order: the same logits.

A state machine drives cache and scorer as the engine does. Whatever it drew, the logits of every
token equal those of a slow oracle that shares no code with them: the whole Hugging Face model in
float64 with its own eager attention over one text at a time, and the heads' formulas in NumPy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from sae_core.errors import ScorerError
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint
from sae_core.language_model import token_streams
from sae_core.language_model.families import blocks_of
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.pages import PagePool
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.prefix_blocks import BLOCK_TOKENS, PrefixBlocks
from sae_core.score_cache import Continuation, OwnForward, ScoreCache, ScoredStream
from sae_core.scorer import Scorer, SegmentScores
from sae_core.testing.attention import reference_kernel
from sae_core.testing.models import D_MODEL, FAMILIES, N_LAYERS, tiny_model_folder
from sae_core.testing.oracle import PlainModel
from sae_core.testing.planted import planted_sae

LAST_BLOCK = HookPoint(N_LAYERS - 1, "resid_post")
SAE = planted_sae(D_MODEL, 24, architecture="relu", seed=1)
TOLERANCE = 1e-5
"""Relative to the largest sum of a token's terms without their signs: terms of either sign may
leave a logit that is smaller than what float32 rounds off them."""
N_IDS = 300
LONGEST = 320
EXAMPLES = 4
"""Runs of the machine for each family and kind of memory."""

PAGE_TOKENS = {"pages": 16, "pages and kernel": 64}

Logits = np.ndarray[Any, np.dtype[np.float64]]
Fault = Literal["none", "nan", "memory"]


def cluster(seed: int) -> Cluster:
    """One bundle's heads; another seed is another bundle on the same model."""
    rng = np.random.default_rng(seed)
    return Cluster(
        id="x",
        latents=tuple(
            LatentTerm(sae="s", latent_id=i, weight=float(w), scale=1.0, label="")
            for i, w in enumerate(rng.normal(size=6))
        ),
        dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
        dense_hook_point=str(LAST_BLOCK),
    )


CLUSTERS = (cluster(0), cluster(1))


Memory = Literal["buffers", "buffers and compiled rows", "pages", "pages and kernel"]


class World:
    """A model with the scorers of two bundles, the oracle, and a switch that breaks a step."""

    def __init__(self, folder: Path) -> None:
        self.model = model = load_language_model(folder, [LAST_BLOCK])
        tokenizer = load_tokenizer(folder)
        self.scorers = [
            Scorer(model, tokenizer, {"s": (LAST_BLOCK, SAE)}, ClusterHeads([c], ["s"]))
            for c in CLUSTERS
        ]
        self.happened: Counter[str] = Counter()
        self._middle_block = blocks_of(model._module)[0][1]
        self._plain = PlainModel(folder, LAST_BLOCK.layer)

    def keep_in(self, memory: Memory) -> None:
        """Whether streams have buffers, or pages of so few tokens that most steps cross several."""
        rows = "torch"
        if memory == "buffers and compiled rows":
            pytest.importorskip("numba", reason="numba is not installed (extra cpu)")
            rows = "compiled"
        self.model.config = replace(self.model.config, rows=rows)
        self.model.pool = PagePool(PAGE_TOKENS[memory]) if memory in PAGE_TOKENS else None
        self.model.kernel = reference_kernel if memory == "pages and kernel" else None

    def logits(self, which: int, token_ids: Sequence[int]) -> tuple[Logits, float, int]:
        """fused, dense, sae of every token, by the formulas of the README; the largest sum of
        terms without their signs; and how many tokens hold."""
        resid, n_decided = self._plain(token_ids)
        x = resid.numpy()
        w = [t.double().numpy() for t in (SAE.weights.W_enc, SAE.weights.b_enc, SAE.weights.b_dec)]
        acts = np.maximum((x - w[2]) @ w[0] + w[1], 0)
        terms, dense_weight = CLUSTERS[which].latents, CLUSTERS[which].dense_weight
        sae = sum(t.weight * acts[:, t.latent_id] / t.scale for t in terms)
        dense = x @ dense_weight.astype(float)
        sizes = sum(abs(t.weight) * acts[:, t.latent_id] / t.scale for t in terms)
        sizes = sizes + np.abs(x) @ np.abs(dense_weight)
        return np.stack((sae + dense, dense, sae), axis=-1), float(sizes.max()), n_decided

    @contextmanager
    def breaking(self, fault: Fault) -> Iterator[None]:
        """While open, a step fails after the first block has written its keys and values."""

        def hook(_module: nn.Module, _args: object, out: Any) -> Any:
            if fault == "memory":
                raise torch.OutOfMemoryError("injected")
            resid = out[0] if isinstance(out, tuple) else out
            resid[..., -1, :] = float("nan")
            return out

        handle = None if fault == "none" else self._middle_block.register_forward_hook(hook)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


@pytest.fixture(scope="module")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    @cache
    def world(family: str) -> World:
        return World(tiny_model_folder(tmp_path_factory.mktemp(family) / "m", family))

    return world


@dataclass
class Work:
    """New tokens on their way."""

    stream: ScoredStream
    first: int
    new: list[int]
    run: Continuation


class Interleavings(RuleBasedStateMachine):
    """What a user of the cache may do, in any order."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.which = 0
        self.streams: list[ScoredStream] = []
        self.texts: dict[ScoredStream, list[int]] = {}
        self.works: list[Work] = []
        self.blocks = PrefixBlocks()

    @initialize(
        tokens=st.sampled_from((0, 70, 200, 400, 10_000)),
        reuses=st.sampled_from((True, True, False)),
    )
    def start(self, tokens: int, reuses: bool) -> None:
        self.tokens, self.reuses = tokens, reuses
        self.load()

    @property
    def scorer(self) -> Scorer:
        return self.world.scorers[self.which]

    def load(self) -> None:
        kv = self.scorer.open_stream()
        self.scorer.language_model.step([Segment(kv, [1])])
        key = b"bundle %d" % self.which if self.reuses else None
        self.cache = ScoreCache(
            self.scorer.open_stream, self.tokens * kv.row_bytes, key=key, blocks=self.blocks
        )

    @precondition(lambda self: len(self.streams) < 5)
    @rule()
    def open(self) -> None:
        stream = self.cache.open_stream()
        self.streams.append(stream)
        self.texts[stream] = []

    @precondition(lambda self: self.idle())
    @rule(
        which=st.integers(0, 4),
        n=st.integers(1, 90),
        text=st.integers(0, 3),
        kept=st.sampled_from((1.0, 1.0, 1.0, 0.95, 0.4, 0.0)),
    )
    def send(self, which: int, n: int, text: int, kept: float) -> None:
        """Text 0 and 1 go on as other streams' do, from the same beginning."""
        idle = self.idle()
        stream = idle[which % len(idle)]
        old = self.texts[stream]
        del old[int(len(old) * kept) :]
        stream.truncate(len(old))
        n = min(n, LONGEST - len(old))
        new = np.random.default_rng(text).integers(0, N_IDS, LONGEST)[len(old) :][:n].tolist()
        source = OwnForward(stream, new)
        if new and self.cache.admits(source):
            self.works.append(Work(stream, len(old), new, self.cache.begin(source)))

    @precondition(lambda self: self.works)
    @rule(
        sizes=st.lists(st.integers(1, 64), min_size=1, max_size=4),
        fault=st.sampled_from(("none",) * 6 + ("nan", "memory")),
        gives_up=st.booleans(),
    )
    def step(self, sizes: list[int], fault: Fault, gives_up: bool) -> None:
        """One step of the engine over some of the works; one that fails is tried again or not."""
        batch = self.works[: len(sizes)]
        for work in batch:
            work.run.restore()
        sizes = [min(n, work.run.n_to_run) for n, work in zip(sizes, batch, strict=False)]
        parts = [work.run.part(n) for n, work in zip(sizes, batch, strict=True)]
        lengths = [work.stream.kv.length for work in batch]
        try:
            with self.world.breaking(fault if any(sizes) else "none"):
                scores = self.scorer.step(parts)
        except (ScorerError, torch.OutOfMemoryError) as error:
            assert fault == ("nan" if isinstance(error, ScorerError) else "memory")
            self.world.happened[fault] += 1
            assert [work.stream.kv.length for work in batch] == lengths
            for work in batch if gives_up else ():
                self.end(work)
            return
        assert fault == "none" or not any(sizes)
        for work, part, scored in zip(batch, parts, scores.segments, strict=True):
            self.cache.take(work.run, part, scored)
            self.works.remove(work)
            if work.run.n_scored == len(work.new):
                self.check(work, work.run.scores())
                self.end(work)
            else:
                self.works.append(work)
        self.cache.settle([work.stream for work in batch])

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 4), ends=st.booleans())
    def close(self, which: int, ends: bool) -> None:
        """Perhaps while tokens are on their way, which then come to an end or not."""
        stream = self.streams.pop(which % len(self.streams))
        self.cache.close(stream)
        for work in [w for w in self.works if w.stream is stream and ends]:
            self.end(work)

    @precondition(lambda self: not self.works)
    @rule()
    def reload(self) -> None:
        """Another bundle takes over: its scores differ, and it may use none of the old ones."""
        while self.streams:
            self.close(0, True)
        self.which = 1 - self.which
        self.note_counts()
        self.load()

    @invariant()
    def stays_within_the_budget(self) -> None:
        if hasattr(self, "cache") and not self.works:
            self.cache.settle([])
            counts = self.cache.counts()
            assert counts.session_bytes + counts.prefix_bytes <= self.cache.max_bytes

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        while self.works:
            self.step([64] * 4, "none", False)
        while self.streams:
            self.close(0, True)
        self.note_counts()
        counts = self.cache.counts()
        assert (counts.sessions, counts.session_bytes) == (0, 0)
        while self.blocks:
            self.blocks.drop_oldest()
        self.texts.clear()
        pages = self.cache.counts().pages
        assert pages is None or (pages.own, pages.shared) == (0, 0)

    def idle(self) -> list[ScoredStream]:
        busy = [work.stream for work in self.works]
        return [stream for stream in self.streams if stream not in busy]

    def end(self, work: Work) -> None:
        self.cache.end(work.run)
        self.works = [other for other in self.works if other is not work]
        n = work.run.n_scored
        self.texts[work.stream] = [*self.texts[work.stream], *work.new[:n]]
        assert work.stream.token_ids == self.texts[work.stream]

    def check(self, work: Work, found: SegmentScores) -> None:
        text = [*self.texts[work.stream], *work.new]
        expected, scale, n = self.world.logits(self.which, text)
        assert found.logits.shape == (len(work.new), 1, 3)
        errors = np.abs(found.logits[:, 0] - expected[work.first :])[: max(0, n - work.first)]
        error = errors.max(initial=0) / scale
        assert error <= TOLERANCE, f"{error:.1e}"

    def note_counts(self) -> None:
        counts = self.cache.counts()
        for name in (
            "evicted_for_memory",
            "recomputed_tokens",
            "prefix_evictions",
            "reused_tokens",
        ):
            self.world.happened[name] += getattr(counts, name)


def run(world: World, *, examples: int, derandomize: bool = False) -> None:
    """A run that fails is not made shorter: that outlasts the test's timeout."""

    class Machine(Interleavings):
        pass

    Machine.world = world
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def windows_forget_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_streams, "GO_BACK_TOKENS", 2 * BLOCK_TOKENS)


@pytest.mark.parametrize("memory", get_args(Memory))
@pytest.mark.parametrize("family", FAMILIES)
def test_any_interleaving_scores_as_the_oracle(
    family: str, memory: Memory, world_of: Callable[[str], World]
) -> None:
    world = world_of(family)
    world.keep_in(memory)
    run(world, examples=EXAMPLES)


@pytest.mark.parametrize("memory", get_args(Memory))
def test_the_machine_meets_all_that_it_is_for(
    memory: Memory, world_of: Callable[[str], World]
) -> None:
    world = world_of("gemma3")
    world.keep_in(memory)
    world.happened.clear()
    run(world, examples=18, derandomize=True)
    expected = {"nan", "memory", "evicted_for_memory", "recomputed_tokens"}
    expected |= {"prefix_evictions", "reused_tokens"}
    assert {name for name, n in world.happened.items() if n} == expected
