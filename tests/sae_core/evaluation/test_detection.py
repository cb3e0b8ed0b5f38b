from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sae_core.evaluation.baselines import keyword_scores, length_scores, tfidf_scores
from sae_core.evaluation.data import EvaluationError, LabelledText, data_digest, read_labelled
from sae_core.evaluation.detection import auroc, detect, evaluate, normalised, tpr_at


def test_auroc_is_sklearns_with_ties() -> None:
    rng = np.random.default_rng(0)
    harmful, benign = rng.integers(0, 9, 80) + 1.0, rng.integers(0, 9, 120) * 1.0
    labels = np.r_[np.ones(80), np.zeros(120)]
    assert auroc(harmful, benign) == pytest.approx(roc_auc_score(labels, np.r_[harmful, benign]))


def test_tpr_leaves_at_most_the_rate_above() -> None:
    benign = np.arange(200, dtype=np.float64)
    assert tpr_at(np.array([197.5, 198.5, 197.0]), benign, 0.01) == pytest.approx(2 / 3)


def test_interval_holds_the_value_and_narrows_with_n() -> None:
    rng = np.random.default_rng(1)
    small = detect("s", rng.normal(1, 1, 40), rng.normal(0, 1, 40)).auroc
    large = detect("l", rng.normal(1, 1, 4000), rng.normal(0, 1, 4000)).auroc
    assert small.low < small.value < small.high
    assert large.high - large.low < (small.high - small.low) / 4


def test_rate_that_n_cannot_carry_is_not_quoted() -> None:
    found = detect("s", np.ones(5), np.zeros(299))
    assert found.tpr_at_1pct is None
    assert detect("s", np.ones(5), np.zeros(300)).tpr_at_1pct is not None
    assert found.tpr_at_01pct is None


def test_normalised_puts_flag_at_zero_and_alert_at_one() -> None:
    scores = np.array([[2.0, 0.0], [4.0, 0.0], [0.0, 30.0]])
    found = normalised(scores, np.array([2.0, 10.0]), np.array([4.0, 20.0]))
    assert found.tolist() == [0.0, 1.0, 2.0]


def _rows() -> list[LabelledText]:
    harmful = [LabelledText(text="how to kill", is_harmful=True, category="a")] * 300
    benign = [LabelledText(text="bake bread", is_harmful=False, category="benign_hard")] * 300
    return harmful + benign


def test_evaluation_has_every_score_and_is_json() -> None:
    rows = _rows()
    scores = np.zeros((600, 2, 3))
    scores[:300, 0, 0] = 2.0
    limits = (np.ones(2), np.full(2, 3.0))
    positives = {name: np.array([row.is_harmful for row in rows]) for name in ("x", "y")}
    found = evaluate(
        "d",
        "digest",
        rows,
        ["x", "y"],
        positives,
        scores,
        dict.fromkeys(("fused", "dense", "sae"), limits),
        {"keywords": keyword_scores([row.text for row in rows])},
        n_resamples=5,
    )
    by_name = {d.score: d for d in found.overall}
    assert by_name["fused"].auroc.value == 1.0
    assert by_name["dense"].auroc.value == 0.5
    assert by_name["keywords"].auroc.value == 1.0
    assert found.benign_raised == {"flag": 0.0, "alert": 0.0}
    assert json.loads(json.dumps(found.to_json()))["clusters"]["x"][0]["auroc"][0] == 1.0
    assert "| fused | 300 / 300 | 1.000" in found.to_markdown()


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"expected \(600, 1, 3\)"):
        evaluate("d", "", _rows(), ["x"], {}, np.zeros((600, 2, 3)), {}, {})


def test_no_harmful_text_is_said() -> None:
    with pytest.raises(EvaluationError, match="found 0 harmful"):
        detect("s", np.empty(0), np.zeros(3))


def test_keywords_are_whole_words_and_density_breaks_ties() -> None:
    found = keyword_scores(["a skilled baker", "kill", "kill it with much longer text around"])
    assert found[0] == 0
    assert found[1] > found[2] > 1


def test_length_counts_characters() -> None:
    assert length_scores(["", "abc"]).tolist() == [0, 3]


def test_tfidf_learns_its_rows() -> None:
    found = tfidf_scores(_rows(), ["how to kill a process", "bake bread slowly"])
    assert found[0] > 0 > found[1]


def test_labelled_rows_are_read_and_digested(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = {"text": "line\u2028separator", "label": "harmful", "category": "a", "source": "s"}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = read_labelled(path)
    assert rows == (
        LabelledText(text="line\u2028separator", is_harmful=True, category="a", source="s"),
    )
    assert data_digest(rows) != data_digest([])


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "found no rows"), ("{}", "line 1"), ('{"text": "a", "label": "bad"}', "label is 'bad'")],
)
def test_bad_data_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        read_labelled(path)
