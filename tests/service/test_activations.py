"""The caller's activations through the real server: the scores of our own forward, and refusals."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from monitor.audit_log.query import query
from monitor.audit_log.verify import verify
from monitor.client import AsyncMonitorClient, MonitorClient
from monitor.errors import (
    ActivationError,
    DeadlineError,
    FingerprintError,
    ForeignActivationsError,
    InvalidRequestError,
    MonitorError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    QueueFullError,
)
from monitor.records import Decision, Stage, UnscoredReason, Verdict
from monitor.testing import HOOK_POINT
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.model import Segment

BENIGN = "please tell me how to bake bread"
RISKY = "please tell me about the attack in the north"

BFLOAT16_TOLERANCE = 0.02
"""Share of a logit's size: 8 bits of each activation remain, and rounding errors average out."""


class Host:
    """The caller's own serving stack: token ids, and the activations of its forward pass."""

    def __init__(self, server: Any, client: MonitorClient) -> None:
        self._scorer = server.server.pipeline.served.scorer
        self.provenance = client.info().provenance
        self.known = {
            "model_digest": self.provenance.model_digest,
            "tokenizer_fingerprint": self.provenance.tokenizer_fingerprint,
        }

    def ids(self, text: str) -> list[int]:
        return list(self._scorer.tokenizer.encode(text))

    def forward(self, text: str) -> torch.Tensor:
        model = self._scorer.language_model
        read = model.step([Segment(model.open_stream(), self.ids(text))])
        return read[parse_hook_point(HOOK_POINT)]

    def acts(self, text: str) -> dict[str, np.ndarray]:
        return {HOOK_POINT: self.forward(text).numpy()}


@pytest.fixture
def host(shared_server: Any, client: MonitorClient) -> Host:
    return Host(shared_server, client)


def logits(decision: Decision) -> np.ndarray:
    return np.array([[t.fused, t.dense, t.sae] for t in decision.tokens])


def same_scores(found: Decision, own: Decision, tolerance: float) -> None:
    assert found.verdict is own.verdict
    assert [t.token_id for t in found.tokens] == [t.token_id for t in own.tokens]
    assert [t.text for t in found.tokens] == [t.text for t in own.tokens]
    assert [t.stage for t in found.tokens] == [t.stage for t in own.tokens]
    expected = logits(own)
    np.testing.assert_allclose(
        logits(found), expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max())
    )
    for a, b in zip(found.clusters, own.clusters, strict=True):
        assert (a.cluster, a.verdict, a.first_crossing, a.stage) == (
            *(b.cluster, b.verdict, b.first_crossing, b.stage),
        )
    assert found.coverage == own.coverage
    assert [(a.cluster, a.position) for a in found.alerts] == [
        (a.cluster, a.position) for a in own.alerts
    ]


@pytest.mark.parametrize("text", [BENIGN, RISKY])
@pytest.mark.parametrize("stage", list(Stage))
def test_given_activations_score_like_our_own_forward(
    client: MonitorClient, host: Host, text: str, stage: Stage
) -> None:
    ids = host.ids(text)
    own = client.score(
        token_ids=ids,
        tokenizer_fingerprint=host.provenance.tokenizer_fingerprint,
        stage=stage,
        tokens=True,
        attribution=True,
    )
    found = client.score_activations(
        host.acts(text), token_ids=ids, stage=stage, tokens=True, attribution=True, **host.known
    )
    same_scores(found, own, 1e-6)
    for a, b in zip(found.clusters, own.clusters, strict=True):
        assert a.attribution is not None
        assert b.attribution is not None
        assert a.attribution.latents == b.attribution.latents
    assert found.overall.fused == pytest.approx(own.overall.fused, rel=1e-6)
    assert found.timings.forward_seconds < own.timings.forward_seconds
    assert (found.provenance.backend, found.provenance.dtype) == ("caller", "float32")
    assert found.provenance.bundle_digest == own.provenance.bundle_digest


def test_bfloat16_scores_within_its_rounding(client: MonitorClient, host: Host) -> None:
    for text in (BENIGN, RISKY):
        ids = host.ids(text)
        own = client.score(
            token_ids=ids,
            tokenizer_fingerprint=host.provenance.tokenizer_fingerprint,
            tokens=True,
        )
        bits = host.forward(text).bfloat16().view(torch.uint16).numpy()
        found = client.score_activations(
            {HOOK_POINT: bits}, token_ids=ids, tokens=True, **host.known
        )
        same_scores(found, own, BFLOAT16_TOLERANCE)
        assert found.provenance.dtype == "bfloat16"
        assert not np.array_equal(logits(found), logits(own))


async def test_the_async_client_and_a_unix_socket_give_the_same(
    shared_server: Any, client: MonitorClient, host: Host
) -> None:
    path = shared_server.ready.listen.split(",")[1]
    ids = host.ids(RISKY)
    async with AsyncMonitorClient(path, timeout_seconds=60) as unix:
        found = await unix.score_activations(
            host.acts(RISKY), token_ids=ids, tokens=True, **host.known
        )
    again = client.score_activations(host.acts(RISKY), token_ids=ids, tokens=True, **host.known)
    assert found.verdict is Verdict.ALERT
    assert logits(found).tolist() == logits(again).tolist()


def test_without_ids_every_row_is_scored(client: MonitorClient, host: Host) -> None:
    n = len(host.ids(RISKY))
    found = client.score_activations(
        host.acts(RISKY), model_digest=host.provenance.model_digest, tokens=True
    )
    assert found.verdict is Verdict.ALERT
    assert found.coverage.scored == found.coverage.received == n
    assert {t.stage for t in found.tokens} == {Stage.PROMPT}
    assert [(t.token_id, t.text) for t in found.tokens] == [(None, "")] * n


def test_the_caller_says_which_rows_count_and_as_what(client: MonitorClient, host: Host) -> None:
    turns = [("user", BENIGN), ("assistant", RISKY)]
    own = client.score(messages=turns, tokens=True)
    ids = [t.token_id for t in own.tokens]
    model = host._scorer.language_model
    read = model.step([Segment(model.open_stream(), ids)])[parse_hook_point(HOOK_POINT)]
    found = client.score_activations(
        {HOOK_POINT: read.numpy()},
        token_ids=[i for i in ids if i is not None],
        stages=[t.stage for t in own.tokens],
        tokens=True,
        **host.known,
    )
    same_scores(found, own, 1e-6)
    assert found.clusters[0].stage is Stage.COMPLETION


def test_it_is_recorded_with_its_source_and_counted(serve: Any) -> None:
    with serve() as server, server.client() as client:
        host = Host(server, client)
        url = server.server.settings.audit
        own = client.score(text=RISKY)
        ids = host.ids(RISKY)
        found = client.score_activations(host.acts(RISKY), token_ids=ids, **host.known)
        blind = client.score_activations(
            host.acts(BENIGN), model_digest=host.provenance.model_digest
        )
        model = {"model": host.provenance.model}
        scored = server.value("saemonitor_tokens_scored_total", **model, stage="prompt")
        assert scored == sum(d.coverage.scored for d in (own, found, blind))
        rpc = {
            "grpc_type": "client_stream",
            "grpc_service": "saemonitor.v1.MonitorService",
            "grpc_method": "ScoreActivations",
        }
        assert server.value("grpc_server_handled_total", **rpc, grpc_code="OK") == 2
        assert server.value("saemonitor_score_lag_seconds_count", **model, stage="prompt") == 3
        assert found.sequence is not None
    records = {r["decision_id"]: r for r in query(url)}
    backends = [records[d.decision_id]["provenance"]["backend"] for d in (own, found, blind)]
    assert backends == ["torch-cpu", "caller", "caller"]
    digests = [records[d.decision_id]["input_digest"] for d in (own, found, blind)]
    assert digests[0] == digests[1] is not None
    assert digests[2] is None
    assert verify(url).records >= 3


# What is refused


@pytest.mark.parametrize(
    ("changes", "cls", "message"),
    [
        ({"model_digest": "0" * 64}, ForeignActivationsError, "model_digest: found 000"),
        ({"model_digest": ""}, ForeignActivationsError, "model_digest: found none, expected"),
        (
            {"activations": {"blocks.0.hook_resid_post": np.zeros((9, 16), np.float32)}},
            ForeignActivationsError,
            "found blocks.0.hook_resid_post, which the bundle does not read, expected",
        ),
        (
            {"activations": {"here": np.zeros((9, 16), np.float32)}},
            InvalidRequestError,
            "hook_point: found 'here', expected one of",
        ),
        (
            {"activations": {HOOK_POINT: np.zeros((9, 5), np.float32)}},
            InvalidRequestError,
            "width: found 5 at",
        ),
        (
            {"activations": {HOOK_POINT: np.zeros((0, 5), np.float32)}},
            InvalidRequestError,
            "n_tokens: found 0, expected at least 1",
        ),
        ({"token_ids": [1, 2]}, InvalidRequestError, "token_ids: found 2 entries, expected"),
        ({"stages": ["prompt"]}, InvalidRequestError, "stages: found 1 entries, expected"),
        ({"tokenizer_fingerprint": "f"}, FingerprintError, "tokenizer_fingerprint: found f"),
        ({"policy": "x"}, NotFoundError, "policy: found 'x', expected one of"),
    ],
)
def test_what_does_not_belong_here_is_refused(
    client: MonitorClient, host: Host, changes: Any, cls: type[MonitorError], message: str
) -> None:
    arguments: dict[str, Any] = {
        "activations": host.acts(RISKY),
        "token_ids": host.ids(RISKY),
        **host.known,
        **changes,
    }
    if "activations" in changes:
        arguments.pop("token_ids")
    with pytest.raises(cls, match=message) as caught:
        client.score_activations(**arguments)
    assert type(caught.value) is cls
    assert client.score(text=BENIGN).verdict is Verdict.PASS


def opening(host: Host, n_tokens: int, **changes: Any) -> pb.ScoreActivationsRequest:
    width = host.forward("a").shape[1]
    fields: dict[str, Any] = {
        "model_digest": host.provenance.model_digest,
        "n_tokens": n_tokens,
        "tensors": [
            pb.ActivationTensor(
                hook_point=HOOK_POINT, dtype=pb.ACTIVATION_DTYPE_FLOAT32, width=width
            )
        ],
        **changes,
    }
    return pb.ScoreActivationsRequest(open=pb.ActivationsOpen(**fields))


def rows_of(
    host: Host, start: int, stop: int, rows: int | None = None, **changes: Any
) -> pb.ScoreActivationsRequest:
    acts = host.forward(RISKY).numpy()[start:stop]
    fields: dict[str, Any] = {"start_row": start, "rows": len(acts), "data": acts.tobytes()}
    return pb.ScoreActivationsRequest(chunk=pb.ActivationsChunk(**{**fields, **changes}))


def refused(address: str, messages: Iterable[pb.ScoreActivationsRequest]) -> Any:
    """Sends raw messages, as a client with bugs would; gives the error."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.MonitorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ScoreActivations(iter(messages), timeout=60)
        return caught.value


NAN = np.full(1, np.nan, "<f4").tobytes()

BAD_UPLOADS: list[tuple[Callable[[Host], list[Any]], str, str]] = [
    (lambda h: [], "INVALID_ARGUMENT", "first activations message: found none, expected open"),
    (
        lambda h: [rows_of(h, 0, 2)],
        "INVALID_ARGUMENT",
        "first activations message: found chunk, expected open",
    ),
    (
        lambda h: [opening(h, 4), opening(h, 4)],
        "INVALID_ARGUMENT",
        "activations message after the first: found open, expected chunk",
    ),
    (lambda h: [opening(h, 4)], "INVALID_ARGUMENT", "tensors[0]: found 0 rows of"),
    (
        lambda h: [opening(h, 4), rows_of(h, 0, 3)],
        "INVALID_ARGUMENT",
        f"tensors[0]: found 3 rows of {HOOK_POINT}, expected 4 (n_tokens)",
    ),
    (lambda h: [opening(h, 4, tensors=[])], "INVALID_ARGUMENT", "tensors: found none, expected"),
    (
        lambda h: [opening(h, 4, tensors=[pb.ActivationTensor(hook_point=HOOK_POINT)])],
        "INVALID_ARGUMENT",
        "tensors[0].dtype: found 0, expected one of ACTIVATION_DTYPE_FLOAT32 (1)",
    ),
    (lambda h: [opening(h, 2**60)], "INVALID_ARGUMENT", "tokens: found 1152921504606846976, ex"),
    (
        lambda h: [opening(h, 4), rows_of(h, 0, 2), rows_of(h, 3, 4)],
        "OUT_OF_RANGE",
        f"chunk.start_row: found 3 for {HOOK_POINT}, expected 2",
    ),
    (
        lambda h: [opening(h, 4), rows_of(h, 0, 2), rows_of(h, 1, 4)],
        "OUT_OF_RANGE",
        f"chunk.start_row: found 1 for {HOOK_POINT}, expected 2",
    ),
    (
        lambda h: [opening(h, 4), rows_of(h, 0, 5)],
        "INVALID_ARGUMENT",
        f"chunk.rows: found 5 for {HOOK_POINT}, expected 1 to 4",
    ),
    (
        lambda h: [opening(h, 4), rows_of(h, 0, 4, tensor=1)],
        "INVALID_ARGUMENT",
        "chunk.tensor: found 1, expected 0 <= tensor < 1",
    ),
    (
        lambda h: [opening(h, 4), rows_of(h, 0, 4, data=b"abc")],
        "INVALID_ARGUMENT",
        f"chunk.data: found 3 bytes for {HOOK_POINT}, expected",
    ),
    (
        lambda h: [
            opening(h, 4),
            rows_of(h, 0, 2),
            rows_of(h, 2, 4, data=rows_of(h, 2, 4).chunk.data[:-4] + NAN),
        ],
        "INVALID_ARGUMENT",
        "chunk.data: found NaN or infinity in row 3, column",
    ),
    (
        lambda h: [opening(h, 4, model_digest="beef")],
        "FAILED_PRECONDITION",
        "model_digest: found beef, expected",
    ),
    (
        lambda h: [
            opening(
                h,
                4,
                tensors=[
                    pb.ActivationTensor(
                        hook_point="blocks.0.hook_resid_post", dtype=pb.ACTIVATION_DTYPE_FLOAT32
                    )
                ],
            )
        ],
        "FAILED_PRECONDITION",
        "tensors[0].hook_point: found blocks.0.hook_resid_post, which the bundle does not read",
    ),
]


@pytest.mark.parametrize(("messages", "code", "details"), BAD_UPLOADS)
def test_a_broken_upload_ends_with_its_code(
    shared_server: Any, client: MonitorClient, host: Host, messages: Any, code: str, details: str
) -> None:
    error = refused(shared_server.address, messages(host))
    assert error.code() is grpc.StatusCode[code]
    assert error.details().startswith(details)
    assert client.score(text=BENIGN).verdict is Verdict.PASS
    assert shared_server.server.pipeline.n_requests == 0


def test_rows_of_a_broken_upload_are_received_and_unscored(
    shared_server: Any, client: MonitorClient, host: Host
) -> None:
    labels = {"model": host.provenance.model, "stage": "completion"}

    def counts() -> list[float]:
        return [
            shared_server.value("saemonitor_tokens_received_total", **labels),
            shared_server.value("saemonitor_tokens_unscored_total", **labels, reason="invalid"),
        ]

    before = counts()
    stage = {"stage": pb.STAGE_COMPLETION}
    refused(shared_server.address, [opening(host, 4, **stage), rows_of(host, 0, 3)])
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [4, 4]


def test_numbers_that_overflow_a_logit_are_refused(
    shared_server: Any, client: MonitorClient, host: Host
) -> None:
    head = shared_server.server.pipeline.served.bundle.dense_heads["danger"]
    acts = np.tile(np.float32(3e38) * np.sign(head.weight).astype(np.float32), (3, 1))
    with pytest.raises(ActivationError, match="position 0: logits of cluster"):
        client.score_activations({HOOK_POINT: acts}, model_digest=host.provenance.model_digest)


def test_more_rows_than_the_limits_are_refused(serve: Any) -> None:
    with serve(max_request_tokens=30, max_queue_tokens=40) as server, server.client() as client:
        host = Host(server, client)
        long = {HOOK_POINT: np.repeat(host.acts("bread")[HOOK_POINT][-1:], 31, 0)}
        digest = host.provenance.model_digest
        with pytest.raises(PayloadTooLargeError, match="tokens: found 31, expected at most 30"):
            client.score_activations(long, model_digest=digest)
        with SlowUpload(server, opening(host, 20)):
            fitting = {HOOK_POINT: long[HOOK_POINT][:20]}
            assert client.score_activations(fitting, model_digest=digest).verdict is Verdict.PASS
            with pytest.raises(QueueFullError, match="20 tokens wait or arrive and 21 more"):
                client.score_activations({HOOK_POINT: long[HOOK_POINT][:21]}, model_digest=digest)
        assert server.call(settled(server))
        decision = client.score_activations(
            {HOOK_POINT: long[HOOK_POINT][:21]}, model_digest=digest
        )
        assert decision.coverage.scored == 21


class SlowUpload:
    """An upload of which nothing but the opening has come; leaving it cancels it."""

    def __init__(self, server: Any, first: pb.ScoreActivationsRequest) -> None:
        self._server = server
        self._first = first
        self._over = threading.Event()

    def __enter__(self) -> SlowUpload:
        self._channel = grpc.insecure_channel(self._server.address)
        stub = pb_grpc.MonitorServiceStub(self._channel)
        self.call = stub.ScoreActivations.future(self._messages(), timeout=60)
        assert self._server.call(arriving(self._server))
        return self

    def __exit__(self, *error: object) -> None:
        self.call.cancel()
        self._over.set()
        self._channel.close()

    def _messages(self) -> Iterator[pb.ScoreActivationsRequest]:
        yield self._first
        self._over.wait(60)


async def arriving(server: Any) -> bool:
    for _ in range(1000):
        if server.server.pipeline._uploads._arriving_tokens:
            return True
        await asyncio.sleep(0.01)
    return False


async def settled(server: Any) -> bool:
    for _ in range(1000):
        if not server.server.pipeline.n_requests:
            return True
        await asyncio.sleep(0.01)
    return False


def test_an_upload_that_is_cancelled_gives_its_place_back(serve: Any) -> None:
    with serve() as server, server.client() as client:
        host = Host(server, client)
        labels = {"model": host.provenance.model, "stage": "prompt"}
        with SlowUpload(server, opening(host, 20)):
            pass
        assert server.call(settled(server))
        assert server.server.pipeline._uploads._arriving_tokens == 0
        unscored = [
            server.value("saemonitor_tokens_unscored_total", **labels, reason=reason)
            for reason in UnscoredReason
        ]
        assert sum(unscored) == 20
        cancelled = server.value("saemonitor_requests_total", **labels, outcome="cancelled")
        assert cancelled == 1


def test_an_upload_that_stalls_is_ended(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.activation_uploads.MAX_CHUNK_WAIT_SECONDS", 0.2)
    with serve() as server, server.client() as client:
        host = Host(server, client)
        with SlowUpload(server, opening(host, 20)) as upload:
            with pytest.raises(grpc.RpcError) as caught:
                upload.call.result()
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert error.details().startswith("chunk: none came for 0.2 seconds, expected")


def test_past_the_caller_s_deadline_nothing_is_left(serve: Any) -> None:
    with serve() as server, server.client() as client:
        host = Host(server, client)

        async def never(*args: Any, **named: Any) -> None:
            await asyncio.Event().wait()

        server.server.pipeline.engine.score = never
        with pytest.raises(DeadlineError):
            client.score_activations(
                host.acts(BENIGN), model_digest=host.provenance.model_digest, timeout=0.3
            )
        assert server.call(settled(server))


def test_a_draining_server_ends_what_it_began_and_takes_no_more(serve: Any) -> None:
    with serve() as server, server.client() as client:
        host = Host(server, client)
        digest = host.provenance.model_digest
        go = threading.Event()

        def messages() -> Iterator[pb.ScoreActivationsRequest]:
            yield opening(host, 4)
            go.wait(60)
            yield rows_of(host, 0, 4)

        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.MonitorServiceStub(channel)
            begun = stub.ScoreActivations.future(messages(), timeout=60)
            assert server.call(arriving(server))
            server.run(server.server._serving.drain)
            with pytest.raises(NotReadyError, match="server: draining, expected"):
                client.score_activations(host.acts(BENIGN), model_digest=digest)
            go.set()
            assert begun.result().decision.coverage.scored == 4
