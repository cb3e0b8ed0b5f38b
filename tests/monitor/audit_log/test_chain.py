from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from monitor.audit_log.chain import canonical_bytes, genesis_hash, plain_number, record_hash
from monitor.errors import AuditError

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))

NUMBERS = st.one_of(
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e-4, 9.9e-5, 1e15, 1e16, 1e21, 123456789012345.5]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(st.characters(codec="utf-8"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), VALUES, max_size=5))
def test_canonical_bytes_are_those_of_the_reference_package(body: dict[str, Any]) -> None:
    assert canonical_bytes(body) == rfc8785.dumps(body)


PLAIN_NUMBERS = st.one_of(
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.one_of(
        st.floats(),
        st.floats(min_value=1e-7, max_value=1e-4),
        st.floats(min_value=2.0**52, max_value=1e22),
        st.floats(width=32),
        st.sampled_from([-0.0, 1.0, 1e-5, -9.9e-6, 1e-6, 1e-7, 2.0**53, 1e16, 1e21, 123456.5]),
    ).map(plain_number),
)
TEXT = st.text(st.characters(codec="utf-8"))
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), PLAIN_NUMBERS, TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(tuple), st.dictionaries(TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(TEXT, PLAIN, max_size=5))
@example({"score": plain_number(1e-6)})
@example({"score": plain_number(2.0**60)})
def test_plain_bodies_are_those_of_the_reference_package_too(body: dict[str, Any]) -> None:
    assert canonical_bytes(body, plain=True) == rfc8785.dumps(body)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_plain_number_is_the_same_double(value: float) -> None:
    text = canonical_bytes({"score": plain_number(value)}, plain=True)
    assert json.loads(text, parse_int=float) == {"score": value}


@pytest.mark.parametrize("vector", VECTORS["canonical"])
def test_canonical_bytes_of_the_committed_vectors(vector: dict[str, Any]) -> None:
    assert canonical_bytes(vector["value"]).decode() == vector["canonical"]


def test_chain_of_the_committed_vectors() -> None:
    chain = VECTORS["chain"]
    previous = chain["genesis"]
    assert genesis_hash(chain["name"]) == previous
    for record in chain["records"]:
        body_bytes = canonical_bytes(record["body"])
        assert body_bytes.decode() == record["canonical"]
        assert record_hash(previous, body_bytes) == record["hash"]
        previous = record["hash"]


def test_vectors_hold_without_our_code() -> None:
    chain = VECTORS["chain"]
    previous = hashlib.sha256(
        b"sae-monitor audit genesis v1\n" + chain["name"].encode()
    ).hexdigest()
    for record in chain["records"]:
        message = b"sae-monitor audit record v1\n" + bytes.fromhex(previous)
        previous = hashlib.sha256(message + record["canonical"].encode()).hexdigest()
        assert previous == record["hash"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, "\ud800", {1: 2}, b"raw"])
def test_a_value_without_canonical_form_is_an_audit_error(value: Any) -> None:
    with pytest.raises(AuditError, match="canonical"):
        canonical_bytes({"score": value})


def test_two_chains_begin_differently() -> None:
    assert genesis_hash("main") != genesis_hash("gpu-1")
