"""Where the time of one request went, added up as it goes."""

from __future__ import annotations

from dataclasses import dataclass

from monitor.engine_steps import EngineResult
from monitor.records import Timings


@dataclass(slots=True)
class TimingSums:
    """Seconds by stage, summed over one request."""

    tokenize_seconds: float = 0.0
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0
    encode_seconds: float = 0.0
    score_seconds: float = 0.0

    def add(self, result: EngineResult) -> None:
        """Adds one piece of the engine's work."""
        self.queue_seconds += result.queue_seconds
        self.forward_seconds += result.forward_seconds
        self.encode_seconds += result.encode_seconds

    def record(self, *, audit_seconds: float, total_seconds: float) -> Timings:
        """The sums as a record."""
        return Timings(
            tokenize_seconds=self.tokenize_seconds,
            queue_seconds=self.queue_seconds,
            forward_seconds=self.forward_seconds,
            encode_seconds=self.encode_seconds,
            score_seconds=self.score_seconds,
            audit_seconds=audit_seconds,
            total_seconds=total_seconds,
        )
