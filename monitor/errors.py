"""Everything the service raises on purpose.

    MonitorError
    ├── SettingsError             an impossible setting; the process refuses to start
    ├── BundleError               a bundle that cannot be read, or does not fit the model
    ├── UnfitError                an SAE does not fit the stream it reads; nothing is scored
    ├── ModelStoreError           the language model's files cannot be found or are damaged
    ├── SAEStoreError             the files of an SAE cannot be found, or are not the sealed ones
    ├── AuditError                the audit log cannot be opened or written
    │   └── AuditChainError       a stored record does not verify
    ├── RequestError              the caller sent something that cannot be scored
    │   ├── InvalidRequestError       a field is wrong: names field, found, expected
    │   ├── PayloadTooLargeError      more bytes or tokens than the stated limit
    │   ├── StreamPositionError       a gap or a rewind in a stream's start_index
    │   ├── NotFoundError             unknown policy, cluster or record
    │   │   └── StreamNotFoundError   no such stream to reopen; send it anew from the beginning
    │   ├── FingerprintError          token ids made by another tokenizer
    │   └── ForeignActivationsError   activations of another model, or of a place that is not read
    ├── QueueFullError            admission refused; says when to try again
    ├── ComputeMemoryError        no memory for a step, even of one request alone
    ├── NotReadyError             starting, draining, or the engine is dead
    │   └── StreamBrokenError         a resumable stream's messages ended without `end`; reopen it
    ├── ActivationError           NaN or infinity where scores are made; names layer and position
    └── DeadlineError             the caller's deadline passed before the work was done

`monitor.rpc.status` gives each one its gRPC code; a test keeps the two complete.
"""

from __future__ import annotations


class MonitorError(Exception):
    """Root of the service's errors; the message is safe to show to the caller."""


class SettingsError(MonitorError):
    """An impossible or contradictory setting, raised at start and naming the setting."""


class BundleError(MonitorError):
    """A bundle is missing, malformed, damaged, or does not belong to the model."""


class UnfitError(MonitorError):
    """An SAE lies outside its fidelity bands: the message has the numbers and likely causes."""


class ModelStoreError(MonitorError):
    """The language model's folder is missing, unreadable, or fails its checksum."""


class SAEStoreError(MonitorError):
    """An SAE's files are nowhere to be had, or are not those that the bundle was sealed with."""


class AuditError(MonitorError):
    """The audit log cannot be opened, written, or read."""


class AuditChainError(AuditError):
    """A stored record does not verify; names the first broken record."""

    def __init__(
        self,
        message: str,
        *,
        chain: str | None = None,
        sequence: int | None = None,
        decision_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.chain = chain
        self.sequence = sequence
        self.decision_id = decision_id


class RequestError(MonitorError):
    """Root of what a caller can get wrong in one request."""


class InvalidRequestError(RequestError):
    """One field is wrong; the message names the field, what was found, what was expected."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: found {found}, expected {expected}")
        self.field = field
        self.found = found
        self.expected = expected


class PayloadTooLargeError(RequestError):
    """More bytes or tokens than the server's stated limit."""


class StreamPositionError(RequestError):
    """A stream message's start_index leaves a gap or goes back."""


class NotFoundError(RequestError):
    """A policy, cluster or record that is not registered."""


class StreamNotFoundError(NotFoundError):
    """A stream to reopen is not here: never was, has ended, or waited too long.

    Open it anew, and send everything from index 0.
    """


class FingerprintError(RequestError):
    """Token ids come from a tokenizer that is not the model's."""


class ForeignActivationsError(RequestError):
    """Given activations are of another model, or of a hook point that the bundle does not read."""


class QueueFullError(MonitorError):
    """The engine's queue holds as many tokens as it may; try again after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class ComputeMemoryError(MonitorError):
    """There was no memory to score a request, even alone and in the smallest pieces."""


class NotReadyError(MonitorError):
    """The server is starting or draining, or its engine thread has died."""


class StreamBrokenError(NotReadyError):
    """A resumable stream's messages ended, and no `end` was among them: its connection broke."""


class ActivationError(MonitorError):
    """The residual stream or a logit is NaN or infinite; nothing can be said of these tokens."""


class DeadlineError(MonitorError):
    """The caller's deadline passed; the tokens left are counted as unscored."""
