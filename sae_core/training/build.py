"""The default bundle from a model folder and texts, in stages that each leave a file behind.

    work/sae/            stage 1, `build_sae`: cfg.json, sae_weights.safetensors
    work/resid_*/        stage 2, `build_residuals`: residual streams of the labelled texts
    work/heads.json      stage 3, `build_heads`: latents, weights, fusion, evidence floor
    out/                 stage 4, `build_bundle`: calibrated, evaluated, written

A stage whose file is there is not run again: delete the file to repeat it. Given the same inputs
and machine every stage gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from sae_core.aggregation import AggregateSpec
from sae_core.calibration import Source, SourceCalibration, calibrate_source, calibration_artefact
from sae_core.evaluation.baselines import keyword_scores, length_scores, tfidf_scores
from sae_core.evaluation.data import LabelledText, data_digest, read_labelled
from sae_core.evaluation.detection import Evaluation, detect, evaluate
from sae_core.fidelity import Bands, measure
from sae_core.formats import load_sae
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.checksums import digest_folder
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import Tokenizer, load_tokenizer
from sae_core.sae import SAE
from sae_core.training.activations import language_model_forward
from sae_core.training.batch_topk import SAETrainConfig
from sae_core.training.bundle_files import BundleParts, write_bundle
from sae_core.training.corpus import corpus_texts
from sae_core.training.dense_heads import (
    FittedHeads,
    Fusion,
    HeadConfig,
    choose_l2,
    cross_fitted_pairs,
    fit_fusion,
    fit_heads,
    is_positive,
    source_folds,
    windows_of,
)
from sae_core.training.discovery import ClusterPlan, latent_labels, text_acts
from sae_core.training.examples import ResidualSet, cached_residuals
from sae_core.training.probes import CANARIES, PROBES, canary_rows
from sae_core.training.recipe import (
    CORPUS_KEEP,
    CORPUS_KEEP_OTHERS,
    PLANS,
    SAE_CONFIG,
)
from sae_core.training.sae_report import SAEReport
from sae_core.training.sae_trainer import TrainProgress, train_sae
from sae_core.training.token_features import latent_acts_of, text_scores, token_logits

SAE_ID = "l9"
WINDOW = 16
MIN_EVIDENCE_TOKENS = 3
SOURCES: tuple[Source, ...] = ("fused", "dense", "sae")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInputs:
    """Where everything comes from and goes to."""

    model_folder: Path
    model_id: str
    model_package: str | None
    """The package of the index that carries the weights, if one does."""
    corpus: Path
    """Folder of JSON lines (plain or gzipped) with `text` and `source`: the SAE's texts."""
    train: Path
    """Labelled JSON lines that latents and heads are fitted on."""
    val: Path
    """Labelled JSON lines: thresholds from its benign rows, figures from all."""
    work: Path
    """Intermediate files; may be deleted afterwards."""
    out: Path
    """The bundle folder."""
    name: str = "gemma3-270m-default"
    version: int = 1
    sae_config: SAETrainConfig = SAE_CONFIG
    head_config: HeadConfig = HeadConfig(window=WINDOW)
    plans: tuple[ClusterPlan, ...] = PLANS


def build_default(inputs: BuildInputs, say: Say = lambda line: None) -> Evaluation:
    """All stages; returns the figures on `val`."""
    build_sae(inputs, say)
    build_heads(inputs, say)
    return build_bundle(inputs, say)


def build_sae(inputs: BuildInputs, say: Say = lambda line: None) -> Path:
    """Stage 1: the SAE, from a mixture of the corpus; one document in a hundred is held out."""
    folder = inputs.work / "sae"
    if (folder / "cfg.json").is_file():
        return folder

    def progress(p: TrainProgress) -> None:
        say(
            f"{p.n_tokens} of {p.total_tokens} tokens, FVU {p.fvu:.3f}, L0 {p.l0:.1f}, "
            f"dead {p.dead_share:.1%}, {p.tokens_per_second:.0f} tokens/s, "
            f"{p.seconds_left / 60:.0f} min left"
        )

    report: SAEReport = train_sae(
        inputs.sae_config,
        corpus_texts(inputs.corpus, keep=CORPUS_KEEP, default_keep=CORPUS_KEEP_OTHERS),
        corpus_texts(inputs.corpus, held_out=True),
        inputs.model_folder,
        folder,
        model_name=inputs.model_id,
        checkpoint=inputs.work / "sae_checkpoint",
        progress=progress,
    )
    say(f"SAE: FVU {report.fvu:.4f}, L0 {report.l0:.1f}, dead {report.dead_share:.2%} (held out)")
    return folder


def build_residuals(
    inputs: BuildInputs, rows: Sequence[LabelledText], name: str, *, exact: bool, say: Say
) -> ResidualSet:
    """Stage 2: residuals of labelled texts; `exact` is float32 and whole, as texts are served.

    Otherwise matrix products run in bfloat16 and texts are cut at 256 tokens: for fitting.
    """
    hook_point = parse_hook_point(inputs.sae_config.hook_point)
    model = load_language_model(inputs.model_folder, [hook_point])
    precision = "float32" if exact else "mixed"
    return cached_residuals(
        [row.text for row in rows],
        load_tokenizer(inputs.model_folder),
        language_model_forward(model, hook_point, mixed_precision=not exact),
        inputs.work / f"resid_{name}",
        identity=f"{inputs.model_id} {hook_point} {precision}",
        max_tokens=100_000 if exact else 256,
        progress=lambda done, total: say(f"residuals of {name}: {done} of {total} tokens"),
    )


def build_heads(inputs: BuildInputs, say: Say = lambda line: None) -> dict[str, Any]:
    """Stages 2 and 3: latents by contrast, dense and SAE heads, fusion; on `train` alone."""
    path = inputs.work / "heads.json"
    sae_path = inputs.work / "sae"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    rows = read_labelled(inputs.train)
    texts = build_residuals(inputs, rows, "train", exact=False, say=say)
    usable = np.flatnonzero(np.diff(texts.starts) > 0)
    rows, texts = tuple(rows[int(i)] for i in usable), texts.subset(usable)
    sae, config, plans = load_sae(sae_path), inputs.head_config, inputs.plans
    say("latent activations of every text")
    acts = text_acts(sae, texts)
    windows = windows_of(np.asarray(texts.resid), texts.starts, config.window)
    folds = source_folds(rows, config.n_folds)
    say(f"dense penalty over {config.n_folds} folds of data sets")
    l2, l2_results = choose_l2(plans, rows, windows, folds, config)
    say(f"dense penalty {l2:g}; AUROC on unseen data sets {l2_results}")
    pairs = cross_fitted_pairs(
        plans, rows, texts, windows, acts, sae, folds, l2, config, progress=say
    )
    fusion = fit_fusion(plans, rows, pairs, texts.starts, config)
    unseen = unseen_source_figures(plans, rows, pairs, texts.starts, fusion, config.window)
    unseen_tfidf = unseen_tfidf_figure(rows, folds)
    say("heads on all data sets")
    heads = fit_heads(plans, rows, texts, windows, acts, sae, l2, config)
    labels = _labels(heads, sae, texts, load_tokenizer(inputs.model_folder))
    content = {
        "data_digest": data_digest(rows),
        "l2": l2,
        "l2_results": l2_results,
        "unseen_sources": unseen,
        "unseen_sources_tfidf": unseen_tfidf,
        "clusters": [
            _cluster_json(plan, column, heads, fusion, labels) for column, plan in enumerate(plans)
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def unseen_source_figures(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    pairs: ndarray,
    starts: ndarray,
    fusion: Fusion,
    window: int,
) -> dict[str, Any]:
    """AUROC of each cluster on texts whose data set its heads never saw, folds pooled.

    The fusion's three numbers a cluster were fitted on these scores, the heads were not.
    """
    sae, dense = pairs[:, :, 0], pairs[:, :, 1]
    fused = fusion.bias + fusion.sae * sae + fusion.dense * dense
    logits = np.stack([fused, dense, sae], axis=-1).astype(np.float32)
    specs = [AggregateSpec(window=window, min_evidence_tokens=0)] * len(plans)
    scores = text_scores(logits, starts, specs)
    flat: dict[str, tuple[ndarray, ndarray]] = {
        name: (np.zeros(len(plans)), np.ones(len(plans))) for name in SOURCES
    }
    found = evaluate(
        "train, heads fitted on other data sets",
        "",
        rows,
        [plan.id for plan in plans],
        is_positive(plans, rows),
        scores,
        flat,
        {},
        n_resamples=50,
    )
    return {
        cluster: {d.score: [round(x, 4) for x in d.auroc] for d in detections}
        for cluster, detections in found.clusters.items()
    }


def unseen_tfidf_figure(rows: Sequence[LabelledText], folds: ndarray) -> list[float]:
    """AUROC, with its interval, of TF-IDF with logistic regression on the same folds."""
    scores = np.empty(len(rows))
    for fold in np.unique(folds):
        train = [row for row, f in zip(rows, folds, strict=True) if f != fold]
        held = np.flatnonzero(folds == fold)
        scores[held] = tfidf_scores(train, [rows[int(i)].text for i in held])
    harmful = np.array([row.is_harmful for row in rows])
    found = detect("TF-IDF", scores[harmful], scores[~harmful], n_resamples=50)
    return [round(x, 4) for x in found.auroc]


def _labels(
    heads: FittedHeads, sae: SAE, texts: ResidualSet, tokenizer: Tokenizer
) -> dict[int, str]:
    ids = sorted({e.latent_id for head in heads.sae for e in head.evidence})
    unique, where = np.unique(texts.token_ids, return_inverse=True)
    names = np.array([tokenizer.token_texts([int(i)])[0] for i in unique])
    acts = latent_acts_of(sae, texts, ids)
    return dict(zip(ids, latent_labels(acts, names[where].tolist()), strict=True))


def _cluster_json(
    plan: ClusterPlan, column: int, heads: FittedHeads, fusion: Fusion, labels: dict[int, str]
) -> dict[str, Any]:
    head = heads.sae[column]
    order = np.argsort(-head.weight, kind="stable")
    return {
        "id": plan.id,
        "title": plan.title,
        "severity": plan.severity,
        "latents": [
            {
                "id": head.evidence[i].latent_id,
                "weight": float(f"{head.weight[i]:.6g}"),
                "scale": float(f"{head.scale[i]:.6g}"),
                "label": labels[head.evidence[i].latent_id],
                "evidence": {k: round(v, 4) for k, v in head.evidence[i]._asdict().items()},
            }
            for i in order
        ],
        "dense_weight": [float(x) for x in heads.dense.weight[:, column]],
        "dense_bias": float(heads.dense.bias[column]),
        "fusion": {
            "sae": float(f"{fusion.sae[column]:.6g}"),
            "dense": float(f"{fusion.dense[column]:.6g}"),
            "bias": float(f"{fusion.bias[column]:.6g}"),
        },
    }


def cluster_heads(content: dict[str, Any], hook_point: str) -> ClusterHeads:
    """The heads of stage 3, as they will be served."""
    clusters = [
        Cluster(
            id=c["id"],
            latents=tuple(
                LatentTerm(
                    sae=SAE_ID,
                    latent_id=t["id"],
                    weight=t["weight"],
                    scale=t["scale"],
                    label=t["label"],
                )
                for t in c["latents"]
            ),
            transform="clip",
            dense_weight=np.array(c["dense_weight"], np.float32),
            dense_bias=float(np.float32(c["dense_bias"])),
            dense_hook_point=hook_point,
            fusion_sae=c["fusion"]["sae"],
            fusion_dense=c["fusion"]["dense"],
            fusion_bias=c["fusion"]["bias"],
        )
        for c in content["clusters"]
    ]
    return ClusterHeads(clusters, [SAE_ID])


def build_bundle(inputs: BuildInputs, say: Say = lambda line: None) -> Evaluation:
    """Stage 4: thresholds from the benign rows of `val`, figures on all of it, the folder."""
    content = build_heads(inputs, say)
    sae, heads = load_sae(inputs.work / "sae"), cluster_heads(content, inputs.sae_config.hook_point)
    rows = read_labelled(inputs.val)
    texts = build_residuals(inputs, rows, "val", exact=True, say=say)
    logits = token_logits(texts, SAE_ID, sae, inputs.sae_config.hook_point, heads)
    benign = np.array([not row.is_harmful for row in rows])
    specs = evidence_specs(logits, texts, benign, inputs.head_config.window)
    scores = text_scores(logits, texts.starts, specs)
    calibrated: dict[Source, SourceCalibration] = {
        name: calibrate_source(scores[benign][:, :, i]) for i, name in enumerate(SOURCES)
    }
    ids = [c["id"] for c in content["clusters"]]
    tokenizer = load_tokenizer(inputs.model_folder)
    facts = {
        "model": inputs.model_id,
        "model_digest": digest_folder(inputs.model_folder),
        "tokenizer_digest": tokenizer.fingerprint,
        "sae_digest": _file_digest(inputs.work / "sae" / "sae_weights.safetensors"),
        "heads_digest": hashlib.sha256(json.dumps(content["clusters"]).encode()).hexdigest(),
        "hook_point": inputs.sae_config.hook_point,
        "dtype": "float32",
        "backend": "torch-cpu",
        "aggregator": "max_rolling_mean",
        "window": inputs.head_config.window,
        "min_evidence_tokens": MIN_EVIDENCE_TOKENS,
        "data": inputs.val.name + ", benign rows",
        "data_digest": data_digest([row for row in rows if not row.is_harmful]),
        "n": int(benign.sum()),
        "date": datetime.now(UTC).date().isoformat(),
    }
    artefact = calibration_artefact(ids, scores[benign][:, :, 0], calibrated, facts)
    train = read_labelled(inputs.train)
    figures = evaluate(
        inputs.val.name,
        data_digest(rows),
        rows,
        ids,
        is_positive(inputs.plans, rows),
        scores,
        {
            name: (found.flag.thresholds, found.alert.thresholds)
            for name, found in calibrated.items()
        },
        {
            "TF-IDF + logistic regression": tfidf_scores(train, [row.text for row in rows]),
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
            sae_id=SAE_ID,
            sae_folder=inputs.work / "sae",
            hook_point=inputs.sae_config.hook_point,
            heads=content,
            specs=tuple(specs),
            artefact=artefact,
            figures=figures,
            bands=_bands(inputs, sae, heads.latent_ids[SAE_ID], say),
            canaries=_canaries(inputs, sae, heads, specs, calibrated["fused"], say),
        ),
    )
    say(figures.to_markdown())
    return figures


def _own_texts(inputs: BuildInputs, name: str, texts: Sequence[str], say: Say) -> ResidualSet:
    rows = [LabelledText(text=text, is_harmful=False) for text in texts]
    return build_residuals(inputs, rows, name, exact=True, say=say)


def _bands(inputs: BuildInputs, sae: SAE, latent_ids: Sequence[int], say: Say) -> Bands:
    """What the SAE gives on the probe texts, BOS left out."""
    probes = _own_texts(inputs, "probes", PROBES, say)
    return Bands.around(measure(sae, torch.from_numpy(np.array(probes.resid)), latent_ids))


def _canaries(
    inputs: BuildInputs,
    sae: SAE,
    heads: ClusterHeads,
    specs: Sequence[AggregateSpec],
    calibrated: SourceCalibration,
    say: Say,
) -> list[dict[str, Any]]:
    texts = _own_texts(inputs, "canaries", CANARIES, say)
    logits = token_logits(texts, SAE_ID, sae, inputs.sae_config.hook_point, heads)
    return canary_rows(
        [cluster.id for cluster in heads.clusters],
        CANARIES,
        text_scores(logits, texts.starts, specs)[:, :, 0],
        calibrated.flag.thresholds,
        calibrated.alert.thresholds,
    )


def evidence_specs(
    logits: ndarray, texts: ResidualSet, benign: ndarray, window: int
) -> list[AggregateSpec]:
    """Each cluster's evidence floor: the 90th percentile of benign tokens, below its flag.

    Found from ungated scores; a gate can only lower a score, so a floor half way between the
    benign median and the ungated flag threshold is as high as any floor may be.
    """
    n = logits.shape[1]
    ungated = [AggregateSpec(window=window, min_evidence_tokens=0)] * n
    scores = text_scores(logits, texts.starts, ungated)[benign][:, :, 0]
    flag = calibrate_source(scores).flag.thresholds
    highest = (flag + np.median(scores, axis=0)) / 2
    tokens = np.repeat(benign, np.diff(texts.starts))
    usual = np.quantile(logits[tokens][:, :, 0], 0.9, axis=0)
    return [
        AggregateSpec(
            window=window,
            min_evidence_tokens=MIN_EVIDENCE_TOKENS,
            evidence_floor=round(float(floor), 5),
        )
        for floor in np.minimum(usual, highest)
    ]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
