"""Labelled texts and their residual streams, computed once and kept on disk.

Residuals lie in one float32 array, texts one after another. The first token of each is left out:
BOS where there is one, else a token whose norm is as far from all others'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64
from numpy import ndarray
from torch import Tensor

from sae_core.training.activations import (
    ActivationsForward,
    ContextForward,
    TextEncoder,
    TrainingError,
)


class ResidualSet:
    """The residual stream of every text at one hook point, BOS excluded."""

    def __init__(
        self,
        resid: Float32[ndarray, "total d_in"],
        token_ids: Int32[ndarray, " total"],
        starts: Int64[ndarray, " n_texts_and_one"],
    ) -> None:
        self.resid = resid
        self.token_ids = token_ids
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, text: int) -> slice:
        """Where one text's tokens lie in `resid` and `token_ids`."""
        return slice(int(self.starts[text]), int(self.starts[text + 1]))

    def text_of_token(self) -> Int64[ndarray, " total"]:
        """For each token, the index of its text."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def subset(self, texts: Sequence[int] | Int64[ndarray, " n"]) -> ResidualSet:
        """The chosen texts in the given order; copies their rows."""
        parts = [self.rows_of(int(i)) for i in texts]
        lengths = [part.stop - part.start for part in parts]
        rows = np.concatenate([np.arange(p.start, p.stop) for p in parts] or [np.empty(0, int)])
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return ResidualSet(self.resid[rows], self.token_ids[rows], starts)


def cached_residuals(
    texts: Sequence[str],
    tokenizer: TextEncoder,
    forward: ContextForward,
    folder: Path,
    *,
    identity: str,
    max_tokens: int = 2048,
    forward_tokens: int = 4096,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ResidualSet:
    """What `cached_streams` gives, of a forward pass that is read at one hook point."""
    return _cached(
        texts,
        tokenizer,
        ["resid"],
        lambda contexts: {"resid": forward(contexts)},
        folder,
        identity=identity,
        max_tokens=max_tokens,
        forward_tokens=forward_tokens,
        progress=progress,
    )["resid"]


def cached_streams(
    texts: Sequence[str],
    tokenizer: TextEncoder,
    forward: ActivationsForward,
    folder: Path,
    *,
    identity: str,
    max_tokens: int = 2048,
    forward_tokens: int = 4096,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ResidualSet]:
    """By hook point the residuals of the texts, read from `folder` where an earlier call left them.

    `identity` names model and dtype; a folder made for another identity, other hook points or other
    texts is computed anew, all hook points in one pass. Texts longer than `max_tokens` are cut.
    """
    return _cached(
        texts,
        tokenizer,
        list(forward.widths),
        forward,
        folder,
        identity=json.dumps([identity, list(forward.widths)]),
        max_tokens=max_tokens,
        forward_tokens=forward_tokens,
        progress=progress,
    )


def _cached(
    texts: Sequence[str],
    tokenizer: TextEncoder,
    names: Sequence[str],
    forward: Callable[[Sequence[Sequence[int]]], Mapping[str, Float[Tensor, "total _"]]],
    folder: Path,
    *,
    identity: str,
    max_tokens: int,
    forward_tokens: int,
    progress: Callable[[int, int], None],
) -> dict[str, ResidualSet]:
    ids = [tokenizer.encode(text, add_bos=True)[: max_tokens + 1] for text in texts]
    key = hashlib.sha256(json.dumps([identity, ids]).encode()).hexdigest()
    lengths = np.array([len(some) - 1 for some in ids], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.array([i for some in ids for i in some[1:]], np.int32)
    done = folder / "key.txt"
    if not (done.is_file() and done.read_text() == key):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        streams: dict[str, np.memmap] = {}
        n_done = 0
        for batch in _batches(lengths, forward_tokens):
            at = 0
            for name, found in forward([ids[i] for i in batch]).items():
                rows = found.float().cpu().numpy()
                if name not in streams:
                    shape = (int(starts[-1]), rows.shape[1])
                    streams[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", np.float32, shape
                    )
                at = 0
                for i in batch:
                    n = int(lengths[i])
                    streams[name][starts[i] : starts[i] + n] = rows[at : at + n]
                    at += n
            n_done += at
            progress(n_done, int(starts[-1]))
        if not streams:
            raise TrainingError("no text to compute residuals of")
        for stream in streams.values():
            stream.flush()
        done.write_text(key)
    return {
        name: ResidualSet(np.load(folder / f"{name}.npy", mmap_mode="r"), flat, starts)
        for name in names
    }


def _batches(lengths: Int64[ndarray, " n"], n_tokens: int) -> Iterator[list[int]]:
    """Indices of texts of like length, at most `n_tokens` tokens together (or one text)."""
    batch: list[int] = []
    total = 0
    for i in np.argsort(lengths, kind="stable"):
        if lengths[i] < 1:
            continue
        if batch and total + lengths[i] > n_tokens:
            yield batch
            batch, total = [], 0
        batch.append(int(i))
        total += int(lengths[i])
    if batch:
        yield batch
