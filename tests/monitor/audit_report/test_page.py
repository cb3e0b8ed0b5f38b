from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright import sync_api as playwright

from monitor.audit_log.query import trace_of
from monitor.audit_log.schema import database_path
from monitor.records import Verdict
from tests.monitor.audit_report.conftest import IMAGE, OVERRIDE, SCRIPT, Log, Run
from tests.monitor.what_if.conftest import AGGREGATES, FUSION


def test_the_page_allows_its_own_style_and_script_and_asks_nobody(page: Path) -> None:
    text = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy[1]
    for forbidden in ("<link", " style=", "http:", "https:", "url(", " onclick="):
        assert forbidden not in text, forbidden
    assert text.count("<script") == 2  # the data, and ours


def test_texts_of_the_log_are_only_text(page: Path) -> None:
    text = page.read_text()
    for hostile in (SCRIPT, IMAGE, *OVERRIDE[::8], "\x00", "\x1b"):
        assert hostile not in text
    assert "&lt;script&gt;document.title" in text
    assert "⟨U+202E⟩gnp.exe⟨U+2066⟩" in text
    assert "{{7*7}}" in text
    assert "日本語" in text


def test_the_page_says_what_the_log_holds(page: Path, log: Log) -> None:
    text = page.read_text()
    for verdict in Verdict:
        assert f"</span>{verdict} {len(log.of(verdict))}" in text
    received = sum(d.coverage.received for d in log.decisions)
    scored = sum(d.coverage.scored for d in log.decisions)
    assert f"{scored:,} of {received:,} tokens were scored" in text
    assert "100 records hold" in text
    assert "Under many@2" in text
    assert "rolling appears: <span" in text
    for decision in (log.older, log.newer):
        assert f"{decision.decision_id}, alert, " in text
    assert "asked for</th><td>chat 100 (queued as prompt)</td>" in text
    assert "level scores keeps neither texts nor ids" in text


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: playwright.Browser, page: Path) -> Iterator[playwright.Page]:
    """The page in a browser that must not complain, or ask for anything else."""
    problems: list[str] = []
    asked: list[str] = []
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: problems.append(dialog.message))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    yield tab
    assert tab.title().startswith("Audit report")
    tab.close()
    assert problems == []
    assert asked == [page.as_uri()]


def test_a_clicked_token_shows_its_scores_and_latents(opened: playwright.Page, log: Log) -> None:
    decision = log.older
    section = opened.locator(".decision", has_text=f"{decision.decision_id}, alert")
    detail = section.locator(".detail")
    assert detail.inner_text().strip() == ""
    section.locator(".t").nth(4).click()
    shown = detail.inner_text()
    assert f"Token 4 {SCRIPT}" in shown
    trace = trace_of(log.url, decision.decision_id)
    assert trace is not None
    row = next(i for i, c in enumerate(decision.clusters) if c.attribution is not None)
    logits = trace.trace.logits[:, row]
    scored = next(i for i, x in enumerate(logits) if x[0] == x[0])
    name = decision.clusters[row].cluster
    section.locator("select").select_option(label=name)
    section.locator(".t").nth(scored).click()
    line = detail.locator("tr", has_text=name).first.inner_text().split()
    assert [float(x) for x in line[-3:]] == pytest.approx(logits[scored].tolist(), abs=0.006)
    section.locator(".t").nth(4).hover()
    assert "latents active here" in detail.inner_text()
    assert "2.50" in detail.inner_text()


def test_a_clicked_token_shows_what_each_latent_gave_to_it(
    opened: playwright.Page, log: Log
) -> None:
    decision = log.newer
    row = next(i for i, c in enumerate(decision.clusters) if c.attribution is not None)
    name = decision.clusters[row].cluster
    trace = trace_of(log.url, decision.decision_id)
    assert trace is not None
    scored = [i for i, x in enumerate(trace.trace.logits[:, row, 2]) if x == x]
    section = opened.locator(".decision", has_text=f"{decision.decision_id}, alert")
    for position in (scored[0], scored[-1]):
        section.locator(".t").nth(position).click()
        table = section.locator(".detail table", has_text=f"latents of {name} here")
        shown = {
            line.split()[0]: line.split()[-2:] for line in table.locator("tr").all_inner_texts()[1:]
        }
        share = FUSION["sae"] * float(trace.trace.logits[position, row, 2])
        assert float(shown[f"l1/{row}"][0]) == pytest.approx(share, abs=0.01)
        assert shown["l1/77"] == ["-0.25", "-0.25"]
        assert shown[f"l1/{row}"][1] == "2.50"


def test_tokens_are_reached_by_the_keyboard(opened: playwright.Page) -> None:
    section = opened.locator(".decision").nth(1)
    tokens = section.locator(".t")
    tokens.first.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert tokens.nth(2).evaluate("token => token === document.activeElement")
    assert section.locator(".detail").inner_text().startswith("Token 2")
    opened.keyboard.press("End")
    last = tokens.count() - 1
    assert section.locator(".detail").inner_text().startswith(f"Token {last}")
    assert section.locator(".t.at").count() == 1


def test_a_clicked_cluster_shows_its_charts_and_latents(opened: playwright.Page) -> None:
    opened.get_by_role("button", name="highest", exact=True).click()
    assert opened.locator(".cluster:visible").count() == 1
    shown = opened.locator(".cluster:visible")
    assert shown.locator("h3").inner_text().startswith("highest")
    assert shown.locator("svg").count() == 2
    assert "l1/2" in shown.inner_text()
    opened.get_by_role("button", name="mean", exact=True).press("Enter")
    assert opened.locator(".cluster:visible h3").inner_text().startswith("mean")


def test_the_shade_follows_the_cluster_that_is_chosen(opened: playwright.Page) -> None:
    section = opened.locator(".decision").first

    def shades() -> list[str]:
        found: list[str] = section.locator(".t").evaluate_all(
            "all => all.map(t => [...t.classList].find(c => /^h\\d$/.test(c)))"
        )
        return found

    seen = set()
    for name in ("rolling", "mean", "highest", "top"):
        section.locator("select").select_option(label=name)
        seen.add(tuple(shades()))
    assert len(seen) > 1


def test_nothing_is_wider_than_a_telephone_and_print_shows_every_cluster(
    opened: playwright.Page,
) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    opened.emulate_media(media="print")
    assert opened.locator(".cluster:visible").count() == len(AGGREGATES)


def test_without_keys_there_are_positions_and_no_texts(log: Log, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    code, output = run("--audit", log.url, "--out", path)
    assert code == 0, output
    text = path.read_text()
    assert "مرحبا" not in text
    assert "expected a key ring that has it" in text
    assert "none given: no thresholds" in text
    assert text.count('<span class="t ') > 10


def test_a_chain_that_does_not_hold_is_on_the_page_and_exit_code_1(
    log: Log, run: Run, tmp_path: Path
) -> None:
    copy, path = tmp_path / "copy.db", tmp_path / "report.html"
    shutil.copy(database_path(log.url), copy)
    with sqlite3.connect(copy) as database:
        database.execute("UPDATE audit_records SET verdict = 'flag' WHERE sequence = 20")
    database.close()
    code, output = run("--audit", f"sqlite:///{copy}", "--out", path)
    assert code == 1
    assert "column verdict" in output
    assert "does not hold: chain &#39;main&#39;, record 20" in path.read_text()


def test_a_chosen_decision_and_a_span_of_time(log: Log, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    chosen = log.of(Verdict.PASS)[0].decision_id
    since = ("--since", "2025-11-25", "--until", "2025-11-26")
    code, output = run("--audit", log.url, "--out", path, "--decision", chosen, *since)
    assert code == 0, output
    text = path.read_text()
    assert f"{chosen}, pass" in text
    assert text.count('<section class="decision">') == 1
    counted = re.search(r"decisions</th><td>(\d+), 2025-11-25T", text)
    assert counted is not None
    assert 0 < int(counted[1]) < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decision", "nobody"), "found none of id 'nobody'"),
        (("--since", "2031-01-01"), "found no decision of that time"),
        (("--compare-bundle", "default"), "expected --bundle with it"),
        (("--keys-file", "missing"), "missing: cannot be read"),
    ],
)
def test_what_cannot_be_reported_is_exit_code_2(
    log: Log, run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "report.html"
    code, output = run("--audit", log.url, "--out", path, *arguments)
    assert code == 2
    assert message in output
    assert not path.exists()


def test_plots_are_pictures_of_the_same(log: Log, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = ("--audit", log.url, "--bundle", log.bundle.folder, "--keys-file", log.keys_file)
    code, output = run(*given, "--out", tmp_path / "r.html", "--plots", tmp_path / "plots")
    assert code == 0, output
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    heats = ["tokens-1.png", "tokens-2.png", "tokens-3.png"]
    assert names == ["alerts.png", "coverage.png", "scores.png", *heats, "traffic.png"]
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 4000
