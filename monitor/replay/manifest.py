"""`manifest.json`: what a folder of parts is made of, and which of its files count.

A part counts where the manifest names it; the manifest is replaced whole. So each row is there once
however often a run was stopped, and a run goes on only with the same inputs and the same things
that score.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import orjson

from monitor.errors import SettingsError
from monitor.replay.compare import TOLERANCE
from monitor.replay.parts import PARTIAL, sha256_of
from monitor.replay.summary import Summary

FORMAT = "sae-monitor replay 2"
MANIFEST = "manifest.json"
_LOCK = ".lock"
_BOUND = (
    "numeric: |now - then| <= tolerance * max(1, |then|), and for tokens' logits half a step of "
    "the stored trace besides (trace_error); the tolerance is that of the coarser dtype"
)


class State(StrEnum):
    """How a run stands."""

    RUNNING = "running"
    """Or it was killed."""
    INTERRUPTED = "interrupted"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """A part that is done."""

    index: int
    name: str
    sha256: str
    bytes: int
    summary: Summary

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `Manifest.to_json` wrote of it."""
        return cls(**{**content, "summary": Summary.from_json(content["summary"])})


@dataclass(slots=True, kw_only=True)
class Manifest:
    """What is known of a run."""

    inputs: list[dict[str, Any]]
    """Each input's identity, as its survey gave it."""
    settings: dict[str, Any]
    """`part_rows` and `policy`."""
    facts: dict[str, Any]
    """What scores, as `run_facts` gives it."""
    engine: str
    """local or ray, of the last run."""
    n_segments: int
    state: State = State.RUNNING
    parts: dict[int, PartRecord] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The file's content."""
        content = {
            "format": FORMAT,
            "state": self.state.value,
            "inputs": self.inputs,
            "settings": self.settings,
            "facts": {**self.facts, "device": self.facts["backend"].split("-")[1]},
            "engine": self.engine,
            "segments": self.n_segments,
            "numeric_bound": {"rule": _BOUND, "tolerance": dict(TOLERANCE)},
            "totals": self.totals(),
            "parts": [self.parts[index] for index in sorted(self.parts)],
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def totals(self) -> Summary:
        """Over all parts."""
        return Summary.joined(part.summary for part in self.parts.values())

    @property
    def undecided(self) -> list[str]:
        """Streams that alerted and have no decision on record: there is nothing to replay."""
        return [stream for one in self.inputs for stream in one.get("undecided", ())]

    def save(self, folder: Path) -> None:
        """Replaces the folder's manifest; SettingsError where it cannot be written."""
        partial = folder / f".{MANIFEST}{PARTIAL}"
        try:
            with partial.open("wb") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, folder / MANIFEST)
        except OSError as error:
            raise SettingsError(f"{folder}: cannot be written: {error.strerror}") from error

    def check_same(self, other: Manifest, folder: Path) -> None:
        """SettingsError, naming the first difference, unless `other` would make the same parts."""
        pairs: list[tuple[str, Any, Any]] = []
        if len(self.inputs) != len(other.inputs):
            pairs.append(("inputs", len(other.inputs), len(self.inputs)))
        for number, (mine, now) in enumerate(zip(self.inputs, other.inputs, strict=False), 1):
            for name in _DEFINING:
                where = f"input {number} ({now['name']}), {name}"
                pairs.append((where, now.get(name), mine.get(name)))
        pairs += _pairs("settings", other.settings, self.settings)
        pairs += _pairs("", other.facts, self.facts)
        for name, found, expected in pairs:
            if found != expected:
                raise SettingsError(
                    f"{folder}: its parts are of another run: {name}: found {_short(found)}, "
                    f"expected {_short(expected)}; take another --out"
                )

    def damaged(self, folder: Path, progress: Callable[[str, float], None]) -> list[str]:
        """Forgets the parts whose files are not there as they were written; gives their names."""
        gone = []
        for done, index in enumerate(sorted(self.parts)):
            part = self.parts[index]
            progress("verifying parts", done / len(self.parts))
            if sha256_of(folder / part.name) != part.sha256:
                gone.append(index)
        return [self.parts.pop(index).name for index in gone]

    def remove_strays(self, folder: Path) -> None:
        """Deletes parts that do not count, and what was not finished."""
        named = {part.name for part in self.parts.values()}
        for path in folder.iterdir():
            is_part = path.name.startswith("part-") and path.suffix == ".parquet"
            if path.name.endswith(PARTIAL) or (is_part and path.name not in named):
                path.unlink(missing_ok=True)


_DEFINING = ("kind", "rows", "sha256", "filter")


def load_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where it has none.

    Raises:
        SettingsError: it is no manifest of this format, or there are files and no manifest.
    """
    path = folder / MANIFEST
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        left = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if left:
            raise SettingsError(
                f"--out {folder}: found {left[0]} and no {MANIFEST}, expected an empty folder or "
                "one of an earlier replay"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise SettingsError(f"{path}: found format {found!r}, expected {FORMAT!r}")
    try:
        parts = [PartRecord.from_json(part) for part in content["parts"]]
        return Manifest(
            inputs=content["inputs"],
            settings=content["settings"],
            facts={name: fact for name, fact in content["facts"].items() if name != "device"},
            engine=content["engine"],
            n_segments=content["segments"],
            state=State(content["state"]),
            parts={part.index: part for part in parts},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path}: is damaged: {error!r}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it; SettingsError where another replay does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingsError(f"--out {folder}: cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"--out {folder}: found another replay at work in it, expected none"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _pairs(
    where: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    prefix = f"{where}." if where else ""
    pairs: list[tuple[str, Any, Any]] = []
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            pairs += _pairs(f"{prefix}{name}", a, b)
        else:
            pairs.append((f"{prefix}{name}", a, b))
    return pairs


def _short(value: object) -> str:
    return f"{value}"[:80]
