"""Records' columns in an export, made for many records at a time.

Arrow's own reader turns the bodies' JSON into columns, and a trace's numbers are joined with those
of its neighbours before they are turned into bytes, so that no value becomes an object of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
from numpy.typing import NDArray
from sqlalchemy import Row

from monitor.audit_log.export_schema import SCHEMA
from monitor.audit_log.token_latents import decode_token_latents
from monitor.audit_log.trace import TraceNumbers, decode_numbers
from monitor.errors import AuditError
from sae_core.aggregation import SOURCES

_IN_BODY = (
    *("chain", "sequence", "decision_id", "verdict", "severity", "action", "mode", "policy"),
    *("level", "session_id", "asked", "caller_hmac", "overall", "alerts"),
)
_IN_PROVENANCE = (
    *("bundle", "bundle_digest", "model", "model_digest", "dtype", "backend", "server_version"),
)
_CLUSTER = [field for field in SCHEMA.field("clusters").type.value_type if field.name != "cluster"]
_BODY = (
    *(SCHEMA.field(name).remove_metadata() for name in _IN_BODY),
    pa.field("input_hmac", pa.string()),
    pa.field("input_digest", pa.string()),
    pa.field("rules", pa.list_(pa.struct([("rule", pa.string())]))),
    pa.field("coverage", pa.struct([("received", pa.int64()), ("scored", pa.int64())])),
    pa.field("timings_us", pa.struct([("total", pa.int64()), ("forward", pa.int64())])),
    pa.field("provenance", pa.struct([(name, pa.string()) for name in _IN_PROVENANCE])),
)
"""What is read of a body; the rest of it is passed over."""

_LATENTS, _NO_LATENTS = b'"token_latents":', b'"token_latents":{}'


def table_of(group: Sequence[Row[Any]]) -> pa.Table:
    """The rows of `SCHEMA` for these stored rows.

    AuditError: a body is no JSON object of a decision.
    """
    try:
        bodies, latents = zip(*(_apart(row.body) for row in group), strict=True)
        body = _parsed(bodies)
    except (ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
        raise AuditError(
            f"audit log holds a record whose body is no decision's; run audit verify ({error})"
        ) from error
    columns: dict[str, Any] = {
        **{name: body[name] for name in _IN_BODY},
        **{name: body["provenance"].field(name) for name in _IN_PROVENANCE},
        "time": [row.time_us for row in group],
        "input_hash": pc.coalesce(body["input_hmac"], body["input_digest"]),
        "clusters": _clusters(body["clusters"]),
        "rules": pa.ListArray.from_arrays(
            body["rules"].offsets, body["rules"].values.field("rule")
        ),
        "token_latents": list(latents),
        "tokens_received": body["coverage"].field("received"),
        "tokens_scored": body["coverage"].field("scored"),
        "total_us": body["timings_us"].field("total"),
        "forward_us": body["timings_us"].field("forward"),
        "body": pa.array([row.body for row in group], pa.binary()).cast(pa.string()),
        "hash": [row.hash for row in group],
        "prev_hash": [row.prev_hash for row in group],
        **_traces([row.trace for row in group]),
    }
    arrays = [
        pa.array(column, field.type) if isinstance(column, list) else column.cast(field.type)
        for field, column in ((field, columns[field.name]) for field in SCHEMA)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _parsed(bodies: Sequence[bytes]) -> dict[str, Any]:
    """Arrays of the fields of `_BODY` and of the clusters, a struct of each cluster's result."""
    text = b"\n".join(bodies)
    names = set(orjson.loads(bodies[0])["clusters"])
    while True:
        kinds = pa.struct([(name, pa.struct(_CLUSTER)) for name in sorted(names)])
        table = pa_json.read_json(
            pa.BufferReader(text),
            pa_json.ReadOptions(use_threads=False, block_size=len(text) + 1),
            pa_json.ParseOptions(explicit_schema=pa.schema([*_BODY, ("clusters", kinds)])),
        )
        found = {field.name for field in table.schema.field("clusters").type}
        if found == names:
            break
        names = found  # those that were not expected have types that are only guessed
    if table.num_rows != len(bodies):
        raise pa.ArrowInvalid(f"found {table.num_rows} objects in {len(bodies)} bodies")
    return {
        name: table.column(name).combine_chunks()
        for name in (*(field.name for field in _BODY), "clusters")
    }


def _clusters(results: pa.StructArray) -> pa.Array:
    """A list of results, by name, from a struct of them; those of a record are not null."""
    kind = SCHEMA.field("clusters").type
    children = results.flatten()
    shape = (len(children), len(results))
    there = np.zeros(shape, np.bool_)
    for place, child in enumerate(children):
        there[place] = child.is_valid().to_numpy(zero_copy_only=False)
    there = there.T
    places = pa.array(np.arange(there.size).reshape(shape).T[there])
    names = pa.array([field.name for field in results.type], pa.string())
    parts = [names.take(pa.array(np.broadcast_to(np.arange(shape[0]), there.shape)[there]))]
    for field in _CLUSTER:
        values = [child.field(field.name).cast(field.type) for child in children]
        joined = pa.concat_arrays(values) if values else pa.nulls(0, field.type)
        parts.append(joined.take(places))
    structs = pa.StructArray.from_arrays(parts, fields=list(kind.value_type))
    return pa.ListArray.from_arrays(pa.array(_bounds(there.sum(axis=1))), structs, type=kind)


def _apart(body: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """A body without its tokens' latents, and those as rows.

    Arrow reads no list of several types, as theirs are; the many bodies that have none stay as
    they are.
    """
    if _NO_LATENTS in body or _LATENTS not in body:
        return body, []
    value = orjson.loads(body)
    found = value.pop("token_latents")
    return orjson.dumps(value), list(_latent_rows(found))


def _latent_rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cluster, stored in sorted(found.items()):
        decoded = decode_token_latents(stored)
        for token in decoded.tokens:
            shares: list[tuple[str | None, int | None, float]] = list(token.latents)
            if token.others:
                shares.append((None, None, token.others))
            for sae, latent_id, contribution in shares:
                yield {
                    "cluster": cluster,
                    "position": token.position,
                    "sae": sae,
                    "latent_id": latent_id,
                    "contribution": contribution,
                    "max_error": decoded.max_error,
                }


def _traces(stored: list[bytes | None]) -> dict[str, Any]:
    """The traces and their numbers; no clusters and no numbers where bytes cannot be read."""
    found = [None if trace is None else _numbers(trace) for trace in stored]
    names: list[str | None] = [
        ("" if numbers is None else ",".join(numbers.clusters)) if trace is not None else None
        for trace, numbers in zip(stored, found, strict=True)
    ]
    by_name: dict[str, list[int]] = {}
    for place, (name, numbers) in enumerate(zip(names, found, strict=True)):
        by_name.setdefault("" if numbers is None or name is None else name, []).append(place)
    parts: list[dict[str, pa.Array]] = []
    for name, places in by_name.items():
        kept = [numbers for numbers in (found[place] for place in places) if numbers is not None]
        parts.append(_joined(kept) if name else _absent(len(places)))
    order = pa.array(np.argsort(list(chain.from_iterable(by_name.values()))))
    return {
        "trace": stored,
        "trace_clusters": names,
        **{
            column: parts[0][column]
            if len(parts) == 1
            else pa.concat_arrays([part[column] for part in parts]).take(order)
            for column in parts[0]
        },
    }


def _numbers(trace: bytes) -> TraceNumbers | None:
    try:
        return decode_numbers(trace)
    except AuditError:
        return None


_COLUMNS = ("trace_stages", "trace_exponents", *(f"trace_{source}" for source in SOURCES))


def _absent(n_rows: int) -> dict[str, pa.Array]:
    return dict.fromkeys(_COLUMNS, pa.nulls(n_rows, pa.binary()))


def _joined(traces: list[TraceNumbers]) -> dict[str, pa.Array]:
    """The columns of traces of the same clusters."""
    lengths = [len(trace.stages) for trace in traces]
    numbers = np.concatenate([trace.numbers for trace in traces], axis=2)  # clusters sources tokens
    n_clusters = len(numbers)
    return {
        "trace_stages": _binary(np.concatenate([trace.stages for trace in traces]), lengths),
        "trace_exponents": _binary(
            np.stack([trace.exponents for trace in traces]), [3 * n_clusters] * len(traces)
        ),
        **{
            f"trace_{source}": _binary(
                numbers[:, place].T, [2 * n_clusters * length for length in lengths]
            )
            for place, source in enumerate(SOURCES)
        },
    }


def _binary(values: NDArray[Any], n_bytes: list[int]) -> pa.Array:
    """A column of binary values that lie one after the other in an array."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(
        pa.binary(), len(n_bytes), [None, pa.py_buffer(_bounds(n_bytes)), data]
    )


def _bounds(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
