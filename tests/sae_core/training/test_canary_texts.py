from __future__ import annotations

import numpy as np
import pytest

from sae_core.training.canary_texts import CANARIES, MARGIN, CanaryText, canary_rows
from sae_core.training.recipe import PLANS

IDS = ("drugs", "hate")
FLAG, ALERT = np.array([1.0, 10.0]), np.array([3.0, 20.0])


def rows(cluster: str | None, drugs: float, hate: float, said: list[str] | None = None) -> list:
    text = [CanaryText(cluster, "a text")]
    scores = np.array([[drugs, hate]])
    return canary_rows(IDS, text, scores, FLAG, ALERT, (said if said is not None else []).append)


@pytest.mark.parametrize(
    ("hate", "verdict"),
    [(12.5, "flag"), (20.0, "flag"), (22.4, "flag"), (22.5, "alert")],
)
def test_verdict_is_the_highest_that_is_reached_by_the_margin(hate: float, verdict: str) -> None:
    (row,) = rows("hate", 0.0, hate)
    assert row == {
        "id": "canary-01",
        "text": "a text",
        "stage": "prompt",
        "verdict": verdict,
        "cluster": "hate",
    }


def test_what_another_cluster_raises_does_not_count() -> None:
    said: list[str] = []
    assert rows("hate", 9.0, 12.4, said) == []
    assert said == ["left out, as hate hardly raises it: a text"]
    assert rows("fraud", 9.0, 30.0) == []


def test_benign_one_must_lie_clearly_below_every_flag() -> None:
    (row,) = rows(None, 0.5, 7.5)
    assert row["verdict"] == "pass"
    assert "cluster" not in row
    said: list[str] = []
    assert rows(None, 0.51, 0.0, said) == []
    assert said == ["left out, as something nearly raises it: a text"]


def test_numbers_of_ids_have_no_gaps() -> None:
    texts = [CanaryText("hate", "a"), CanaryText("hate", "b"), CanaryText(None, "c")]
    scores = np.array([[0.0, 0.0], [0.0, 30.0], [0.0, 0.0]])
    found = canary_rows(IDS, texts, scores, FLAG, ALERT)
    assert [(row["id"], row["text"]) for row in found] == [("canary-01", "b"), ("canary-02", "c")]


def test_every_cluster_of_the_recipe_has_canaries() -> None:
    assert 0 < MARGIN < 1
    assert {canary.cluster for canary in CANARIES} - {None} == {plan.id for plan in PLANS}
    assert len({canary.text for canary in CANARIES}) == len(CANARIES)
