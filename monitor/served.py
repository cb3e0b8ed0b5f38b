"""A bundle made ready to score: its model, SAEs and heads loaded, checked and named.

One `Served` is immutable; a reload builds another beside it. Requests keep the one that they
began with.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from monitor import __version__
from monitor.baselines import Expected, find_expected
from monitor.bundle import Bundle
from monitor.bundle_spec import BundleSpec
from monitor.canary_spec import Canary, CanaryExpectation
from monitor.engine import devices, torch_dtype
from monitor.errors import BundleError, ModelStoreError, SettingsError
from monitor.evidence import BenignP, ClusterPlan, aggregate_specs
from monitor.graph_store import GraphPlace, Progress, graph_identity, on_graph, open_graph
from monitor.policy import Policy
from monitor.records import ClusterInfo, LatentInfo, Provenance
from monitor.sae_store import SAEFiles
from sae_core.aggregation import Aggregator
from sae_core.errors import (
    ExportError,
    ModelLoadError,
    RankError,
    SAECoreError,
    TokenizerError,
)
from sae_core.formats import load_sae
from sae_core.heads import Cluster, ClusterHeads, LatentTerm, heads_digest
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel
from sae_core.language_model.products import Products
from sae_core.language_model.ranks import load_tensor_parallel
from sae_core.language_model.tokenizer import Tokenizer, load_tokenizer
from sae_core.sae import SAE
from sae_core.scorer import Scorer

CALLER = "caller"
"""Backend of activations that a caller gave."""

LatentDrift = Callable[[str, int], tuple[int, float | None]]
"""SAE and latent to `LatentInfo.drift` and `LatentInfo.live_rate`."""


def no_drift(sae: str, latent: int) -> tuple[int, float | None]:
    """Nothing is known of the latent's live rate."""
    return 0, None


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
    expected: Expected | None = None
    """What traffic like the calibration's does; None where nothing here is calibrated so."""
    no_baseline: str = ""
    """Why that is so."""

    def as_given(self, dtype: str) -> Served:
        """The same, as it scores activations of this dtype that a caller gave.

        A calibration covers them where it was made with the backend "caller" and this dtype.
        """
        provenance = replace(self.provenance, dtype=dtype, backend=CALLER)
        facts = calibration_facts(self.bundle, provenance, self.plan.heads)
        reasons = _uncalibrated(self.bundle, facts)
        expected, no_baseline = find_expected(self.bundle, facts, self.plan.heads)
        plan = replace(
            self.plan,
            calibrated=tuple(c.id not in reasons for c in self.bundle.spec.clusters),
            benign_p=_benign_p(self.bundle, reasons),
        )
        return replace(
            self,
            provenance=provenance,
            plan=plan,
            uncalibrated_reasons=reasons,
            expected=expected,
            no_baseline=no_baseline,
        )

    @property
    def logits_key(self) -> str:
        """Equal where equal tokens have equal logits, whatever thresholds and aggregates are."""
        facts = calibration_facts(self.bundle, self.provenance, self.plan.heads)
        if len(self.bundle.sae_digests()) < len(self.bundle.spec.saes):
            facts["bundle_digest"] = self.provenance.bundle_digest
        facts["server_version"] = self.provenance.server_version
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def reuse_key(self) -> str:
        """Equal where equal tokens have equal scores: what `Engine` reuses results under."""
        p = self.provenance
        return " ".join((p.model_digest, p.bundle_digest, p.dtype, p.backend, p.server_version))

    def with_canaries(
        self, canaries: tuple[Canary, ...], expectation: CanaryExpectation | None
    ) -> Served:
        """The same with other canaries."""
        bundle = replace(self.bundle, canaries=canaries, canary_expectation=expectation)
        return replace(self, bundle=bundle)

    def close(self) -> None:
        """Ends the other processes of a tensor-parallel model; nothing can be scored then."""
        self.scorer.language_model.close()

    def cluster_infos(self, drift: LatentDrift = no_drift) -> tuple[ClusterInfo, ...]:
        """The registry's view of the clusters."""
        ids = [cluster.id for cluster in self.bundle.spec.clusters]
        infos = self.bundle.cluster_infos(dict(zip(ids, self.plan.calibrated, strict=True)))
        staleness = self.plan.staleness
        rates = {} if self.expected is None else self.expected.baseline.rates()

        def watched(latent: LatentInfo) -> LatentInfo:
            sign, live = drift(latent.sae, latent.latent_id)
            baseline = rates.get((latent.sae, latent.latent_id))
            return replace(latent, baseline_rate=baseline, live_rate=live, drift=sign)

        return tuple(
            replace(
                info,
                stale_reasons=staleness.reasons(info.cluster),
                latents=tuple(map(watched, info.latents)),
            )
            for info in infos
        )


def backend_name(device: str, *, tensor_parallel: int = 1, graph: GraphPlace | None = None) -> str:
    """What multiplies and where, as provenance and calibration artefacts name it."""
    if graph is not None:
        return f"onnx-{device}"
    return f"torch-{device}" + (f"-tp{tensor_parallel}" if tensor_parallel > 1 else "")


def load_served(
    bundle: Bundle,
    model_folder: Path,
    model_digest: str,
    saes: Mapping[str, SAEFiles],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    gpus: int = 1,
    tensor_parallel: int = 1,
    products: Products = "auto",
    graph: GraphPlace | None = None,
    progress: Progress = lambda what, share: None,
) -> Served:
    """Loads what the bundle names and proves that the parts belong together.

    Args:
        model_digest: digest of the model's folder, as `model_store` found it.
        saes: the files of the bundle's SAEs, as `sae_store` found them.
        dtype: float32 or bfloat16; float32 or int8 with a graph.
        gpus: CUDA devices that the model's blocks are spread over.
        tensor_parallel: processes that every block is split over; `close` what is returned.
        products: what multiplies the model's matrices on the CPU; torch for a model to export.
        graph: the exported graph that makes the scores (backend onnx); None for torch.

    Raises:
        SettingsError: there are fewer CUDA devices; or the graph cannot be had, or is of something
            else.
        BundleError: an SAE, head or tokenizer that does not fit the model.
        ModelStoreError: the model's folder cannot be loaded.
    """
    with _explaining(bundle, model_folder):
        loaded_saes = _load_saes(bundle, saes)
        tokenizer = load_tokenizer(model_folder)
        hook_points = list(_hook_points(bundle.spec).values())
        heads = _heads(bundle)

        def in_torch(device: str = "cpu", dtype: str = "float32") -> Scorer:
            language_model = _load_model(
                model_folder,
                hook_points,
                device=device,
                dtype=dtype,
                gpus=gpus,
                tensor_parallel=tensor_parallel,
                products=products if graph is None else "torch",
            )
            try:
                return Scorer(language_model, tokenizer, loaded_saes, heads)
            except BaseException:
                language_model.close()
                raise

        backend = backend_name(device, tensor_parallel=tensor_parallel, graph=graph)
        if graph is None:
            scorer = in_torch(device, dtype)
        else:
            identity = graph_identity(bundle.digest, model_digest)
            session = open_graph(
                graph, in_torch, identity=identity, device=device, dtype=dtype, progress=progress
            )
            scorer = on_graph(session, model_folder, tokenizer, loaded_saes, heads)
    try:
        return _assemble(bundle, scorer, model_digest, loaded_saes, dtype, backend)
    except BaseException:
        scorer.language_model.close()
        raise


def _load_model(
    folder: Path,
    hook_points: Sequence[HookPoint],
    *,
    device: str,
    dtype: str,
    gpus: int,
    tensor_parallel: int,
    products: Products,
) -> LanguageModel:
    places = devices(device, gpus)
    if tensor_parallel == 1:
        return load_language_model(
            folder, hook_points, device=places, dtype=torch_dtype(dtype), products=products
        )
    if device == "cuda":
        devices(device, tensor_parallel, setting="tensor_parallel")
    return load_tensor_parallel(
        folder, hook_points, n_ranks=tensor_parallel, device=device, dtype=torch_dtype(dtype)
    )


@contextmanager
def _explaining(bundle: Bundle, model_folder: Path) -> Iterator[None]:
    """Says of what goes wrong in here whether it is the model's or the bundle's."""
    try:
        yield
    except (ModelLoadError, TokenizerError, RankError) as error:
        raise ModelStoreError(f"model {model_folder}: {error}") from error
    except ExportError as error:
        raise SettingsError(f"backend: onnx: {error}") from error
    except SAECoreError as error:
        raise BundleError(f"bundle {bundle.label}: {error}") from error


def _assemble(
    bundle: Bundle,
    scorer: Scorer,
    model_digest: str,
    loaded_saes: Mapping[str, tuple[HookPoint, SAE]],
    dtype: str,
    backend: str,
) -> Served:
    spec, tokenizer = bundle.spec, scorer.tokenizer
    wanted = spec.model.tokenizer_digest
    if wanted is not None and wanted != tokenizer.fingerprint:
        raise BundleError(
            f"model.tokenizer_digest: found {tokenizer.fingerprint} in "
            f"{scorer.language_model.config.folder}, "
            f"expected {wanted}"
        )
    provenance = Provenance(
        model=spec.model.id,
        model_digest=model_digest,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bundle=bundle.label,
        bundle_digest=bundle.digest,
        dtype=dtype,
        backend=backend,
        server_version=__version__,
    )
    facts = calibration_facts(bundle, provenance, scorer.heads)
    reasons = _uncalibrated(bundle, facts)
    expected, no_baseline = find_expected(bundle, facts, scorer.heads)
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
        hook_points=tuple(str(point) for point in _hook_points(spec).values()),
        vocab_size=scorer.language_model.config.vocab_size,
        uncalibrated_reasons=reasons,
        expected=expected,
        no_baseline=no_baseline,
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


def calibration_facts(
    bundle: Bundle, provenance: Provenance, heads: ClusterHeads
) -> dict[str, object]:
    """What token logits depend on, as a calibration artefact records it and is compared with."""
    return {
        "model_digest": provenance.model_digest,
        "tokenizer_digest": provenance.tokenizer_fingerprint,
        "sae_digests": bundle.sae_digests(),
        "heads_digest": heads_digest(heads),
        "dtype": provenance.dtype,
        "backend": provenance.backend,
    }


def _uncalibrated(bundle: Bundle, facts: Mapping[str, object]) -> dict[str, str]:
    """Per cluster, the first thing in which its artefact differs from what is served."""
    digests = bundle.sae_digests()
    unpinned = [sae_id for sae_id in bundle.spec.saes if sae_id not in digests]
    reasons: dict[str, str] = {}
    for cluster in bundle.spec.clusters:
        if cluster.calibration is None:
            reasons[cluster.id] = "no calibration artefact"
            continue
        artefact = bundle.calibration[cluster.calibration]
        if unpinned:
            reasons[cluster.id] = (
                f"sae_digests: {unpinned[0]} is not in the bundle and not pinned (`bundle seal`)"
            )
            continue
        for key, found in facts.items():
            if artefact.get(key) != found:
                reasons[cluster.id] = _difference(key, found, artefact.get(key))
                break
        else:
            if artefact.get("calibrated") is not True:
                reasons[cluster.id] = str(
                    artefact.get("reason") or "the artefact does not claim to be calibrated"
                )
            elif _thresholds(artefact, cluster.id) != cluster.thresholds.model_dump():
                reasons[cluster.id] = "thresholds in bundle.yaml are not the calibrated ones"
            elif _entry(artefact, cluster.id).get("aggregate") != cluster.aggregate.model_dump():
                reasons[cluster.id] = "the aggregate in bundle.yaml is not the calibrated one"
    return reasons


def _difference(key: str, found: object, calibrated: object) -> str:
    if isinstance(found, dict) and isinstance(calibrated, dict):
        for name in sorted(found.keys() | calibrated.keys()):
            if found.get(name) != calibrated.get(name):
                return _difference(f"{key}.{name}", found.get(name), calibrated.get(name))
    return f"{key}: found {found}, calibrated on {calibrated}"


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
