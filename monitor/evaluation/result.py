"""What an evaluation says, as JSON. `sae-monitor evaluate --schema` prints this as a JSON schema.

The version in `schema` changes where a field goes or changes its meaning; new fields may come
without that. Scores are named `fused`, `dense`, `sae`, and the baselines `tfidf`, `keywords`,
`length`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = "saemonitor.evaluation/1"
Interval = tuple[float, float, float]
"""Value, and the lower and upper end of its 95 % interval."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Setting(_Data):
    """What was evaluated and how."""

    bundle: str
    """name@version."""
    bundle_digest: str
    model: str
    model_digest: str
    dtype: str
    backend: str
    policy: str
    server_version: str
    date: str
    n_resamples: int
    """Bootstrap resamples, harmful and benign rows drawn apart, the same for every score."""
    seed: int
    with_prompts: bool
    """Whether completions were read after their prompts, which then do not count themselves."""


class DataFile(_Data):
    """One file of rows."""

    file: str
    digest: str
    """sha256 over texts, labels and prompts in order."""
    n_harmful: int
    n_benign: int


class ScoreFigures(_Data):
    """How well one score tells harmful from benign rows."""

    auroc: Interval
    auprc: Interval
    """Average precision; depends on the share of harmful rows."""
    tpr_at_1pct: Interval | None
    """True-positive rate where at most 1 % of benign rows are raised; null below 300 of them."""
    tpr_at_01pct: Interval | None
    """The same at 0.1 %; null below 3,000 benign rows."""


class DifferenceFigures(_Data):
    """Figures of one score minus those of another, on the same resamples."""

    score: str
    minus: str
    auroc: Interval
    tpr_at_1pct: Interval | None
    is_better: bool
    """Whether the whole interval of AUROC's difference lies above 0."""


class Question(_Data):
    """Every score on the same rows."""

    n_harmful: int
    n_benign: int
    scores: dict[str, ScoreFigures]
    differences: list[DifferenceFigures]


class VerdictRate(_Data):
    """How many of some rows the policy raises."""

    rows: str
    """benign, benign_hard, benign_general, harmful, or a source or kind with its label."""
    verdict: Literal["flag", "alert"]
    """flag counts flagged and alerted rows."""
    n: int
    n_raised: int
    rate: float
    low: float
    high: float
    """Two-sided 95 % Clopper-Pearson interval."""
    claimed: float | None
    """The bundle's calibrated target for benign rows; null where it claims none."""
    standing: Literal["within", "above", "open"] | None
    """The interval against the claim: all within, all above, or too few rows to say."""


class SourceFigures(_Data):
    """One data set: its harmful rows against all benign rows of the data, and its own verdicts."""

    n_harmful: int
    n_benign: int
    question: Question | None
    """null without harmful rows."""
    verdicts: list[VerdictRate]


class Cost(_Data):
    """What scoring took when it was computed; rows from the cache count as then."""

    n_texts: int
    n_tokens: int
    """Read by the model, BOS included."""
    tokens_per_text: float
    ms_per_text: float
    """Forward pass, SAEs and heads; its share of batches."""
    ms_per_1000_tokens: float
    baseline_ms_per_text: dict[str, float]


class Fragility(_Data):
    """What a disguise does to one cluster (or, as `overall`, to the policy)."""

    n: int
    """Harmful rows that were disguised."""
    tpr: float
    """Share at or above the flag threshold as they are."""
    tpr_disguised: float
    tpr_change: float
    score_change: float
    """Change of the mean score; logits, for `overall` on the scale of flag 0 and alert 1."""


class Disguise(_Data):
    """One of the battery."""

    clusters: dict[str, Fragility]
    """By cluster, and `overall`."""
    n_too_long: int
    """Rows left out because the model does not take them disguised."""
    n_benign: int
    benign_flagged: float | None
    """Share of benign rows flagged as they are; null without any."""
    benign_flagged_disguised: float | None


class Battery(_Data):
    """Seeded samples of the rows, disguised in ways that cost nothing."""

    seed: int
    disguises: dict[str, Disguise]


class DelayFigures(_Data):
    """Scored tokens that a stream had when a verdict came, of harmful rows."""

    n: int
    n_caught: int
    median_tokens: float | None
    p90_tokens: float | None
    median_share_of_text: float | None
    caught_within: dict[int, float]
    """Tokens -> share of all the rows that were caught by then."""


class Example(_Data):
    """One row that the policy got wrong; its text is where `place` says."""

    place: str
    source: str
    category: str
    cluster: str
    """The cluster that comes nearest to its thresholds, or is farthest above."""
    overall: float | None
    """0 at flag, 1 at alert; null where no token counted."""


class Worst(_Data):
    """The worst rows first."""

    misses: list[Example]
    false_alarms: list[Example]


class UnseenSource(_Data):
    """One data set under heads that were fitted without it."""

    n_harmful: int
    n_benign: int
    question: Question | None
    """Its harmful rows against all benign rows, each under heads that did not see its data set."""
    verdicts: list[VerdictRate]
    """Of its benign rows, under thresholds from the other data sets' benign rows."""


class Unseen(_Data):
    """Leave one source out: heads and fusion fitted anew for each, latents chosen anew."""

    overall: Question
    clusters: dict[str, Question]
    sources: dict[str, UnseenSource]


class EvaluationResult(_Data):
    """Everything an evaluation found."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    setting: Setting
    data: list[DataFile]
    train: list[DataFile]
    """What `tfidf` was trained on; empty where it is absent."""
    absent: dict[str, str]
    """What is missing from the figures, and why."""
    overall: Question
    """All harmful rows against all benign ones, by the policy's one number."""
    clusters: dict[str, Question]
    """Each cluster's positives against all benign rows, by its own score."""
    kinds: dict[str, Question]
    """prompt, completion, statement: as `overall`, of these rows alone."""
    sources: dict[str, SourceFigures]
    verdicts: list[VerdictRate]
    cost: Cost
    delay: dict[Literal["flag", "alert"], DelayFigures]
    battery: Battery | None
    worst: Worst
    unseen: Unseen | None
    """null without --leave-one-source-out."""
