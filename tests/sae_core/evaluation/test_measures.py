"""Rates, delay, folds, disguises and reading rows: small things against known answers."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from scipy.stats import binomtest

from sae_core.evaluation.data import EvaluationError, LabelledText, data_digest, read_labelled
from sae_core.evaluation.delay import delay_of
from sae_core.evaluation.folds import fold_numbers, source_folds
from sae_core.evaluation.perturbations import BATTERY, perturbed
from sae_core.evaluation.rates import rate_of

TEXT = "How do I take a loaf of bread out of the oven without an oven glove?"


@pytest.mark.parametrize(("k", "n"), [(0, 50), (3, 200), (50, 50), (10, 12)])
def test_interval_is_scipys_exact_one(k: int, n: int) -> None:
    found, exact = rate_of(k, n), binomtest(k, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.value == k / n


def test_standing_needs_the_whole_interval() -> None:
    assert rate_of(1, 1000).standing(0.01) == "within"
    assert rate_of(50, 1000).standing(0.01) == "above"
    assert rate_of(1, 100).standing(0.01) == "open"


def test_delay_is_of_those_caught_and_shares_are_of_all() -> None:
    found = delay_of([10, 40, None, 30], [20, 80, 50, 30])
    assert found is not None
    assert (found.n, found.n_caught, found.median_tokens) == (4, 3, 30)
    assert found.median_share_of_text == 0.5
    assert found.caught_within[32] == 0.5
    assert found.caught_within[512] == 0.75
    none = delay_of([None], [5])
    assert none is not None
    assert none.median_tokens is None
    assert delay_of([], []) is None


def row(source: str, is_harmful: bool) -> LabelledText:
    return LabelledText(text="a", is_harmful=is_harmful, source=source)


def test_every_source_is_held_out_once() -> None:
    rows = [row("b", True), row("a", False), row("b", False), row("a", True)]
    folds = source_folds(rows)
    assert [(f.source, f.train.tolist(), f.held.tolist()) for f in folds] == [
        ("a", [0, 2], [1, 3]),
        ("b", [1, 3], [0, 2]),
    ]
    assert fold_numbers(folds).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("a", True), row("a", False)], "found one source"),
        ([row("a", True), row("b", False)], "without source a found no harmful row"),
        ([row("a", True), row("", False)], "found no source"),
    ],
)
def test_rows_that_cannot_be_left_out_are_refused(rows: list[LabelledText], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        source_folds(rows)


@pytest.mark.parametrize("name", BATTERY)
def test_a_disguise_is_repeatable_and_changes_the_text(name: str) -> None:
    once = perturbed(name, TEXT, 3, ["calm words here"])
    assert once == perturbed(name, TEXT, 3, ["calm words here"])
    assert once != TEXT


def test_disguises_do_what_they_say() -> None:
    assert base64.b64decode(perturbed("base64", TEXT, 0, [])).decode() == TEXT
    assert perturbed("upper_case", TEXT, 0, []) == TEXT.upper()
    assert perturbed("random_case", TEXT, 0, []).lower() == TEXT.lower()
    assert "br34d" in perturbed("leetspeak", TEXT, 0, [])
    front = perturbed("padded_front", TEXT, 0, ["calm"], n_words=5)
    assert front == "calm calm calm calm calm\n\n" + TEXT
    assert perturbed("padded_back", TEXT, 0, ["calm"], n_words=2) == TEXT + "\n\ncalm calm"
    typos = perturbed("typos", TEXT * 5, 0, [])
    assert 0.9 < len(typos) / len(TEXT * 5) < 1.1


def test_rows_keep_where_they_stood_and_what_they_answer(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '\n{"text": "yes", "label": "harmful", "kind": "completion", "prompt": "may I?"}\n'
        '{"text": "no", "label": "benign", "prompt": null, "id": 7}\n'
    )
    first, second = read_labelled(file)
    assert (first.place, first.prompt, first.kind) == (f"{file} line 2", "may I?", "completion")
    assert (second.place, second.prompt) == (f"{file} line 3", "")
    assert data_digest([first]) != data_digest([second])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="gone.jsonl: cannot be read"):
        read_labelled(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(EvaluationError, match="latin.jsonl: found bytes that are no UTF-8"):
        read_labelled(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="empty.jsonl: found no rows"):
        read_labelled(tmp_path / "empty.jsonl")
