"""What differs between two bundles: every key of bundle.yaml, every head, SAE and file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from monitor.bundle import Bundle, DenseHead

KEYED = {"clusters": ("id",), "rules": ("id",), "latents": ("sae", "id")}
"""Lists whose entries are known by these keys and not by their place."""
SHOWN_DIGITS = 12
"""Of a digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One place where two bundles differ."""

    place: str
    """As clusters.weapons.thresholds.alert."""
    before: str | None
    """None where the first bundle does not have it."""
    after: str | None


def differences(before: Bundle, after: Bundle) -> tuple[Difference, ...]:
    """All of them: the digest first, then bundle.yaml in its order, heads, SAEs and files."""
    found = [
        *_compared("digest", before.digest[:SHOWN_DIGITS], after.digest[:SHOWN_DIGITS]),
        *_walk("", *(_keyed(b.spec.model_dump(mode="json")) for b in (before, after))),
    ]
    for name in _names(before.dense_heads, after.dense_heads):
        found += _head(name, before.dense_heads.get(name), after.dense_heads.get(name))
    saes = before.sae_digests(), after.sae_digests()
    for name in _names(*saes):
        found += _compared(f"saes.{name}.digest", *(_short(side.get(name)) for side in saes))
    for name in _names(before.hashes, after.hashes):
        sides = (_short(bundle.hashes.get(name)) for bundle in (before, after))
        found += _compared(f"file {name}", *sides)
    return tuple(found)


def _walk(place: str, before: object, after: object) -> Iterator[Difference]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in _names(before, after):
            here = f"{place}.{key}" if place else key
            yield from _walk(here, before.get(key), after.get(key))
    elif before != after:
        yield Difference(place=place, before=_shown(before), after=_shown(after))


def _keyed(value: Any, name: str = "") -> Any:
    """The same with lists as mappings where their entries have names."""
    if isinstance(value, dict):
        return {key: _keyed(entry, key) for key, entry in value.items()}
    if name in KEYED and isinstance(value, list) and all(isinstance(x, dict) for x in value):
        return {
            "/".join(str(entry[key]) for key in KEYED[name]): {
                key: _keyed(content, key)
                for key, content in entry.items()
                if key not in KEYED[name]
            }
            for entry in value
        }
    return value


def _shown(value: object) -> str | None:
    """A value in a line; of a whole entry only the title, as the rest would be a page."""
    if value is None:
        return None
    if isinstance(value, dict):
        return str(value.get("title") or value.get("label") or "present")
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _head(name: str, before: DenseHead | None, after: DenseHead | None) -> Iterator[Difference]:
    place = f"dense_heads.{name}.weight"
    if before is None or after is None or before.weight.shape != after.weight.shape:
        shapes = (None if head is None else f"{len(head.weight)} wide" for head in (before, after))
        yield from _compared(place, *shapes)
        return
    yield from _compared(f"dense_heads.{name}.bias", f"{before.bias:.6g}", f"{after.bias:.6g}")
    if not np.array_equal(before.weight, after.weight):
        one, other = (head.weight.astype(np.float64) for head in (before, after))
        norms = [float(np.linalg.norm(weight)) for weight in (one, other)]
        cosine = float(one @ other) / (norms[0] * norms[1]) if min(norms) else float("nan")
        yield Difference(
            place=place,
            before=f"norm {norms[0]:.4g}",
            after=f"norm {norms[1]:.4g}, cosine {cosine:.4f} with the first",
        )


def _compared(place: str, before: str | None, after: str | None) -> Iterator[Difference]:
    if before != after:
        yield Difference(place=place, before=before, after=after)


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest[:SHOWN_DIGITS]


def _names(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [*before, *(name for name in after if name not in before)]
