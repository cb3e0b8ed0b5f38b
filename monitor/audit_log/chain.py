"""How records are chained: canonical bytes, the hash over them, and where a chain begins.

A record is a JSON object, its body, which holds its chain's name and its sequence number:

    body_bytes = RFC 8785 canonical JSON of the body
    hash       = SHA-256( b"sae-monitor audit record v1\\n" + prev_hash + body_bytes )
    genesis    = SHA-256( b"sae-monitor audit genesis v1\\n" + UTF-8 of the chain's name )

`prev_hash` is the 32 raw bytes of the previous record's hash; that of sequence 1 is the genesis.
Hashes are stored as lower-case hexadecimal. The two prefixes keep a record's hash from ever being
read as anything else. tests/monitor/audit_log/vectors.json holds worked examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import rfc8785

from monitor.errors import AuditError

Json: TypeAlias = (
    "None | bool | int | float | str | list[Json] | tuple[Json, ...] | Mapping[str, Json]"
)

RECORD_PREFIX = b"sae-monitor audit record v1\n"
GENESIS_PREFIX = b"sae-monitor audit genesis v1\n"
FIRST_SEQUENCE = 1

_SAFE_INTEGER = 2**53 - 1


def genesis_hash(chain: str) -> str:
    """What the first record of a chain names as its predecessor."""
    return hashlib.sha256(GENESIS_PREFIX + chain.encode()).hexdigest()


def record_hash(prev_hash: str, body_bytes: bytes) -> str:
    """The hash that stands for this record and, through `prev_hash`, for all before it."""
    return hashlib.sha256(RECORD_PREFIX + bytes.fromhex(prev_hash) + body_bytes).hexdigest()


def canonical_bytes(body: Mapping[str, Json]) -> bytes:
    """RFC 8785 bytes of a body; AuditError for NaN, infinity, or what JSON cannot hold.

    Most bodies hold only values that the C encoder of `json` writes exactly as RFC 8785 asks, which
    is five times faster than the reference package; any other body goes to the package.
    """
    try:
        if _is_plain(body):
            return json.dumps(
                body,
                sort_keys=True,
                separators=(",", ":"),
                ensure_ascii=False,
                check_circular=False,
            ).encode()
        return bytes(rfc8785.dumps(body))
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise AuditError(f"an audit record's body has no canonical JSON form: {error}") from error


def _is_plain(value: Any) -> bool:
    """Whether `json` and RFC 8785 agree on every byte of this value.

    They part on numbers such as 1.0, 1e-05 and 1e16, and on the order of keys beyond ASCII.
    """
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return True
    if kind is float:
        return bool(1e-4 <= abs(value) < 1e16 and value % 1)
    if kind is int:
        return bool(abs(value) <= _SAFE_INTEGER)
    if kind is dict:
        return all(
            type(key) is str and key.isascii() and _is_plain(item) for key, item in value.items()
        )
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return False
