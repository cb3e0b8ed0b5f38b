"""The closed sets of the records and their numbers on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from monitor.errors import InvalidRequestError, MonitorError
from monitor.records import Action, Mode, Severity, Stage, UnscoredReason, Verdict
from protos.saemonitor.v1 import monitor_pb2 as pb

Member = TypeVar("Member")

STAGES: Mapping[Stage, pb.Stage.ValueType] = {
    Stage.PROMPT: pb.STAGE_PROMPT,
    Stage.COMPLETION: pb.STAGE_COMPLETION,
}
VERDICTS: Mapping[Verdict, pb.Verdict.ValueType] = {
    Verdict.PASS: pb.VERDICT_PASS,
    Verdict.FLAG: pb.VERDICT_FLAG,
    Verdict.ALERT: pb.VERDICT_ALERT,
}
SEVERITIES: Mapping[Severity, pb.Severity.ValueType] = {
    Severity.INFO: pb.SEVERITY_INFO,
    Severity.WARNING: pb.SEVERITY_WARNING,
    Severity.CRITICAL: pb.SEVERITY_CRITICAL,
}
ACTIONS: Mapping[Action, pb.Action.ValueType] = {
    Action.ALLOW: pb.ACTION_ALLOW,
    Action.FLAG: pb.ACTION_FLAG,
    Action.BLOCK: pb.ACTION_BLOCK,
}
MODES: Mapping[Mode, pb.Mode.ValueType] = {
    Mode.MONITOR: pb.MODE_MONITOR,
    Mode.ENFORCE: pb.MODE_ENFORCE,
}
UNSCORED_REASONS: Mapping[UnscoredReason, pb.UnscoredReason.ValueType] = {
    UnscoredReason.OVERLOAD: pb.UNSCORED_REASON_OVERLOAD,
    UnscoredReason.DEADLINE: pb.UNSCORED_REASON_DEADLINE,
    UnscoredReason.CANCELLED: pb.UNSCORED_REASON_CANCELLED,
    UnscoredReason.INVALID: pb.UNSCORED_REASON_INVALID,
    UnscoredReason.ERROR: pb.UNSCORED_REASON_ERROR,
    UnscoredReason.EXCLUDED: pb.UNSCORED_REASON_EXCLUDED,
    UnscoredReason.NOT_READY: pb.UNSCORED_REASON_NOT_READY,
}


def stage_to_wire(stage: Stage | None) -> pb.Stage.ValueType:
    """The stage's number; unspecified for None."""
    return pb.STAGE_UNSPECIFIED if stage is None else STAGES[stage]


def stage_from_wire(number: int) -> Stage | None:
    """The stage of a reply; None for unspecified."""
    return None if number == pb.STAGE_UNSPECIFIED else from_wire(STAGES, number)


def requested_stage(number: int, default: Stage) -> Stage:
    """The stage of a request, `default` where it says none; InvalidRequestError if unknown."""
    if number == pb.STAGE_UNSPECIFIED:
        return default
    for stage, known in STAGES.items():
        if known == number:
            return stage
    raise InvalidRequestError("stage", str(number), "STAGE_PROMPT (1) or STAGE_COMPLETION (2)")


def from_wire(table: Mapping[Member, int], number: int) -> Member:
    """The member with this number; MonitorError if this version of the client has none."""
    for member, known in table.items():
        if known == number:
            return member
    known_members = ", ".join(str(member) for member in table)
    raise MonitorError(
        f"the server's reply holds enum number {number}, this client knows {known_members};"
        " the server is newer"
    )
