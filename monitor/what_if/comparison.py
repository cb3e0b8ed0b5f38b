"""Two bundles over batches of traces: every cluster, every rule, and all of them together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monitor.audit_log.logged_traces import Counted, TraceBatch
from monitor.bundle_spec import BundleSpec, ClusterModel, RuleModel
from monitor.what_if.changes import Change, Pair, Tally
from monitor.what_if.moments import rule_claims
from monitor.what_if.outcomes import (
    DENSE,
    FUSED,
    SAE,
    BatchReader,
    Claim,
    ClusterScores,
    condition_limit,
)
from monitor.what_if.running import Bools

LEVELS = ("flag", "alert")

Scored = dict[str, tuple[ClusterModel, ClusterScores]]
"""Clusters by id, as one of the bundles reads them."""


class Comparison:
    """Two bundles, ready for batches of the champion's traces.

    Args:
        unanswerable: clusters of the challenger to leave out, by reason.
    """

    def __init__(
        self, champion: BundleSpec, challenger: BundleSpec, unanswerable: dict[str, str]
    ) -> None:
        self.policies = tuple(sorted(champion.policies.keys() & challenger.policies.keys()))
        self.n = 0
        self.not_reproduced = Counted()
        self._sides = (champion, challenger)
        self._order = [cluster.id for cluster in champion.clusters]
        self._unanswerable = unanswerable
        self._models = [
            {c.id: c for c in side.clusters if c.id in self._order and c.id not in unanswerable}
            for side in self._sides
        ]
        self._champion = {c.id: c for c in champion.clusters}
        self._lowest = self._lowest_limits()
        self._rules = [
            {rule.id: rule for rule in side.rules if all(c.cluster in models for c in rule.all)}
            for side, models in zip(self._sides, self._models, strict=True)
        ]
        self._overall = {level: Tally() for level in LEVELS}
        self._clusters = {
            name: {level: Tally() for level in LEVELS}
            for name in self._order
            if name not in unanswerable
        }
        self._by_rule = {rule: Tally() for rule in (*self._rules[0], *self._rules[1])}

    @property
    def sources(self) -> tuple[bool, bool, bool]:
        """Which of fused, dense and sae the traces must bring."""
        wanted = [True, False, False]
        for name, after in self._models[1].items():
            if after.fusion != self._champion[name].fusion:
                wanted[DENSE] |= bool(after.fusion.dense)
                wanted[SAE] |= bool(after.fusion.sae)
        return wanted[FUSED], wanted[DENSE], wanted[SAE]

    def add(self, batch: TraceBatch) -> None:
        """Counts a batch."""
        self.decide(batch, self.score(batch))

    def add_empty(self, n: int) -> None:
        """Counts decisions without a token: they pass under both."""
        self.n += n

    def changes(self) -> tuple[dict[str, Change], dict[str, dict[str, Change]], dict[str, Change]]:
        """overall by level, clusters by level, and rules."""
        return (
            {level: tally.change(self.n) for level, tally in self._overall.items()},
            {
                name: {level: tally.change(self.n) for level, tally in tallies.items()}
                for name, tallies in self._clusters.items()
            },
            {rule: tally.change(self.n) for rule, tally in self._by_rule.items()},
        )

    def _lowest_limits(self) -> dict[str, float]:
        lowest: dict[str, float] = {}
        for side in self._sides:
            for model in side.clusters:
                limits = [model.thresholds.flag]
                limits += [
                    condition_limit(condition, model)
                    for rule in side.rules
                    for condition in rule.all
                    if condition.cluster == model.id
                ]
                lowest[model.id] = min([*limits, lowest.get(model.id, np.inf)])
        return lowest

    def score(self, batch: TraceBatch) -> list[Scored]:
        """Every cluster's scores under the champion, and under the challenger."""
        reader = BatchReader(batch, [self._champion[name].fusion for name in self._order])
        sides: list[Scored] = [{}, {}]
        for index, name in enumerate(self._order):
            before, after = self._champion[name], self._models[1].get(name)
            models = [before] if after is None else [before, after]
            found = reader.scores(index, models, self._lowest[name])
            for side, model, scores in zip(sides, models, found, strict=False):
                side[name] = model, scores
        return sides

    def decide(self, batch: TraceBatch, sides: list[Scored]) -> None:
        """Counts what these scores say."""
        self.n += len(batch)
        included = [self._included(side, batch) for side in self._sides]
        no = np.zeros(len(batch), np.bool_)
        nothing = Claim(no, no, no)
        recorded: dict[str, list[Claim]] = {level: [] for level in LEVELS}
        pairs: dict[str, list[Pair]] = {level: [] for level in LEVELS}
        for name in self._order:
            before = sides[0][name]
            after = sides[1].get(name)
            for level in LEVELS:
                champion = _masked(_reaches(*before, level), included[0][name])
                recorded[level].append(champion)
                if name in self._unanswerable:
                    continue
                challenger, is_same = nothing, no
                if after is not None:
                    challenger = _masked(_reaches(*after, level), included[1][name])
                    is_same = (included[0][name] == included[1][name]) & (
                        _reading(before[0], level) == _reading(after[0], level)
                    )
                pair = Pair(is_same, champion, challenger)
                values = (before[1].peak.value, (after or before)[1].peak.value)
                self._clusters[name][level].add(batch.ids, [pair], values)
                pairs[level].append(pair)
        self._decide_rules(batch, sides, recorded, pairs)
        for level in LEVELS:
            if pairs[level]:
                self._overall[level].add(batch.ids, pairs[level])
        self._check(batch, recorded)

    def _decide_rules(
        self,
        batch: TraceBatch,
        sides: list[Scored],
        recorded: dict[str, list[Claim]],
        pairs: dict[str, list[Pair]],
    ) -> None:
        no = np.zeros(len(batch), np.bool_)
        claim_of = {}
        for rule in self._sides[0].rules:
            claim = claim_of[rule.id] = self._rule_claims(rule, batch, sides[0])
            for level in LEVELS:
                recorded[level].append(claim)
        for name, tally in self._by_rule.items():
            claims = [Claim(no, no, no), Claim(no, no, no)]
            if name in self._rules[0]:
                claims[0] = claim_of[name]
            if name in self._rules[1]:
                claims[1] = self._rule_claims(self._rules[1][name], batch, sides[1])
            is_same = np.full(len(batch), self._same_rule(name))
            pair = Pair(is_same, claims[0], claims[1])
            tally.add(batch.ids, [pair])
            for level in LEVELS:
                pairs[level].append(pair)

    def _rule_claims(self, rule: RuleModel, batch: TraceBatch, side: Scored) -> Claim:
        reader = BatchReader(batch, [self._champion[name].fusion for name in self._order])
        return rule_claims(rule, side, reader, {name: i for i, name in enumerate(self._order)})

    def _same_rule(self, name: str) -> bool:
        before, after = (rules.get(name) for rules in self._rules)
        return (
            before is not None
            and after is not None
            and before.all == after.all
            and all(
                _reading(self._models[0][c.cluster]) == _reading(self._models[1][c.cluster])
                for c in before.all
            )
        )

    def _included(self, side: BundleSpec, batch: TraceBatch) -> dict[str, Bools]:
        chosen = {}
        for name in self._order:
            reading = [
                policy
                for policy in self.policies
                if side.policies[policy].clusters is None
                or name in (side.policies[policy].clusters or ())
            ]
            everybody = len(reading) == len(self.policies)
            chosen[name] = (
                np.full(len(batch), everybody)
                if everybody or not reading
                else np.isin(batch.policies, reading)
            )
        return chosen

    def _check(self, batch: TraceBatch, recorded: dict[str, list[Claim]]) -> None:
        """Counts decisions whose recorded verdict the champion surely does not give."""
        wrong = np.zeros(len(batch), np.bool_)
        for level, verdicts in (("flag", ("flag", "alert")), ("alert", ("alert",))):
            said = np.isin(batch.verdicts, verdicts)
            sure = np.logical_or.reduce([claim.sure for claim in recorded[level]])
            possible = np.logical_or.reduce([claim.possible for claim in recorded[level]])
            wrong |= (said & ~possible) | (~said & sure)
        if wrong.any():
            self.not_reproduced.add(batch.ids[wrong].tolist())


def _reaches(model: ClusterModel, scores: ClusterScores, level: str) -> Claim:
    limits = model.thresholds
    return scores.reaches(limits.flag if level == "flag" else limits.alert)


def _reading(model: ClusterModel, level: str | None = None) -> Sequence[object]:
    """All that a cluster's answer depends on beside the trace, at one level or at both."""
    limits = model.thresholds
    limit = {"flag": limits.flag, "alert": limits.alert}.get(
        level or "", (limits.flag, limits.alert)
    )
    return (model.fusion, model.aggregate, model.stages, limit)


def _masked(claim: Claim, where: Bools) -> Claim:
    return Claim(claim.sure & where, claim.said & where, claim.possible & where)
