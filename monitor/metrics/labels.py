"""The closed sets that labels come from, and the buckets of the histograms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from monitor.records import Action, Decision, Verdict

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
REQUESTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
TOKENS = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)
SCORE = (-4.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""On the policy's own scale: 0 at the cluster's flag threshold, 1 at its alert threshold. Logits of
different clusters could not share buckets; on this scale they do, and the buckets at 0 and at 1
tell how many scores were below flag and below alert."""

MAX_CLUSTERS = 64
"""Clusters with series of their own; the rest share `other`, so that no bundle can grow the scrape
without bound."""

OTHER = "other"
NO_STAGE = "none"
"""Stage of an alert whose rule spans both stages."""

STEPS = ("tokenize", "queue", "forward", "encode", "score", "audit")
"""Values of `step`, in the order of a request's way."""

GRPC_CODES = (
    *("OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound"),
    *("AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted"),
    *("OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated"),
)
"""Values of grpc_code by number, spelled as the Go middleware spells them, whose names these series
have."""


class RequestKind(StrEnum):
    """What was sent, the `stage` label of requests: one side of a conversation, or both."""

    PROMPT = "prompt"
    COMPLETION = "completion"
    CHAT = "chat"


class Outcome(StrEnum):
    """How a request or stream ended."""

    OK = "ok"
    FLAGGED = "flagged"
    BLOCKED = "blocked"
    ERROR = "error"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"

    @classmethod
    def of(cls, decision: Decision) -> Outcome:
        """How a request ended that was decided."""
        if decision.action is Action.BLOCK:
            return cls.BLOCKED
        return cls.OK if decision.verdict is Verdict.PASS else cls.FLAGGED


class Rejection(StrEnum):
    """Why a request was refused before any work was done for it."""

    QUEUE_FULL = "queue_full"
    PAYLOAD = "payload"
    CONCURRENCY = "concurrency"
    INVALID = "invalid"
    DRAINING = "draining"
    NOT_READY = "not_ready"


class Resume(StrEnum):
    """What became of a resumable stream whose call broke off, or of a caller who wanted one."""

    RESUMED = "resumed"
    EXPIRED = "expired"
    """Nobody came back in time, or there were too many."""
    NOT_FOUND = "not_found"


class FailOpen(StrEnum):
    """Why something was allowed that was not scored, or not recorded."""

    OVERLOAD = "overload"
    DEADLINE = "deadline"
    ERROR = "error"
    NOT_READY = "not_ready"
    AUDIT = "audit"


class Component(StrEnum):
    """What must be ready before the server is."""

    MODEL = "model"
    SAE = "sae"
    REGISTRY = "registry"
    AUDIT = "audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcMethod:
    """One method as the gRPC series name it."""

    kind: str
    """unary, client_stream, server_stream or bidi_stream."""
    service: str
    method: str
