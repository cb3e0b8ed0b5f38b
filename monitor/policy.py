"""Scores to verdicts: a pure state machine with no clock and no tensors.

A cluster flags and alerts when its running fused score reaches its thresholds. An alert opens an
episode; the episode ends when the score falls below `clear`, and only then can the same cluster
alert again in the same request. A verdict never goes back within a request or stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from monitor.bundle_spec import BundleSpec, ClusterModel, PolicyModel, RuleCondition, SoloThreshold
from monitor.errors import NotFoundError
from monitor.records import Action, Mode, Overall, RuleResult, Severity, Stage, Verdict

FUSED, DENSE, SAE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A cluster whose running score just reached its alert threshold, or a rule that now holds."""

    cluster: str
    severity: Severity
    stage: Stage | None
    score: float
    position: int | None


@dataclass(slots=True)
class ClusterState:
    """What one cluster has reached so far in one request."""

    verdict: Verdict = Verdict.PASS
    first_crossing: int | None = None
    open_stages: set[Stage] = field(default_factory=set)
    """Stages with an alert episode that has not cleared."""


@dataclass(slots=True)
class PolicyState:
    """What one request or stream has reached so far; start one with `Policy.start`."""

    clusters: list[ClusterState]
    fired_rules: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The policy's view of the running scores."""

    verdict: Verdict
    action: Action
    overall: Overall
    rules: tuple[RuleResult, ...]


class Policy:
    """One policy of a bundle over that bundle's clusters."""

    def __init__(self, name: str, spec: BundleSpec) -> None:
        if name not in spec.policies:
            raise NotFoundError(
                f"policy: found {name!r}, expected one of {', '.join(sorted(spec.policies))}"
            )
        self.name = name
        self.model: PolicyModel = spec.policies[name]
        self._clusters = spec.clusters
        self._rules = spec.rules
        chosen = self.model.clusters
        self._included = [chosen is None or c.id in chosen for c in spec.clusters]

    @property
    def mode(self) -> Mode:
        """monitor or enforce."""
        return self.model.mode

    def includes(self, index: int) -> bool:
        """Whether the policy looks at the bundle's cluster of this index."""
        return self._included[index]

    def start(self) -> PolicyState:
        """The state before any token."""
        return PolicyState(clusters=[ClusterState() for _ in self._clusters])

    def advance(
        self,
        state: PolicyState,
        stage: Stage,
        positions: Sequence[int],
        running: NDArray[np.float64],
    ) -> list[Crossing]:
        """Takes the running scores of one stage's next tokens; returns alerts that opened.

        Args:
            positions: request positions of these tokens, ascending.
            running: [n_tokens, n_clusters, 3], the running score after each token.
        """
        if not len(positions):
            return []
        crossings = []
        highest = running[:, :, FUSED].max(axis=0)
        for index, cluster in enumerate(self._clusters):
            if not self._included[index] or stage not in cluster.stages:
                continue
            mine, limits = state.clusters[index], cluster.thresholds
            is_quiet = highest[index] < min(limits.flag, limits.alert)
            if is_quiet and stage not in mine.open_stages:
                continue
            scores = running[:, index, FUSED]
            crossings += self._advance_cluster(mine, cluster, stage, positions, scores)
        return crossings

    def _advance_cluster(
        self,
        state: ClusterState,
        cluster: ClusterModel,
        stage: Stage,
        positions: Sequence[int],
        scores: NDArray[np.float64],
    ) -> list[Crossing]:
        limits = cluster.thresholds
        flagged = np.flatnonzero(scores >= limits.flag)
        if len(flagged):
            first = positions[int(flagged[0])]
            if state.first_crossing is None or first < state.first_crossing:
                state.first_crossing = first
            if state.verdict is Verdict.PASS:
                state.verdict = Verdict.FLAG
        opened = []
        at = 0
        while at < len(scores):
            if stage in state.open_stages:
                below = np.flatnonzero(scores[at:] < limits.clear)
                if not len(below):
                    break
                state.open_stages.discard(stage)
                at += int(below[0])
            above = np.flatnonzero(scores[at:] >= limits.alert)
            if not len(above):
                break
            at += int(above[0])
            state.open_stages.add(stage)
            state.verdict = Verdict.ALERT
            opened.append(
                Crossing(
                    cluster=cluster.id,
                    severity=cluster.severity,
                    stage=stage,
                    score=float(scores[at]),
                    position=positions[at],
                )
            )
        return opened

    def judge(self, state: PolicyState, scores: NDArray[np.float64]) -> Judgement:
        """The verdict over all clusters, and the rules that hold or have held.

        Args:
            scores: [n_clusters, 3], NaN where a cluster has seen no token.
        """
        held = state.fired_rules | self._held(scores[None, :, FUSED]).keys()
        rules = tuple(
            RuleResult(rule=rule.id, severity=rule.severity)
            for rule in self._rules
            if rule.id in held
        )
        verdicts = [
            state.clusters[i].verdict for i, included in enumerate(self._included) if included
        ]
        if rules:
            verdicts.append(Verdict.ALERT)
        verdict = max(verdicts, key=lambda v: v.rank, default=Verdict.PASS)
        action = Action.ALLOW
        if verdict is Verdict.ALERT and self.mode is Mode.ENFORCE:
            action = Action.BLOCK
        elif verdict is not Verdict.PASS:
            action = Action.FLAG
        return Judgement(
            verdict=verdict,
            action=action,
            overall=self._overall(scores, verdict),
            rules=rules,
        )

    def new_rules(self, state: PolicyState, judgement: Judgement) -> list[Crossing]:
        """Rules that hold now and had not fired before in this request."""
        new = [rule for rule in judgement.rules if rule.rule not in state.fired_rules]
        state.fired_rules.update(rule.rule for rule in new)
        return [_rule_crossing(rule, judgement.overall.fused, None) for rule in new]

    @property
    def has_rules(self) -> bool:
        """Whether the bundle has joint rules."""
        return bool(self._rules)

    def advance_rules(
        self, state: PolicyState, positions: Sequence[int], scores: NDArray[np.float64]
    ) -> list[Crossing]:
        """Asks the joint rules after each of these tokens; those that held and had not before.

        Args:
            positions: request positions of the tokens, ascending.
            scores: [n_tokens, n_clusters], fused, NaN where a cluster has seen no token.
        """
        crossings = []
        for rule, row in self._held(scores).items():
            if rule not in state.fired_rules:
                state.fired_rules.add(rule)
                (severity,) = (r.severity for r in self._rules if r.id == rule)
                then = np.full((len(self._clusters), 3), np.nan)
                then[:, FUSED] = scores[row]
                overall = self._overall(then, Verdict.ALERT)
                result = RuleResult(rule=rule, severity=severity)
                crossings.append(_rule_crossing(result, overall.fused, positions[row]))
        return sorted(crossings, key=lambda crossing: crossing.position or 0)

    def _held(self, scores: NDArray[np.float64]) -> dict[str, int]:
        """The rules that hold at some of [n_tokens, n_clusters] scores, and the first such row."""
        found = {}
        for rule in self._rules:
            rows = np.logical_and.reduce([self._holds(c, scores) for c in rule.all])
            if rows.any():
                found[rule.id] = int(rows.argmax())
        return found

    def _holds(self, condition: RuleCondition, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        index = next(i for i, c in enumerate(self._clusters) if c.id == condition.cluster)
        score = scores[:, index]  # a comparison with NaN is false
        limits = self._clusters[index].thresholds
        named: Mapping[str, float] = {"flag": limits.flag, "alert": limits.alert}
        side = condition.above if condition.above is not None else condition.below
        limit = named[side] if isinstance(side, str) else float(side or 0.0)
        held: NDArray[np.bool_] = score >= limit if condition.above is not None else score < limit
        return held

    def _overall(self, scores: NDArray[np.float64], verdict: Verdict) -> Overall:
        """Each source's score on a scale with flag at 0 and alert at 1; NaN where it has none.

        The largest of all clusters; or that of the cluster which the policy is `ranked_by`, unless
        another one is in a higher zone. Fused agrees with the verdict: a rule or an episode that
        has cleared again lifts it to the level that the verdict says.
        """
        fused, dense, sae = (self._ranking(scores, source) for source in (FUSED, DENSE, SAE))
        if verdict is not Verdict.PASS:
            floor = 1.0 if verdict is Verdict.ALERT else 0.0
            fused = max(floor, fused) if np.isfinite(fused) else floor
        return Overall(fused=fused, dense=dense, sae=sae)

    def _ranking(self, scores: NDArray[np.float64], source: int) -> float:
        own = largest = -np.inf
        for index, cluster in enumerate(self._clusters):
            value = float(scores[index, source])
            if not self._included[index] or np.isnan(value):
                continue
            if source == DENSE and cluster.dense_head is None:
                continue
            if source == SAE and not cluster.latents:
                continue
            flag, alert = _limits(cluster, source)
            level = (value - flag) / (alert - flag)
            largest = max(largest, level)
            if cluster.id == self.model.ranked_by:
                own = level
        # A cluster of another stage has no score here: then the largest stands in.
        ranking = own if np.isfinite(own) and _zone(own) == _zone(largest) else largest
        return ranking if np.isfinite(ranking) else float("nan")


def _rule_crossing(rule: RuleResult, score: float, position: int | None) -> Crossing:
    return Crossing(
        cluster=f"rule:{rule.rule}",
        severity=rule.severity,
        stage=None,
        score=score,
        position=position,
    )


def _limits(cluster: ClusterModel, source: int) -> tuple[float, float]:
    if source == FUSED:
        return cluster.thresholds.flag, cluster.thresholds.alert
    return _solo(cluster.solo.dense if source == DENSE else cluster.solo.sae)


def _zone(level: float) -> int:
    """0 below flag, 1 up to alert, 2 from there on."""
    return int(level >= 0) + int(level >= 1)


def _solo(limits: SoloThreshold | None) -> tuple[float, float]:
    """The source's own thresholds, or its raw logit where it was never calibrated."""
    if limits is None:
        return 0.0, 1.0
    return limits.flag, limits.alert
