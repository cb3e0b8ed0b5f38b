"""The layout of an export: `SCHEMA`, with what each column holds in its field's metadata.

Time is UTC, hashes are lower-case hexadecimal, scores are logits, NaN stored as null. `trace` is as
`trace.decode_trace` reads it, and the columns `trace_*` are its numbers, for whoever reads them by
the million: a score is `number * 2**exponent`. `body` is the record itself, whose hash is `hash`.
Needs pyarrow.
"""

from __future__ import annotations

import pyarrow as pa

from sae_core.aggregation import SOURCES

SCHEMA_VERSION = 3
VERSION_KEY = b"sae-monitor audit export"
"""In the file's metadata, with the version."""


def _field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


_SCORES = [("fused", pa.float64()), ("dense", pa.float64()), ("sae", pa.float64())]
_COUNT = pa.int64()

SCHEMA = pa.schema(
    [
        _field("chain", pa.string(), "name of the chain"),
        _field("sequence", pa.int64(), "place in the chain, from 1"),
        _field("decision_id", pa.string(), "the decision's id"),
        _field("time", pa.timestamp("us", "UTC"), "when it was made"),
        _field("verdict", pa.string(), "pass, flag or alert"),
        _field("severity", pa.string(), "the gravest of what flagged or alerted; null for pass"),
        _field("action", pa.string(), "allow, flag or block"),
        _field("mode", pa.string(), "monitor or enforce"),
        _field("policy", pa.string(), "name of the policy"),
        _field("level", pa.string(), "metadata, scores, tokens or content"),
        _field("session_id", pa.string(), "the stream's name; empty for a request"),
        _field(
            "asked",
            pa.struct([("stage", pa.string()), ("priority", pa.string())]),
            "stage prompt, completion or chat; priority in the engine's queue, completion, prompt "
            "or replay; null in records of before",
        ),
        _field("caller_hmac", pa.string(), "keyed hash of the caller; null where none is stored"),
        _field("input_hash", pa.string(), "keyed hash or plain SHA-256 of the token ids"),
        _field("overall", pa.struct(_SCORES), "0 at flag, 1 at alert; null at level metadata"),
        _field(
            "clusters",
            pa.list_(
                pa.struct(
                    [
                        ("cluster", pa.string()),
                        ("verdict", pa.string()),
                        ("severity", pa.string()),
                        ("stage", pa.string()),
                        ("first_crossing", pa.int64()),
                        ("calibrated", pa.bool_()),
                        ("benign_p", pa.float64()),
                        *_SCORES,
                    ]
                )
            ),
            "every cluster's result, by name",
        ),
        _field(
            "alerts",
            pa.list_(
                pa.struct(
                    [
                        ("cluster", pa.string()),
                        ("severity", pa.string()),
                        ("stage", pa.string()),
                        ("position", pa.int64()),
                        ("score", pa.float64()),
                    ]
                )
            ),
            "what alerted, in order",
        ),
        _field("rules", pa.list_(pa.string()), "joint rules that fired"),
        _field(
            "token_latents",
            pa.list_(
                pa.struct(
                    [
                        ("cluster", pa.string()),
                        ("position", pa.int64()),
                        ("sae", pa.string()),
                        ("latent_id", pa.int64()),
                        ("contribution", pa.float64()),
                        ("max_error", pa.float64()),
                    ]
                )
            ),
            "latents of the tokens that made a raised cluster's score, and what each added to its "
            "token's fused logit; a null latent is the sum of the token's others",
        ),
        _field("tokens_received", _COUNT, "tokens of the request or stream"),
        _field("tokens_scored", _COUNT, "those of them that were scored"),
        _field("total_us", _COUNT, "microseconds from arrival to decision"),
        _field("forward_us", _COUNT, "those of them in the forward pass"),
        _field("bundle", pa.string(), "name@version"),
        _field("bundle_digest", pa.string(), "sha256 of the bundle"),
        _field("model", pa.string(), "the model's id"),
        _field("model_digest", pa.string(), "sha256 of the model"),
        _field("dtype", pa.string(), "of the forward pass"),
        _field("backend", pa.string(), "what ran the forward pass"),
        _field("server_version", pa.string(), "of sae-monitor"),
        _field("trace", pa.binary(), "scores of every token; null at level metadata"),
        _field("trace_clusters", pa.string(), "those of the trace in its order, by commas"),
        _field("trace_stages", pa.binary(), "a byte a token: 0 not scored, 1 prompt, 2 completion"),
        _field("trace_exponents", pa.binary(), "int8 [clusters, 3]: fused, dense, sae"),
        *(
            _field(f"trace_{source}", pa.binary(), "int16 [tokens, clusters]; -32768 is no score")
            for source in SOURCES
        ),
        _field("body", pa.string(), "the record: RFC 8785 JSON"),
        _field("hash", pa.string(), "the record's hash"),
        _field("prev_hash", pa.string(), "that of the record before it in the chain"),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)

REPEATED = (
    *("chain", "verdict", "severity", "action", "mode", "policy", "level", "bundle"),
    *("bundle_digest", "model", "model_digest", "dtype", "backend", "server_version"),
    *("trace_clusters", "rules.list.element"),
    *(f"clusters.list.element.{name}" for name in ("cluster", "verdict", "severity", "stage")),
    *(f"alerts.list.element.{name}" for name in ("cluster", "severity", "stage")),
    *("asked.stage", "asked.priority"),
    *(f"token_latents.list.element.{name}" for name in ("cluster", "sae")),
)
"""Columns of few values, which are stored as numbers of a list; in the others that is lost work."""

SEARCHED = tuple(name for name in SCHEMA.names if name != "body" and not name.startswith("trace"))
"""Columns whose least and largest values are stored."""
