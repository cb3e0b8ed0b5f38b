"""The wire for operators: /metrics, /livez and /readyz over HTTP.

Liveness is about this process only (event loop, engine thread); readiness is about everything a
request needs. Neither waits for the engine's queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from monitor.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentState:
    """Whether one part of the server is in order, and why not."""

    component: str
    ready: bool
    reason: str = ""
    """Empty where it is ready."""


def ops_app(
    metrics: Metrics,
    *,
    ready: Callable[[], Sequence[ComponentState]],
    live: Callable[[], Sequence[ComponentState]],
) -> Starlette:
    """The app; `ready` and `live` are asked at every request and must not block."""

    async def scrape(request: Request) -> Response:
        page = metrics.render(request.headers.get("accept", ""))
        return Response(page.body, headers={"content-type": page.content_type})

    async def livez(request: Request) -> Response:
        return _answer("live", live())

    async def readyz(request: Request) -> Response:
        return _answer("ready", ready())

    return Starlette(
        routes=[
            Route("/metrics", scrape),
            Route("/livez", livez),
            Route("/readyz", readyz),
        ]
    )


def _answer(claim: str, states: Sequence[ComponentState]) -> JSONResponse:
    holds = all(state.ready for state in states)
    body = {claim: holds, "components": [asdict(state) for state in states]}
    return JSONResponse(body, status_code=200 if holds else 503)
