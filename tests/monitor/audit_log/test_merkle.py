"""The tree against the recursive definitions of RFC 6962, section 2.1, written down plainly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from monitor.audit_log.merkle import EMPTY_ROOT, Frontier, inclusion_path, leaf_hash

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def half(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def mth(data: list[bytes]) -> bytes:
    if not data:
        return sha256(b"")
    if len(data) == 1:
        return sha256(b"\x00" + data[0])
    k = half(len(data))
    return sha256(b"\x01" + mth(data[:k]) + mth(data[k:]))


def path(m: int, data: list[bytes]) -> list[bytes]:
    if len(data) == 1:
        return []
    k = half(len(data))
    if m < k:
        return [*path(m, data[:k]), mth(data[k:])]
    return [*path(m - k, data[k:]), mth(data[:k])]


@pytest.mark.parametrize("size", range(1, 35))
def test_root_and_every_path_are_those_of_the_definition(size: int) -> None:
    data = [bytes([index]) * 3 for index in range(size)]
    leaves = [leaf_hash(item) for item in data]
    assert Frontier().extended(leaves).root() == mth(data)
    for known in range(size):
        before = Frontier().extended(leaves[:known])
        assert Frontier.from_bytes(known, before.to_bytes()) == before
        assert before.extended(leaves[known:]).root() == mth(data)
        for index in range(known, size):
            assert inclusion_path(before, leaves[known:], index) == path(index, data)


def test_the_empty_tree_is_the_hash_of_nothing() -> None:
    assert Frontier().root() == EMPTY_ROOT == sha256(b"")


@pytest.mark.parametrize("vector", VECTORS["merkle"])
def test_roots_of_the_committed_vectors(vector: dict[str, object]) -> None:
    leaves = [leaf_hash(bytes.fromhex(item)) for item in vector["leaves"]]  # type: ignore[attr-defined]
    assert Frontier().extended(leaves).root().hex() == vector["root"]


def test_a_frontier_that_does_not_fit_its_size_is_refused() -> None:
    with pytest.raises(ValueError, match="3 leaves: 32 bytes, expected 64"):
        Frontier.from_bytes(3, b"x" * 32)


@pytest.mark.parametrize("index", [-1, 1, 5])
def test_a_leaf_that_is_not_among_those_given_has_no_path(index: int) -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(5)]
    with pytest.raises(ValueError, match="expected 2 to 4"):
        inclusion_path(Frontier().extended(leaves[:2]), leaves[2:], index)
