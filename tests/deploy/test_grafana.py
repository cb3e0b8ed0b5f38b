"""The dashboard names only what a server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

from monitor.metrics import Metrics
from monitor.records import ClusterInfo, Severity, Stage

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/liveness.json"


def test_every_panel_asks_for_series_that_exist() -> None:
    cluster = ClusterInfo(
        cluster="weapons",
        title="Weapons",
        severity=Severity.CRITICAL,
        stages=tuple(Stage),
        latents=(),
        has_dense_head=False,
        aggregate="max",
        flag=0.0,
        alert=1.0,
        clear=-1.0,
        calibrated=False,
    )
    metrics = Metrics("tiny", [cluster])
    metrics.liveness.canary_judged("weapons", passed=True, deviation=0.0)
    metrics.liveness.watch_staleness(["weapons"], lambda cluster: False)
    drift = metrics.liveness.drift(["registered_l0"])
    drift.ratio("registered_l0", 1.0)
    drift.latents(up=0, down=0)
    drift.score_shift("weapons", 0.0)
    page = metrics.render().body.decode()
    exported = {re.split(r"[{ ]", line)[0] for line in page.splitlines() if line[:1] != "#"}
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        (target,) = panel["targets"]
        named = re.findall(r"saemonitor_\w+", target["expr"])
        assert named, panel["title"]
        assert set(named) <= exported, set(named) - exported
