"""Counts over rows and parts: classes, what differs, how far, and why rows were not scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from monitor.replay.compare import FACTS
from monitor.replay.parts import PartRow
from monitor.replay.rows import NO_TOKENS, ReplayClass

COMPARED = (ReplayClass.BITWISE, ReplayClass.NUMERIC, ReplayClass.DECISION, ReplayClass.FLIPPED)
"""The classes of rows that have an original, best first."""


@dataclass(slots=True, kw_only=True)
class Group:
    """Records that were made by the same things, and differ from this run in the same."""

    then: dict[str, Any]
    """Keys of `run_facts`, as far as they are on record."""
    differs: tuple[str, ...]
    not_recorded: tuple[str, ...]
    classes: dict[str, int] = field(default_factory=dict)
    score_difference: float = 0.0
    """Largest of the group's, in logits; so are the next two."""
    token_difference: float = 0.0
    trace_error: float = 0.0

    @property
    def key(self) -> str:
        """Equal where two groups are one."""
        return json.dumps([self.then, self.differs], sort_keys=True)

    def merge(self, other: Group) -> None:
        """Takes in another part of the same group."""
        _add(self.classes, other.classes)
        for name in ("score_difference", "token_difference", "trace_error"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass(slots=True, kw_only=True)
class Summary:
    """What came of some rows."""

    rows: int = 0
    tokens: int = 0
    """Scored ones."""
    classes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    """Why rows were skipped or failed, `skipped: level scores`."""
    groups: list[Group] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[tuple[PartRow, Mapping[str, Any]]]) -> Self:
        """Of rows of a part, each with the facts of its original (empty where it has none)."""
        found = cls()
        for row, then in rows:
            one = cls(
                rows=1,
                tokens=row.n_scored,
                classes={row.replay_class.value: 1},
                reasons={f"{row.replay_class.value}: {row.reason}": 1} if row.reason else {},
            )
            if row.comparison is not None:
                compared = row.comparison
                one.groups.append(
                    Group(
                        then={key: then[key] for key in _TOLD if key in then},
                        differs=compared.differs,
                        not_recorded=compared.not_recorded,
                        classes={row.replay_class.value: 1},
                        score_difference=compared.score_difference or 0.0,
                        token_difference=compared.token_difference or 0.0,
                        trace_error=compared.trace_error or 0.0,
                    )
                )
            found.merge(one)
        return found

    @classmethod
    def joined(cls, summaries: Iterable[Summary]) -> Self:
        """Of all of them together."""
        found = cls()
        for summary in summaries:
            found.merge(summary)
        return found

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What JSON was made of."""
        groups = [
            Group(
                **{
                    **group,
                    "differs": tuple(group["differs"]),
                    "not_recorded": tuple(group["not_recorded"]),
                }
            )
            for group in content["groups"]
        ]
        return cls(**{**content, "groups": groups})

    def merge(self, other: Summary) -> None:
        """Takes in the counts of other rows."""
        self.rows += other.rows
        self.tokens += other.tokens
        _add(self.classes, other.classes)
        _add(self.reasons, other.reasons)
        known = {group.key: group for group in self.groups}
        for group in other.groups:
            if group.key in known:
                known[group.key].merge(group)
            else:
                mine = known[group.key] = replace(group, classes=dict(group.classes))
                self.groups.append(mine)

    def count(self, replay_class: ReplayClass) -> int:
        """Rows of a class."""
        return self.classes.get(replay_class.value, 0)

    @property
    def n_lost(self) -> int:
        """Rows that should have been scored and were not."""
        lost = self.count(ReplayClass.FAILED) + self.count(ReplayClass.SKIPPED)
        return lost - self.reasons.get(f"{ReplayClass.SKIPPED.value}: {NO_TOKENS}", 0)

    def n_below(self, least: ReplayClass) -> int:
        """Records whose class is worse than `least`."""
        return sum(self.count(one) for one in COMPARED[COMPARED.index(least) + 1 :])


def fact_text(value: object) -> str:
    """One of `run_facts` as a person reads it; digests are cut short."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {fact_text(one)}" for name, one in value.items()) or "none"
    text = str(value)
    return text[:12] if len(text) == 64 else text


_TOLD = (*FACTS.values(), "bundle", "model")


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, n in more.items():
        counts[name] = counts.get(name, 0) + n
