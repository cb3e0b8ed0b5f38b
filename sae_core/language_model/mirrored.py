"""Streams of a model that is split over ranks: what rank 0 does to one, every rank does.

Each rank's `KVStream` holds the keys and values of its own heads, row for row alike. Rank 0 writes
down what it does to its streams, and hands that over with its next step. Knows no processes (see
`ranks`).
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from sae_core.language_model.packed import PackedPlan, Span
from sae_core.language_model.token_streams import KVRows, KVStream, TokenRows


@runtime_checkable
class Peers(Protocol):
    """Any rank's link to the others while they load."""

    @property
    def n_ranks(self) -> int:
        """All of them, this one too."""

    def join(self) -> Any:
        """Meets the others; returns their one-dimensional DeviceMesh."""

    def wait_until_loaded(self) -> None:
        """Returns when every rank holds its weights."""


@runtime_checkable
class Leader(Protocol):
    """Rank 0's link to the others while they run."""

    @property
    def failure(self) -> str:
        """Why no step can succeed any more; empty while they can."""

    def open_stream(self, n_layers: int) -> KVStream:
        """A stream whose doings every rank repeats."""

    def step(
        self, plan: PackedPlan, token_ids: list[int], positions: list[int]
    ) -> AbstractContextManager[None]:
        """While open, the other ranks run the same forward pass."""

    def close(self) -> None:
        """Ends the other ranks."""


Action = Literal["release", "truncate", "advance", "copy_rows", "paste_rows", "forget"]


class Doing(NamedTuple):
    """What was done to a stream, or (`copy_rows`, and `forget` without a stream) to some rows."""

    stream: int
    action: Action
    numbers: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


_NO_STREAM = -1


class Script:
    """What rank 0 did to its streams and has not told yet.

    Any thread may add to it, the garbage collector too: so there is no lock, and an append is one
    operation.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._doings: deque[Doing] = deque()

    def number(self) -> int:
        """A name that was not used yet, of a stream or of rows."""
        return next(self._numbers)

    def add(self, doing: Doing) -> None:
        """To be told with the next step."""
        self._doings.append(doing)

    def take(self) -> list[Doing]:
        """What is to be told now, in order."""
        taken = []
        while self._doings:
            taken.append(self._doings.popleft())
        return taken


@dataclass(frozen=True)
class MirroredRows(KVRows):
    """A copy of some tokens' keys and values; each rank has its own under the same number."""

    number: int = _NO_STREAM


class MirroredStream(KVStream):
    """Rank 0's stream: does what a `KVStream` does, and writes it down."""

    def __init__(self, n_layers: int, script: Script) -> None:
        super().__init__(n_layers)
        self.number = script.number()
        self._script = script
        weakref.finalize(self, script.add, Doing(self.number, "forget")).atexit = False

    def release(self) -> None:
        super().release()
        self._script.add(Doing(self.number, "release"))

    def truncate(self, n: int) -> None:
        super().truncate(n)
        if self.length == n:  # else it was released instead, which is told already
            self._script.add(Doing(self.number, "truncate", (n,)))

    def advance(self, n: int) -> None:
        super().advance(n)
        self._script.add(Doing(self.number, "advance", (n,)))

    def copy_rows(self, start: int, stop: int) -> KVRows:
        rows = super().copy_rows(start, stop)
        mirrored = MirroredRows(rows.n_tokens, rows.layers, self._script.number())
        self._script.add(Doing(self.number, "copy_rows", (start, stop), (mirrored.number,)))
        forget = Doing(_NO_STREAM, "forget", rows=(mirrored.number,))
        weakref.finalize(mirrored, self._script.add, forget).atexit = False
        return mirrored

    def paste_rows(self, start: int, rows: Sequence[TokenRows]) -> None:
        super().paste_rows(start, rows)
        numbers = tuple(part.number for part in rows if isinstance(part, MirroredRows))
        assert len(numbers) == len(rows), "rows of another model"
        self._script.add(Doing(self.number, "paste_rows", (start,), numbers))


class MirroredSpan(NamedTuple):
    """A `Span` whose stream is named, not held."""

    stream: int
    start: int
    stop: int
    past: int


class Mirror:
    """Another rank's streams and rows, by the numbers that rank 0 gave them."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._streams: dict[int, KVStream] = {}
        self._rows: dict[int, KVRows] = {}

    def __len__(self) -> int:
        """Streams and copies of rows that are held."""
        return len(self._streams) + len(self._rows)

    def repeat(self, doings: Sequence[Doing]) -> None:
        """Does what rank 0 did."""
        for number, action, numbers, rows in doings:
            if action == "forget":
                self._streams.pop(number, None)
                for row in rows:
                    self._rows.pop(row, None)
            elif action == "copy_rows":
                self._rows[rows[0]] = self._stream(number).copy_rows(numbers[0], numbers[1])
            elif action == "paste_rows":
                self._stream(number).paste_rows(numbers[0], [self._rows[row] for row in rows])
            else:
                getattr(self._stream(number), action)(*numbers)

    def plan(self, spans: Sequence[MirroredSpan]) -> PackedPlan:
        """The same plan over this rank's streams."""
        return PackedPlan(tuple(Span(self._stream(s.stream), *s[1:]) for s in spans))

    def _stream(self, number: int) -> KVStream:
        if number not in self._streams:
            self._streams[number] = KVStream(self._n_layers)
        return self._streams[number]


def mirrored_spans(plan: PackedPlan) -> list[MirroredSpan]:
    """The plan's spans with numbers in their streams' places."""
    spans = []
    for span in plan.spans:
        assert isinstance(span.stream, MirroredStream), "a stream of another model"
        spans.append(MirroredSpan(span.stream.number, span.start, span.stop, span.past))
    return spans
