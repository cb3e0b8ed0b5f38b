"""What benign texts did to the SAEs when thresholds were calibrated: what traffic is compared with.

Rates are per scored token. Tokens of one text go together, so a latent's count varies more between
texts than tokens drawn apart would make it; `dispersion` says by how much. Signals are one number a
text, with mean and spread in each length bucket, as a short text's mean scatters more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from sae_core.calibration import LENGTH_BUCKETS, CalibrationError, length_buckets
from sae_core.vitals import TextVitals

SCHEMA = 1
LEAST_TEXTS = 50
"""Fewer say nothing of how texts differ."""
LEAST_IN_BUCKET = 30
"""A length bucket with fewer texts takes the numbers of all."""
N_AXES = 12
"""Directions in which the registered latents go together that distances know of."""
LEAST_SPREAD = 1e-9


class Signal(NamedTuple):
    """One number a text, by length bucket."""

    mean: Float64[ndarray, " n_buckets"]
    spread: Float64[ndarray, " n_buckets"]
    """Standard deviation between texts."""

    @classmethod
    def of(
        cls, values: Float64[ndarray, " n_texts"], buckets: ndarray, kept: ndarray | None = None
    ) -> Signal:
        """From texts; those whose value is not finite are left out."""
        known = np.isfinite(values) if kept is None else kept & np.isfinite(values)
        mean, spread = [], []
        for bucket in range(len(LENGTH_BUCKETS)):
            mine = values[known & (buckets == bucket)]
            mine = mine if len(mine) >= LEAST_IN_BUCKET else values[known]
            mean.append(float(mine.mean()))
            spread.append(max(float(mine.std(ddof=1)), LEAST_SPREAD))
        return cls(np.array(mean), np.array(spread))

    def z(self, value: float, n_tokens: int) -> float:
        """How many spreads a text of this length lies above the mean."""
        bucket = int(length_buckets(np.array([n_tokens]))[0])
        return float((value - self.mean[bucket]) / self.spread[bucket])


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Mahalanobis distance of a text's mean latent activations from benign ones.

    The covariance of probabilistic principal components (Tipping and Bishop 1999): the strongest
    `axes` as they are, everything else shrunk to one variance, so that few texts suffice.
    """

    mean: Float64[ndarray, " n_latents"]
    scale: Float64[ndarray, " n_latents"]
    axes: Float64[ndarray, "n_axes n_latents"]
    variances: Float64[ndarray, " n_axes"]
    rest: float
    """Variance in every other direction."""

    @classmethod
    def of(cls, means: Float64[ndarray, "n_texts n_latents"]) -> Distance:
        """From each text's mean activations."""
        mean, scale = means.mean(axis=0), means.std(axis=0)
        # A latent that hardly ever fires would make each text on which it does infinitely far.
        scale = np.maximum(scale, max(float(np.median(scale)), LEAST_SPREAD))
        standard = (means - mean) / scale
        n, width = standard.shape
        k = min(N_AXES, width - 1, n - 2)
        _, s, axes = np.linalg.svd(standard, full_matrices=False)
        variances = s**2 / (n - 1)
        rest = max(float(variances[k:].sum()) / max(width - k, 1), 1e-3)
        return cls(
            mean=mean,
            scale=scale,
            axes=axes[:k],
            variances=np.maximum(variances[:k], rest),
            rest=rest,
        )

    def __call__(self, means: Float64[ndarray, " n_latents"]) -> float:
        """The logarithm of the distance: its tail is long."""
        standard = (means - self.mean) / self.scale
        along = self.axes @ standard
        others = float(standard @ standard - along @ along)
        squared = float((along**2 / self.variances).sum()) + max(others, 0.0) / self.rest
        return 0.5 * float(np.log(squared + 1e-6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What is expected of traffic like the calibration's."""

    latents: tuple[tuple[str, int], ...]
    """SAE and latent id, in the order of the heads."""
    n_texts: int
    n_tokens: int
    firings: Float64[ndarray, " n_latents"]
    """Tokens on which each latent was active."""
    dispersion: Float64[ndarray, " n_latents"]
    """Variance of a text's count over what tokens drawn apart would give; at least 1."""
    distance: Distance
    signals: Mapping[str, Signal]
    """registered_l0 and distance; and of each SAE measured whole, `l0:<id>` and `fvu:<id>`."""
    ratios: Mapping[str, float]
    """registered_l0, `l0:<id>`, `fvu:<id>` over all texts together: sums over sums."""

    @classmethod
    def of(cls, latents: Sequence[tuple[str, int]], texts: Sequence[TextVitals]) -> Baseline:
        """From benign texts; CalibrationError where they are too few or no latent is registered."""
        texts = [text for text in texts if text.n_tokens]
        if len(texts) < LEAST_TEXTS or not latents:
            raise CalibrationError(
                f"baseline: found {len(texts)} texts with scored tokens and {len(latents)} "
                f"latents, expected at least {LEAST_TEXTS} and 1"
            )
        lengths = np.array([text.n_tokens for text in texts])
        counts = np.array([text.firings for text in texts], dtype=np.float64)
        firings = counts.sum(axis=0)
        expected = np.outer(lengths, np.maximum(firings, 0.5) / lengths.sum())
        dispersion = ((counts - expected) ** 2 / expected).sum(axis=0) / (len(texts) - 1)
        means = np.array([text.means for text in texts])
        distance = Distance.of(means)
        buckets = length_buckets(lengths)
        signals = {
            "registered_l0": Signal.of(np.array([text.l0 for text in texts]), buckets),
            "distance": Signal.of(_held_out_distances(means), buckets),
        }
        ratios = {"registered_l0": float(firings.sum() / lengths.sum())}
        for sae in texts[0].fits:
            fits = [text.fits[sae] for text in texts if sae in text.fits]
            mine = np.array([buckets[i] for i, text in enumerate(texts) if sae in text.fits])
            signals[f"l0:{sae}"] = Signal.of(np.array([fit.l0 for fit in fits]), mine)
            ratios[f"l0:{sae}"] = sum(f.n_active for f in fits) / sum(f.n_tokens for f in fits)
            fvus = np.array([fit.fvu for fit in fits])
            if np.isfinite(fvus).sum() >= LEAST_TEXTS:
                signals[f"fvu:{sae}"] = Signal.of(fvus, mine)
                whole = [fit for fit in fits if np.isfinite(fit.fvu)]
                ratios[f"fvu:{sae}"] = sum(f.error for f in whole) / sum(f.variance for f in whole)
        return cls(
            latents=tuple(latents),
            n_texts=len(texts),
            n_tokens=int(lengths.sum()),
            firings=firings,
            dispersion=np.maximum(dispersion, 1.0),
            distance=distance,
            signals=signals,
            ratios=ratios,
        )

    def rates(self) -> dict[tuple[str, int], float]:
        """Share of tokens on which each latent was active."""
        pairs = zip(self.latents, (self.firings / self.n_tokens).tolist(), strict=True)
        return dict(pairs)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, six digits a number."""
        d = self.distance
        return {
            "schema": SCHEMA,
            "n_texts": self.n_texts,
            "n_tokens": self.n_tokens,
            "latents": [list(latent) for latent in self.latents],
            "firings": self.firings.astype(int).tolist(),
            "dispersion": _short(self.dispersion),
            "distance": {
                "mean": _short(d.mean),
                "scale": _short(d.scale),
                "axes": [_short(axis) for axis in d.axes],
                "variances": _short(d.variances),
                "rest": d.rest,
            },
            "signals": {
                name: {"mean": _short(signal.mean), "spread": _short(signal.spread)}
                for name, signal in self.signals.items()
            },
            "ratios": {name: float(f"{value:.6g}") for name, value in self.ratios.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], name: str) -> Baseline:
        """What `to_json` gave; CalibrationError naming what is wrong."""
        if content.get("schema") != SCHEMA:
            raise CalibrationError(
                f"{name}: baseline: schema: found {content.get('schema')!r}, expected {SCHEMA}"
            )
        try:
            d = content["distance"]
            n = len(content["latents"])
            for key, values in (("firings", content), ("dispersion", content), ("mean", d)):
                if len(values[key]) != n:
                    raise CalibrationError(
                        f"{name}: baseline: {key}: found {len(values[key])} numbers, expected one "
                        f"for each of {n} latents"
                    )
            return cls(
                latents=tuple((str(sae), int(latent)) for sae, latent in content["latents"]),
                n_texts=int(content["n_texts"]),
                n_tokens=int(content["n_tokens"]),
                firings=_numbers(content["firings"]),
                dispersion=_numbers(content["dispersion"]),
                distance=Distance(
                    mean=_numbers(d["mean"]),
                    scale=_numbers(d["scale"]),
                    axes=np.array([_numbers(axis) for axis in d["axes"]]).reshape(-1, n),
                    variances=_numbers(d["variances"]),
                    rest=float(d["rest"]),
                ),
                signals={
                    key: Signal(_numbers(signal["mean"]), _numbers(signal["spread"]))
                    for key, signal in content["signals"].items()
                },
                ratios={key: float(value) for key, value in content["ratios"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{name}: baseline: found {type(error).__name__} {error}, expected what "
                "`sae-monitor calibrate` writes"
            ) from error


def _held_out_distances(means: Float64[ndarray, "n_texts n_latents"]) -> Float64[ndarray, " n"]:
    """Each text's distance from those of the other half: its own would be too near."""
    order = np.random.default_rng(len(means)).permutation(len(means))
    halves = (order[::2], order[1::2])
    found = np.empty(len(means))
    for mine, others in (halves, halves[::-1]):
        distance = Distance.of(means[others])
        found[mine] = [distance(row) for row in means[mine]]
    return found


def _numbers(values: Any) -> Float64[ndarray, " n"]:
    numbers = np.array(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError("numbers that are not finite, or not a list")
    return numbers


def _short(values: Float64[ndarray, " n"]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
