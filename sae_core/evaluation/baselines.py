"""What any monitor must beat: keywords, length, and TF-IDF with logistic regression."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sae_core.evaluation.data import EvaluationError, LabelledText

KEYWORDS = re.compile(
    r"\b(?:"
    r"kill|murder|stab|shoot|bomb|explosive|weapon|gun|rifle|grenade|poison|assassinat|massacre|"
    r"tortur|attack|assault|terroris|hostage|arson|nerve agent|sarin|anthrax|uranium|"
    r"hack|malware|ransomware|virus|trojan|keylog|exploit|phish|ddos|botnet|backdoor|rootkit|"
    r"spyware|sql injection|brute.force|crack|bypass|privilege escalation|reverse shell|payload|"
    r"steal|stolen|theft|rob|burglar|shoplift|counterfeit|forge|fraud|scam|launder|blackmail|"
    r"extort|brib|embezzl|ponzi|pyramid scheme|fake news|disinformation|misinformation|"
    r"propaganda|conspiracy|suicid|self.harm|cut(?:ting)? myself|kill myself|end my life|"
    r"overdos|anorexi|meth|cocaine|heroin|fentanyl|drug|porn|nude|sex|rap(?:e|ist)|molest|"
    r"erotic|blowjob|orgasm|racis|nazi|immigrant|muslim|jew|faggot|bitch|whore|slut|retard|"
    r"inferior|vermin|subhuman|disgusting|hate|doxx?|stalk|spy|home address|social security|"
    r"credit card|jailbr|do anything now|DAN|ignore (?:all |the |your )?previous|"
    r"no restrictions|unfiltered|uncensored|illegal|unethical|harmful|dangerous"
    r")\w*",
    re.IGNORECASE,
)
"""Word stems that an operator might list in an hour; from the risks, not from any data set."""


def keyword_scores(texts: Sequence[str]) -> Float64[ndarray, " n_texts"]:
    """Keyword hits of each text; among equals the denser text is higher."""
    hits = np.array([len(KEYWORDS.findall(text)) for text in texts], np.float64)
    words = np.array([len(text.split()) for text in texts], np.float64)
    return hits + np.minimum(hits / (words + 1.0), 0.999)


def length_scores(texts: Sequence[str]) -> Float64[ndarray, " n_texts"]:
    """Length in characters."""
    return np.array([len(text) for text in texts], np.float64)


def tfidf_scores(
    train: Sequence[LabelledText], texts: Sequence[str]
) -> Float64[ndarray, " n_texts"]:
    """TF-IDF of words and word pairs with logistic regression, trained on the same rows."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
    )
    model.fit([row.text for row in train], [row.is_harmful for row in train])
    return np.asarray(model.decision_function(list(texts)), np.float64)


class TfidfBaseline:
    """The same for several questions at once: one vocabulary, one regression a question."""

    def __init__(self, train: Sequence[LabelledText], texts: Sequence[str]) -> None:
        vectoriser = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        try:
            self._train = vectoriser.fit_transform([row.text for row in train])
        except ValueError as error:
            raise EvaluationError(f"TF-IDF: {error}, expected more training rows") from error
        self._texts = vectoriser.transform(list(texts))

    def scores(self, is_positive: Bool[ndarray, " n_train"]) -> Float64[ndarray, " n_texts"] | None:
        """Every text's score as one of these training rows; None where they are all or none.

        Rows that are neither positive nor benign belong out of `is_positive` and count as negative.
        """
        if is_positive.all() or not is_positive.any():
            return None
        model = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
        model.fit(self._train, is_positive)
        return np.asarray(model.decision_function(self._texts), np.float64)
