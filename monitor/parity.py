"""Whether a quantized model decides as its float32 original does, on the bundle's own texts.

Before int8 serves anything, its SAEs must be within their bands on it, and every probe text and
canary must get the verdicts that float32 gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from monitor.errors import SettingsError
from monitor.evidence import Evidence
from monitor.fidelity import check_fidelity
from monitor.inputs import InputReader
from monitor.records import ClusterResult, Stage
from monitor.served import Served
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.scorer import Scorer

log = structlog.get_logger(__name__)

QUANTIZED = "int8"
"""The dtype that has to prove itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Two scorers of the same bundle on the same texts."""

    n_texts: int
    n_differing: int
    """Texts where the verdict on some cluster differs."""
    first_differing: str
    """What differs in the first of them; empty where nothing does."""
    largest_gap: float
    """Between two aggregated fused logits of one cluster."""


def admit_quantized(served: Served) -> None:
    """Loads the float32 model beside the quantized one for as long as the comparison takes.

    Raises:
        SettingsError: An SAE is outside its bands, or a verdict differs; with the numbers.
        BundleError: There are no probe texts or bands to judge by.
    """
    unfit = [one.message for one in check_fidelity(served, explain=False) if not one.fits]
    if unfit:
        raise SettingsError(f"dtype: {QUANTIZED} takes SAEs out of their bands: {'; '.join(unfit)}")
    model = served.scorer.language_model
    in_float32 = Scorer(
        load_language_model(model.config.folder, model.hook_points),
        served.tokenizer,
        served.saes,
        served.scorer.heads,
    )
    parity = compare(served, in_float32)
    log.info("quantized_parity", n_texts=parity.n_texts, largest_gap=parity.largest_gap)
    if parity.n_differing:
        raise SettingsError(
            f"dtype: {QUANTIZED} changes the verdicts on {parity.n_differing} of {parity.n_texts} "
            f"probe texts and canaries ({parity.first_differing}; largest gap of a fused score "
            f"{parity.largest_gap:.3g}), expected none; use float32"
        )


def compare(served: Served, other: Scorer) -> Parity:
    """The served scorer and another one on the bundle's probe texts and canaries."""
    texts = (*served.bundle.probes, *(canary.text for canary in served.bundle.canaries))
    n_differing, first, largest = 0, "", 0.0
    for number, text in enumerate(texts, 1):
        found = _results(served, served.scorer, text)
        expected = _results(served, other, text)
        pairs = list(zip(found, expected, strict=True))
        gaps = [abs(a.fused - b.fused) for a, b in pairs]
        largest = max([largest, *np.nan_to_num(gaps).tolist()])
        different = [(a, b) for a, b in pairs if a.verdict is not b.verdict]
        n_differing += bool(different)
        if different and not first:
            a, b = different[0]
            first = (
                f"text {number}: cluster {a.cluster} is {a.verdict.value} at {a.fused:.4g}, "
                f"{b.verdict.value} at {b.fused:.4g} in float32"
            )
    return Parity(
        n_texts=len(texts), n_differing=n_differing, first_differing=first, largest_gap=largest
    )


def _results(served: Served, scorer: Scorer, text: str) -> Sequence[ClusterResult]:
    config = scorer.language_model.config
    reader = InputReader(
        served.tokenizer, vocab_size=served.vocab_size, max_request_tokens=config.max_positions
    )
    tokens = reader.text(text, Stage.PROMPT)
    scores = scorer.step([Segment(scorer.open_stream(), tokens.token_ids)]).segments[0]
    evidence = Evidence(served.plan, next(iter(served.policies.values())))
    evidence.add(tokens.token_ids, tokens.stages, scores.logits, scores.latent_acts)
    evidence.close()
    return evidence.results()
