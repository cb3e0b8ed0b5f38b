"""Why an SAE does not fit the stream it reads: likely mistakes, each tried and measured.

What brings the numbers back into their bands is a likely cause. What nothing brings back is most
often another model: its weights cannot be tried, but may be compared by digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from sae_core.sae_config import Architecture, SAEConfig
from sae_core.sae_weights import SAEWeights

LAYERS_AROUND = 3
NO_DIFFERENCE = 1e-3
"""Distance below which two measurements are the same."""
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

    @property
    def tried(self) -> str:
        """`what` without its claim, for one that does not explain."""
        return self.what.replace("it fits ", "", 1)


LARGEST_TRIED = 2**28
"""Encoder numbers beyond which other formulas are not tried: they need the whole SAE in memory."""

MakeSAE = Callable[[], SAE]


def diagnose(
    sae: SAE,
    hook_point: str,
    bands: Bands,
    reader: ProbeReader,
    *,
    with_bos: bool = True,
    out: str | None = None,
) -> tuple[Cause, ...]:
    """What may be wrong with an SAE outside its bands, the likeliest first.

    Tries other layers and sites near by, the other habits of normalising, of `b_dec`, of gates and
    thresholds, and texts with BOS or without, other than `with_bos`. Formulas need the whole SAE in
    memory, and are left out where it is larger than `LARGEST_TRIED`.

    Args:
        out: The place that a transcoder predicts; in other layers the one beside it is taken.
    """
    causes: list[Cause] = []
    hook_point = reader.canonical(hook_point)
    places = _places(hook_point)
    targets = {place: _beside(reader.canonical(out), hook_point, place) for place in places if out}
    activations = reader.read([*places, *dict.fromkeys(targets.values())], with_bos)
    here = activations.get(hook_point)
    if here is None:
        return ()
    target = activations.get(targets.get(hook_point, ""))
    latent_ids = sorted(bands.firings)
    attempt = _Attempts(bands, latent_ids, measure(sae, here, latent_ids, target=target), causes)
    for place in places:
        x = activations.get(place)
        if x is not None and place != hook_point:
            there = activations.get(targets.get(place, ""))
            attempt(_misplaced(hook_point, place), lambda: sae, x, there)
    other = reader.read([hook_point], not with_bos).get(hook_point)
    if other is not None:
        habit = "without" if with_bos else "with"
        what = f"BOS handled differently: it fits texts read {habit} BOS"
        attempt(what, lambda: sae, other, None)
    if sae.config.d_in * sae.config.d_sae <= LARGEST_TRIED:
        for what, make in _other_formulas(sae, here, bands):
            attempt(what, make, here, target)
    return tuple(sorted(causes, key=lambda cause: (not cause.explains, cause.distance)))


class _Attempts(NamedTuple):
    """Tries one mistake after the other and keeps what each gives."""

    bands: Bands
    latent_ids: Sequence[int]
    as_is: Measured
    """What the SAE gives without any change: a change that changes nothing is no cause."""
    causes: list[Cause]

    def __call__(
        self,
        what: str,
        make: MakeSAE,
        x: Float[Tensor, "n width"],
        target: Float[Tensor, "n d_out"] | None,
    ) -> None:
        try:
            sae = make()
            if not sae.config.reads(x.shape[-1]):
                return
            measured = measure(sae, x, self.latent_ids, target=target)
        except SAECoreError:
            return  # a formula that these numbers do not allow explains nothing
        if _distance(Bands.around(self.as_is), measured) < NO_DIFFERENCE:
            return
        # With another BOS habit the same texts may have another number of tokens to score.
        bands = replace(self.bands, n_tokens=measured.n_tokens)
        if measured.fvu is None:  # a transcoder's target is not there to be read
            none = dict.fromkeys(("fvu", "fvu_min", "fvu_max"))
            none |= dict.fromkeys(("fvu_median", "fvu_median_min", "fvu_median_max"))
            bands = replace(bands, **none)  # type: ignore[arg-type]
        cause = Cause(
            what=what,
            measured=measured,
            explains=not bands.problems(measured),
            distance=_distance(bands, measured),
        )
        self.causes.append(cause)


def _beside(out: str, hook_point: str, place: str) -> str:
    """The transcoder's target, as many layers on as the place is."""
    point = parse_hook_point(out)
    moved = point.layer + parse_hook_point(place).layer - parse_hook_point(hook_point).layer
    if moved < 0 or point.site == "module":
        return out
    return str(replace(point, layer=moved))


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
        if place != hook_point and sae.config.reads(x.shape[-1]):
            there = measure(sae, x)
            if there.fvu is not None and there.fvu < CLEARLY_BETTER * measured.fvu:
                found.append(Place(place, there))
    return tuple(sorted(found, key=lambda place: place.measured.fvu or 0.0))


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
) -> Iterator[tuple[str, MakeSAE]]:
    """The same numbers under other formulas, each with the mistake that it would undo."""
    config, weights = sae.config, sae.weights

    def changed(weights: SAEWeights = weights, **changes: object) -> MakeSAE:
        return lambda: SAE(replace(config, **changes), weights, sae.card)  # type: ignore[arg-type]

    length = config.d_in**0.5 / float(x.float().norm(dim=-1).mean().clamp(min=1e-30))
    for normalize in ("layer_norm", "unit_norm", "none"):
        if normalize != config.normalize:
            what = f"missing normalisation: it fits inputs normalised by {normalize}"
            yield what, changed(normalize=normalize)
    what = f"missing normalisation: it fits inputs times {length:.4g} (sqrt(d_in) / mean length)"
    yield what, changed(input_scale=length, output_scale=length)
    habit = "without" if config.center_input else "with"
    what = f"centring: it fits inputs {habit} their mean taken off (center)"
    yield what, changed(center_input=not config.center_input)
    if not config.predicts_another_place:
        habit = "without" if config.apply_b_dec_to_input else "with"
        what = f"b_dec: it fits inputs {habit} b_dec taken off (apply_b_dec_to_input)"
        yield what, changed(apply_b_dec_to_input=not config.apply_b_dec_to_input)
    if config.architecture != "gated":
        norms = "acts" if config.decoder_norms == "unused" else "unused"
        yield f"decoder norms: it fits decoder_norms {norms}", changed(decoder_norms=norms)
        plain = weights._replace(threshold=None)
        for architecture, k in _other_ranks(config, bands):
            kind = "wrong k" if architecture == config.architecture else "wrong gate"
            gate = {"topk": "TopK", "abstopk": "AbsTopK"}[architecture]
            make = changed(plain, architecture=architecture, k=k, signed=False)
            yield f"{kind}: it fits {gate} with k {k}", make
        if config.architecture != "relu":
            make = changed(plain, architecture="relu", k=None, signed=False)
            yield "wrong gate: it fits ReLU", make
    if weights.threshold is not None:
        factor = _threshold_factor(sae, x, bands.l0)
        scaled = weights._replace(threshold=weights.threshold * factor)
        yield f"unscaled threshold: it fits thresholds times {factor:.4g}", changed(scaled)


def _other_ranks(config: SAEConfig, bands: Bands) -> list[tuple[Architecture, int]]:
    """Ranked gates to try: with the k that gives the expected L0, and with k as it is."""
    ks = {round(bands.l0)} if config.k is None else {round(bands.l0), config.k}
    if config.k is not None:  # L0 lies below k where few latents are positive
        ks |= {2 * config.k, config.k // 2}
    gates: tuple[Architecture, ...] = ("topk", "abstopk")
    return [
        (gate, k)
        for gate in gates
        for k in sorted(ks)
        if 1 <= k <= config.d_sae and (gate, k) != (config.architecture, config.k)
    ]


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
