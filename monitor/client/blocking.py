"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from monitor.audit_log.checkpoint import Statement
from monitor.client import audit, calls
from monitor.client.blocking_stream import ScoreStream
from monitor.client.stream_book import StreamBook
from monitor.client.uploads import Upload
from monitor.records import ClusterInfo, Decision, ServerInfo, Severity, Stage, StreamOpen, Verdict
from monitor.rpc import status
from monitor.rpc.convert import decisions, registry
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

Reply = TypeVar("Reply")


class MonitorClient:
    """One connection to a server; may be shared by threads.

    Args:
        address: HOST:PORT or unix:PATH.
        timeout_seconds: deadline of every call that states none, attempts and waits included.
        retry: when a call is made again.
        caller: who calls, in every request; the server stores a hash.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = calls.DEFAULT_TIMEOUT_SECONDS,
        retry: calls.RetryPolicy | None = None,
        caller: str | None = None,
    ) -> None:
        self._channel = grpc.insecure_channel(address, options=list(calls.CHANNEL_OPTIONS))
        self._monitor = pb_grpc.MonitorServiceStub(self._channel)
        self._info = pb_grpc.InfoServiceStub(self._channel)
        self._registry = pb_grpc.RegistryServiceStub(self._channel)
        self._audit = pb_grpc.AuditServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._timeout_seconds = timeout_seconds
        self._retry = calls.RetryPolicy() if retry is None else retry
        self._caller = caller

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        self._channel.close()

    def score(
        self,
        *,
        text: str | None = None,
        messages: calls.Messages | None = None,
        token_ids: Sequence[int] | None = None,
        stage: Stage | str = Stage.PROMPT,
        tokens: bool = False,
        attribution: bool = False,
        policy: str = "default",
        timeout: float | None = None,
        tokenizer_fingerprint: str | None = None,
        model: str | None = None,
    ) -> Decision:
        """Scores one text, conversation, or list of token ids: give exactly one of the three.

        Args:
            stage: which side of a conversation `text` or `token_ids` is; messages know theirs.
            tokens: ask for per-token logits.
            attribution: ask for the exact terms of every score.
            timeout: deadline in seconds, waits and retries included.
            tokenizer_fingerprint: required with `token_ids`; see `info`.

        Raises:
            MonitorError: what the server raised, by its own class.
        """
        request = calls.score_request(
            text=text,
            messages=messages,
            token_ids=token_ids,
            stage=stage,
            tokens=tokens,
            attribution=attribution,
            policy=policy,
            tokenizer_fingerprint=tokenizer_fingerprint,
            caller=self._caller,
            model=model,
        )
        reply = self._call(lambda left: self._monitor.Score(request, timeout=left), timeout)
        return decisions.decision_from_wire(reply.decision)

    def score_activations(
        self,
        activations: Mapping[str, NDArray[Any]],
        *,
        model_digest: str,
        token_ids: Sequence[int] | None = None,
        tokenizer_fingerprint: str | None = None,
        stage: Stage | str = Stage.PROMPT,
        stages: Sequence[Stage | str | None] = (),
        tokens: bool = False,
        attribution: bool = False,
        policy: str = "default",
        timeout: float | None = None,
    ) -> Decision:
        """Scores activations that your own forward pass made: no other one is run.

        Args:
            activations: for each of the server's hook points (see `info`), the raw activations of a
                Hugging Face model there, one row a token from the first of the text on: float32,
                float16, or uint16 with the bits of bfloat16.
            model_digest: of the model that made them; the server refuses another than its own.
            token_ids: the rows' ids, if known; control tokens are then left out of scores.
            tokenizer_fingerprint: required with `token_ids`.
            stage: which side of a conversation the rows are.
            stages: in place of it, one a row; None leaves a row (BOS, template) out of scores.
            tokens, attribution, policy, timeout: as in `score`.

        Raises:
            MonitorError: what the server raised, by its own class.
        """
        upload = Upload(
            activations,
            model_digest=model_digest,
            token_ids=token_ids,
            tokenizer_fingerprint=tokenizer_fingerprint,
            stage=stage,
            stages=stages,
            tokens=tokens,
            attribution=attribution,
            policy=policy,
            caller=self._caller,
        )
        reply = self._call(
            lambda left: self._monitor.ScoreActivations(upload.messages(), timeout=left), timeout
        )
        return decisions.decision_from_wire(reply.decision)

    def stream(
        self,
        *,
        session_id: str = "",
        stage: Stage | str = Stage.COMPLETION,
        policy: str = "default",
        tokenizer_fingerprint: str | None = None,
        context: calls.Messages = (),
        tokens: bool = False,
        attribution: bool = False,
        timeout: float = calls.DEFAULT_STREAM_TIMEOUT_SECONDS,
        model: str | None = None,
        resumable: bool = False,
    ) -> ScoreStream:
        """A stream of tokens to score as they are made; use it as a context manager.

        Args:
            session_id: your name for it; the server chooses one where it is empty.
            context: turns that precede it, scored first.
            timeout: longest life of the stream, seconds.
            resumable: where the connection breaks or the server drains, reopen the stream, within
                the client's timeout and retries; `send` waits meanwhile. It goes on as if nothing
                had been, where the server still has it. Where not, as behind a load balancer, it
                is sent anew from its beginning: updates, alerts and the decision are then another
                server's. Left without `finish`, it ends when the server has waited for long enough.
        """
        opening = StreamOpen(
            session_id=session_id,
            stage=calls.stage_record(stage),
            policy=policy,
            tokenizer_fingerprint=tokenizer_fingerprint,
            context_messages=calls.message_records(context),
            want_tokens=tokens,
            want_attribution=attribution,
            caller=self._caller,
            model=model,
            resumable=resumable,
        )
        return ScoreStream(
            self._monitor,
            StreamBook(opening),
            timeout=timeout,
            open_timeout=self._timeout_seconds,
            retry=self._retry,
        )

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is: digests, limits, policies, clusters, tokenizer fingerprint."""
        request = pb.GetServerInfoRequest()
        reply = self._call(lambda left: self._info.GetServerInfo(request, timeout=left), timeout)
        return registry.server_info_from_wire(reply)

    def clusters(self, *, timeout: float | None = None) -> tuple[ClusterInfo, ...]:
        """Every registered cluster, in bundle order."""
        request = pb.ListClustersRequest()
        reply = self._call(lambda left: self._registry.ListClusters(request, timeout=left), timeout)
        return tuple(registry.cluster_info_from_wire(cluster) for cluster in reply.clusters)

    def cluster(self, cluster_id: str, *, timeout: float | None = None) -> ClusterInfo:
        """One registered cluster; NotFoundError where there is none."""
        request = pb.GetClusterRequest(cluster=cluster_id)
        reply = self._call(lambda left: self._registry.GetCluster(request, timeout=left), timeout)
        return registry.cluster_info_from_wire(reply.cluster)

    def audit_record(self, decision_id: str, *, timeout: float | None = None) -> audit.StoredRecord:
        """One decision's record in the audit log; NotFoundError where there is none."""
        request = pb.GetRecordRequest(decision_id=decision_id)
        reply = self._call(lambda left: self._audit.GetRecord(request, timeout=left), timeout)
        return audit.record_from_wire(reply.record)

    def audit_records(
        self,
        *,
        verdict: Verdict | str | None = None,
        severity: Severity | str | None = None,
        cluster: str | None = None,
        caller_hmac: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        timeout: float = calls.DEFAULT_STREAM_TIMEOUT_SECONDS,
    ) -> Iterator[audit.StoredRecord]:
        """The decisions' records that match, by time, as they are read; asks once.

        Args:
            severity: of the gravest cluster or rule that flagged or alerted.
            cluster: decisions in which it flagged or alerted.
            caller_hmac: the caller's keyed hash, in hexadecimal.
            since, until: Unix seconds; the first is included, the last is not.
            limit: at most so many; None for all.
            timeout: deadline in seconds of the whole answer.

        Raises:
            MonitorError: what the server raised, by its own class.
        """
        request = audit.query_request(
            verdict=verdict,
            severity=severity,
            cluster=cluster,
            caller_hmac=caller_hmac,
            since=since,
            until=until,
            limit=limit,
            newest_first=newest_first,
        )
        call = self._audit.QueryRecords(request, timeout=timeout)
        return _records(call)

    def audit_checkpoint(
        self,
        chain: str | None = None,
        *,
        public_key: str | None = None,
        timeout: float | None = None,
    ) -> Statement:
        """A chain's last checkpoint, its signature checked; NotFoundError where there is none.

        Args:
            chain: its name; the server's own by default.
            public_key: the signer's, in hexadecimal; without it the checkpoint's own is taken, or
                none where it is not signed.

        Raises:
            AuditChainError: the signature is not one by the key.
        """
        request = pb.GetCheckpointRequest(chain=chain or "")
        reply = self._call(lambda left: self._audit.GetCheckpoint(request, timeout=left), timeout)
        return audit.checkpoint_from_wire(reply, public_key)

    def verify_audit(
        self,
        chain: str | None = None,
        *,
        first_sequence: int | None = None,
        last_sequence: int | None = None,
        timeout: float | None = None,
    ) -> audit.VerifiedRange:
        """Has the server verify a chain, or the part between two records, both included.

        Raises:
            AuditChainError: a record or a checkpoint does not hold; the message names it.
        """
        request = audit.range_request(chain, first_sequence, last_sequence)
        reply = self._call(lambda left: self._audit.VerifyRange(request, timeout=left), timeout)
        return audit.range_from_wire(reply)

    def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Whether the server, or one of its services, takes work now; asks once."""
        request = health_pb2.HealthCheckRequest(service=service)
        seconds = self._timeout_seconds if timeout is None else timeout
        try:
            reply = self._health.Check(request, timeout=seconds)
        except grpc.RpcError as error:
            raise status.from_wire(error) from None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _call(self, attempt: Callable[[float], Reply], timeout: float | None) -> Reply:
        deadline = time.monotonic() + (self._timeout_seconds if timeout is None else timeout)
        n_attempts = 0
        while True:
            n_attempts += 1
            try:
                return attempt(max(deadline - time.monotonic(), 0.0))
            except grpc.RpcError as failed:
                error = status.from_wire(failed)
            delay = self._retry.delay_seconds(error, n_attempts)
            if delay is None or time.monotonic() + delay >= deadline:
                raise error
            time.sleep(delay)


def _records(call: Any) -> Iterator[audit.StoredRecord]:
    try:
        for reply in call:
            yield audit.record_from_wire(reply.record)
    except grpc.RpcError as error:
        raise status.from_wire(error) from None
    finally:
        call.cancel()
