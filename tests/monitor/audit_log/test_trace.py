from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from monitor.audit_log.trace import TRACE_MAGIC, TokenTrace, decode_trace, encode_trace
from monitor.errors import AuditError
from monitor.records import Stage

STAGES = (None, Stage.PROMPT, Stage.COMPLETION)


def trace_of(logits: np.ndarray) -> TokenTrace:
    return TokenTrace(
        clusters=tuple(f"c{index}" for index in range(logits.shape[1])),
        stages=tuple(STAGES[index % 3] for index in range(logits.shape[0])),
        logits=logits.astype(np.float32),
    )


@settings(deadline=None)
@given(
    st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.integers(1, 4), st.just(3)),
        elements=st.one_of(
            st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, float("nan"), 3e38, 1e-30])
        ),
    )
)
def test_what_is_decoded_lies_within_the_stated_error(logits: np.ndarray) -> None:
    decoded = decode_trace(encode_trace(trace_of(logits)))
    assert decoded.trace.clusters == trace_of(logits).clusters
    assert decoded.trace.stages == trace_of(logits).stages
    assert (np.isnan(decoded.trace.logits) == np.isnan(logits)).all()
    difference = np.abs(decoded.trace.logits.astype(float) - logits.astype(float))
    assert (np.nan_to_num(difference) <= decoded.max_error[None]).all()
    largest = np.nanmax(np.abs(logits.astype(float)), axis=0, initial=0.0)
    assert (decoded.max_error <= np.maximum(largest / 32767, 2.0**-13)).all()


def test_multiples_of_the_step_come_back_as_they_were() -> None:
    logits = np.array([[[1.5, -2.25, 0.0]], [[-7.0, 3.125, 2.0**-12]]], np.float32)
    assert (decode_trace(encode_trace(trace_of(logits))).trace.logits == logits).all()


def test_a_score_that_is_not_finite_is_absent() -> None:
    logits = np.array([[[np.inf, -np.inf, 1.0]]], np.float32)
    decoded = decode_trace(encode_trace(trace_of(logits))).trace.logits
    assert np.isnan(decoded[0, 0, :2]).all()
    assert decoded[0, 0, 2] == 1.0


def test_a_trace_takes_at_most_two_bytes_a_score() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (200, 10, 3))
    assert len(encode_trace(trace_of(logits))) < 200 * 10 * 3 * 2 + 400


CUT = encode_trace(trace_of(np.zeros((2, 1, 3))))[:-5]


@pytest.mark.parametrize("stored", [b"", b"PNG", TRACE_MAGIC, TRACE_MAGIC + b"junk", CUT])
def test_other_bytes_are_refused(stored: bytes) -> None:
    with pytest.raises(AuditError, match="trace: "):
        decode_trace(stored)
