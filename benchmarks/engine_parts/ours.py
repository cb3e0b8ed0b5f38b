"""One backend and dtype of ours, behind its engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import get_args

from engine_parts.measuring import say
from engine_parts.setting import Setting
from monitor.config import ServeSettings, default_cache_dir
from monitor.engine import Engine, EngineResult, Priority, placement
from monitor.errors import MonitorError
from monitor.graph_store import GraphPlace
from monitor.local import UNBOUNDED, load_local
from monitor.served import Served
from sae_core.errors import SAECoreError
from sae_core.language_model.model import LanguageModel
from sae_core.score_cache import OwnForward


class Ours:
    """A bundle that is loaded, with an engine that runs and reuses nothing."""

    def __init__(self, name: str, served: Served, runner: asyncio.Runner) -> None:
        self.name = name
        self.served = served
        self.runner = runner
        self.engine = self.new_engine(reuse=False)

    @property
    def dtype(self) -> str:
        """Of the forward pass."""
        return self.served.provenance.dtype

    @property
    def language_model(self) -> LanguageModel | None:
        """What can be run alone; None where forward and scoring are one graph."""
        found = getattr(self.served.scorer, "language_model", None)
        return found if isinstance(found, LanguageModel) else None

    def new_engine(self, *, reuse: bool) -> Engine:
        """Another engine over the same scorer, started; stop it."""
        key = self.served.reuse_key if reuse else None
        engine = Engine(self.served.scorer, max_queue_tokens=UNBOUNDED, reuse_key=key)
        engine.start()
        return engine

    def seconds(self, texts: Sequence[list[int]]) -> float:
        """Of scoring texts that are all sent at once."""
        began = time.perf_counter()
        self.score(texts)
        return time.perf_counter() - began

    def score(self, texts: Sequence[list[int]]) -> list[EngineResult]:
        """The scores of texts that are all sent at once."""
        return self.runner.run(score_all(self.engine, texts))

    def close(self) -> None:
        """Ends the engine's thread."""
        self.engine.stop()


async def score_all(engine: Engine, texts: Sequence[list[int]]) -> list[EngineResult]:
    """Every text in a stream of its own."""

    async def one(token_ids: list[int]) -> EngineResult:
        stream = engine.open_stream()
        try:
            return await engine.score(OwnForward(stream, token_ids), priority=Priority.PROMPT)
        finally:
            engine.close_stream(stream)

    return await asyncio.gather(*(one(text) for text in texts))


def load_ours(
    setting: Setting, backends: Sequence[str], runner: asyncio.Runner
) -> tuple[list[Ours], list[Ours], list[str]]:
    """Those in float32, those that `--dtype auto` picks (maybe the same), and what is missing."""
    known = get_args(ServeSettings.model_fields["backend"].annotation)
    plain, picked, missing = [], [], []
    for backend in backends:
        if backend not in known:
            missing.append(f"{backend}: left out, this version serves {', '.join(known)}")
            continue
        _, (auto, *_) = placement("cpu", "auto", backend)
        for dtype in dict.fromkeys(("float32", auto)):
            say(f"loading {backend} {dtype}")
            try:
                ours = Ours(f"{backend} {dtype}", _load(setting, backend, dtype), runner)
            except (MonitorError, SAECoreError, ImportError) as error:
                missing.append(f"{backend} {dtype}: left out, {error}")
                continue
            if dtype == "float32":
                plain.append(ours)
            if dtype == auto:
                picked.append(ours)
    return plain, picked, missing


def _load(setting: Setting, backend: str, dtype: str) -> Served:
    # The graph is exported beside the bundle, which goes with this run.
    graph = None if backend == "torch" else GraphPlace(cache=setting.bundle.parent)
    return load_local(
        setting.bundle,
        model=None,
        cache=default_cache_dir(),
        dtype=dtype,
        graph=graph,
        check_fit=False,
    )
