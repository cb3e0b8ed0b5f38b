"""The command on planted data: figures that are known beforehand, and bad input named."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitor.cli.app import app
from monitor.evaluation.result import SCHEMA, EvaluationResult
from monitor.testing import NEUTRAL_TEXTS
from sae_core.evaluation.perturbations import BATTERY

WORDS = " ".join(NEUTRAL_TEXTS).split()
N_CAUGHT, N_MISSED, N_CALM, N_HARD = 18, 2, 36, 4


def planted_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Harmful rows have the trigger word but two; benign ones do not, but the hard ones."""
    rng = random.Random(seed)

    def text(trigger: bool) -> str:
        words = rng.choices(WORDS, k=rng.randint(5, 14))
        return " ".join([*words, "danger", *rng.choices(WORDS, k=3)] if trigger else words)

    def row(trigger: bool, **said: str) -> dict[str, Any]:
        return {"text": text(trigger), **said}

    harm = {"label": "harmful", "category": "danger"}
    return [
        *(row(True, **harm, source=f"risky_{i % 3}", kind="prompt") for i in range(N_CAUGHT)),
        *(row(False, **harm, source="risky_0", kind="completion") for _ in range(N_MISSED)),
        *(
            row(False, label="benign", category="benign_general", source=f"calm_{i % 2}", kind=kind)
            for i, kind in enumerate(["prompt", "completion"] * (N_CALM // 2))
        ),
        *(
            row(True, label="benign", category="benign_hard", source="calm_0", kind="prompt")
            for _ in range(N_HARD)
        ),
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    return write_rows(work / "rows.jsonl", planted_rows())


@pytest.fixture(scope="module")
def html(work: Path) -> Path:
    return work / "report.html"


@pytest.fixture(scope="module")
def result(tiny_bundle: Path, work: Path, data: Path, html: Path) -> EvaluationResult:
    """What one run of the command wrote, with everything in it but left-out sources."""
    train = write_rows(work / "train.jsonl", planted_rows(seed=1))
    out = work / "result.json"
    code, output = run(
        *("--bundle", tiny_bundle, "--data", data, "--train", train, "--work", work),
        *("--json", out, "--html", html, "--bootstrap", 100, "--robustness-rows", 20),
    )
    assert code == 0, output
    return EvaluationResult.model_validate_json(out.read_text())


def test_verdict_rates_are_those_that_were_planted(result: EvaluationResult) -> None:
    raised = {(r.rows, r.verdict): (r.n_raised, r.n) for r in result.verdicts}
    assert raised[("harmful", "flag")] == (N_CAUGHT, N_CAUGHT + N_MISSED)
    assert raised[("benign", "alert")] == (N_HARD, N_CALM + N_HARD)
    assert raised[("benign_hard", "flag")] == (N_HARD, N_HARD)
    assert raised[("benign_general", "flag")] == (0, N_CALM)
    assert all(r.claimed is None and r.standing is None for r in result.verdicts)


def test_figures_stand_beside_the_baselines(result: EvaluationResult) -> None:
    scores = result.overall.scores
    assert set(scores) == {"fused", "dense", "sae", "tfidf", "keywords", "length"}
    caught, hard = N_CAUGHT / (N_CAUGHT + N_MISSED), N_HARD / (N_CALM + N_HARD)
    # All with the trigger outscore all without; among those with it the order is the model's.
    low = caught * (1 - hard)
    assert low <= scores["fused"].auroc[0] <= low + caught * hard + (1 - caught)
    assert scores["fused"].auroc[0] > scores["length"].auroc[0]
    assert scores["fused"].tpr_at_1pct is None  # 40 benign rows carry no rate of 1 %
    pairs = {(d.score, d.minus) for d in result.overall.differences}
    assert ("fused", "tfidf") in pairs


def test_clusters_kinds_and_sources_are_apart(result: EvaluationResult) -> None:
    assert set(result.clusters) == {"danger"}
    assert result.absent == {"cluster quiet": "no harmful row of category quiet in its stages"}
    assert set(result.kinds) == {"prompt", "completion"}
    assert result.kinds["completion"].n_harmful == N_MISSED
    assert set(result.sources) == {"calm_0", "calm_1", "risky_0", "risky_1", "risky_2"}
    assert result.sources["calm_1"].question is None
    assert result.sources["risky_1"].question is not None
    assert result.sources["risky_1"].question.n_benign == N_CALM + N_HARD


def test_disguises_that_hide_the_word_are_seen(result: EvaluationResult) -> None:
    assert result.battery is not None
    assert set(result.battery.disguises) == set(BATTERY)
    hidden = result.battery.disguises["base64"].clusters["danger"]
    padded = result.battery.disguises["padded_front"].clusters["danger"]
    assert hidden.tpr_change < -0.5
    assert hidden.score_change < 0
    assert padded.tpr == pytest.approx(N_CAUGHT / (N_CAUGHT + N_MISSED))


def test_delay_counts_tokens_of_caught_rows(result: EvaluationResult) -> None:
    delay = result.delay["alert"]
    assert (delay.n_caught, delay.n) == (N_CAUGHT, N_CAUGHT + N_MISSED)
    assert delay.median_tokens is not None
    assert 1 < delay.median_tokens < 100
    assert list(delay.caught_within.values()) == sorted(delay.caught_within.values())


def test_worst_rows_are_named_by_place(result: EvaluationResult, data: Path) -> None:
    misses = {example.place for example in result.worst.misses}
    lines = range(N_CAUGHT + 1, N_CAUGHT + N_MISSED + 1)
    assert misses == {f"{data} line {n}" for n in lines}
    alarms = result.worst.false_alarms
    assert len(alarms) == N_HARD
    assert {a.cluster for a in alarms} == {"danger"}
    assert [a.overall for a in alarms] == sorted((a.overall or 0 for a in alarms), reverse=True)


def test_cost_is_of_all_rows(result: EvaluationResult) -> None:
    assert result.cost.n_texts == len(planted_rows())
    assert result.cost.n_tokens > 5 * result.cost.n_texts
    assert result.cost.ms_per_text > 0


def test_a_second_run_says_the_same(
    tiny_bundle: Path, work: Path, data: Path, tmp_path: Path, result: EvaluationResult
) -> None:
    code, output = run(
        *("--bundle", tiny_bundle, "--data", data, "--train", work / "train.jsonl"),
        *("--work", work, "--json", tmp_path / "again.json"),
        *("--bootstrap", 100, "--robustness-rows", 20),
    )
    assert code == 0, output
    again = EvaluationResult.model_validate_json((tmp_path / "again.json").read_text())
    for name in ("overall", "clusters", "verdicts", "battery", "delay", "worst", "sources"):
        assert getattr(again, name) == getattr(result, name)


def test_sources_are_left_out_one_by_one(tiny_bundle: Path, work: Path, data: Path) -> None:
    code, output = run(
        *("--bundle", tiny_bundle, "--data", data, "--work", work, "--json", "-"),
        *("--bootstrap", 20, "--robustness-rows", 0, "--leave-one-source-out"),
    )
    assert code == 0, output
    found = EvaluationResult.model_validate_json(output[output.index("{") :])
    assert found.battery is None
    assert found.unseen is not None
    assert set(found.unseen.sources) == set(found.sources)
    fused = found.unseen.overall.scores["fused"].auroc[0]
    assert fused > 0.7  # two of twenty have nothing to find, four benign rows have the word
    assert found.unseen.sources["calm_1"].verdicts[0].n == N_CALM // 2


def test_the_schema_is_printed() -> None:
    code, output = run("--schema")
    schema = json.loads(output)
    assert code == 0
    assert schema["properties"]["schema"]["default"] == SCHEMA
    figures = schema["$defs"]["ScoreFigures"]["properties"]["tpr_at_1pct"]
    assert figures["description"].startswith("True-positive rate where at most 1 %")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "bread", "label": "bad"}', "line 2: label is 'bad', expected harmful or benign"),
        ('{"text": "", "label": "benign"}', "line 2: text is '', expected visible characters"),
        ('{"text": "a", "label": "benign", "kind": "poem"}', "line 2: kind is 'poem'"),
        ('{"text": "a", "label": "benign", "source": 3}', "line 2: source is 3, expected text"),
        ("[1]", "line 2: found list, expected an object"),
        ("{", "line 2: found no JSON"),
    ],
)
def test_a_bad_line_is_named(tiny_bundle: Path, tmp_path: Path, line: str, said: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "bread", "label": "benign"}) + "\n" + line + "\n")
    code, output = run("--bundle", tiny_bundle, "--data", rows, "--work", tmp_path)
    assert code == 2
    assert said in output.replace("\n", "")


def test_one_label_alone_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [row for row in planted_rows() if row["label"] == "benign"]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    code, output = run("--bundle", tiny_bundle, "--data", data, "--work", tmp_path)
    assert code == 2
    assert "found no harmful row in 40, expected both labels" in output.replace("\n", "")


def test_rows_without_a_source_cannot_be_left_out(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "source"} for row in planted_rows()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    code, output = run(
        *("--bundle", tiny_bundle, "--data", data, "--work", tmp_path),
        *("--bootstrap", 5, "--robustness-rows", 0, "--leave-one-source-out"),
    )
    assert code == 2
    assert "rows.jsonl line 1: found no source, expected one" in output.replace("\n", "")


def test_nothing_is_half_written_where_the_folder_lacks(tiny_bundle: Path, data: Path) -> None:
    code, output = run("--bundle", tiny_bundle, "--data", data, "--json", "/nowhere/out.json")
    assert code == 2
    assert "--json: found no folder" in output
    assert not os.path.exists("/nowhere")


def test_the_page_asks_nobody_and_runs_nothing(result: EvaluationResult, html: Path) -> None:
    text = html.read_text()
    assert "default-src 'none'" in text
    assert "unsafe" not in text
    for forbidden in ("<script", "<link", " style=", " src=", "http:", "https:", "url("):
        assert forbidden not in text, forbidden
    assert text.count("<svg") == 2  # ROC curves, one cluster


def test_the_page_shows_what_the_result_says(result: EvaluationResult, html: Path) -> None:
    text = html.read_text()
    for name in ("Worst misses", "Worst false alarms", "Disguises", "padded_front", "danger"):
        assert name in text
    assert f"{result.overall.scores['fused'].auroc[0]:.3f}" in text
    assert text.count('class="strip"') == N_MISSED + N_HARD


def test_texts_of_the_data_are_only_text(tiny_bundle: Path, work: Path, tmp_path: Path) -> None:
    attack = "<script>danger</script><img src=x onerror=danger()>"
    rows = [*planted_rows(), {"text": attack, "label": "benign", "source": "<b>s</b>"}]
    data, page = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "page.html"
    code, output = run(
        *("--bundle", tiny_bundle, "--data", data, "--work", work, "--html", page),
        *("--bootstrap", 5, "--robustness-rows", 0),
    )
    assert code == 0, output
    text = page.read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>s" not in text
    assert "&lt;b&gt;s" in text


def test_a_browser_renders_the_page_under_its_policy(
    result: EvaluationResult, html: Path, chromium: Path, tmp_path: Path
) -> None:
    shot, profile = tmp_path / "page.png", tmp_path / "profile"
    done = subprocess.run(
        [
            *(str(chromium), "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", f"--user-data-dir={profile}", "--enable-logging=stderr"),
            *("--window-size=1200,2400", f"--screenshot={shot}", "--v=0", html.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Content Security Policy" not in done.stderr
    assert "Refused to" not in done.stderr
    assert shot.stat().st_size > 20_000  # an unstyled or empty page compresses to less
