from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.what_if.running import Ragged, running_ends
from sae_core.aggregation import AggregateKind, AggregateSpec, Aggregator

SPECS = st.builds(
    AggregateSpec,
    kind=st.sampled_from(get_args(AggregateKind)),
    window=st.integers(5, 9),
    k=st.integers(1, 5),
    alpha=st.sampled_from([0.1, 0.5, 1.0]),
    min_evidence_tokens=st.integers(0, 4),
    evidence_floor=st.sampled_from([-1.0, 0.0, 0.75]),
)


@settings(deadline=None)
@given(SPECS, st.lists(st.integers(1, 25), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_many_sequences_at_once_give_the_bits_of_the_aggregator(
    spec: AggregateSpec, lengths: list[int], seed: int
) -> None:
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    steps = np.random.default_rng(seed).integers(-3000, 3000, bounds[-1])
    logits = steps * 2.0**-10
    is_turn_end = np.isin(np.arange(len(logits)), bounds[1:] - 1)
    floor = np.full(len(lengths), spec.evidence_floor)
    ends = running_ends(spec, Ragged(logits, bounds, is_turn_end), floor)
    aggregator = Aggregator([spec])
    for row, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = aggregator.start()
        mine = np.repeat(logits[start:stop, None, None], 3, axis=2).astype(np.float32)
        running = aggregator.update(state, mine)[:, 0, 0]
        last = aggregator.score(state)[0, 0]
        assert ends.peak[row] == max(running.max(), last)
        assert ends.last[row] == last
