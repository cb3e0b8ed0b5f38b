"""Attention over ragged segments as a model-local ONNX function of standard operators.

A `Loop` goes over blocks of query rows. Each block is a row of `blocks`, int64 [n_blocks, 5]:

    query_start, query_stop   its rows of the batch
    past_start, past_stop     rows of the pasts that it sees
    key_start                 first row of the batch that it sees; the last is query_stop - 1

The keys that a block sees are consecutive tokens which end with its last query, so causality and
window follow from counting. No row is padded and no mask is larger than a block times its keys.
"""

from __future__ import annotations

import onnx
from onnx import parser

from sae_core.language_model.traced import AttentionCall

DOMAIN = "sae_monitor"
OPERATOR = "RaggedAttention"
QUERY_BLOCK = 256
"""Rows of queries in one block: bounds the scores that are in memory to 256 x heads x keys."""
BLOCK_COLUMNS = 5
_HIDDEN = -3.0e38
"""A score that softmax makes exactly 0 of."""


def blocks_name(window: int | None) -> str:
    """The input that says what layers with this window see."""
    return f"blocks.{'all' if window is None else window}"


def function_name(number: int) -> str:
    """Of the variant with this number; layers that ask the same share one."""
    return f"{OPERATOR}{number}"


def attention_function(name: str, call: AttentionCall, opset: int) -> onnx.FunctionProto:
    """The function for one kind of layer.

    Inputs: query [1, n_heads, n, key_dim], key and value [1, n_kv_heads, n, dim], past keys and
    values [n_kv_heads, n_past, dim], blocks. Output: [1, n, n_heads, value_dim].
    """
    n_kv, d, d_v = call.n_kv_heads, call.key_dim, call.value_dim
    group = call.n_heads // n_kv
    capped = "scores = Identity(products)"
    if call.softcap is not None:
        capped = """shrunk = Div(products, cap)
              bent = Tanh(shrunk)
              scores = Mul(bent, cap)"""
    windowed = "seen = Identity(causal)"
    if call.window is not None:
        windowed = """oldest = Sub(row_places, window)
              near = Greater(columns, oldest)
              seen = And(causal, near)"""
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {name} (query, key, value, past_keys, past_values, blocks) => (mixed) {{
        one = Constant<value_ints=[1]>()
        two = Constant<value_ints=[2]>()
        from = Constant<value_int=0>()
        by = Constant<value_int=1>()
        scale = Constant<value_float={call.scaling!r}>()
        cap = Constant<value_float={call.softcap or 1.0!r}>()
        window = Constant<value_int={call.window or 0}>()
        hidden = Constant<value_float={_HIDDEN!r}>()
        go = Constant<value=bool {{1}}>()
        grouped_shape = Constant<value_ints=[{n_kv}, {group}, -1, {d}]>()
        keys_shape = Constant<value_ints=[{n_kv}, -1, {d}]>()
        values_shape = Constant<value_ints=[{n_kv}, -1, {d_v}]>()
        heads_shape = Constant<value_ints=[{n_kv}, {group}, -1, {d_v}]>()
        mixed_shape = Constant<value_ints=[1, -1, {call.n_heads}, {d_v}]>()
        split_heads = Constant<value_ints=[{n_kv}, {group}]>()
        joined_heads = Constant<value_ints=[{n_kv}, -1]>()
        scaled = Mul(query, scale)
        queries = Reshape(scaled, grouped_shape)
        new_keys = Reshape(key, keys_shape)
        new_values = Reshape(value, values_shape)
        count = Shape<start=0, end=1>(blocks)
        n_blocks = Squeeze(count)
        nothing = SequenceEmpty<dtype=1>()
        parts = Loop(n_blocks, go, nothing) <body = attend (
            int64 number, bool go_on, seq(float[?, ?, ?, ?]) before
        ) => (bool goes_on, seq(float[?, ?, ?, ?]) after) {{
              goes_on = Identity(go_on)
              block = Gather<axis=0>(blocks, number)
              query_start, query_stop, past_start, past_stop, key_start
                  = Split<axis=0, num_outputs={BLOCK_COLUMNS}>(block)
              block_queries = Slice(queries, query_start, query_stop, two)
              rows = Reshape(block_queries, keys_shape)
              own_keys = Slice(new_keys, key_start, query_stop, one)
              old_keys = Slice(past_keys, past_start, past_stop, one)
              keys = Concat<axis=1>(old_keys, own_keys)
              own_values = Slice(new_values, key_start, query_stop, one)
              old_values = Slice(past_values, past_start, past_stop, one)
              values = Concat<axis=1>(old_values, own_values)
              turned_keys = Transpose<perm=[0, 2, 1]>(keys)
              products = MatMul(rows, turned_keys)
              {capped}
              n_rows = Sub(query_stop, query_start)
              n_keys = Shape<start=1, end=2>(keys)
              first_place = Sub(n_keys, n_rows)
              stop = Squeeze(n_keys)
              first = Squeeze(first_place)
              columns = Range(from, stop, by)
              places = Range(first, stop, by)
              row_places = Unsqueeze(places, one)
              causal = LessOrEqual(columns, row_places)
              {windowed}
              split_shape = Concat<axis=0>(split_heads, n_rows, n_keys)
              split_scores = Reshape(scores, split_shape)
              seen_scores = Where(seen, split_scores, hidden)
              split_weights = Softmax<axis=-1>(seen_scores)
              joined_shape = Concat<axis=0>(joined_heads, n_keys)
              weights = Reshape(split_weights, joined_shape)
              joined = MatMul(weights, values)
              part = Reshape(joined, heads_shape)
              after = SequenceInsert(before, part)
        }}>
        by_head = ConcatFromSequence<axis=2>(parts)
        by_row = Transpose<perm=[2, 0, 1, 3]>(by_head)
        mixed = Reshape(by_row, mixed_shape)
    }}
    """
    return parser.parse_function(text)
