"""Every token's cluster scores in a few bytes, so that thresholds can be tried without a model.

A trace is `TRACE_MAGIC` followed by one zlib stream of

    4 bytes    length of the header, little-endian
    header     JSON: clusters (names in bundle order), tokens (their number)
    3 C bytes  for each cluster its fused, dense and sae column: the exponent e, signed
    N bytes    the stage of each token: 0 read and not scored, 1 prompt, 2 completion
    3 C N low bytes, then 3 C N high bytes of the columns, each a row of N 16-bit numbers q

and a score is q * 2**e, or absent where q is -32768. The step 2**e is the smallest power of two
that lets a column's largest score fit, and at least 2**-12. So a decoded score is off by at most
2**(e - 1): at most 1/32767 of the largest absolute score of its column, or 1/8192 if that is more.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from monitor.errors import AuditError
from monitor.records import Stage

TRACE_MAGIC = b"saemonitor-trace-1\n"
FINEST_EXPONENT = -12
"""Scores are read to a few hundredths; finer steps would only store noise that does not pack."""

ABSENT = -32768
"""The number that stands for no score; every score's is larger."""

_LARGEST = 32767
_STAGES: tuple[Stage | None, ...] = (None, Stage.PROMPT, Stage.COMPLETION)
_CODES = {stage: bytes([code]) for code, stage in enumerate(_STAGES)}
_COMPRESSION = 1
"""isal's, whose streams zlib reads: in size as zlib's fastest, which takes 2 to 7 times as long
(benchmarks/LOG.md, 2026-11-24)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTrace:
    """The token logits of one request or stream, in order of position."""

    clusters: tuple[str, ...]
    """In bundle order."""
    stages: tuple[Stage | None, ...]
    """One a token; None where it is read and not scored."""
    logits: NDArray[np.float32]
    """[n_tokens, n_clusters, 3]: fused, dense, sae; NaN where a token was not scored."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedTrace:
    """A trace as it was stored, and how far it may be from what was scored."""

    trace: TokenTrace
    max_error: NDArray[np.float64]
    """[n_clusters, 3]: the largest absolute error of each column, in logits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceNumbers:
    """A trace as the numbers that are stored, for whoever reads many."""

    clusters: tuple[str, ...]
    """In bundle order."""
    stages: NDArray[np.uint8]
    """[n_tokens]: 0 read and not scored, 1 prompt, 2 completion."""
    exponents: NDArray[np.int8]
    """[n_clusters, 3]: e of each column; a score is `number * 2**e`."""
    numbers: NDArray[np.int16]
    """[n_clusters, 3, n_tokens]: `ABSENT` where there is no score."""


def encode_trace(trace: TokenTrace) -> bytes:
    """The stored form. A score that is not finite is stored as absent."""
    n_tokens, n_clusters, n_sources = trace.logits.shape
    columns = np.ascontiguousarray(trace.logits.reshape(n_tokens, n_clusters * n_sources).T)
    known, absent = columns, None
    largest = np.abs(known).max(axis=1, initial=np.float32(0))
    if not np.isfinite(largest).all():
        absent = ~np.isfinite(columns)
        known = np.where(absent, np.float32(0), columns)
        largest = np.abs(known).max(axis=1, initial=np.float32(0))
    # All exact: a product with a power of two, and a mantissa of 15 bits.
    mantissas, exponents = np.frexp(largest)
    exponents += (np.rint(mantissas * 2.0**15) > _LARGEST) - 15
    exponents = np.maximum(exponents, FINEST_EXPONENT)
    numbers = np.rint(known * np.ldexp(np.float32(1), -exponents)[:, None]).astype("<i2")
    if absent is not None:
        numbers[absent] = ABSENT
    planes = numbers.view(np.uint8).reshape(-1, 2).T
    plain = b"".join(
        (
            _header(trace.clusters, n_tokens),
            exponents.astype(np.int8).tobytes(),
            *(_CODES[stage] * len(list(run)) for stage, run in groupby(trace.stages)),
            planes.tobytes(),
        )
    )
    return TRACE_MAGIC + isal_zlib.compress(plain, _COMPRESSION)


def decode_trace(stored: bytes) -> DecodedTrace:
    """What `encode_trace` stored; AuditError for anything else."""
    found = decode_numbers(stored)
    steps = np.ldexp(1.0, found.exponents.astype(np.int64))
    columns = np.where(found.numbers == ABSENT, np.nan, found.numbers * steps[:, :, None])
    return DecodedTrace(
        trace=TokenTrace(
            clusters=found.clusters,
            stages=tuple(_STAGES[code] for code in found.stages),
            logits=columns.astype(np.float32).transpose(2, 0, 1),
        ),
        max_error=steps / 2,
    )


def decode_numbers(stored: bytes) -> TraceNumbers:
    """The same without turning numbers into scores; AuditError for other bytes."""
    if not stored.startswith(TRACE_MAGIC):
        raise AuditError(
            f"trace: found {stored[: len(TRACE_MAGIC)]!r} at its start, expected {TRACE_MAGIC!r}"
        )
    try:
        plain = zlib.decompress(stored[len(TRACE_MAGIC) :])
        (header_length,) = struct.unpack_from("<I", plain)
        clusters, n_tokens = _read_header(plain[4 : 4 + header_length])
        n_columns = 3 * len(clusters)
        at = 4 + header_length
        parts = np.frombuffer(plain, np.uint8, offset=at)
        stages = parts[n_columns : n_columns + n_tokens]
        planes = parts[n_columns + n_tokens :].reshape(2, n_columns * n_tokens)
        numbers = np.empty((n_columns * n_tokens, 2), np.uint8)
        numbers[:, 0], numbers[:, 1] = planes
        if len(stages) and stages.max() >= len(_STAGES):
            raise ValueError(f"found stage {stages.max()}, expected 0 to {len(_STAGES) - 1}")
    except (zlib.error, struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise AuditError(f"trace: its {len(stored)} bytes cannot be read: {error}") from error
    return TraceNumbers(
        clusters=clusters,
        stages=stages,
        exponents=parts[:n_columns].view(np.int8).reshape(-1, 3),
        numbers=numbers.view("<i2").reshape(len(clusters), 3, n_tokens),
    )


@lru_cache(maxsize=256)
def _read_header(header: bytes) -> tuple[tuple[str, ...], int]:
    """The clusters and the number of tokens; most traces of a log begin like another."""
    content = json.loads(header)
    clusters, n_tokens = tuple(map(str, content["clusters"])), int(content["tokens"])
    if n_tokens < 0 or not clusters:
        raise ValueError(f"found {n_tokens} tokens of {len(clusters)} clusters")
    return clusters, n_tokens


@lru_cache(maxsize=256)
def _header(clusters: tuple[str, ...], n_tokens: int) -> bytes:
    header = json.dumps({"clusters": clusters, "tokens": n_tokens}).encode()
    return struct.pack("<I", len(header)) + header
