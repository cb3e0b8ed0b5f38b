"""The default bundle's SAE and heads: the first three stages of `build`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from sae_core.aggregation import AggregateSpec
from sae_core.calibration import (
    Source,
)
from sae_core.evaluation.data import LabelledText, data_digest, read_labelled
from sae_core.formats import load_sae
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import Tokenizer, load_tokenizer
from sae_core.sae import SAE
from sae_core.training.activations import language_model_forward
from sae_core.training.corpus import corpus_texts
from sae_core.training.dense_heads import (
    FittedHeads,
    Fusion,
    HeadConfig,
    choose_l2,
    cross_fitted_pairs,
    fit_fusion,
    fit_heads,
    source_folds,
)
from sae_core.training.discovery import ClusterPlan, latent_labels, text_acts
from sae_core.training.examples import ResidualSet, cached_residuals
from sae_core.training.recipe import (
    CORPUS_KEEP,
    CORPUS_KEEP_OTHERS,
    HEAD_CONFIG,
    HOOK_POINT,
    ORIGINS,
    PLANS,
    SAE_CONFIG,
)
from sae_core.training.sae_train_config import SAETrainConfig
from sae_core.training.sae_trainer import TrainProgress
from sae_core.training.token_features import (
    latent_acts_of,
    text_means,
)
from sae_core.training.train_saes import SAETrainInputs, train_saes

SAE_ID = "l9"
UNSEEN_LOGITS = "unseen_logits.npy"
"""Token logits of the training texts, each by heads that never saw its data set."""
AGGREGATE = AggregateSpec(kind="max_window_mean", window=64, min_evidence_tokens=0)
"""What was best on data sets not trained on (benchmarks/LOG.md, 2026-11-24)."""
MAX_TOKENS = 100_000
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
    hook_point: str = HOOK_POINT
    """Where the SAE and the dense heads read."""
    sae_config: SAETrainConfig = SAE_CONFIG
    head_config: HeadConfig = HEAD_CONFIG
    plans: tuple[ClusterPlan, ...] = PLANS
    origins: Mapping[str, str] = field(default_factory=lambda: ORIGINS)
    """Data sets that were made from another, or with it, and who made them: held out together."""


def build_sae(inputs: BuildInputs, say: Say = lambda line: None) -> Path:
    """Stage 1: the SAE, from a mixture of the corpus; one document in a hundred is held out."""
    folder = inputs.work / "sae"
    if (folder / "cfg.json").is_file():
        return folder

    said = 0.0

    def progress(p: TrainProgress) -> None:
        nonlocal said
        share = p.n_tokens / p.total_tokens
        if share - said < 0.01:
            return
        said = share
        (stats,) = p.stats.values()
        say(
            f"{p.n_tokens} of {p.total_tokens} tokens, FVU {stats.fvu:.3f}, L0 {stats.l0:.1f}, "
            f"dead {stats.dead_share:.1%}, {p.tokens_per_second:.0f} tokens/s"
        )

    (outcome,) = train_saes(
        SAETrainInputs(
            config=inputs.sae_config,
            folders={parse_hook_point(inputs.hook_point): folder},
            model_folder=inputs.model_folder,
            model_name=inputs.model_id,
            texts=corpus_texts([inputs.corpus], keep=CORPUS_KEEP, default_keep=CORPUS_KEEP_OTHERS),
            held_out=corpus_texts([inputs.corpus], held_out=True),
            checkpoint=inputs.work / "sae_checkpoint",
            store_dtype="bfloat16",
        ),
        progress=progress,
    ).values()
    report = outcome.report
    say(f"SAE: FVU {report.fvu:.4f}, L0 {report.l0:.1f}, dead {report.dead_share:.2%} (held out)")
    return folder


def build_residuals(
    inputs: BuildInputs, rows: Sequence[LabelledText], name: str, say: Say
) -> ResidualSet:
    """Stage 2: residuals of labelled texts, in float32 and whole, as texts are served."""
    hook_point = parse_hook_point(inputs.hook_point)
    model = load_language_model(inputs.model_folder, [hook_point])
    return cached_residuals(
        [row.text for row in rows],
        load_tokenizer(inputs.model_folder),
        language_model_forward(model, hook_point, mixed_precision=False),
        inputs.work / f"resid_{name}",
        identity=f"{inputs.model_id} {hook_point} float32",
        max_tokens=MAX_TOKENS,
        progress=lambda done, total: say(f"residuals of {name}: {done} of {total} tokens"),
    )


def build_heads(inputs: BuildInputs, say: Say = lambda line: None) -> dict[str, Any]:
    """Stages 2 and 3: latents by contrast, dense and SAE heads, fusion; on `train` alone."""
    path = inputs.work / "heads.json"
    sae_path = inputs.work / "sae"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    rows, texts = train_texts(inputs, say)
    sae, config, plans = load_sae(sae_path), inputs.head_config, inputs.plans
    say("latent activations of every text")
    acts = text_acts(sae, texts)
    means = text_means(np.asarray(texts.resid), texts.starts)
    folds = source_folds(rows, config.n_folds, inputs.origins)
    say(f"dense penalty over {config.n_folds} folds of data sets")
    l2, l2_results = choose_l2(plans, rows, means, folds, config)
    say(f"dense penalty {l2:g}; AUROC on unseen data sets {l2_results}")
    pairs = cross_fitted_pairs(
        plans, rows, texts, means, acts, sae, folds, l2, config, progress=say
    )
    fusion = fit_fusion(plans, rows, pairs, texts.starts, config)
    np.save(inputs.work / UNSEEN_LOGITS, _fused(fusion, pairs))
    say("heads on all data sets")
    heads = fit_heads(plans, rows, means, acts, l2, config)
    labels = _labels(heads, sae, texts, load_tokenizer(inputs.model_folder))
    content = {
        "data_digest": data_digest(rows),
        "l2": l2,
        "l2_results": l2_results,
        "clusters": [
            _cluster_json(plan, column, heads, fusion, labels) for column, plan in enumerate(plans)
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def train_texts(inputs: BuildInputs, say: Say) -> tuple[tuple[LabelledText, ...], ResidualSet]:
    """The rows of `train` that have a token to score, and their residuals."""
    rows = read_labelled(inputs.train)
    texts = build_residuals(inputs, rows, "train", say=say)
    usable = np.flatnonzero(np.diff(texts.starts) > 0)
    if len(usable) == len(rows):
        return tuple(rows), texts
    return tuple(rows[int(i)] for i in usable), texts.subset(usable)


def _fused(
    fusion: Fusion, pairs: Float32[ndarray, "total n_clusters 2"]
) -> Float32[ndarray, "total n_clusters 3"]:
    sae, dense = pairs[:, :, 0], pairs[:, :, 1]
    fused = fusion.bias + fusion.sae * sae + fusion.dense * dense
    return np.stack([fused, dense, sae], axis=-1).astype(np.float32)


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
        "categories": list(plan.categories),
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
