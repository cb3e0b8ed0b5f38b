"""Health, readiness and liveness: true, and quick even when the engine is busy or gone."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from monitor.client import MonitorClient
from monitor.errors import NotFoundError, NotReadyError
from monitor.server import process

SERVICES = (
    "",
    "saemonitor.v1.MonitorService",
    "saemonitor.v1.InfoService",
    "saemonitor.v1.RegistryService",
    "saemonitor.v1.AuditService",
)


def get(server: Any, path: str, address: str | None = None) -> tuple[int, Any]:
    url = f"http://{address or server.ready.ops_listen}{path}"
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())


def reasons(answer: Any) -> dict[str, str]:
    return {c["component"]: c["reason"] for c in answer["components"] if not c["ready"]}


def eventually(claim: Callable[[], bool]) -> bool:
    for _ in range(1000):
        if claim():
            return True
        time.sleep(0.01)
    return False


def test_the_server_and_every_service_serve(client: MonitorClient, shared_server: Any) -> None:
    assert [client.health(service) for service in SERVICES] == [True] * len(SERVICES)
    with pytest.raises(NotFoundError):
        client.health("no.such.Service")
    check = {"grpc_type": "unary", "grpc_service": "grpc.health.v1.Health", "grpc_method": "Check"}
    handled = "grpc_server_handled_total"
    assert shared_server.value(handled, **check, grpc_code="OK") >= len(SERVICES)
    assert shared_server.value(handled, **check, grpc_code="NotFound") >= 1
    assert get(shared_server, "/livez")[0] == 200
    code, answer = get(shared_server, "/readyz")
    assert code == 200
    assert {c["component"] for c in answer["components"]} == {
        *("registry", "sae", "model", "audit", "server")
    }


def test_metrics_are_served_with_the_series_of_the_bundle(shared_server: Any) -> None:
    url = f"http://{shared_server.ready.ops_listen}/metrics"
    with urllib.request.urlopen(url, timeout=30) as reply:
        page = reply.read().decode()
    assert 'cluster="danger"' in page
    assert 'saemonitor_component_ready{component="model"} 1.0' in page
    assert "saemonitor_build_info{" in page


def test_watchers_hear_of_draining(serve: Any) -> None:
    with serve() as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[1]), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopping = server.start(server.server.stop(5.0))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        stopping.result(timeout=60)


def test_an_audit_log_that_cannot_be_written_ends_readiness_until_it_can(serve: Any) -> None:
    class Broken:
        healthy = False

    with serve() as server, server.client() as client:
        audit_log = server.server._audit_log
        server.server._audit_log = Broken()
        assert eventually(lambda: not client.health())
        code, answer = get(server, "/readyz")
        assert (code, reasons(answer)) == (503, {"audit": "the audit log cannot be written"})
        assert get(server, "/livez")[0] == 200
        assert server.value("saemonitor_component_ready", component="audit") == 0
        server.server._audit_log = audit_log
        assert eventually(client.health)
        assert get(server, "/readyz")[0] == 200


def test_a_dead_engine_ends_liveness_and_readiness(serve: Any) -> None:
    with serve() as server, server.client() as client:
        server.server.pipeline.engine.stop()
        assert eventually(lambda: not client.health())
        code, answer = get(server, "/livez")
        assert (code, reasons(answer)) == (503, {"engine": "the engine thread has died"})
        code, answer = get(server, "/readyz")
        assert (code, reasons(answer)) == (503, {"model": "the engine thread is not running"})
        with pytest.raises(NotReadyError, match="engine: not running"):
            client.score(text="bread")


def test_while_the_model_loads_the_server_lives_and_is_not_ready(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load, seen = threading.Event(), threading.Event()
    load_model = process.load_model
    found: dict[str, Any] = {}
    wires: list[process.OpsWire] = []

    class SeenWire(process.OpsWire):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            wires.append(self)

    def slow(*args: Any) -> Any:
        seen.set()
        assert may_load.wait(60)
        return load_model(*args)

    def look() -> None:
        assert seen.wait(60)
        address = str(wires[0].address)
        try:
            found["live"] = get(None, "/livez", address)
            found["ready"] = get(None, "/readyz", address)
        finally:
            may_load.set()

    monkeypatch.setattr(process, "load_model", slow)
    monkeypatch.setattr(process, "OpsWire", SeenWire)
    looker = threading.Thread(target=look)
    looker.start()
    with serve() as server:
        looker.join()
        assert found["live"][0] == 200
        code, answer = found["ready"]
        assert code == 503
        assert reasons(answer) == {"sae": "still loading", "model": "still loading"}
        assert get(server, "/readyz")[0] == 200


def test_health_does_not_wait_behind_the_engine(serve: Any) -> None:
    """The engine's thread is held in a step; health, livez and info answer all the same."""
    with serve() as server, server.client() as client:
        engine = server.server.pipeline.engine
        scorer, held, release = engine.scorer, threading.Event(), threading.Event()

        class Held:
            def __getattr__(self, name: str) -> Any:
                return getattr(scorer, name)

            def step(self, *args: Any, **named: Any) -> Any:
                held.set()
                assert release.wait(60)
                return scorer.step(*args, **named)

        engine.scorer = Held()
        waiting = threading.Thread(target=lambda: client.score(text="bread"))
        waiting.start()
        try:
            assert held.wait(60)
            assert client.health(timeout=30)
            assert client.info(timeout=30).ready
            assert get(server, "/livez")[0] == 200
            model = client.info().provenance.model
            assert server.value("saemonitor_requests_in_flight", model=model) == 1
            assert server.value("saemonitor_queue_tokens", model=model) > 0
        finally:
            release.set()
            waiting.join()
