"""The default bundle's SAEs and heads: the first three stages of `build`."""

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
from sae_core.training.activations import LanguageModelForward
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
from sae_core.training.dictionary import (
    Dictionary,
    PlacedSAE,
    ReadTexts,
    shared,
    some_texts,
)
from sae_core.training.discovery import ClusterPlan, latent_labels
from sae_core.training.examples import ResidualSet, cached_streams
from sae_core.training.recipe import (
    CORPUS_KEEP,
    CORPUS_KEEP_OTHERS,
    DENSE_HOOK_POINT,
    HEAD_CONFIG,
    HOOK_POINTS,
    ORIGINS,
    PLANS,
    SAE_CONFIG,
)
from sae_core.training.sae_train_config import SAETrainConfig
from sae_core.training.sae_trainer import TrainProgress
from sae_core.training.train_saes import SAETrainInputs, train_saes

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
    """Folder of JSON lines (plain or gzipped) with `text` and `source`: the SAEs' texts."""
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
    hook_points: tuple[str, ...] = HOOK_POINTS
    """Where the SAEs read, one each."""
    dense_hook_point: str = DENSE_HOOK_POINT
    """Where the dense heads read; one of `hook_points`."""
    sae_config: SAETrainConfig = SAE_CONFIG
    head_config: HeadConfig = HEAD_CONFIG
    plans: tuple[ClusterPlan, ...] = PLANS
    origins: Mapping[str, str] = field(default_factory=lambda: ORIGINS)
    """Data sets that were made from another, or with it, and who made them: held out together."""

    @property
    def sae_folders(self) -> dict[str, Path]:
        """Where stage 1 writes each SAE, by its id."""
        return {sae_id_of(point): self.work / "saes" / point for point in self.hook_points}


def sae_id_of(hook_point: str) -> str:
    """What a bundle calls the SAE that reads there, such as l9 after nine blocks."""
    return f"l{parse_hook_point(hook_point).layer + 1}"


def build_saes(inputs: BuildInputs, say: Say = lambda line: None) -> Dictionary:
    """Stage 1: SAEs from a mixture of the corpus; one document in a hundred is held out."""
    folders = inputs.sae_folders
    if not all((folder / "cfg.json").is_file() for folder in folders.values()):
        _train(inputs, say)
    return Dictionary(
        [
            PlacedSAE(sae_id_of(point), point, load_sae(folders[sae_id_of(point)]))
            for point in inputs.hook_points
        ]
    )


def _train(inputs: BuildInputs, say: Say) -> None:
    said = 0.0

    def progress(p: TrainProgress) -> None:
        nonlocal said
        share = p.n_tokens / p.total_tokens
        if share - said < 0.01:
            return
        said = share
        saes = ", ".join(
            f"{name}: FVU {one.fvu:.3f}, L0 {one.l0:.1f}, dead {one.dead_share:.1%}"
            for name, one in p.stats.items()
        )
        say(f"{p.n_tokens} of {p.total_tokens} tokens, {p.tokens_per_second:.0f} tokens/s; {saes}")

    outcomes = train_saes(
        SAETrainInputs(
            config=inputs.sae_config,
            folders={
                parse_hook_point(point): inputs.sae_folders[sae_id_of(point)]
                for point in inputs.hook_points
            },
            model_folder=inputs.model_folder,
            model_name=inputs.model_id,
            texts=corpus_texts([inputs.corpus], keep=CORPUS_KEEP, default_keep=CORPUS_KEEP_OTHERS),
            held_out=corpus_texts([inputs.corpus], held_out=True),
            checkpoint=inputs.work / "sae_checkpoint",
            store_dtype="bfloat16",
        ),
        progress=progress,
    )
    for name, one in outcomes.items():
        found = one.report
        say(f"{name}: FVU {found.fvu:.4f}, L0 {found.l0:.1f}, dead {found.dead_share:.2%}")


def build_residuals(
    inputs: BuildInputs, rows: Sequence[LabelledText], name: str, say: Say
) -> dict[str, ResidualSet]:
    """Stage 2: residuals of labelled texts, in float32 and whole, as texts are served."""
    points = [parse_hook_point(point) for point in inputs.hook_points]
    model = load_language_model(inputs.model_folder, points)
    return cached_streams(
        [row.text for row in rows],
        load_tokenizer(inputs.model_folder),
        LanguageModelForward(model, mixed_precision=False),
        inputs.work / f"resid_{name}",
        identity=f"{inputs.model_id} float32",
        max_tokens=MAX_TOKENS,
        progress=lambda done, total: say(f"residuals of {name}: {done} of {total} tokens"),
    )


def build_heads(inputs: BuildInputs, say: Say = lambda line: None) -> dict[str, Any]:
    """Stages 2 and 3: latents by contrast, dense and SAE heads, fusion; on `train` alone."""
    path = inputs.work / "heads.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    dictionary = build_saes(inputs, say)
    rows, streams = train_texts(inputs, say)
    config, plans = inputs.head_config, inputs.plans
    say("latent activations of every text")
    read = ReadTexts.of(streams, dictionary, inputs.dense_hook_point)
    folds = source_folds(rows, config.n_folds, inputs.origins)
    say(f"dense penalty over {config.n_folds} folds of data sets")
    l2, l2_results = choose_l2(plans, rows, read.means, folds, config)
    say(f"dense penalty {l2:g}; AUROC on unseen data sets {l2_results}")
    pairs = cross_fitted_pairs(plans, rows, read, folds, l2, config, progress=say)
    fusion = fit_fusion(plans, rows, pairs, shared(streams).starts, config)
    np.save(inputs.work / UNSEEN_LOGITS, _fused(fusion, pairs))
    say("heads on all data sets")
    heads = fit_heads(plans, rows, read.means, read.acts, l2, config)
    labels = _labels(heads, read, load_tokenizer(inputs.model_folder))
    content = {
        "data_digest": data_digest(rows),
        "l2": l2,
        "l2_results": l2_results,
        "clusters": [
            _cluster_json(plan, column, heads, fusion, dictionary, labels)
            for column, plan in enumerate(plans)
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def train_texts(
    inputs: BuildInputs, say: Say
) -> tuple[tuple[LabelledText, ...], dict[str, ResidualSet]]:
    """The rows of `train` that have a token to score, and their residuals by hook point."""
    rows = read_labelled(inputs.train)
    streams = build_residuals(inputs, rows, "train", say=say)
    usable = np.flatnonzero(np.diff(shared(streams).starts) > 0)
    if len(usable) == len(rows):
        return tuple(rows), streams
    return tuple(rows[int(i)] for i in usable), some_texts(streams, usable)


def _fused(
    fusion: Fusion, pairs: Float32[ndarray, "total n_clusters 2"]
) -> Float32[ndarray, "total n_clusters 3"]:
    sae, dense = pairs[:, :, 0], pairs[:, :, 1]
    fused = fusion.bias + fusion.sae * sae + fusion.dense * dense
    return np.stack([fused, dense, sae], axis=-1).astype(np.float32)


def _labels(heads: FittedHeads, read: ReadTexts, tokenizer: Tokenizer) -> dict[int, str]:
    ids = sorted({e.latent_id for head in heads.sae for e in head.evidence})
    unique, where = np.unique(shared(read.streams).token_ids, return_inverse=True)
    names = np.array([tokenizer.token_texts([int(i)])[0] for i in unique])
    acts = read.dictionary.acts_of(read.streams, ids)
    return dict(zip(ids, latent_labels(acts, names[where].tolist()), strict=True))


def _cluster_json(
    plan: ClusterPlan,
    column: int,
    heads: FittedHeads,
    fusion: Fusion,
    dictionary: Dictionary,
    labels: Mapping[int, str],
) -> dict[str, Any]:
    head = heads.sae[column]
    names = [dictionary.name_of(evidence.latent_id) for evidence in head.evidence]
    order = np.argsort(-head.weight, kind="stable")
    return {
        "id": plan.id,
        "title": plan.title,
        "severity": plan.severity,
        "categories": list(plan.categories),
        "latents": [
            {
                "sae": names[i][0],
                "id": names[i][1],
                "weight": float(f"{head.weight[i]:.6g}"),
                "scale": float(f"{head.scale[i]:.6g}"),
                "label": labels[head.evidence[i].latent_id],
                "evidence": {
                    **{k: round(v, 4) for k, v in head.evidence[i]._asdict().items()},
                    "latent_id": names[i][1],
                },
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


def cluster_heads(content: dict[str, Any], inputs: BuildInputs) -> ClusterHeads:
    """The heads of stage 3, as they will be served."""
    clusters = [
        Cluster(
            id=c["id"],
            latents=tuple(
                LatentTerm(
                    sae=t["sae"],
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
            dense_hook_point=inputs.dense_hook_point,
            fusion_sae=c["fusion"]["sae"],
            fusion_dense=c["fusion"]["dense"],
            fusion_bias=c["fusion"]["bias"],
        )
        for c in content["clusters"]
    ]
    return ClusterHeads(clusters, list(inputs.sae_folders))
