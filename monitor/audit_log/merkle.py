"""The Merkle tree over a chain's records: RFC 6962 section 2.1, over SHA-256.

A record is the leaf of index `sequence - 1`; the leaf's data are the 32 raw bytes of its hash. A
`Frontier` is all that is needed of the leaves before to go on: the roots of the complete subtrees
that they make, largest first, one for each bit that is set in their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """MTH of one leaf: SHA-256(0x00 || data)."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """An inner node: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """The first `size` leaves of a tree, as the roots of their complete subtrees."""

    size: int = 0
    roots: tuple[bytes, ...] = ()

    def extended(self, leaves: Iterable[bytes]) -> Frontier:
        """With these leaf hashes after the last one."""
        size, roots = self.size, list(self.roots)
        for leaf in leaves:
            node = leaf
            place = size
            while place & 1:
                node = node_hash(roots.pop(), node)
                place >>= 1
            roots.append(node)
            size += 1
        return Frontier(size, tuple(roots))

    def root(self) -> bytes:
        """The Merkle tree hash of all leaves."""
        if not self.roots:
            return EMPTY_ROOT
        node = self.roots[-1]
        for left in reversed(self.roots[:-1]):
            node = node_hash(left, node)
        return node

    def to_bytes(self) -> bytes:
        """The roots, one after the other."""
        return b"".join(self.roots)

    @classmethod
    def from_bytes(cls, size: int, stored: bytes) -> Frontier:
        """What `to_bytes` gave; ValueError when the bytes do not fit the number of leaves."""
        expected = size.bit_count() * HASH_BYTES
        if len(stored) != expected:
            raise ValueError(f"frontier of {size} leaves: {len(stored)} bytes, expected {expected}")
        starts = range(0, expected, HASH_BYTES)
        return cls(size, tuple(stored[start : start + HASH_BYTES] for start in starts))


def inclusion_path(before: Frontier, leaves: list[bytes], index: int) -> list[bytes]:
    """The audit path of one leaf, from the leaf's sibling up to below the root.

    Args:
        before: the leaves that precede `leaves`.
        leaves: the leaf hashes from there to the end of the tree.
        index: the leaf's, in the whole tree; at least `before.size`.
    """
    size = before.size + len(leaves)
    if not before.size <= index < size:
        raise ValueError(f"leaf {index}, expected {before.size} to {size - 1}")

    def subtree(start: int, stop: int) -> bytes:
        part = _between(before, start, stop)
        first = max(start, before.size) - before.size
        return part.extended(leaves[first : max(0, stop - before.size)]).root()

    path: list[bytes] = []
    start, stop = 0, size
    while stop - start > 1:
        half = start + (1 << ((stop - start - 1).bit_length() - 1))
        if index < half:
            path.append(subtree(half, stop))
            stop = half
        else:
            path.append(subtree(start, half))
            start = half
    return path[::-1]


def _between(frontier: Frontier, start: int, stop: int) -> Frontier:
    """The frontier's subtrees from leaf `start` to `stop`; both are boundaries, or beyond its end.

    What precedes a leaf on its path is made of complete subtrees, so no other is ever asked for.
    """
    place, left, size, roots = 0, frontier.size, 0, []
    for root in frontier.roots:
        block = 1 << (left.bit_length() - 1)
        if start <= place < stop:
            roots.append(root)
            size += block
        place, left = place + block, left - block
    return Frontier(size, tuple(roots))
