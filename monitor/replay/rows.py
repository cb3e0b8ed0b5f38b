"""What is replayed, row by row, and the classes that a comparison ends in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from monitor.audit_log.query import Place
from monitor.audit_log.trace import DecodedTrace
from monitor.errors import MonitorError
from monitor.records import ScoreRequest, Stage

Progress = Callable[[str, float], None]


class ReplayClass(StrEnum):
    """How a row's decision now stands to the one on record; each row has exactly one."""

    BITWISE = "bitwise"
    """Every outcome and every stored number is the same, bit for bit."""
    NUMERIC = "numeric"
    """The same verdicts, and every score within the bound of `compare`."""
    DECISION = "decision"
    """The same verdict, overall and of every cluster."""
    FLIPPED = "flipped"
    """Another verdict, overall or of a cluster."""
    NEW = "new"
    """Scored, and nothing is on record to compare with."""
    FAILED = "failed"
    """It cannot be scored; `error` says why."""
    SKIPPED = "skipped"
    """A record whose tokens cannot be had; `reason` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Why a record's tokens cannot be had."""

    reason: str
    """From a small set, to count by: its level, its key's name, what is damaged or absent."""
    detail: str = ""


NO_TOKENS = "no tokens"
"""A stream that ended before its first token: nothing to score, and nothing was lost."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Original:
    """A decision as it is on record."""

    decision_id: str
    time_us: int
    body: Mapping[str, Any]
    """The record's, as parsed JSON."""
    facts: Mapping[str, Any]
    """What made it, as far as it is on record: keys of `run_facts`."""
    trace: DecodedTrace | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayRow:
    """One row of an input."""

    source: str
    """Its file's name, or its chain."""
    place: int
    """Its line or row, from 1, or its sequence in the chain."""
    id: str
    """The row's own id, else its place; a record's decision id."""
    request: ScoreRequest | MonitorError | Unreadable
    """What to score, or why it cannot be."""
    stages: tuple[Stage | None, ...] = ()
    """Where each token id counts, in place of the request's stage."""
    original: Original | None = None

    @property
    def is_stream(self) -> bool:
        """Whether it was a stream's, whose joint rules are asked after every token."""
        return self.original is not None and bool(self.original.body["session_id"])

    @property
    def n_tokens(self) -> int:
        """About how many tokens it has; a token is taken as four characters."""
        request = self.request
        if not isinstance(request, ScoreRequest):
            return 1
        if request.token_ids is not None:
            return max(1, len(request.token_ids))
        texts = [request.text or "", *(m.content for m in request.messages or ())]
        return 1 + sum(map(len, texts)) // 4


Start = Place | tuple[int, ...]
"""Where a segment begins, as its input takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive rows of one input, which become one part."""

    index: int
    """Of all segments of the run, from 0."""
    input: int
    start: Start
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """An input read through once."""

    identity: dict[str, Any]
    """What the manifest says of it: `kind`, `name`, `rows`, `sha256`, and what the kind adds."""
    starts: tuple[tuple[Start, int], ...]
    """Where each segment begins, and its rows."""


class Input(Protocol):
    """Something that rows come from; picklable, and read again wherever a segment is scored."""

    def pinned(self, identity: Mapping[str, Any]) -> Input:
        """The same, cut to what an earlier survey saw."""
        ...

    def survey(self, part_rows: int, progress: Progress) -> Survey:
        """Reads all of it once.

        Raises:
            MonitorError: it cannot be read.
        """
        ...

    def rows(self, start: Start, n_rows: int, *, policy: str) -> Iterator[ReplayRow]:
        """The rows of a segment.

        Args:
            policy: judges the rows that name none.
        """
        ...
