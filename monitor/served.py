"""A bundle made ready to score: its model, SAEs and heads loaded, checked and named.

One `Served` is immutable; a reload builds another beside it. Requests keep the one that they
began with.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from monitor import __version__
from monitor.bundle import Bundle
from monitor.bundle_spec import BundleSpec
from monitor.engine import torch_dtype
from monitor.errors import BundleError, ModelStoreError
from monitor.evidence import BenignP, ClusterPlan, aggregate_specs
from monitor.policy import Policy
from monitor.records import ClusterInfo, Provenance
from monitor.sae_store import SAEFiles
from sae_core.aggregation import Aggregator
from sae_core.errors import ModelLoadError, SAECoreError, TokenizerError
from sae_core.formats import load_sae
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import Tokenizer, load_tokenizer
from sae_core.sae import SAE
from sae_core.scorer import Scorer

CALLER = "caller"
"""Backend of activations that a caller gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Everything a request needs of the bundle that is served."""

    bundle: Bundle
    scorer: Scorer
    saes: Mapping[str, tuple[HookPoint, SAE]]
    """By id: where each reads and what it is; the scorer keeps the registered latents only."""
    tokenizer: Tokenizer
    plan: ClusterPlan
    provenance: Provenance
    policies: Mapping[str, Policy]
    hook_points: tuple[str, ...]
    vocab_size: int
    uncalibrated_reasons: Mapping[str, str]
    """Why a cluster's thresholds are no calibrated claim here; calibrated ones are absent."""

    def as_given(self, dtype: str) -> Served:
        """The same, as it scores activations of this dtype that a caller gave.

        A calibration covers them where it was made with the backend "caller" and this dtype.
        """
        provenance = replace(self.provenance, dtype=dtype, backend=CALLER)
        reasons = _uncalibrated(self.bundle, provenance)
        plan = replace(
            self.plan,
            calibrated=tuple(c.id not in reasons for c in self.bundle.spec.clusters),
            benign_p=_benign_p(self.bundle, reasons),
        )
        return replace(self, provenance=provenance, plan=plan, uncalibrated_reasons=reasons)

    @property
    def reuse_key(self) -> str:
        """Equal where equal tokens have equal scores: what `Engine` reuses results under."""
        p = self.provenance
        return " ".join((p.model_digest, p.bundle_digest, p.dtype, p.backend, p.server_version))

    def cluster_infos(self) -> tuple[ClusterInfo, ...]:
        """The registry's view of the clusters."""
        ids = [cluster.id for cluster in self.bundle.spec.clusters]
        return self.bundle.cluster_infos(dict(zip(ids, self.plan.calibrated, strict=True)))


def load_served(
    bundle: Bundle,
    model_folder: Path,
    model_digest: str,
    saes: Mapping[str, SAEFiles],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Served:
    """Loads what the bundle names and proves that the parts belong together.

    Args:
        model_digest: digest of the model's folder, as `model_store` found it.
        saes: the files of the bundle's SAEs, as `sae_store` found them.

    Raises:
        BundleError: an SAE, head or tokenizer that does not fit the model.
        ModelStoreError: the model's folder cannot be loaded.
    """
    spec = bundle.spec
    try:
        loaded_saes = _load_saes(bundle, saes)
        hook_points = _hook_points(spec)
        language_model = load_language_model(
            model_folder, hook_points.values(), device=device, dtype=torch_dtype(dtype)
        )
        tokenizer = load_tokenizer(model_folder)
        scorer = Scorer(language_model, tokenizer, loaded_saes, _heads(bundle))
    except (ModelLoadError, TokenizerError) as error:
        raise ModelStoreError(f"model {model_folder}: {error}") from error
    except SAECoreError as error:
        raise BundleError(f"bundle {bundle.label}: {error}") from error
    wanted = spec.model.tokenizer_digest
    if wanted is not None and wanted != tokenizer.fingerprint:
        raise BundleError(
            f"model.tokenizer_digest: found {tokenizer.fingerprint} in {model_folder}, "
            f"expected {wanted}"
        )
    provenance = Provenance(
        model=spec.model.id,
        model_digest=model_digest,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bundle=bundle.label,
        bundle_digest=bundle.digest,
        dtype=dtype,
        backend=f"torch-{device}",
        server_version=__version__,
    )
    reasons = _uncalibrated(bundle, provenance)
    return Served(
        bundle=bundle,
        scorer=scorer,
        saes=loaded_saes,
        tokenizer=tokenizer,
        plan=ClusterPlan(
            spec=spec,
            heads=scorer.heads,
            aggregator=Aggregator(aggregate_specs(spec)),
            calibrated=tuple(c.id not in reasons for c in spec.clusters),
            benign_p=_benign_p(bundle, reasons),
        ),
        provenance=provenance,
        policies={name: Policy(name, spec) for name in spec.policies},
        hook_points=tuple(str(point) for point in hook_points.values()),
        vocab_size=language_model.config.vocab_size,
        uncalibrated_reasons=reasons,
    )


def _load_saes(bundle: Bundle, saes: Mapping[str, SAEFiles]) -> dict[str, tuple[HookPoint, SAE]]:
    loaded = {}
    for sae_id, ref in bundle.spec.saes.items():
        found = saes[sae_id]
        try:
            hook_point = parse_hook_point(ref.hook_point)
            sae = load_sae(found.path, **found.hints)  # type: ignore[arg-type]  # checked there
            loaded[sae_id] = (hook_point, sae)
        except SAECoreError as error:
            raise BundleError(f"saes.{sae_id}: {error}") from error
    return loaded


def _hook_points(spec: BundleSpec) -> dict[str, HookPoint]:
    names = [ref.hook_point for ref in spec.saes.values()]
    names += [ref.hook_point for ref in spec.dense_heads.values()]
    return {name: parse_hook_point(name) for name in dict.fromkeys(names)}


def _heads(bundle: Bundle) -> ClusterHeads:
    clusters = []
    for c in bundle.spec.clusters:
        head = None if c.dense_head is None else bundle.dense_heads[c.dense_head]
        clusters.append(
            Cluster(
                id=c.id,
                latents=tuple(
                    LatentTerm(
                        sae=t.sae, latent_id=t.id, weight=t.weight, scale=t.scale, label=t.label
                    )
                    for t in c.latents
                ),
                transform=c.transform,
                dense_weight=None if head is None else head.weight,
                dense_bias=0.0 if head is None else head.bias,
                dense_hook_point=(
                    None
                    if c.dense_head is None
                    else str(parse_hook_point(bundle.spec.dense_heads[c.dense_head].hook_point))
                ),
                fusion_sae=c.fusion.sae,
                fusion_dense=c.fusion.dense,
                fusion_bias=c.fusion.bias,
            )
        )
    return ClusterHeads(clusters, list(bundle.spec.saes))


def _uncalibrated(bundle: Bundle, provenance: Provenance) -> dict[str, str]:
    """Per cluster, the first thing in which its artefact differs from what is served."""
    reasons: dict[str, str] = {}
    for cluster in bundle.spec.clusters:
        if cluster.calibration is None:
            reasons[cluster.id] = "no calibration artefact"
            continue
        artefact = bundle.calibration[cluster.calibration]
        served = {
            "model_digest": provenance.model_digest,
            "tokenizer_digest": provenance.tokenizer_fingerprint,
            "dtype": provenance.dtype,
            "backend": provenance.backend,
        }
        for key, found in served.items():
            if artefact.get(key) != found:
                reasons[cluster.id] = f"{key}: found {found}, calibrated on {artefact.get(key)}"
                break
        else:
            if artefact.get("calibrated") is not True:
                reasons[cluster.id] = str(
                    artefact.get("reason") or "the artefact does not claim to be calibrated"
                )
            elif _thresholds(artefact, cluster.id) != cluster.thresholds.model_dump():
                reasons[cluster.id] = "thresholds in bundle.yaml are not the calibrated ones"
    return reasons


def _entry(artefact: Mapping[str, object], cluster: str) -> Mapping[str, object]:
    clusters = artefact.get("clusters")
    entry = clusters.get(cluster) if isinstance(clusters, dict) else None
    return entry if isinstance(entry, dict) else {}


def _thresholds(artefact: Mapping[str, object], cluster: str) -> object:
    return _entry(artefact, cluster).get("thresholds")


def _benign_p(bundle: Bundle, reasons: Mapping[str, str]) -> BenignP:
    """Share of benign calibration texts at or above a score, from the stored sorted scores."""
    tables: list[list[float] | None] = []
    for cluster in bundle.spec.clusters:
        table: object = None
        if cluster.calibration is not None and cluster.id not in reasons:
            table = _entry(bundle.calibration[cluster.calibration], cluster.id).get("benign_scores")
        tables.append(sorted(float(v) for v in table) if isinstance(table, list) else None)

    def benign_p(index: int, score: float) -> float | None:
        table = tables[index]
        if table is None:
            return None
        at_least = len(table) - bisect.bisect_left(table, score)
        # The scored text counts as one more benign one: a p-value is never 0.
        return (at_least + 1) / (len(table) + 1)

    return benign_p
