"""What made scores, as far as it can be told: recorded when a server starts, and with a replay.

Two runs with the same facts score the same tokens alike, up to the rounding of batches.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict

from monitor.served import Served
from sae_core.heads import heads_digest

Fact = str | int | Mapping[str, str]


def run_facts(served: Served, *, max_step_tokens: int) -> dict[str, Fact]:
    """The provenance of decisions, and what it leaves out.

    `sae_digests` (by id; those that are neither in the bundle nor pinned are absent),
    `heads_digest`, the versions `torch` and `transformers`, and `max_step_tokens`, the most tokens
    that share a step.
    """
    return {
        **asdict(served.provenance),
        "sae_digests": served.bundle.sae_digests(),
        "heads_digest": heads_digest(served.plan.heads),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "max_step_tokens": max_step_tokens,
    }
