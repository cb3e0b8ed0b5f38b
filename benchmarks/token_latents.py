"""What do the latents of an alert's tokens cost a record, and rules after every token a stream?

Ten clusters of 32 latents and a window of 64 tokens, as the default bundle has them, over random
scores. For one cluster that alerts: the bytes that its tokens' latents add to the record, the time
that the event loop takes to gather them, and the time that the writing thread takes to encode them.
For a stream fed token by token: the time a token with and without a joint rule.

    python -m benchmarks.token_latents [--tokens N] [--runs N]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from monitor.audit_log.chain import canonical_bytes
from monitor.audit_log.token_latents import encode_token_latents
from monitor.bundle_spec import BundleSpec
from monitor.evidence import ClusterPlan, Evidence, aggregate_specs
from monitor.policy import Policy
from monitor.records import Stage
from sae_core.aggregation import Aggregator
from sae_core.heads import Cluster, ClusterHeads, LatentTerm

N_CLUSTERS, N_LATENTS, WINDOW = 10, 32, 64
RULE = {
    "id": "both",
    "severity": "critical",
    "all": [{"cluster": "c0", "above": 1e6}, {"cluster": "c1", "below": "flag"}],
}


def plan_of(rules: list[dict[str, object]]) -> ClusterPlan:
    """A bundle's plan; nothing of it alerts by itself."""
    clusters = [
        {
            "id": f"c{index}",
            "title": "t",
            "severity": "warning",
            "latents": [
                {"sae": "l9", "id": N_LATENTS * index + i, "weight": 0.5} for i in range(N_LATENTS)
            ],
            "aggregate": {"kind": "max_window_mean", "window": WINDOW},
            "thresholds": {"flag": 1e5, "alert": 1e6, "clear": 0.0},
        }
        for index in range(N_CLUSTERS)
    ]
    spec = BundleSpec.model_validate(
        {
            "name": "b",
            "version": 1,
            "model": {"id": "m"},
            "saes": {"l9": {"path": "a", "hook_point": "blocks.0.hook_resid_post"}},
            "clusters": clusters,
            "rules": rules,
            "policies": {"default": {}},
        }
    )
    terms = [
        tuple(
            LatentTerm(sae=x.sae, latent_id=x.id, weight=x.weight, scale=x.scale, label="")
            for x in cluster.latents
        )
        for cluster in spec.clusters
    ]
    heads = ClusterHeads(
        [
            Cluster(
                id=cluster.id,
                latents=latents,
                transform="identity",
                dense_weight=None,
                dense_bias=0.0,
                dense_hook_point=None,
                fusion_sae=1.0,
                fusion_dense=0.0,
                fusion_bias=0.0,
            )
            for cluster, latents in zip(spec.clusters, terms, strict=True)
        ],
        ["l9"],
    )
    return ClusterPlan(
        spec=spec,
        heads=heads,
        aggregator=Aggregator(aggregate_specs(spec)),
        calibrated=(True,) * N_CLUSTERS,
        benign_p=lambda index, score: None,
    )


def microseconds(work: Callable[[], object], runs: int, times: int) -> str:
    """Of one call: the median of the runs, and the least and the most."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - started) / times * 1e6)
    return f"{statistics.median(found):.0f} us ({min(found):.0f} to {max(found):.0f})"


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    n = given.tokens
    chance = np.random.default_rng(0)
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    logits = chance.normal(-2, 2, (n, N_CLUSTERS, 3)).astype(np.float32)
    stages = [Stage.PROMPT] * n
    plan = plan_of([])
    policy = Policy("default", plan.spec)
    for share in (0.03, 0.1, 0.3):
        shape = (n, N_CLUSTERS * N_LATENTS)
        acts = chance.exponential(2.0, shape) * (chance.random(shape) < share)
        evidence = Evidence(plan, policy)
        evidence.add([None] * n, stages, logits, acts.astype(np.float32))
        found = evidence.token_latents(["c0"])["c0"]
        size = len(canonical_bytes({"c0": encode_token_latents(found)}))
        gathered = microseconds(lambda e=evidence: e.token_latents(["c0"]), given.runs, 50)
        encoded = microseconds(lambda f=found: encode_token_latents(f), given.runs, 50)
        print(f"{share:.0%} of latents active: {size} bytes, gather {gathered}, encode {encoded}")
    none = np.zeros((n, N_CLUSTERS * N_LATENTS), np.float32)
    for name, rules in (("no rule", []), ("a rule", [RULE])):
        ruled = plan_of(rules)

        def stream(ruled: ClusterPlan = ruled) -> None:
            evidence = Evidence(ruled, Policy("default", ruled.spec), rules_each_token=True)
            for at in range(n):
                evidence.add([None], stages[:1], logits[at : at + 1], none[at : at + 1])

        def whole(ruled: ClusterPlan = ruled) -> None:
            evidence = Evidence(ruled, Policy("default", ruled.spec), rules_each_token=True)
            evidence.add([None] * n, stages, logits, none)

        print(
            f"{name}: {n} tokens one by one {microseconds(stream, given.runs, 1)}, "
            f"at once {microseconds(whole, given.runs, 3)}"
        )


if __name__ == "__main__":
    main()
