"""Live traffic beside its calibration, through a real server: like traffic, other traffic, back."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitor.bundle import load_bundle
from monitor.cli.app import app
from monitor.client import AsyncMonitorClient, MonitorClient
from monitor.errors import BundleError
from monitor.testing import NEUTRAL_TEXTS

WORDS = " ".join(NEUTRAL_TEXTS).split()
LABELS = {"model": "tiny/gemma3"}
WINDOW = 100


def calm_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 20))) for _ in range(n)]


@pytest.fixture(scope="module")
def calibrated(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated copy of the tiny bundle, with a baseline."""
    folder = tmp_path_factory.mktemp("drift")
    rows = folder / "benign.jsonl"
    lines = [json.dumps({"text": t, "label": "benign"}) + "\n" for t in calm_texts(600, 0)]
    rows.write_text("".join(lines))
    out = folder / "calibrated"
    command = ["calibrate", "--bundle", str(tiny_bundle), "--data", str(rows), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--work", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return out


def send(server: Any, texts: Sequence[str]) -> None:
    async def every() -> None:
        async with AsyncMonitorClient(server.address) as client:
            await asyncio.gather(*(client.score(text=text, timeout=60) for text in texts))

    asyncio.run(every())


def outside(server: Any, signal: str) -> float:
    return float(server.value("saemonitor_drift_outside_bounds", signal=signal, **LABELS))


def test_like_traffic_stays_and_other_traffic_leaves_and_returns(
    calibrated: Path, serve: Any
) -> None:
    settings = {"drift_window": WINDOW, "drift_sample_share": 1.0}
    with serve(calibrated, **settings) as server, server.client() as client:
        signals = ("latents", "registered_l0", "l0:l1", "fvu:l1", "scores", "flag_rate")
        send(server, calm_texts(WINDOW, 1))
        assert server.value("saemonitor_drift_windows_total", **LABELS) == 1
        assert {s: outside(server, s) for s in signals} == dict.fromkeys(signals, 0)
        assert client.info().stale_clusters == ()
        assert server.value("saemonitor_drift_ratio", signal="fvu:l1", **LABELS) == (
            pytest.approx(1.0, abs=0.25)
        )

        send(server, ["attack"] * WINDOW)
        assert outside(server, "scores") == outside(server, "alert_rate") == 1
        assert "danger" in client.info().stale_clusters
        reasons = " ".join(client.cluster("danger").stale_reasons)
        assert "scores: population stability index" in reasons
        assert "rate: " in reasons
        assert client.score(text="bread").clusters[0].stale

        # The reply above is one of the next window.
        send(server, calm_texts(WINDOW - 1, 2))
        assert "danger" in client.info().stale_clusters  # one calm window is not enough
        send(server, calm_texts(WINDOW, 3))
        assert client.info().stale_clusters == ()


def test_a_latent_that_goes_silent_is_found_in_live_traffic(calibrated: Path, serve: Any) -> None:
    with serve(calibrated, drift_window=WINDOW) as server, server.client() as client:
        rates = {t.latent_id: t.baseline_rate for t in client.cluster("quiet").latents}
        silent = max(rates, key=lambda latent: rates[latent] or 0.0)
        scorer = server.server.pipeline.served.scorer
        column = scorer.heads.latents.index(("l1", silent))
        encode = scorer.readings["l1"].encode

        def without(x: Any) -> Any:
            acts = encode(x)
            acts[:, column] = 0
            return acts

        scorer.readings = {"l1": scorer.readings["l1"]._replace(encode=without)}
        send(server, calm_texts(2 * WINDOW, 5))
        assert outside(server, "latents") == 1
        assert server.value("saemonitor_drift_latents", direction="down", **LABELS) == 1
        latents = client.cluster("quiet").latents
        assert {t.latent_id: t.live_rate == 0 for t in latents}[silent]
        assert any(t.live_rate for t in latents)
        found = {t.latent_id: t.drift for t in latents}
        assert found == {latent: -1 if latent == silent else 0 for latent in rates}


def test_rates_are_looked_at_after_every_decision(calibrated: Path, serve: Any) -> None:
    with serve(calibrated, drift_window=10_000) as server, server.client() as client:
        send(server, ["attack"] * 20)
        assert server.value("saemonitor_drift_windows_total", **LABELS) == 0
        (reason,) = client.cluster("danger").stale_reasons
        assert reason.startswith("rate: ")
        assert "calibrated below" in reason


def test_replies_say_how_unusual_a_text_is_and_verdicts_do_not_depend_on_it(
    calibrated: Path, serve: Any
) -> None:
    with serve(calibrated, drift_sample_share=1.0) as server, server.client() as client:
        anomaly = client.score(text=calm_texts(1, 4)[0]).anomaly
        assert anomaly is not None
        for name in ("registered_l0", "distance", "l0", "fvu"):
            assert abs(getattr(anomaly, name)) < 6, name
        odd = client.score(text="zq 77 xx " * 12)
        assert odd.verdict.value == "pass"
        with client.stream(stage="completion") as stream:
            for piece in ("what is the ", "weather like ", "today in the north"):
                stream.send(text=piece)
            streamed = stream.finish().anomaly
        assert streamed is not None
        assert streamed.fvu is not None
        count = server.value("saemonitor_anomaly_zscore_bucket", signal="fvu", le="+Inf", **LABELS)
        assert count == 3


def test_what_is_not_sampled_is_not_measured(calibrated: Path, serve: Any) -> None:
    with serve(calibrated, drift_sample_share=0.0) as server, server.client() as client:
        anomaly = client.score(text="bake bread").anomaly
        assert anomaly is not None
        assert anomaly.registered_l0 is not None
        assert (anomaly.l0, anomaly.fvu) == (None, None)


def test_the_registry_shows_each_latent_s_rate(calibrated: Path, serve: Any) -> None:
    with serve(calibrated) as server, server.client() as client:
        latents = client.cluster("quiet").latents
        rates = [latent.baseline_rate for latent in latents]
        assert all(rate is not None and 0 <= rate <= 1 for rate in rates)
        assert any(rates)
        assert {(latent.drift, latent.live_rate) for latent in latents} == {(0, None)}


def test_without_a_baseline_nothing_is_compared(shared_server: Any, client: MonitorClient) -> None:
    assert client.score(text="bread").anomaly is None
    page = shared_server.run(lambda: shared_server.server.metrics.render().body.decode())
    assert "saemonitor_drift_" not in page
    assert "saemonitor_anomaly_" not in page


def test_a_damaged_baseline_is_named(calibrated: Path, tmp_path: Path, serve: Any) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "damaged"))
    (folder / "MANIFEST.json").unlink()
    path = folder / "calibration/default.json"
    artefact = json.loads(path.read_text())
    artefact["baseline"]["schema"] = 7
    path.write_text(json.dumps(artefact))
    assert load_bundle(folder)
    said = "calibration/default.json: baseline: schema: found 7, expected 1"
    with pytest.raises(BundleError, match=said), serve(folder):
        pass
