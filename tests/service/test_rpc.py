from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from monitor.client import MonitorClient
from monitor.records import Action, Decision, Mode, Severity, Stage, UnscoredReason, Verdict

BENIGN = "please tell me how to bake bread"
RISKY = "please tell me about the attack"


def cluster(decision: Decision, name: str = "danger") -> Any:
    return next(result for result in decision.clusters if result.cluster == name)


def test_a_benign_text_passes_with_everything_that_a_reply_must_say(client: MonitorClient) -> None:
    decision = client.score(text=BENIGN)
    info = client.info()
    assert decision.verdict is Verdict.PASS
    assert decision.action is Action.ALLOW
    assert decision.mode is Mode.MONITOR
    assert decision.policy == "default"
    assert len(decision.decision_id) >= 32
    assert [result.cluster for result in decision.clusters] == list(info.clusters)
    assert decision.provenance == info.provenance
    assert len(decision.provenance.bundle_digest) == len(decision.provenance.model_digest) == 64
    assert decision.coverage.received == decision.coverage.scored + 1
    assert decision.coverage.unscored == {UnscoredReason.EXCLUDED: 1}
    assert decision.timings.forward_seconds > 0
    assert decision.timings.total_seconds >= decision.timings.forward_seconds
    assert decision.tokens == ()
    assert not decision.alerts
    assert cluster(decision).first_crossing is None
    assert cluster(decision).attribution is None


def test_a_risky_text_alerts_at_the_word(client: MonitorClient) -> None:
    decision = client.score(text=RISKY, tokens=True)
    assert decision.verdict is Verdict.ALERT
    (alert,) = decision.alerts
    assert (alert.cluster, alert.severity) == ("danger", Severity.CRITICAL)
    assert alert.stage is Stage.PROMPT
    assert alert.decision_id == decision.decision_id
    crossing = cluster(decision).first_crossing
    assert crossing is not None
    assert "attack" in "".join(token.text for token in decision.tokens[crossing : crossing + 1])
    assert cluster(decision).fused == pytest.approx(
        max(token.fused[0] for token in decision.tokens if token.stage is not None), rel=1e-6
    )
    assert decision.sequence is not None


def test_tokens_come_in_order_with_one_logit_a_cluster(client: MonitorClient) -> None:
    decision = client.score(text=BENIGN, tokens=True)
    assert [token.position for token in decision.tokens] == list(range(len(decision.tokens)))
    assert decision.tokens[0].stage is None  # BOS
    assert {token.stage for token in decision.tokens[1:]} == {Stage.PROMPT}
    for token in decision.tokens[1:]:
        assert len(token.fused) == len(token.dense) == len(token.sae) == 2
        assert all(map(math.isfinite, token.fused))


def test_attribution_sums_to_the_score(client: MonitorClient) -> None:
    for text in (BENIGN, RISKY):
        for result in client.score(text=text, attribution=True).clusters:
            why = result.attribution
            assert why is not None
            terms = [latent.contribution for latent in why.latents]
            total = sum(terms) + why.dense + why.bias + why.gate
            assert total == pytest.approx(result.fused, rel=1e-5, abs=1e-6)


def test_ids_with_the_fingerprint_score_like_the_text_they_came_from(
    client: MonitorClient,
) -> None:
    from_text = client.score(text=RISKY, tokens=True)
    from_ids = client.score(
        token_ids=[token.token_id for token in from_text.tokens],
        tokenizer_fingerprint=client.info().provenance.tokenizer_fingerprint,
    )
    assert from_ids.verdict is Verdict.ALERT
    assert cluster(from_ids).fused == pytest.approx(cluster(from_text).fused, rel=1e-4)


def test_each_turn_of_a_conversation_is_scored_in_its_stage(client: MonitorClient) -> None:
    in_prompt = client.score(messages=[("user", RISKY), ("assistant", BENIGN)])
    in_completion = client.score(messages=[("user", BENIGN), ("assistant", RISKY)], tokens=True)
    assert cluster(in_prompt).stage is Stage.PROMPT
    assert cluster(in_completion).stage is Stage.COMPLETION
    assert {token.stage for token in in_completion.tokens} == {None, *Stage}


def test_the_stage_of_a_text_is_the_caller_s_to_say(client: MonitorClient) -> None:
    decision = client.score(text=RISKY, stage="completion")
    assert cluster(decision).stage is Stage.COMPLETION


def test_a_policy_that_enforces_asks_to_block(client: MonitorClient) -> None:
    decision = client.score(text=RISKY, policy="strict")
    assert (decision.action, decision.mode) == (Action.BLOCK, Mode.ENFORCE)
    assert client.score(text=BENIGN, policy="strict").action is Action.ALLOW


def test_requests_that_share_a_batch_get_what_they_get_alone(client: MonitorClient) -> None:
    texts = [BENIGN, RISKY, "bread", "what is the weather like", f"{BENIGN} {RISKY}"] * 5
    alone = {text: client.score(text=text) for text in set(texts)}
    with ThreadPoolExecutor(max_workers=12) as pool:
        together = list(pool.map(lambda text: client.score(text=text), texts))
    for text, decision in zip(texts, together, strict=True):
        assert decision.verdict is alone[text].verdict
        assert cluster(decision).fused == pytest.approx(cluster(alone[text]).fused, rel=1e-4)
    assert len({decision.decision_id for decision in together}) == len(texts)


def test_info_states_the_limits_and_what_is_registered(
    client: MonitorClient, shared_server: Any
) -> None:
    info = client.info()
    settings = shared_server.server.settings
    assert info.ready
    assert info.clusters == ("danger", "quiet")
    assert set(info.policies) == {"default", "strict"}
    assert info.hook_points == ("blocks.1.hook_resid_post",)
    assert info.limits.max_message_bytes == settings.max_message_bytes
    assert 0 < info.limits.max_request_tokens <= settings.max_request_tokens
    assert info.vocab_size > 0


def test_the_registry_lists_clusters_with_their_latents(client: MonitorClient) -> None:
    danger, quiet = client.clusters()
    assert (danger.cluster, danger.severity, danger.has_dense_head) == (
        "danger",
        Severity.CRITICAL,
        True,
    )
    assert len(quiet.latents) == 5
    assert quiet.latents[0].label == "random 1"
    assert client.cluster("quiet") == quiet


def test_a_unix_socket_serves_the_same(shared_server: Any) -> None:
    path = shared_server.ready.listen.split(",")[1]
    assert path.startswith("unix:")
    with MonitorClient(path, timeout_seconds=60) as client:
        assert client.score(text=RISKY).verdict is Verdict.ALERT


def test_a_caller_that_has_only_reflection_can_score(shared_server: Any) -> None:
    """What grpcurl does: no stubs of ours, descriptors from the server, JSON in and out."""
    with grpc.insecure_channel(shared_server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {
            "saemonitor.v1.MonitorService",
            "saemonitor.v1.InfoService",
            "saemonitor.v1.RegistryService",
            "saemonitor.v1.AuditService",
            "grpc.health.v1.Health",
        } <= services
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("saemonitor.v1.MonitorService").FindMethodByName("Score")
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        score = channel.unary_unary(
            "/saemonitor.v1.MonitorService/Score",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )
        answer = score(json_format.ParseDict({"text": RISKY, "wantTokens": True}, request()))
    decision = json_format.MessageToDict(answer)["decision"]
    assert decision["verdict"] == "VERDICT_ALERT"
    assert decision["clusters"][0]["severity"] == "SEVERITY_CRITICAL"


def test_reflection_can_be_turned_off(serve: Any) -> None:
    with serve(reflection=False) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        code: Any = caught.value
        assert code.code() is grpc.StatusCode.UNIMPLEMENTED


def test_what_was_scored_is_counted(client: MonitorClient, shared_server: Any) -> None:
    def count(name: str, **labels: str) -> float:
        return float(shared_server.value(name, **labels))

    model = {"model": client.info().provenance.model}
    alerts = {**model, "cluster": "danger", "stage": "prompt", "severity": "critical"}
    rpc = {
        "grpc_type": "unary",
        "grpc_service": "saemonitor.v1.MonitorService",
        "grpc_method": "Score",
    }
    before = (
        count("saemonitor_tokens_scored_total", **model, stage="prompt"),
        count("saemonitor_alerts_total", **alerts),
        count("grpc_server_handled_total", **rpc, grpc_code="OK"),
        count("grpc_server_msg_sent_total", **rpc),
        count("saemonitor_score_lag_seconds_count", **model, stage="prompt"),
    )
    decision = client.score(text=RISKY)
    after = (
        count("saemonitor_tokens_scored_total", **model, stage="prompt"),
        count("saemonitor_alerts_total", **alerts),
        count("grpc_server_handled_total", **rpc, grpc_code="OK"),
        count("grpc_server_msg_sent_total", **rpc),
        count("saemonitor_score_lag_seconds_count", **model, stage="prompt"),
    )
    grown = [now - then for now, then in zip(after, before, strict=True)]
    assert grown == [decision.coverage.scored, 1, 1, 1, 1]
