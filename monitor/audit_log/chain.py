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
import re
from collections.abc import Mapping
from math import isfinite
from typing import TypeAlias

import orjson
import rfc8785

from monitor.errors import AuditError

Json: TypeAlias = (
    "None | bool | int | float | str | list[Json] | tuple[Json, ...] | Mapping[str, Json]"
)

RECORD_PREFIX = b"sae-monitor audit record v1\n"
GENESIS_PREFIX = b"sae-monitor audit genesis v1\n"
FIRST_SEQUENCE = 1


def genesis_hash(chain: str) -> str:
    """What the first record of a chain names as its predecessor."""
    return hashlib.sha256(GENESIS_PREFIX + chain.encode()).hexdigest()


def record_hash(prev_hash: str, body_bytes: bytes) -> str:
    """The hash that stands for this record and, through `prev_hash`, for all before it."""
    return record_digest(bytes.fromhex(prev_hash), body_bytes).hex()


def record_digest(prev_digest: bytes, body_bytes: bytes) -> bytes:
    """The same in raw bytes."""
    return hashlib.sha256(RECORD_PREFIX + prev_digest + body_bytes).digest()


def canonical_bytes(body: Mapping[str, Json], *, plain: bool = False) -> bytes:
    """RFC 8785 bytes of a body; AuditError for NaN, infinity, or what JSON cannot hold.

    Most bodies are written by a fast encoder exactly as RFC 8785 asks; where its output holds
    anything on which the two may part, the reference package writes the body.

    Args:
        plain: the caller knows that every key is a string, every integer below 2**53, and every
            other number one that `plain_number` gave: orjson may write it, which does not ask.
    """
    try:
        fast = _dump_plain(body) if plain else _dump(body)
        return bytes(rfc8785.dumps(body)) if fast is None else fast
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise AuditError(f"an audit record's body has no canonical JSON form: {error}") from error


class _SpeltOtherwise(float):
    """A number that orjson would write unlike RFC 8785; being no plain float, orjson refuses it."""


def plain_number(value: float | None) -> float | int | None:
    """A number as a plain body holds it: whole ones as integers, null for NaN and infinity.

    RFC 8785 writes 1.0 as 1, and exponents from other sizes on than orjson, whose text is the same
    where there is neither.
    """
    if value is None:
        return None
    number = float(value)
    if 1e-5 <= abs(number) < 2**53:
        return int(number) if number.is_integer() else number
    if number == 0:
        return 0
    return _SpeltOtherwise(number) if isfinite(number) else None


def _dump_plain(body: Mapping[str, Json]) -> bytes | None:
    """What orjson writes; None where RFC 8785 may write otherwise."""
    try:
        text = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return None
    return text if text.isascii() else None


def _dump(body: Mapping[str, Json]) -> bytes | None:
    """What `json` writes; None where RFC 8785 may write otherwise, or nothing."""
    try:
        text = _ENCODER.encode(body).encode()
    except (TypeError, ValueError):
        return None
    suspects = (_EXPONENT, _WHOLE_FLOAT, _LARGE_INTEGER, _BARE_KEY)
    if not text.isascii() or any(suspect.search(text) for suspect in suspects):
        return None
    return text


_ENCODER = json.JSONEncoder(
    sort_keys=True,
    separators=(",", ":"),
    ensure_ascii=False,
    check_circular=False,
    allow_nan=False,
)
_EXPONENT = re.compile(rb"[:,[]-?[\d.]+e")
"""1e-05, which is 0.00001."""
_WHOLE_FLOAT = re.compile(rb"\.0[],}]")
"""1.0, which is 1."""
_LARGE_INTEGER = re.compile(rb"[:,[]-?(?:\d{17}|9\d{15})")
"""One that a double may not hold."""
_BARE_KEY = re.compile(rb'"(?:-?[\d.]+|true|false|null)":')
"""A key that may have been a number, which `json` writes as a string and RFC 8785 has not."""
