"""The fidelity gate: a bundle's SAEs on its probe texts, before anything is scored.

An SAE outside its bands belongs to another place, another model or another formula; what it would
score is plausible nonsense. The gate says which numbers are off and what brings them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import structlog

from monitor.bundle import FIDELITY_FOLDER, PROBES, Bundle
from monitor.errors import BundleError, UnfitError
from monitor.served import Served
from sae_core.diagnosis import Cause, Place, better_places, diagnose
from sae_core.errors import SAECoreError
from sae_core.fidelity import Bands, Measured, measure
from sae_core.hook_points import HookPoint, n_layers_needed
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel
from sae_core.language_model.processing import DEFAULT_PROCESSING
from sae_core.probe_reader import ProbeReader

log = structlog.get_logger(__name__)

NAMED_CAUSES = 3
"""Causes in a message; the table of `bundle check` has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SAEFidelity:
    """One SAE, measured and judged."""

    sae: str
    hook_point: str
    measured: Measured
    bands: Bands
    problems: tuple[str, ...]
    causes: tuple[Cause, ...]
    """Mistakes that were tried, the likeliest first; empty where all is well."""
    model_differs: str | None
    """How the model differs by digest from the one that the bundle was made on; None if not."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether it is what it was."""
        return not self.problems

    @property
    def message(self) -> str:
        """One line: the numbers that are off, then the likely causes."""
        if not self.causes:
            other = "" if self.model_differs is None else f". The model: {self.model_differs}"
            return f"SAE {self.sae} at {self.hook_point}: {'; '.join(self.problems)}{other}"
        tried = f"of {len(self.causes)} mistakes tried"
        likely = [cause for cause in self.causes if cause.explains][:NAMED_CAUSES]
        lines = [f"({n}) {_brief(cause)}" for n, cause in enumerate(likely, 1)]
        if self.model_differs is not None:
            lines.insert(0, f"wrong model or revision: {self.model_differs}")
        if not likely:
            nearest = f"; nearest: {_brief(self.causes[0])}"
            lines.append(
                "none brings it back into its bands, so most likely a wrong model or revision, "
                f"or other SAE weights{nearest}"
            )
        return (
            f"SAE {self.sae} at {self.hook_point}: {'; '.join(self.problems)}. "
            f"Likely causes, {tried}: {'; '.join(lines)}"
        )


def check_fidelity(served: Served, *, explain: bool = True) -> tuple[SAEFidelity, ...]:
    """Measures every SAE of the bundle that a cluster reads.

    Args:
        explain: Whether to look for the causes where one is outside its bands; that loads more of
            the model, and the SAE whole. Never done where the model is split over ranks: in one
            process it might not fit.

    Raises:
        BundleError: The bundle has no probe texts, or no bands for an SAE.
    """
    bundle = served.bundle
    explain = explain and served.scorer.language_model.config.n_ranks == 1
    found = []
    for sae_id in served.saes:
        content = bundle.fidelity.get(sae_id)
        name = f"{FIDELITY_FOLDER}/{sae_id}.json"
        if content is None:
            raise BundleError(
                f"bundle: found no {name}, expected what SAE {sae_id} gives on the probe texts "
                "(`sae-monitor bundle measure` writes it)"
            )
        try:
            d_sae = served.saes[sae_id][1].config.d_sae
            bands = Bands.from_json(content, name, d_sae=d_sae)
            found.append(_judge(served, sae_id, bands, explain=explain))
        except SAECoreError as error:
            raise BundleError(f"SAE {sae_id}: {error}") from error
    return tuple(found)


def measure_fidelity(served: Served, sae_id: str) -> tuple[Bands, tuple[Place, ...]]:
    """Bands that do not exist yet, around what is measured, and places that the SAE fits better.

    Raises:
        BundleError: The bundle has no probe texts.
    """
    try:
        reader = _reader(served, sae_id)
        measured, hook_point = _measure(served, sae_id, reader)
        sae = served.saes[sae_id][1].replaced()
        bands = Bands.around(measured, with_bos=reader.begins_with_bos)
        return bands, better_places(sae, hook_point, measured, reader)
    except SAECoreError as error:
        raise BundleError(f"SAE {sae_id}: {error}") from error


def calibrated_first(
    bundle: Bundle, dtypes: Sequence[str], *, model_digest: str, backend: str
) -> tuple[str, ...]:
    """The data types that may be tried, from the first on whose thresholds are calibrated here.

    All of them where none is: a faster one must not void the claims that the bundle makes.
    """
    here = (model_digest, backend, True)
    calibrated = {
        artefact.get("dtype")
        for artefact in bundle.calibration.values()
        if tuple(map(artefact.get, ("model_digest", "backend", "calibrated"))) == here
    }
    first = next((place for place, dtype in enumerate(dtypes) if dtype in calibrated), 0)
    if first:
        log.info("dtype_calibrated", dtype=dtypes[first], faster=", ".join(dtypes[:first]))
    return tuple(dtypes[first:])


def load_fitting(
    load: Callable[[str], Served], dtypes: Sequence[str], *, check: bool = True
) -> Served:
    """What `load` gives for the first data type in which every SAE lies within its bands.

    The last one is not looked at: whether it fits is for the gate. Nor is one that cannot be
    measured, as nothing speaks against it.

    Args:
        check: Off takes the first as it is.
    """
    for dtype in dtypes[:-1]:
        served = load(dtype)
        if not check:
            return served
        try:
            unfit = [one for one in check_fidelity(served, explain=False) if not one.fits]
        except BundleError as error:
            log.warning("dtype_not_checked", dtype=dtype, reason=str(error))
            return served
        if not unfit:
            return served
        log.warning("dtype_unfit", dtype=dtype, reason="; ".join(one.message for one in unfit))
        served.close()  # one group of processes at a time
        del served, unfit  # two models would not fit where one just does
    return load(dtypes[-1])


def gate(served: Served) -> None:
    """Raises UnfitError where an SAE lies outside its bands, with everything that was found."""
    unfit = [one.message for one in check_fidelity(served) if not one.fits]
    if unfit:
        raise UnfitError("; ".join(unfit))


def _judge(served: Served, sae_id: str, bands: Bands, *, explain: bool) -> SAEFidelity:
    began = perf_counter()
    reader = _reader(served, sae_id)
    measured, hook_point = _measure(served, sae_id, reader)
    problems = bands.problems(measured)
    if bands.with_bos != reader.begins_with_bos:
        habits = {True: "with BOS", False: "without BOS"}
        found, expected = habits[reader.begins_with_bos], habits[bands.with_bos]
        problems += (f"the probe texts are read {found}, expected {expected} as measured",)
    causes: tuple[Cause, ...] = ()
    if explain and problems and measured.n_tokens == bands.n_tokens:
        sae = served.saes[sae_id][1].replaced()
        try:
            causes = diagnose(
                sae,
                hook_point,
                bands,
                reader,
                with_bos=reader.begins_with_bos,
                out=sae.card.hook_point_out,
            )
        except (SAECoreError, MemoryError, RuntimeError) as error:
            # What is off must be told, whatever becomes of the search for the cause.
            log.warning("diagnosis_failed", sae=sae_id, error=str(error))
    return SAEFidelity(
        sae=sae_id,
        hook_point=hook_point,
        measured=measured,
        bands=bands,
        problems=problems,
        causes=causes,
        model_differs=_model_differs(served),
        seconds=perf_counter() - began,
    )


def _measure(served: Served, sae_id: str, reader: ProbeReader) -> tuple[Measured, str]:
    point, kept = served.saes[sae_id]
    sae = kept.replaced()  # what this reads of it is not to stay in memory
    hook_point, out = str(point), sae.card.hook_point_out
    wanted = [hook_point]
    if sae.config.predicts_another_place and out is not None:
        wanted.append(out)
    read = reader.read(wanted, reader.begins_with_bos)
    target = None if len(wanted) == 1 else read.get(wanted[1])
    latent_ids = served.scorer.heads.latent_ids[sae_id]
    return measure(sae, read[hook_point], latent_ids, target=target), hook_point


def _reader(served: Served, sae_id: str) -> ProbeReader:
    bundle, model = served.bundle, served.scorer.language_model
    if not bundle.probes:
        raise BundleError(
            f"bundle: found no probe texts, expected some for its SAEs in {PROBES} "
            "(`sae-monitor bundle measure` writes some)"
        )
    processed = served.saes[sae_id][1].card.processing == "default"
    return ProbeReader(
        model,
        _loader(model),
        served.tokenizer,
        bundle.probes,
        processing=DEFAULT_PROCESSING if processed else None,
    )


def _loader(model: LanguageModel) -> Callable[[Sequence[HookPoint]], LanguageModel]:
    config = model.config

    def load(hook_points: Sequence[HookPoint]) -> LanguageModel:
        devices = config.devices[: max(1, n_layers_needed(hook_points))]
        return load_language_model(config.folder, hook_points, device=devices, dtype=config.dtype)

    return load


def _model_differs(served: Served) -> str | None:
    expected, found = served.bundle.spec.model.weights_digest, served.provenance.model_digest
    if expected is None or expected == found:
        return None
    return f"its weights have digest {found[:12]}..., the bundle was made on {expected[:12]}..."


def _brief(cause: Cause) -> str:
    m = cause.measured
    fvu = "" if m.fvu is None else f"FVU {m.fvu:.3g}, "
    what = cause.what if cause.explains else cause.tried
    return f"{what} ({fvu}L0 {m.l0:.3g})"
