"""Does an SAE belong to the stream it reads? Measured on probe texts, against what it once was.

A wrong layer, another model, a formula read wrongly: each leaves plausible activations and another
fraction of variance unexplained (FVU), another number of active latents (L0), other latents that
fire. `measure` takes these numbers, `Bands` are what they may be, `diagnosis` looks for the cause
where they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.encoder import cut_input
from sae_core.errors import FidelityError, ShapeError
from sae_core.sae import SAE

FVU_FACTOR = 1.05
"""From the expected FVU, up or down, that is still the same SAE: on the same texts bfloat16 instead
of float32 moves it by 0.3 % (benchmarks/LOG.md, 2026-11-24). A lower FVU is no better sign than a
higher one: a larger stream hides what a threshold cuts off."""
L0_SHARE = 0.05
"""Likewise; bfloat16 moves L0 by 0.1 %."""
FIRING_AGREEMENT = 0.85
"""Least share of expected firings of registered latents that are found again; 98 % in bfloat16."""
MIN_FIRINGS = 10
"""Fewer firings than this say nothing about agreement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An SAE on the tokens of the probe texts, BOS left out."""

    n_tokens: int
    fvu: float | None
    """Fraction of variance unexplained, all dimensions together; None for a transcoder whose
    output place was not read, and without a decoder."""
    fvu_median: float | None
    """Median over dimensions: what a few dimensions of large variance cannot hide."""
    l0: float
    """Mean active latents a token."""
    firings: Mapping[int, int]
    """Of each registered latent: on how many tokens it was active."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """What the same measurement gave where the SAE was known to belong, and how far it may move."""

    n_tokens: int
    fvu: float | None
    fvu_min: float | None
    fvu_max: float | None
    fvu_median: float | None
    fvu_median_min: float | None
    fvu_median_max: float | None
    l0: float
    l0_min: float
    l0_max: float
    firings: Mapping[int, int]
    with_bos: bool = True
    """Whether the probe texts were read with BOS ahead of them."""

    @property
    def silent(self) -> tuple[int, ...]:
        """Registered latents that fire on no probe text, and so are not held to anything."""
        return tuple(latent for latent, count in self.firings.items() if count == 0)

    @classmethod
    def around(cls, measured: Measured, *, with_bos: bool = True) -> Bands:
        """The bands of an SAE that was measured at its own place."""
        fvu, median = measured.fvu, measured.fvu_median
        return cls(
            n_tokens=measured.n_tokens,
            fvu=fvu,
            fvu_min=None if fvu is None else fvu / FVU_FACTOR,
            fvu_max=None if fvu is None else FVU_FACTOR * fvu,
            fvu_median=median,
            fvu_median_min=None if median is None else median / FVU_FACTOR,
            fvu_median_max=None if median is None else FVU_FACTOR * median,
            l0=measured.l0,
            l0_min=(1 - L0_SHARE) * measured.l0,
            l0_max=(1 + L0_SHARE) * measured.l0,
            firings=measured.firings,
            with_bos=with_bos,
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any], name: str, *, d_sae: int) -> Bands:
        """The bands in a parsed JSON object; FidelityError naming key, found and expected."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(content.keys() - set(names))
        if unknown or (missing := [n for n in names if n not in content]):
            found = f"unknown {unknown}" if unknown else f"no {missing[0]}"
            raise FidelityError(f"{name}: found {found}, expected the keys {', '.join(names)}")
        values = dict(content)
        firings, with_bos = values.pop("firings"), values.pop("with_bos")
        if type(with_bos) is not bool:
            raise FidelityError(f"{name}: with_bos: found {with_bos!r}, expected true or false")
        if type(values["n_tokens"]) is not int:
            found = values["n_tokens"]
            raise FidelityError(f"{name}: n_tokens: found {found!r}, expected a whole number")
        for key, value in values.items():
            optional = key.startswith("fvu") and value is None
            if not optional and not (_is_number(value) and value >= 0):
                raise FidelityError(f"{name}: {key}: found {value!r}, expected a number from 0")
        for key in ("fvu", "fvu_median", "l0"):
            band = [values[f"{key}_min"], values[key], values[f"{key}_max"]]
            known = [number for number in band if number is not None]
            if len(known) not in (0, 3) or sorted(known) != known:
                raise FidelityError(
                    f"{name}: {key}_min, {key}, {key}_max: found {band}, expected three numbers in "
                    "order, or null for all"
                )
        return cls(**values, firings=_counts(firings, name, d_sae), with_bos=with_bos)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }

    def problems(self, measured: Measured) -> tuple[str, ...]:
        """What lies outside, each as one clause with both numbers; empty where all is well."""
        if measured.n_tokens != self.n_tokens:
            return (
                f"the probe texts have {measured.n_tokens} tokens, expected {self.n_tokens}: they "
                "or the tokenizer are not those that were measured",
            )
        found = []
        if unknown := sorted(measured.firings.keys() - self.firings.keys()):
            some = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            found.append(
                f"latents {some} are registered and were not measured, expected all of them "
                "(`sae-monitor bundle measure`)"
            )
        median = "median FVU over dimensions"
        for name, value, least, most in (
            ("FVU", measured.fvu, self.fvu_min, self.fvu_max),
            (median, measured.fvu_median, self.fvu_median_min, self.fvu_median_max),
            ("L0", measured.l0, self.l0_min, self.l0_max),
        ):
            if least is None or most is None or (value is not None and least <= value <= most):
                continue
            expected = f"{_short(least)} to {_short(most)}"
            found.append(f"{name} is {_short(value)}, expected {expected}")
        agreement = self.firing_agreement(measured)
        if agreement is not None and agreement < FIRING_AGREEMENT:
            found.append(
                f"registered latents fire as expected in {agreement:.0%} of cases, "
                f"expected at least {FIRING_AGREEMENT:.0%}"
            )
        return tuple(found)

    def firing_agreement(self, measured: Measured) -> float | None:
        """Firings common to both counts over those of either; None where there are too few.

        Compares the latents that both know.
        """
        known = self.firings.keys() & measured.firings.keys()
        pairs = [(self.firings[i], measured.firings[i]) for i in known]
        either = sum(max(pair) for pair in pairs)
        return sum(min(pair) for pair in pairs) / either if either >= MIN_FIRINGS else None


def measure(
    sae: SAE,
    x: Float[Tensor, "n width"],
    latent_ids: Sequence[int] = (),
    *,
    target: Float[Tensor, "n d_out"] | None = None,
) -> Measured:
    """The whole SAE on some tokens, in memory for a chunk of it at a time.

    Args:
        x: What it reads, a row per token; at least two.
        latent_ids: The registered latents, whose firings are counted.
        target: What a transcoder should predict; None leaves its FVU open.
    """
    if len(x) < 2:
        raise ShapeError(f"found {len(x)} probe tokens, expected at least 2")
    with torch.inference_mode():
        recons, l0, acts = sae.reconstruct(x.float(), latent_ids)
        counts = (acts != 0).sum(dim=0).tolist()
        wanted = x.float() if target is None else target.float()
        comparable = target is not None or not sae.config.predicts_another_place
        if target is None:
            wanted = cut_input(sae.config, wanted)
        fvu = median = None
        if comparable and recons is not None and wanted.shape == recons.shape:
            error = (wanted - recons).double().square().sum(dim=0)
            variance = (wanted - wanted.mean(dim=0)).double().square().sum(dim=0)
            fvu = float(error.sum() / variance.sum().clamp(min=1e-30))
            median = float((error / variance.clamp(min=1e-30)).median())
    return Measured(
        n_tokens=len(x),
        fvu=fvu,
        fvu_median=median,
        l0=float(l0.double().mean()),
        firings=dict(zip(latent_ids, counts, strict=True)),
    )


def _counts(firings: object, name: str, d_sae: int) -> dict[int, int]:
    if not isinstance(firings, dict):
        raise FidelityError(f"{name}: firings: found {firings!r:.80}, expected counts by latent id")
    counts: dict[int, int] = {}
    for latent, count in firings.items():
        is_id = isinstance(latent, str) and latent.isdecimal() and int(latent) < d_sae
        if not is_id or type(count) is not int or count < 0:
            raise FidelityError(
                f"{name}: firings: found {latent!r:.40}: {count!r:.40}, expected counts from 0 by "
                f"latent id from 0 to {d_sae - 1}"
            )
        counts[int(latent)] = count
    return counts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _short(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
