"""Which clusters have left their bounds, and why; they keep scoring, and every reply says it.

One book for each served bundle: the canaries and the watch for drift write it, replies and the
registry read it. A cluster is stale for as long as one of them says so.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class StaleBy(StrEnum):
    """What found it; a closed set, used as a metric label."""

    CANARY = "canary"
    LATENTS = "latents"
    """Its latents fire at other rates than in calibration."""
    SCORES = "scores"
    """Its scores are distributed otherwise."""
    RATE = "rate"
    """It flags or alerts more often than was calibrated."""
    FIT = "fit"
    """An SAE that it reads reconstructs worse, or has another number of active latents."""


class Staleness:
    """The book. `on_change` is told of a cluster that becomes stale, or stops to be."""

    def __init__(self) -> None:
        self.on_change: Callable[[str, tuple[str, ...]], None] = lambda cluster, reasons: None
        """Called with the cluster and the reasons that hold now; none where it is back."""
        self._reasons: dict[str, dict[StaleBy, str]] = {}

    def __contains__(self, cluster: str) -> bool:
        return cluster in self._reasons

    def reasons(self, cluster: str) -> tuple[str, ...]:
        """Why it is stale, as `canary: canary-04 ...`; none where it is not."""
        found = self._reasons.get(cluster, {})
        return tuple(f"{by}: {reason}" for by, reason in found.items())

    def holds(self, cluster: str, by: StaleBy) -> bool:
        """Whether it is stale by this."""
        return by in self._reasons.get(cluster, {})

    def say(self, cluster: str, by: StaleBy, reason: str) -> None:
        """Sets or, with an empty reason, clears what one check says of a cluster."""
        was_stale = cluster in self
        reasons = self._reasons.setdefault(cluster, {})
        had = by in reasons
        if reason:
            reasons[by] = reason
        else:
            reasons.pop(by, None)
        if not reasons:
            del self._reasons[cluster]
        if had != bool(reason) or was_stale != (cluster in self):
            self.on_change(cluster, self.reasons(cluster))
