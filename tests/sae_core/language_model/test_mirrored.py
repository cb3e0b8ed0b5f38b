"""What is done to rank 0's streams, repeated on another's, leaves the same rows."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path

import torch

from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.mirrored import Mirror, MirroredStream, Script, mirrored_spans
from sae_core.language_model.model import LanguageModel
from sae_core.language_model.packed import PackedPlan, Span
from sae_core.language_model.token_streams import KVRows, KVStream

N_IDS = 300


class Pair:
    """A rank 0 and a mirror of it, each with the whole model, in one process."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.script = model, Script()
        self.mirror = Mirror(model.config.n_layers)

    def open(self) -> KVStream:
        return MirroredStream(self.model.config.n_layers, self.script)

    def step(self, streams: list[KVStream], n: int, rng: random.Random) -> None:
        spans = tuple(Span(s, i * n, (i + 1) * n, s.length) for i, s in enumerate(streams))
        ids = [rng.randrange(N_IDS) for _ in range(n * len(streams))]
        positions = [p for span in spans for p in range(span.past, span.past + n)]
        self.mirror.repeat(self.script.take())
        other = self.mirror.plan(mirrored_spans(PackedPlan(spans)))
        found, expected = (
            self.model.run(plan, ids, positions) for plan in (other, PackedPlan(spans))
        )
        for hook_point, acts in expected.items():
            assert torch.equal(found[hook_point], acts)
        for span in spans:
            span.stream.advance(n)


def test_any_order_of_doings_is_repeated(folder_of: Callable[[str], Path]) -> None:
    pair = Pair(load_language_model(folder_of("gemma3"), [HookPoint(2, "resid_post")]))
    rng = random.Random(0)
    streams = [pair.open() for _ in range(4)]
    kept: dict[KVStream, list[KVRows]] = {}
    for _ in range(300):
        stream = rng.choice(streams)
        action = rng.choice(["step", "step", "truncate", "release", "copy", "paste", "close"])
        if action == "step":
            pair.step(rng.sample(streams, 2), rng.randrange(1, 12), rng)
        elif action == "truncate":
            stream.truncate(rng.randint(max(0, stream.length - 20), stream.length))
        elif action == "release":
            stream.release()
        elif action == "copy" and stream.length >= 8:
            # A step's own rows are there whatever the window.
            kept[stream] = [stream.copy_rows(stream.length - 1, stream.length)]
        elif action == "paste" and stream in kept and stream.length:
            stream.paste_rows(stream.length - 1, kept[stream])
        elif action == "close":
            streams[streams.index(stream)] = pair.open()
            kept.pop(stream, None)
    assert all(len(rows) == 1 for rows in kept.values())


def test_what_is_gone_here_is_gone_there(folder_of: Callable[[str], Path]) -> None:
    pair = Pair(load_language_model(folder_of("llama"), [HookPoint(0, "resid_post")]))
    streams = [pair.open() for _ in range(20)]
    pair.step(streams, 9, random.Random(0))
    rows = [stream.copy_rows(0, 9) for stream in streams]
    pair.mirror.repeat(pair.script.take())
    assert len(pair.mirror) == 40
    del rows
    gc.collect()
    pair.mirror.repeat(pair.script.take())
    assert len(pair.mirror) == 20
    streams.clear()
    gc.collect()
    pair.mirror.repeat(pair.script.take())
    assert len(pair.mirror) == 0
