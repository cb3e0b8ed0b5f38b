"""Blocks of tokens seen before: their keys, values and scores, by what was read up to them.

A block's name is a hash of a key, of all tokens before it and of its own: equal names mean that
model, SAEs and heads (the key's part) and the whole context are equal, and so are the rows. Rows
are copied in and out of streams with buffers of their own, and held in pages otherwise; knows no
budget.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from sae_core.language_model.token_streams import TokenRows
from sae_core.scorer import SegmentScores

BLOCK_TOKENS = 32
"""A repeated text runs at most 31 of its known tokens again."""


def extend_chain(chain: list[bytes], key: bytes, token_ids: Sequence[int]) -> None:
    """Appends the names of the whole blocks in `token_ids`, which follow those of `chain`."""
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array("q", token_ids[start : start + BLOCK_TOKENS])
        parent = chain[-1] if chain else blake2b(key, digest_size=32).digest()
        chain.append(blake2b(parent + block.tobytes(), digest_size=32).digest())


@dataclass(slots=True)
class Block:
    """What the tokens of one block left behind."""

    rows: TokenRows
    scores: SegmentScores
    last_use: int

    @property
    def n_bytes(self) -> int:
        """Memory of rows and scores."""
        return self.rows.n_bytes + self.scores.logits.nbytes + self.scores.latent_acts.nbytes


class PrefixBlocks:
    """Blocks by name, in the order of their last use."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def find(self, chain: Sequence[bytes]) -> list[Block]:
        """The blocks with the first names of `chain`, up to the first that is not there."""
        found: list[Block] = []
        for name in chain:
            block = self._blocks.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, name: bytes, block: Block) -> None:
        """Keeps a block whose name is not there yet."""
        self._blocks[name] = block
        self.n_bytes += block.n_bytes

    def touch(self, chain: Sequence[bytes], now: int) -> None:
        """Marks blocks of one chain as used; its end is forgotten before its beginning."""
        for name in reversed(chain):
            block = self._blocks.get(name)
            if block is not None:
                block.last_use = now
                self._blocks.move_to_end(name)

    def oldest_use(self) -> float:
        """When the block unused for longest was used; infinite where there is none."""
        block = next(iter(self._blocks.values()), None)
        return float("inf") if block is None else float(block.last_use)

    def drop_oldest(self) -> None:
        """Forgets that block."""
        _, block = self._blocks.popitem(last=False)
        self.n_bytes -= block.n_bytes


class ScoreTail:
    """The scores of a stream's last rows: a block is often filled by many steps."""

    def __init__(self) -> None:
        self.start = 0
        self._scores: SegmentScores | None = None

    def append(self, start: int, scores: SegmentScores) -> None:
        """Adds those of the rows from `start`; what does not reach up to them is forgotten."""
        old = self._scores
        if old is None or self.start + len(old.logits) != start:
            self.start, self._scores = start, scores
            return
        self._scores = SegmentScores(
            np.concatenate((old.logits, scores.logits)),
            np.concatenate((old.latent_acts, scores.latent_acts)),
        )

    def cut(self, stop: int) -> None:
        """Forgets those of rows at and beyond `stop`."""
        if self._scores is not None:
            n = max(0, stop - self.start)
            self._scores = SegmentScores(*(rows[:n] for rows in self._scores)) if n else None

    def drop_before(self, start: int) -> None:
        """Forgets those of rows before `start`."""
        if self._scores is not None and start > self.start:
            # Copied: a view would keep a whole step's scores alive.
            kept = (rows[start - self.start :].copy() for rows in self._scores)
            self._scores = SegmentScores(*kept)
            self.start = start

    def block(self, index: int) -> SegmentScores | None:
        """Those of one block, copied; None where they are not all here."""
        first = index * BLOCK_TOKENS - self.start
        if self._scores is None or first < 0:
            return None
        rows = slice(first, first + BLOCK_TOKENS)
        if len(self._scores.logits) < rows.stop:
            return None
        return SegmentScores(*(part[rows].copy() for part in self._scores))
