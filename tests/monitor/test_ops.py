from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from monitor.metrics import Metrics
from monitor.ops import ComponentState, ops_app
from monitor.records import Stage


class FakeServer:
    def __init__(self) -> None:
        self.loaded = False
        self.engine_alive = True

    def ready(self) -> list[ComponentState]:
        reason = "" if self.loaded else "still loading"
        return [
            ComponentState(component="registry", ready=True),
            ComponentState(component="model", ready=self.loaded, reason=reason),
        ]

    def live(self) -> list[ComponentState]:
        return [ComponentState(component="engine", ready=self.engine_alive, reason="died")]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny")


@pytest.fixture
async def http(server: FakeServer, metrics: Metrics) -> AsyncIterator[httpx.AsyncClient]:
    app = ops_app(metrics, ready=server.ready, live=server.live)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://ops") as client:
        yield client


async def test_readyz_is_503_with_the_reason_until_everything_is_ready(
    http: httpx.AsyncClient, server: FakeServer
) -> None:
    answer = await http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {
        "ready": False,
        "components": [
            {"component": "registry", "ready": True, "reason": ""},
            {"component": "model", "ready": False, "reason": "still loading"},
        ],
    }
    server.loaded = True
    answer = await http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["ready"] is True


async def test_livez_does_not_wait_for_readiness_but_for_the_engine(
    http: httpx.AsyncClient, server: FakeServer
) -> None:
    assert (await http.get("/livez")).status_code == 200
    server.engine_alive = False
    answer = await http.get("/livez")
    assert answer.status_code == 503
    assert answer.json()["components"][0]["reason"] == "died"


async def test_metrics_come_in_the_format_that_is_asked_for(
    http: httpx.AsyncClient, metrics: Metrics
) -> None:
    metrics.tokens_scored(Stage.PROMPT, 41)
    plain = await http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'saemonitor_tokens_scored_total{model="tiny",stage="prompt"} 41.0' in plain.text
    openmetrics = await http.get(
        "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_there_is_nothing_else(http: httpx.AsyncClient) -> None:
    assert (await http.get("/")).status_code == 404
    assert (await http.post("/metrics")).status_code == 405
