"""Why an SAE does not fit the stream it reads: likely mistakes, each tried and measured.

What brings the numbers back into their bands is a likely cause. What nothing brings back is most
often another model: its weights cannot be tried, but may be compared by digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sae_core.errors import SAECoreError
from sae_core.fidelity import Bands, Measured, measure
from sae_core.hook_points import parse_hook_point
from sae_core.probe_reader import ProbeReader
from sae_core.sae import SAE
from sae_core.sae_config import RANKED, THRESHOLDED, SAEConfig
from sae_core.sae_weights import SAEWeights

LAYERS_AROUND = 3
SITES = ("hook_resid_post", "hook_resid_mid", "hook_attn_out", "hook_mlp_out")
"""Tried in every near layer; resid_pre is resid_post of the layer before, but for layer 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A mistake that was tried, and what the SAE gives without it."""

    what: str
    measured: Measured
    explains: bool
    """Whether everything lies inside the bands then."""
    distance: float
    """From the expected numbers, in powers of e; 0 is the very same."""


def diagnose(
    sae: SAE, hook_point: str, bands: Bands, reader: ProbeReader, *, with_bos: bool = True
) -> tuple[Cause, ...]:
    """What may be wrong with an SAE outside its bands, the likeliest first.

    Tries other layers and sites near by, the other habits of normalising, of `b_dec`, of gates and
    thresholds, and texts with BOS or without, other than `with_bos`. Reads the whole SAE into
    memory.
    """
    causes: list[Cause] = []
    hook_point = reader.canonical(hook_point)
    latent_ids = sorted(bands.firings)
    activations = reader.read(_places(hook_point), with_bos)
    here = activations.get(hook_point)
    for place, x in activations.items():
        if place != hook_point:
            _try(causes, sae, x, latent_ids, bands, _misplaced(hook_point, place))
    other = reader.read([hook_point], not with_bos).get(hook_point)
    if other is not None:
        had = "with" if with_bos else "without"
        wants = "without" if with_bos else "with"
        what = f"BOS handled differently: texts were read {had} BOS, it fits them {wants}"
        _try(causes, sae, other, latent_ids, bands, what)
    if here is not None:
        for what, changed in _other_formulas(sae, here, bands):
            _try(causes, changed, here, latent_ids, bands, what)
    return tuple(sorted(causes, key=lambda cause: (not cause.explains, cause.distance)))


class Place(NamedTuple):
    """A hook point, and what an SAE gives there."""

    hook_point: str
    measured: Measured


CLEARLY_BETTER = 0.8
"""Share of the FVU below which another place counts as better."""


def better_places(
    sae: SAE, hook_point: str, measured: Measured, reader: ProbeReader
) -> tuple[Place, ...]:
    """Near places where the SAE reconstructs clearly better than at its own, the best first.

    An SAE is at its best where it was trained: what needs no bands to be noticed.
    """
    if measured.fvu is None:
        return ()
    found = []
    hook_point = reader.canonical(hook_point)
    for place, x in reader.read(_places(hook_point), reader.begins_with_bos).items():
        if place != hook_point and x.shape[-1] == sae.config.d_in:
            there = measure(sae, x)
            if there.fvu is not None and there.fvu < CLEARLY_BETTER * measured.fvu:
                found.append(Place(place, there))
    return tuple(sorted(found, key=lambda place: place.measured.fvu or 0.0))


def _try(
    causes: list[Cause],
    sae: SAE,
    x: Float[Tensor, "n width"],
    latent_ids: Sequence[int],
    bands: Bands,
    what: str,
) -> None:
    if x.shape[-1] != sae.config.d_in:
        return
    try:
        measured = measure(sae, x, latent_ids)
    except SAECoreError:
        return  # a formula that these numbers do not allow explains nothing
    # With another BOS habit the same texts may have another number of tokens to score.
    at_ease = replace(bands, n_tokens=measured.n_tokens)
    explains = not at_ease.problems(measured)
    causes.append(
        Cause(what=what, measured=measured, explains=explains, distance=_distance(bands, measured))
    )


def _distance(bands: Bands, measured: Measured) -> float:
    pairs = [
        (bands.fvu, measured.fvu),
        (bands.fvu_median, measured.fvu_median),
        (bands.l0, measured.l0),
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    total = sum(abs(log((b + 1e-6) / (a + 1e-6))) for a, b in known)
    agreement = bands.firing_agreement(measured)
    return total + (0.0 if agreement is None else 1 - agreement)


def _places(hook_point: str) -> list[str]:
    layer = parse_hook_point(hook_point).layer
    near = range(max(0, layer - LAYERS_AROUND), layer + LAYERS_AROUND + 1)
    places = [hook_point] + [f"blocks.{n}.{site}" for n in near for site in SITES]
    if 0 in near:
        places.append("blocks.0.hook_resid_pre")
    return list(dict.fromkeys(places))


def _misplaced(hook_point: str, place: str) -> str:
    given, found = parse_hook_point(hook_point), parse_hook_point(place)
    if given.site == found.site:
        kind = "wrong layer"
    elif given.layer == found.layer:
        kind = "wrong site"
    else:
        kind = "wrong layer and site"
    return f"{kind}: it fits {place}"


def _other_formulas(
    sae: SAE, x: Float[Tensor, "n width"], bands: Bands
) -> Iterator[tuple[str, SAE]]:
    """The same numbers under other formulas, each with the mistake that it would undo."""
    config, weights = sae.config, sae.weights
    length = config.d_in**0.5 / float(x.float().norm(dim=-1).mean().clamp(min=1e-30))
    for normalize in ("layer_norm", "unit_norm", "none"):
        if normalize != config.normalize:
            what = f"missing normalisation: it fits inputs normalised by {normalize}"
            yield from _changed(sae, what, normalize=normalize)
    what = f"missing normalisation: it fits inputs times {length:.4g} (sqrt(d_in) / mean length)"
    yield from _changed(sae, what, input_scale=length, output_scale=length)
    habit = "without" if config.center_input else "with"
    what = f"centring: it fits inputs {habit} their mean taken off (center)"
    yield from _changed(sae, what, center_input=not config.center_input)
    if not config.predicts_another_place:
        habit = "without" if config.apply_b_dec_to_input else "with"
        what = f"b_dec: it fits inputs {habit} b_dec taken off (apply_b_dec_to_input)"
        yield from _changed(sae, what, apply_b_dec_to_input=not config.apply_b_dec_to_input)
    norms = "acts" if config.decoder_norms == "unused" else "unused"
    yield from _changed(sae, f"decoder norms: it fits decoder_norms {norms}", decoder_norms=norms)
    plain = weights._replace(threshold=None)
    k = min(config.d_sae, max(1, round(bands.l0)))
    if config.architecture not in RANKED and config.architecture != "gated":
        topk = replace(config, architecture="topk", k=k)
        yield f"wrong gate: it fits TopK with k {k}", SAE(topk, plain, sae.card)
    if config.architecture in (*THRESHOLDED, *RANKED):
        relu = replace(config, architecture="relu", k=None, signed=False)
        yield "wrong gate: it fits ReLU", SAE(relu, plain, sae.card)
    if weights.threshold is not None:
        factor = _threshold_factor(sae, x, bands.l0)
        scaled = weights._replace(threshold=weights.threshold * factor)
        yield f"unscaled threshold: it fits thresholds times {factor:.4g}", SAE(config, scaled)


def _changed(sae: SAE, what: str, **changes: object) -> Iterator[tuple[str, SAE]]:
    config: SAEConfig = replace(sae.config, **changes)  # type: ignore[arg-type]
    if config.decoder_norms != "unused" and config.architecture == "gated":
        return
    yield what, SAE(config, sae.weights, sae.card)


def _threshold_factor(sae: SAE, x: Float[Tensor, "n width"], l0: float) -> float:
    """What thresholds must be multiplied by for `l0` active latents a token."""
    weights: SAEWeights = sae.weights
    assert weights.threshold is not None
    positive = weights.threshold > 0
    if not bool(positive.any()):
        return 1.0
    pre_acts = sae.pre_acts(x)[:, positive]
    ratios = (pre_acts / weights.threshold[positive]).flatten()
    above = ratios[ratios > 0].sort(descending=True).values
    wanted = min(len(above) - 1, max(0, round(l0 * len(x))))
    return float(above[wanted]) if len(above) else 1.0
