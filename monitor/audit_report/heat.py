"""Chosen decisions token by token: each token's scores, and which latents of the alert it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from monitor.audit_log.query import query, sealed_of, trace_of
from monitor.audit_log.sealing import KeyRing
from monitor.audit_log.token_latents import decode_token_latents
from monitor.audit_log.trace import DecodedTrace
from monitor.errors import AuditError, NotFoundError
from monitor.pages.document import visible

N_HEAT = 6
"""Steps of heat: 0 is no colour."""
_SHOWS = {"content": "texts", "tokens": "ids"}
MAX_TOKENS = 2000
"""Of a decision; around its highest token where it is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenHeat:
    """One token."""

    position: int
    text: str
    """The token's text, its id as #7, or nothing where neither is known."""
    stage: str
    """Empty where it was read and not scored."""
    fused: tuple[float | None, ...]
    """One a cluster; None where the token was not scored."""
    dense: tuple[float | None, ...]
    sae: tuple[float | None, ...]
    levels: tuple[int, ...]
    """One a cluster, 0 to `N_HEAT`, by the fused logit between 0 and the alert threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Why a cluster alerted."""

    cluster: str
    dense: float | None
    bias: float | None
    gate: float | None
    window: tuple[int, int]
    """First position of the window that made the score, and one past the last."""
    latents: tuple[tuple[str, str, float | None, tuple[int, ...]], ...]
    """Name, label, contribution over the window in logits, positions; largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsHere:
    """The latents of one cluster in one token of its window."""

    position: int
    latents: tuple[tuple[str, str, float, float | None], ...]
    """Name, label, what it gave to the token's fused logit, and to the alert's score over the
    window (None where that is not on record); largest first."""
    others: float
    """What the token's latents that are not named gave together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLatents:
    """One cluster's window, token by token."""

    cluster: str
    tokens: tuple[LatentsHere, ...]
    left_out: int
    """Tokens of the window that have latents and are not on record."""
    max_error: float
    """Of a contribution, logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionHeat:
    """One decision."""

    decision_id: str
    time: str
    verdict: str
    level: str
    shows: str
    """texts, ids or positions."""
    note: str
    """Why there is less than one may expect; empty where there is not."""
    clusters: tuple[str, ...]
    """Those of the trace."""
    chosen: int
    """The cluster that is shown first: one that alerted, or the highest against its threshold."""
    tokens: tuple[TokenHeat, ...]
    is_cut: bool
    results: tuple[tuple[str, str, float | None, str], ...]
    """cluster, verdict, score and stage, as recorded."""
    rules: tuple[str, ...]
    """Joint rules that held."""
    explained: tuple[Explained, ...]
    latents: tuple[ClusterLatents, ...]
    """Empty where the record does not have them; older ones do not."""


def heat_of(
    url: str,
    decision_id: str,
    limits: Mapping[str, float],
    keys: KeyRing | None,
    labels: Mapping[tuple[str, int], str] = MappingProxyType({}),
) -> DecisionHeat:
    """A decision of the log.

    Args:
        limits: each cluster's alert threshold; 1 is taken for those that are not there.
        labels: of latents by SAE and id, where the record has none.

    Raises:
        NotFoundError: no such decision.
    """
    body = next(query(url, decision_id=decision_id), None)
    if body is None:
        raise NotFoundError(f"decision: found none of id {decision_id!r} in the audit log")
    texts, note = _texts(url, body, keys)
    trace = trace_of(url, decision_id)
    if trace is None:
        note = f"level {body['level']} keeps no scores of tokens"
    try:
        latents = tuple(_latents(body, labels))
    except AuditError as error:
        latents, note = (), str(error)
    clusters = () if trace is None else trace.trace.clusters
    levels, start, stop = _levels(trace, limits)
    return DecisionHeat(
        decision_id=decision_id,
        time=body["time"],
        verdict=body["verdict"],
        level=body["level"],
        shows=_SHOWS[body["sealed"]["holds"]] if texts else "positions",
        note=note,
        clusters=tuple(map(visible, clusters)),
        chosen=_chosen(body, clusters, levels),
        tokens=() if trace is None else _tokens(trace, levels, texts, start, stop),
        is_cut=trace is not None and stop - start < len(levels),
        results=tuple(
            (visible(name), r["verdict"], r.get("fused"), r["stage"] or "")
            for name, r in body["clusters"].items()
        ),
        rules=tuple(visible(rule["rule"]) for rule in body["rules"]),
        explained=tuple(_explained(body)),
        latents=latents,
    )


def _chosen(
    body: Mapping[str, Any],
    clusters: Sequence[str],
    levels: np.ndarray[Any, np.dtype[np.int64]],
) -> int:
    if not levels.size:
        return 0
    results = body["clusters"]
    alerted = [name in results and results[name]["verdict"] == "alert" for name in clusters]
    return int((levels.max(axis=0) + (N_HEAT + 1) * np.array(alerted)).argmax())


def _texts(url: str, body: Mapping[str, Any], keys: KeyRing | None) -> tuple[list[str], str]:
    """Each token's own, and why there is none."""
    if "sealed" not in body:
        return [], f"level {body['level']} keeps neither texts nor ids: tokens are positions"
    try:
        sealed = sealed_of(url, body["decision_id"], keys)
    except AuditError as error:
        return [], str(error)
    if "texts" in sealed:
        return list(sealed["texts"]), ""
    return [f"#{token_id}" for token_id in sealed["token_ids"]], "level tokens keeps ids, not texts"


def _levels(
    trace: DecodedTrace | None, limits: Mapping[str, float]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int, int]:
    """[n_tokens, n_clusters], and which tokens are shown."""
    if trace is None:
        return np.zeros((0, 0), np.int64), 0, 0
    alert = np.array([max(limits.get(name, 1.0), 1e-6) for name in trace.trace.clusters])
    counted = np.array([stage is not None for stage in trace.trace.stages])[:, None]
    share = np.nan_to_num(trace.trace.logits[:, :, 0] / alert, nan=0.0)
    levels = np.round(N_HEAT * np.where(counted, share, 0).clip(0, 1)).astype(np.int64)
    n = len(levels)
    if n <= MAX_TOKENS:
        return levels, 0, n
    start = min(max(int(share.max(axis=1).argmax()) - MAX_TOKENS // 2, 0), n - MAX_TOKENS)
    return levels, start, start + MAX_TOKENS


def _tokens(
    trace: DecodedTrace,
    levels: np.ndarray[Any, np.dtype[np.int64]],
    texts: Sequence[str],
    start: int,
    stop: int,
) -> tuple[TokenHeat, ...]:
    rows = trace.trace.logits.tolist()
    found = []
    for position in range(start, stop):
        fused, dense, sae = zip(*rows[position], strict=True)
        stage = trace.trace.stages[position]
        found.append(
            TokenHeat(
                position=position,
                text=visible(texts[position]) if position < len(texts) else "",
                stage="" if stage is None else stage.value,
                fused=tuple(map(_number, fused)),
                dense=tuple(map(_number, dense)),
                sae=tuple(map(_number, sae)),
                levels=tuple(levels[position].tolist()),
            )
        )
    return tuple(found)


def _explained(body: Mapping[str, Any]) -> list[Explained]:
    return [
        Explained(
            cluster=visible(name),
            dense=why["dense"],
            bias=why["bias"],
            gate=why["gate"],
            window=(why["window_start"], why["window_stop"]),
            latents=tuple(
                (
                    f"{visible(latent['sae'])}/{latent['latent_id']}",
                    visible(latent["label"]),
                    latent["contribution"],
                    tuple(latent["positions"]),
                )
                for latent in why["latents"]
            ),
        )
        for name, result in body["clusters"].items()
        if (why := result.get("attribution")) is not None
    ]


def _latents(
    body: Mapping[str, Any], labels: Mapping[tuple[str, int], str]
) -> Iterator[ClusterLatents]:
    for name, stored in sorted(body.get("token_latents", {}).items()):
        found = decode_token_latents(stored)
        why = body["clusters"].get(name, {}).get("attribution") or {"latents": ()}
        known = {(latent["sae"], latent["latent_id"]): latent for latent in why["latents"]}
        tokens = []
        for token in found.tokens:
            shown = []
            for sae, latent_id, contribution in token.latents:
                recorded = known.get((sae, latent_id), {})
                label = visible(recorded.get("label") or labels.get((sae, latent_id), ""))
                share = recorded.get("contribution")
                shown.append((f"{visible(sae)}/{latent_id}", label, contribution, share))
            tokens.append(
                LatentsHere(position=token.position, latents=tuple(shown), others=token.others)
            )
        yield ClusterLatents(
            cluster=visible(name),
            tokens=tuple(tokens),
            left_out=found.left_out,
            max_error=found.max_error,
        )


def _number(value: float) -> float | None:
    return None if value != value else round(value, 4)
