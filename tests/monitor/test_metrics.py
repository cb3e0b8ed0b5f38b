from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from monitor.metrics import Metrics
from monitor.metrics.labels import (
    GRPC_CODES,
    MAX_CLUSTERS,
    Component,
    FailOpen,
    Outcome,
    Rejection,
    RequestKind,
    RpcMethod,
)
from monitor.records import (
    Action,
    Alert,
    ClusterInfo,
    ClusterResult,
    Decision,
    Mode,
    Provenance,
    Severity,
    Stage,
    Timings,
    UnscoredReason,
    Verdict,
)

MakeRecord = Callable[[type[Any], int], Any]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"

HARM = ClusterInfo(
    cluster="harm",
    title="Harm",
    severity=Severity.CRITICAL,
    stages=(Stage.PROMPT, Stage.COMPLETION),
    latents=(),
    has_dense_head=True,
    aggregate="max",
    flag=2.0,
    alert=4.0,
    clear=1.0,
    calibrated=True,
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny", [HARM], {"jailbreak": Severity.WARNING})


def samples(metrics: Metrics) -> list[Any]:
    families: Any = text_string_to_metric_families(metrics.render().body.decode())
    return [sample for family in families for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def result(fused: float, stage: Stage | None = Stage.PROMPT, cluster: str = "harm") -> Any:
    return ClusterResult(
        cluster=cluster,
        fused=fused,
        dense=0.0,
        sae=0.0,
        verdict=Verdict.PASS,
        severity=Severity.CRITICAL,
        stage=stage,
        first_crossing=None,
        calibrated=True,
    )


def alert(cluster: str = "harm", stage: Stage | None = Stage.PROMPT) -> Alert:
    return Alert(
        decision_id="d-1",
        cluster=cluster,
        severity=Severity.WARNING if cluster.startswith("rule:") else Severity.CRITICAL,
        stage=stage,
        score=5.0,
        position=3,
    )


def test_every_series_of_the_closed_sets_is_there_at_zero(metrics: Metrics) -> None:
    def zero(name: str, **labels: str) -> None:
        assert value(metrics, f"saemonitor_{name}", **labels) == 0, (name, labels)

    for stage in Stage:
        zero("tokens_received_total", model="tiny", stage=stage)
        zero("tokens_scored_total", model="tiny", stage=stage)
        zero("alerts_total", model="tiny", cluster="harm", stage=stage, severity="critical")
        zero("cluster_score_bucket", model="tiny", cluster="harm", stage=stage, le="+Inf")
        for reason in UnscoredReason:
            zero("tokens_unscored_total", model="tiny", stage=stage, reason=reason)
    for stage_label in [*Stage, "none"]:
        labels = {"cluster": "rule:jailbreak", "stage": stage_label, "severity": "warning"}
        zero("alerts_total", model="tiny", **labels)
    for kind in RequestKind:
        zero("score_lag_seconds_count", model="tiny", stage=kind)
        for outcome in Outcome:
            zero("requests_total", model="tiny", stage=kind, outcome=outcome)
    for rejection in Rejection:
        zero("rejections_total", model="tiny", reason=rejection)
    for reason_label in FailOpen:
        zero("fail_open_total", model="tiny", reason=reason_label)
    for action in Action:
        for mode in Mode:
            zero("verdicts_total", model="tiny", action=action, mode=mode)
    for step in ("tokenize", "queue", "forward", "encode", "score", "audit"):
        zero("step_seconds_count", model="tiny", step=step)
    for component in Component:
        zero("component_ready", component=component)
    for gauge in (
        *("streams_active", "queue_tokens", "queue_capacity_tokens", "requests_in_flight"),
        *("session_cache_sessions", "session_cache_bytes"),
        *("prefix_cache_blocks", "prefix_cache_bytes"),
        *("prefix_cache_reused_tokens_total", "prefix_cache_evictions_total"),
    ):
        zero(gauge, model="tiny")
    for reason_label in ("memory", "closed"):
        zero("session_cache_evictions_total", model="tiny", reason=reason_label)
    zero("session_cache_recomputed_tokens_total", model="tiny")
    zero("batch_requests_count", model="tiny")
    zero("batch_tokens_count", model="tiny")
    zero("audit_records_total", result="written")
    zero("audit_records_total", result="failed")
    for name in (
        *("audit_dropped_total", "audit_pending_records", "audit_sequence"),
        *("audit_last_sync_timestamp_seconds", "audit_sync_seconds_count"),
        *("audit_pending_bytes", "audit_uncovered_records", "audit_checkpoint_failures_total"),
        "event_loop_lag_seconds_count",
    ):
        zero(name)


def test_tokens_are_counted_by_stage_and_reason(metrics: Metrics) -> None:
    metrics.tokens_received(Stage.PROMPT, 10)
    metrics.tokens_scored(Stage.PROMPT, 7)
    metrics.tokens_unscored(Stage.PROMPT, UnscoredReason.OVERLOAD, 3)
    prompt = {"model": "tiny", "stage": "prompt"}
    assert value(metrics, "saemonitor_tokens_received_total", **prompt) == 10
    assert value(metrics, "saemonitor_tokens_scored_total", **prompt) == 7
    unscored = value(metrics, "saemonitor_tokens_unscored_total", **prompt, reason="overload")
    assert unscored == 3
    completion = {"model": "tiny", "stage": "completion"}
    assert value(metrics, "saemonitor_tokens_received_total", **completion) == 0


@pytest.mark.parametrize(
    ("fused", "below_flag", "below_alert"),
    [(1.9, 1, 1), (2.0, 1, 1), (2.1, 0, 1), (3.9, 0, 1), (4.1, 0, 0)],
)
def test_scores_count_as_0_at_flag_and_1_at_alert(
    metrics: Metrics, make_record: MakeRecord, fused: float, below_flag: int, below_alert: int
) -> None:
    decision = dataclasses.replace(make_record(Decision, 0), clusters=(result(fused),), alerts=())
    metrics.observe_decision(decision)
    labels = {"model": "tiny", "cluster": "harm", "stage": "prompt"}
    bucket = "saemonitor_cluster_score_bucket"
    assert value(metrics, bucket, **labels, le="0.0") == below_flag
    assert value(metrics, bucket, **labels, le="1.0") == below_alert


def test_a_cluster_without_a_score_is_not_observed(
    metrics: Metrics, make_record: MakeRecord
) -> None:
    nothing = (result(math.nan, None), result(math.nan), result(1.0, cluster="nobody's"))
    metrics.observe_decision(
        dataclasses.replace(make_record(Decision, 0), clusters=nothing, alerts=())
    )
    labels = {"model": "tiny", "cluster": "harm", "stage": "prompt"}
    assert value(metrics, "saemonitor_cluster_score_bucket", **labels, le="+Inf") == 0


def test_alerts_are_counted_when_they_are_raised(metrics: Metrics) -> None:
    metrics.observe_alerts([alert(), alert("rule:jailbreak", None)])
    metrics.observe_alerts([alert()])
    by_cluster = {"cluster": "harm", "stage": "prompt", "severity": "critical"}
    assert value(metrics, "saemonitor_alerts_total", model="tiny", **by_cluster) == 2
    by_rule = {"cluster": "rule:jailbreak", "stage": "none", "severity": "warning"}
    assert value(metrics, "saemonitor_alerts_total", model="tiny", **by_rule) == 1


def test_a_decision_counts_its_verdict_and_timings_and_not_its_alerts_again(
    metrics: Metrics, make_record: MakeRecord
) -> None:
    decision = dataclasses.replace(
        make_record(Decision, 0),
        clusters=(),
        alerts=(alert(),),
        action=Action.BLOCK,
        mode=Mode.ENFORCE,
        timings=Timings(queue_seconds=0.03, forward_seconds=0.5),
    )
    metrics.observe_decision(decision)
    metrics.observe_decision(decision)
    by_cluster = {"cluster": "harm", "stage": "prompt", "severity": "critical"}
    assert value(metrics, "saemonitor_alerts_total", model="tiny", **by_cluster) == 0
    verdicts = {"action": "block", "mode": "enforce"}
    assert value(metrics, "saemonitor_verdicts_total", model="tiny", **verdicts) == 2
    forward = {"model": "tiny", "step": "forward"}
    assert value(metrics, "saemonitor_step_seconds_sum", **forward) == 1.0
    audit = {"model": "tiny", "step": "audit"}
    assert value(metrics, "saemonitor_step_seconds_count", **audit) == 0


def test_what_is_not_registered_cannot_make_a_series(metrics: Metrics) -> None:
    metrics.observe_alerts([alert("caller's invention")])
    text = metrics.render().body.decode()
    assert "invention" not in text
    other = {"cluster": "other", "stage": "prompt", "severity": "critical"}
    assert value(metrics, "saemonitor_alerts_total", model="tiny", **other) == 1
    with pytest.raises(ValueError, match="tuesday"):
        metrics.rejected("tuesday")
    with pytest.raises(ValueError, match="tuesday"):
        metrics.request_finished("prompt", "tuesday")


def test_clusters_beyond_the_cap_share_other() -> None:
    many = [dataclasses.replace(HARM, cluster=f"c{i}") for i in range(MAX_CLUSTERS + 9)]
    metrics = Metrics("tiny", many)
    text = metrics.render().body.decode()
    assert f'cluster="c{MAX_CLUSTERS - 1}"' in text
    assert f'cluster="c{MAX_CLUSTERS}"' not in text
    assert 'cluster="other"' in text


def test_gauges_are_read_at_the_scrape(metrics: Metrics) -> None:
    queue = [1, 2, 3]
    metrics.watch_queue(lambda: len(queue), lambda: 100, lambda: 2)
    assert value(metrics, "saemonitor_queue_tokens", model="tiny") == 3
    queue.clear()
    assert value(metrics, "saemonitor_queue_tokens", model="tiny") == 0
    assert value(metrics, "saemonitor_queue_capacity_tokens", model="tiny") == 100
    assert value(metrics, "saemonitor_requests_in_flight", model="tiny") == 2


@dataclasses.dataclass
class FakePages:
    own: int = 5
    shared: int = 2
    free: int = 1


@dataclasses.dataclass
class FakeCache:
    sessions: int = 4
    session_bytes: int = 4096
    evicted_for_memory: int = 3
    evicted_at_close: int = 9
    recomputed_tokens: int = 70
    prefix_blocks: int = 6
    prefix_bytes: int = 600
    prefix_evictions: int = 2
    reused_tokens: int = 640
    pages: FakePages | None = None


def test_the_cache_is_read_at_the_scrape(metrics: Metrics) -> None:
    cache = FakeCache()
    metrics.watch_cache(lambda: cache)
    cache.sessions = 5

    def read(name: str, **labels: str) -> float | None:
        return value(metrics, f"saemonitor_{name}", model="tiny", **labels)

    assert read("session_cache_sessions") == 5
    assert read("session_cache_bytes") == 4096
    assert read("session_cache_evictions_total", reason="memory") == 3
    assert read("session_cache_evictions_total", reason="closed") == 9
    assert read("session_cache_recomputed_tokens_total") == 70
    assert read("prefix_cache_blocks") == 6
    assert read("prefix_cache_bytes") == 600
    assert read("prefix_cache_evictions_total") == 2
    assert read("prefix_cache_reused_tokens_total") == 640
    assert read("cache_pages", state="own") is None
    cache.pages = FakePages()
    assert [read("cache_pages", state=state) for state in ("own", "shared", "free")] == [5, 2, 1]


@dataclasses.dataclass
class FakeCounts:
    written: int = 12
    failed: int = 2
    dropped: int = 1
    pending: int = 3
    pending_bytes: int = 9000
    sequence: int = 40
    last_sync_timestamp: float = 1.5e9
    uncovered: int = 7
    checkpoint_failures: int = 2
    last_checkpoint_timestamp: float = 1.4e9
    last_checkpoint_signed: bool = True


def test_the_audit_log_is_read_at_the_scrape(metrics: Metrics) -> None:
    counts = FakeCounts()
    metrics.watch_audit(lambda: counts)
    metrics.audit_synced(0.015)
    assert value(metrics, "saemonitor_audit_records_total", result="written") == 12
    assert value(metrics, "saemonitor_audit_records_total", result="failed") == 2
    assert value(metrics, "saemonitor_audit_dropped_total") == 1
    assert value(metrics, "saemonitor_audit_pending_records") == 3
    assert value(metrics, "saemonitor_audit_sequence") == 40
    assert value(metrics, "saemonitor_audit_last_sync_timestamp_seconds") == 1.5e9
    assert value(metrics, "saemonitor_audit_sync_seconds_sum") == 0.015
    assert value(metrics, "saemonitor_audit_pending_bytes") == 9000
    assert value(metrics, "saemonitor_audit_uncovered_records") == 7
    assert value(metrics, "saemonitor_audit_checkpoint_failures_total") == 2
    last = "saemonitor_audit_last_checkpoint_timestamp_seconds"
    assert value(metrics, last, signed="true") == 1.4e9
    counts.written = 13
    assert value(metrics, "saemonitor_audit_records_total", result="written") == 13


def test_the_rest_of_the_story_is_counted(metrics: Metrics) -> None:
    metrics.stream_opened()
    metrics.stream_opened()
    metrics.stream_closed()
    assert value(metrics, "saemonitor_streams_active", model="tiny") == 1
    metrics.observe_batch(3, 500)
    assert value(metrics, "saemonitor_batch_requests_sum", model="tiny") == 3
    assert value(metrics, "saemonitor_batch_tokens_bucket", model="tiny", le="1024.0") == 1
    metrics.score_lag("completion", 0.25)
    lag = {"model": "tiny", "stage": "completion"}
    assert value(metrics, "saemonitor_score_lag_seconds_sum", **lag) == 0.25
    metrics.failed_open("audit")
    assert value(metrics, "saemonitor_fail_open_total", model="tiny", reason="audit") == 1
    metrics.loop_lag(0.003)
    assert value(metrics, "saemonitor_event_loop_lag_seconds_count") == 1
    metrics.component_ready(Component.MODEL, True)
    assert value(metrics, "saemonitor_component_ready", component="model") == 1
    assert value(metrics, "saemonitor_component_ready", component="sae") == 0


def test_build_and_model_are_described(metrics: Metrics, make_record: MakeRecord) -> None:
    provenance = make_record(Provenance, 1)
    metrics.describe(provenance, ("blocks.1.hook_resid_post",), "2.13.0")
    labels = {s.name: s.labels for s in samples(metrics) if s.name.endswith("_info")}
    assert labels["saemonitor_build_info"]["torch"] == "2.13.0"
    assert labels["saemonitor_model_info"]["bundle_digest"] == provenance.bundle_digest
    assert labels["saemonitor_model_info"]["hook_points"] == "blocks.1.hook_resid_post"


def test_rpcs_have_the_names_and_codes_of_the_ecosystem(metrics: Metrics) -> None:
    rpc = RpcMethod(kind="unary", service="saemonitor.v1.MonitorService", method="Score")
    labels = {
        "grpc_type": "unary",
        "grpc_service": "saemonitor.v1.MonitorService",
        "grpc_method": "Score",
    }
    metrics.rpc_prepare(rpc)
    for code in GRPC_CODES:
        assert value(metrics, "grpc_server_handled_total", **labels, grpc_code=code) == 0
    metrics.rpc_started(rpc)
    metrics.rpc_message_received(rpc)
    metrics.rpc_message_sent(rpc)
    metrics.rpc_handled(rpc, "ResourceExhausted", 0.2)
    assert value(metrics, "grpc_server_started_total", **labels) == 1
    assert value(metrics, "grpc_server_msg_received_total", **labels) == 1
    assert value(metrics, "grpc_server_msg_sent_total", **labels) == 1
    exhausted = value(metrics, "grpc_server_handled_total", **labels, grpc_code="ResourceExhausted")
    assert exhausted == 1
    assert value(metrics, "grpc_server_handling_seconds_sum", **labels) == 0.2


def test_plain_text_by_default_and_without_created_series(metrics: Metrics) -> None:
    page = metrics.render()
    assert page.content_type.startswith("text/plain; version=0.0.4")
    names = [sample.name for sample in samples(metrics)]
    assert "saemonitor_requests_total" in names
    assert not [name for name in names if name.endswith("_created")]


def test_openmetrics_carries_the_decision_id_of_an_alert(
    metrics: Metrics, make_record: MakeRecord
) -> None:
    metrics.describe(make_record(Provenance, 1), ("blocks.1.hook_resid_post",), "2.13.0")
    metrics.observe_alerts([alert()])
    page = metrics.render(OPENMETRICS)
    assert page.content_type.startswith("application/openmetrics-text")
    families: Any = openmetrics_parser.text_string_to_metric_families(page.body.decode())
    exemplars = [s.exemplar for f in families for s in f.samples if s.exemplar]
    assert [exemplar.labels for exemplar in exemplars] == [{"decision_id": "d-1"}]


def test_domain_names_have_the_prefix_and_counters_alone_end_in_total(metrics: Metrics) -> None:
    for family in metrics.registry.collect():
        assert family.name.startswith(("saemonitor_", "grpc_server_", "process_")), family.name
        for sample in family.samples:
            ends_in_total = sample.name.endswith("_total")
            assert ends_in_total == (family.type == "counter") or sample.name.endswith("_created")


def test_a_scrape_of_many_clusters_stays_below_5000_series() -> None:
    many = [dataclasses.replace(HARM, cluster=f"c{i}") for i in range(MAX_CLUSTERS)]
    metrics = Metrics("tiny", many)
    for kind, method in (("unary", "Score"), ("bidi_stream", "ScoreStream"), ("unary", "Get")):
        metrics.rpc_prepare(RpcMethod(kind=kind, service="s", method=method))
    assert len(samples(metrics)) < 5000
