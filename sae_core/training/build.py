"""The default bundle from a model folder and texts, in stages that each leave a file behind.

    work/saes/*/         stage 1, `build_saes`: cfg.json, sae_weights.safetensors of each SAE
    work/resid_*/        stage 2, `build_residuals`: residual streams of the labelled texts
    work/heads.json      stage 3, `build_heads`: latents, weights, fusion, evidence floor
    out/                 stage 4, `build_bundle`: calibrated, evaluated, written

A stage whose file is there is not run again: delete the file to repeat it. Given the same inputs
and machine every stage gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from sae_core.aggregation import AggregateSpec
from sae_core.baseline import Baseline
from sae_core.calibration import (
    Source,
    SourceCalibration,
    calibrate_source,
    length_buckets,
    upper_bound,
)
from sae_core.calibration_artefact import benign_table, calibration_artefact
from sae_core.digests import sae_digest
from sae_core.evaluation.baselines import keyword_scores, length_scores, tfidf_scores
from sae_core.evaluation.data import LabelledText, data_digest, read_labelled
from sae_core.evaluation.detection import Evaluation, evaluate
from sae_core.fidelity import Bands, measure
from sae_core.heads import ClusterHeads, heads_digest
from sae_core.language_model.checksums import digest_folder
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.training.build_heads import (
    AGGREGATE,
    SOURCES,
    UNSEEN_LOGITS,
    BuildInputs,
    Say,
    build_heads,
    build_residuals,
    build_saes,
    cluster_heads,
    train_texts,
)
from sae_core.training.bundle_files import SAE_FILES, BundleParts, write_bundle
from sae_core.training.canary_texts import CANARIES, canary_rows
from sae_core.training.dense_heads import (
    is_positive,
    source_folds,
)
from sae_core.training.dictionary import Dictionary, Streams, shared, token_logits
from sae_core.training.examples import ResidualSet
from sae_core.training.probes import PROBES, TOPIC_PROBES
from sae_core.training.text_vitals import text_vitals
from sae_core.training.token_features import text_scores
from sae_core.training.unseen_figures import TFIDF, unseen_figures

MIN_EVIDENCE_TOKENS = 3
BUNDLE_PROBES = (*PROBES, *TOPIC_PROBES)


def build_default(inputs: BuildInputs, say: Say = lambda line: None) -> Evaluation:
    """All stages; returns the figures on `val`."""
    build_heads(inputs, say)
    return build_bundle(inputs, say)


def build_bundle(inputs: BuildInputs, say: Say = lambda line: None) -> Evaluation:
    """Stage 4: thresholds from benign rows, figures on all of `val`, the folder.

    The benign rows are those of `val`, and those of `train` as heads score them that never saw
    their data set: what is raised on data sets like any other, not on those that were fitted.
    """
    content = build_heads(inputs, say)
    dictionary, heads = build_saes(inputs, say), cluster_heads(content, inputs)
    rows = read_labelled(inputs.val)
    texts = build_residuals(inputs, rows, "val", say=say)
    text_starts = shared(texts).starts
    logits = token_logits(texts, dictionary, heads)
    train, known = train_texts(inputs, say)
    known_starts = shared(known).starts
    unseen_logits = np.load(inputs.work / UNSEEN_LOGITS)
    harmless, n_tokens = _benign_logits(
        (train, known_starts, unseen_logits), (rows, text_starts, logits)
    )
    starts = np.concatenate([[0], np.cumsum(n_tokens)]).astype(np.int64)
    specs = evidence_specs(harmless, starts)
    benign = text_scores(harmless, starts, specs)
    scores = text_scores(logits, text_starts, specs)
    buckets = length_buckets(n_tokens)
    calibrated: dict[Source, SourceCalibration] = {
        name: calibrate_source(benign[:, :, i], buckets=buckets) for i, name in enumerate(SOURCES)
    }
    ids = [c["id"] for c in content["clusters"]]
    tokenizer, folders = load_tokenizer(inputs.model_folder), inputs.sae_folders
    facts = {
        "model": inputs.model_id,
        "model_digest": digest_folder(inputs.model_folder),
        "tokenizer_digest": tokenizer.fingerprint,
        "sae_digests": {
            one.id: sae_digest(
                {name: _file_digest(folders[one.id] / name) for name in SAE_FILES},
                one.hook_point,
                {},
            )
            for one in dictionary.saes
        },
        "heads_digest": heads_digest(heads),
        "hook_points": list(inputs.hook_points),
        "dtype": "float32",
        "backend": "torch-cpu",
        "data": f"benign rows of {inputs.val.name}, and of {inputs.train.name} by heads that had "
        "not seen their data set",
        "data_digest": data_digest([row for row in (*train, *rows) if not row.is_harmful]),
        "n": len(benign),
        "date": datetime.now(UTC).date().isoformat(),
    }
    artefact = calibration_artefact(
        ids,
        benign[:, :, 0],
        calibrated,
        facts,
        aggregates=[asdict(spec) for spec in specs],
        buckets=buckets,
    )
    folds = source_folds(train, inputs.head_config.n_folds, inputs.origins)
    is_benign = np.array([not row.is_harmful for row in train])
    artefact["held_out"] = _raised_on_held_out_sources(
        benign[:, :, 0], buckets, folds[is_benign], say
    )
    known_logits = token_logits(known, dictionary, heads)
    served = (text_scores(known_logits, known_starts, specs), scores)
    artefact["baseline"] = {
        **_baseline(dictionary, heads, ((train, known), (rows, texts)), say).to_json(),
        "scores": _benign_tables(ids, served, (train, rows)),
    }
    scales: dict[str, tuple[ndarray, ndarray]] = {
        name: (found.flag.thresholds, found.alert.thresholds) for name, found in calibrated.items()
    }
    figures = evaluate(
        inputs.val.name,
        data_digest(rows),
        rows,
        ids,
        is_positive(inputs.plans, rows),
        scores,
        scales,
        {
            TFIDF: tfidf_scores(train, [row.text for row in rows]),
            "keywords": keyword_scores([row.text for row in rows]),
            "length": length_scores([row.text for row in rows]),
        },
    )
    write_bundle(
        inputs.out,
        BundleParts(
            name=inputs.name,
            version=inputs.version,
            model_id=inputs.model_id,
            model_package=inputs.model_package,
            model_digest=str(facts["model_digest"]),
            tokenizer_digest=tokenizer.fingerprint,
            saes={one.id: (one.hook_point, folders[one.id]) for one in dictionary.saes},
            dense_hook_point=inputs.dense_hook_point,
            heads=content,
            specs=tuple(specs),
            artefact=artefact,
            figures=figures,
            unseen=unseen_figures(
                train,
                is_positive(inputs.plans, train),
                text_scores(unseen_logits, known_starts, specs),
                scales,
                folds,
                inputs.origins,
            ),
            probes=BUNDLE_PROBES,
            bands=_bands(inputs, dictionary, heads, say),
            canaries=_canaries(inputs, dictionary, heads, specs, calibrated["fused"], say),
        ),
    )
    say(figures.to_markdown())
    return figures


def _own_texts(
    inputs: BuildInputs, name: str, texts: Sequence[str], say: Say
) -> dict[str, ResidualSet]:
    rows = [LabelledText(text=text, is_harmful=False) for text in texts]
    return build_residuals(inputs, rows, name, say=say)


def _bands(
    inputs: BuildInputs, dictionary: Dictionary, heads: ClusterHeads, say: Say
) -> dict[str, Bands]:
    """What each SAE gives on the probe texts, BOS left out."""
    probes = _own_texts(inputs, "probes", BUNDLE_PROBES, say)
    found = {}
    for one in dictionary.saes:
        resid = torch.from_numpy(np.array(probes[one.hook_point].resid))
        found[one.id] = Bands.around(measure(one.sae, resid, heads.latent_ids[one.id]))
    return found


def _canaries(
    inputs: BuildInputs,
    dictionary: Dictionary,
    heads: ClusterHeads,
    specs: Sequence[AggregateSpec],
    calibrated: SourceCalibration,
    say: Say,
) -> list[dict[str, Any]]:
    texts = _own_texts(inputs, "canaries", [canary.text for canary in CANARIES], say)
    logits = token_logits(texts, dictionary, heads)
    return canary_rows(
        [cluster.id for cluster in heads.clusters],
        CANARIES,
        text_scores(logits, shared(texts).starts, specs)[:, :, 0],
        calibrated.flag.thresholds,
        calibrated.alert.thresholds,
        say,
    )


def _baseline(
    dictionary: Dictionary,
    heads: ClusterHeads,
    parts: Sequence[tuple[Sequence[LabelledText], Streams]],
    say: Say,
) -> Baseline:
    """What the benign texts of all parts do to the SAEs."""
    vitals = []
    for rows, texts in parts:
        benign = np.flatnonzero([not row.is_harmful for row in rows])
        vitals += text_vitals(texts, benign, dictionary, heads.latent_ids, progress=_every(say))
    return Baseline.of(heads.latents, vitals)


def _benign_tables(
    ids: Sequence[str],
    scores: Sequence[Float64[ndarray, "_ n_clusters 3"]],
    rows: Sequence[Sequence[LabelledText]],
) -> dict[str, list[float]]:
    """By cluster, how the heads that are served score the benign texts of all parts.

    Live scores are compared with these, and not with those of heads that had not seen the texts'
    data sets: other heads' scores differ on the same traffic.
    """
    benign = [
        some[[not row.is_harmful for row in of_part], :, 0]
        for some, of_part in zip(scores, rows, strict=True)
    ]
    return dict(zip(ids, map(benign_table, np.concatenate(benign).T), strict=True))


def _every(say: Say, step: int = 500) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done % step == 0 or done == total:
            say(f"baseline: {done} of {total} benign texts")

    return progress


def _benign_logits(
    *parts: tuple[Sequence[LabelledText], ndarray, Float32[ndarray, "_ n_clusters 3"]],
) -> tuple[Float32[ndarray, "n_benign n_clusters 3"], Int64[ndarray, " n_texts"]]:
    """Token logits of the benign texts of all parts, one after another, and their lengths."""
    logits, lengths = [], []
    for rows, starts, found in parts:
        benign = np.array([not row.is_harmful for row in rows]) & (np.diff(starts) > 0)
        logits.append(found[np.repeat(benign, np.diff(starts))])
        lengths.append(np.diff(starts)[benign])
    return np.concatenate(logits), np.concatenate(lengths)


def _raised_on_held_out_sources(
    scores: Float64[ndarray, "n_texts n_clusters"],
    buckets: Int64[ndarray, " n_texts"],
    folds: Int64[ndarray, " n_train"],
    say: Say,
) -> dict[str, Any]:
    """What thresholds raise on a fold of data sets when they come from the other benign rows.

    Args:
        folds: of the first rows; those that follow, of `val`, have no fold of their own.
    """
    fold_of = np.concatenate([folds, np.full(len(scores) - len(folds), -1)])
    raised = {"flag": 0, "alert": 0}
    for fold in np.unique(folds):
        held = fold_of == fold
        found = calibrate_source(scores[~held], buckets=buckets[~held])
        for zone, thresholds in (("flag", found.flag), ("alert", found.alert)):
            n = int((scores[held] >= thresholds.thresholds).any(axis=1).sum())
            say(f"fold {fold} held out: {zone} on {n} of {int(held.sum())} benign texts")
            raised[zone] += n
    n = len(folds)
    return {
        "of": "folds of data sets",
        **{
            zone: {
                "n_benign": n,
                "n_false_positive": count,
                "achieved": count / n,
                "upper_bound": upper_bound(count, n),
            }
            for zone, count in raised.items()
        },
    }


def evidence_specs(
    logits: Float32[ndarray, "total n_clusters 3"], starts: Int64[ndarray, " n_texts_and_one"]
) -> list[AggregateSpec]:
    """Each cluster's evidence floor: the 90th percentile of benign tokens, below its flag.

    Found from ungated scores of benign texts; a gate can only lower a score, so a floor half way
    between the benign median and the ungated flag threshold is as high as any floor may be.
    """
    scores = text_scores(logits, starts, [AGGREGATE] * logits.shape[1])[:, :, 0]
    flag = calibrate_source(scores).flag.thresholds
    highest = (flag + np.median(scores, axis=0)) / 2
    usual = np.quantile(logits[:, :, 0], 0.9, axis=0)
    return [
        replace(
            AGGREGATE,
            min_evidence_tokens=MIN_EVIDENCE_TOKENS,
            evidence_floor=round(float(floor), 5),
        )
        for floor in np.minimum(usual, highest)
    ]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
