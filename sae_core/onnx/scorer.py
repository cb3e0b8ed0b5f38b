"""The exported graph behind the interface of `LanguageModel` and `Scorer`.

The host keeps keys and values in the same `KVStream`s as the torch backend and hands the graph
those that its new tokens see; what the graph gives back for the new ones is written to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sae_core.heads import ClusterHeads
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, LanguageModelConfig, Segment
from sae_core.language_model.packed import Span
from sae_core.language_model.processing import ProcessedShift, Processing
from sae_core.language_model.token_streams import KVStream
from sae_core.language_model.tokenizer import Tokenizer
from sae_core.onnx.attention import BLOCK_COLUMNS, QUERY_BLOCK, blocks_name
from sae_core.onnx.session import GraphSession
from sae_core.sae import SAE
from sae_core.scorer import Forward, Scorer, SegmentScores


class Run(NamedTuple):
    """New tokens of one stream, side by side in the batch."""

    stream: KVStream
    start: int
    """First row of the batch."""
    stop: int
    """One past the last row."""
    past: int
    """Tokens of the stream before."""

    def n_seen(self, window: int | None) -> int:
        """Tokens of the past that some of the new ones see."""
        return self.past if window is None else min(self.past, window - 1)


class OnnxLanguageModel(LanguageModel):
    """A `LanguageModel` whose steps run in ONNX Runtime.

    Args:
        session: The exported graph.
        folder: The model's folder that it was exported from, for places that it does not read.
    """

    def __init__(self, session: GraphSession, folder: Path) -> None:
        manifest = session.manifest
        self.config = LanguageModelConfig(
            model_type=manifest.model_type,
            d_model=manifest.d_model,
            n_layers=manifest.n_layers,
            n_layers_total=manifest.n_layers_total,
            vocab_size=manifest.vocab_size,
            max_positions=manifest.max_positions,
            folder=folder,
            dtype=torch.float32,
            devices=(torch.device("cpu"),),
        )
        self.pool = self.kernel = self._leader = None
        self.widths = {parse_hook_point(name): n for name, n in manifest.hook_points.items()}
        self.hook_points = tuple(self.widths)
        self.devices = dict.fromkeys(self.hook_points, self.config.device)
        self._session, self._layers = session, manifest.layers
        self._room: dict[str, Tensor] = {}
        self._windows = list(dict.fromkeys(layer.window for layer in manifest.layers))

    def can_read(self, hook_point: HookPoint) -> bool:
        return hook_point in self.hook_points or self._in_torch.can_read(hook_point)

    def canonical(self, hook_point: HookPoint) -> HookPoint:
        return self._in_torch.canonical(hook_point)

    def processed_shift(self, hook_point: HookPoint, processing: Processing) -> ProcessedShift:
        return self._load_in_torch().processed_shift(hook_point, processing)

    def step(self, segments: Sequence[Segment]) -> dict[HookPoint, Float[Tensor, "total_tokens _"]]:
        return dict(self.score(segments, with_scores=False).resid)

    def score(self, segments: Sequence[Segment], *, with_scores: bool = True) -> Forward:
        """As `step`, with the scores that the graph makes of the activations.

        Raises:
            TokenError: As `LanguageModel.step`.
        """
        plan, token_ids, positions = self._plan(segments)
        if not token_ids:
            return Forward(super().step(segments))
        order, runs = _by_stream(plan.spans)
        scores = ["logits", "latent_acts"] if with_scores else []
        resid = [f"resid.{hook_point}" for hook_point in self.hook_points]
        rows = [f"{what}.{i}" for what in ("keys", "values") for i in range(len(self._layers))]
        found = self._session.run(
            [*scores, *resid, *rows],
            {
                "input_ids": np.array(token_ids, np.int64)[order],
                "position_ids": np.array(positions, np.int64)[order],
                **{blocks_name(w): blocks(runs, w) for w in self._windows},
                **self._pasts(runs),
            },
        )
        self._write(runs, found)
        for run in runs:
            run.stream.advance(run.stop - run.start)
        back = np.argsort(order, kind="stable")
        acts = {
            hook_point: torch.from_numpy(found[name][back])
            for hook_point, name in zip(self.hook_points, resid, strict=True)
        }
        if not with_scores:
            return Forward(acts)
        return Forward(acts, SegmentScores(found["logits"][back], found["latent_acts"][back]))

    @torch.inference_mode()
    def _write(self, runs: Sequence[Run], found: Mapping[str, np.ndarray]) -> None:
        """Puts the new rows where blocks seen before may have been pasted, in that mode."""
        for number, layer in enumerate(self._layers):
            keys = torch.from_numpy(found[f"keys.{number}"])
            values = torch.from_numpy(found[f"values.{number}"])
            for run in runs:
                new = slice(run.start, run.stop)
                run.stream.write(number, run.past, keys[:, new], values[:, new], layer.window)

    def _pasts(self, runs: Sequence[Run]) -> dict[str, Float32[np.ndarray, "n_kv_heads n dim"]]:
        """What the new tokens see of their streams, layer by layer."""
        pasts: dict[str, np.ndarray] = {}
        for number, layer in enumerate(self._layers):
            keys, values = [], []
            for run in runs:
                n = run.n_seen(layer.window)
                if n:
                    old_keys, old_values = run.stream.read(number, run.past - n, run.past)
                    keys.append(old_keys)
                    values.append(old_values)
            for name, parts, dim in (
                (f"past_keys.{number}", keys, layer.key_dim),
                (f"past_values.{number}", values, layer.value_dim),
            ):
                pasts[name] = self._joined(name, parts, layer.n_kv_heads, dim)
        return pasts

    def _joined(self, name: str, parts: list[Tensor], n_kv_heads: int, dim: int) -> np.ndarray:
        """The parts one behind the other, in memory that is used again at the next step.

        New memory would cost more in page faults than the copy itself (LOG.md, 2026-11-24).
        """
        if len(parts) == 1:
            return parts[0].contiguous().numpy()
        shape = (n_kv_heads, sum(part.shape[1] for part in parts), dim)
        n = math.prod(shape)
        room = self._room.get(name)
        if room is None or len(room) < n:
            room = self._room[name] = torch.empty(n)
        joined = room[:n].view(shape)
        if parts:
            torch.cat(parts, dim=1, out=joined)
        return joined.numpy()

    @cached_property
    def _in_torch(self) -> LanguageModel:
        """The same model with its modules; kept, as only a diagnosis asks, and often."""
        return self._load_in_torch()

    def _load_in_torch(self) -> LanguageModel:
        return load_language_model(self.config.folder, self.hook_points)


class OnnxScorer(Scorer):
    """A `Scorer` whose own forward passes are scored by the graph itself.

    Activations that are given are scored in torch, by the same SAEs and heads.
    """

    def __init__(
        self,
        language_model: OnnxLanguageModel,
        tokenizer: Tokenizer,
        saes: Mapping[str, tuple[HookPoint, SAE]],
        heads: ClusterHeads,
    ) -> None:
        super().__init__(language_model, tokenizer, saes, heads)
        self._graph = language_model

    def _forward(self, segments: Sequence[Segment]) -> Forward:
        return self._graph.score(segments)


def blocks(runs: Sequence[Run], window: int | None) -> Int64[np.ndarray, "n_blocks 5"]:
    """What each block of query rows sees, for pasts as `_pasts` lays them; see `attention`."""
    return np.array(list(_blocks(runs, window)), np.int64).reshape(-1, BLOCK_COLUMNS)


def _blocks(runs: Sequence[Run], window: int | None) -> Iterator[tuple[int, int, int, int, int]]:
    past_stop = 0
    for run in runs:
        past_stop += run.n_seen(window)
        for start in range(run.start, run.stop, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, run.stop)
            position = run.past + start - run.start
            first = 0 if window is None else max(0, position - window + 1)
            n_old = max(0, run.past - first)
            key_start = run.start + max(0, first - run.past)
            yield start, stop, past_stop - n_old, past_stop, key_start


def _by_stream(spans: Sequence[Span]) -> tuple[Int64[np.ndarray, " n"], list[Run]]:
    """Rows in an order in which each stream's lie side by side, and the streams' runs."""
    by_stream: dict[int, list[Span]] = {}
    for span in spans:
        by_stream.setdefault(id(span.stream), []).append(span)
    rows: list[int] = []
    runs: list[Run] = []
    for parts in by_stream.values():
        start = len(rows)
        for span in parts:
            rows += range(span.start, span.stop)
        stream = parts[0].stream
        assert isinstance(stream, KVStream), "a stream of another model"
        runs.append(Run(stream, start, len(rows), parts[0].past))
    return np.array(rows, np.int64), runs
