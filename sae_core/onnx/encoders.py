"""SAE encoders as tracing can follow them: `encoder` and `columns` without padding to tiles.

The formulas are those of `Encoder`; the last bits may differ, as products here are rounded in
whatever order the runtime likes. TopK and AbsTopK rank with a model-local ONNX function over blocks
of tokens, so that no [n_tokens, d_sae] array exists.
"""

from __future__ import annotations

import onnx
import torch
from onnx import parser
from torch import Tensor

from sae_core import activation_functions as gates
from sae_core.columns import Columns
from sae_core.encoder import Encoder, lowest_key, normalised
from sae_core.errors import ExportError
from sae_core.onnx.attention import DOMAIN
from sae_core.sae_config import RANKED

AMONG_TOP_K = "AmongTopK"
BLOCK_TOKENS = 64
"""Tokens that are ranked at a time: 16 MiB of keys at 65,536 latents."""


def encode(encoder: Encoder, x: Tensor) -> Tensor:
    """What `encoder(x)` gives, for `x` of [n, width]; to be traced.

    Raises:
        ExportError: The encoder ranks the products of a gated linear unit.
    """
    config, parts = encoder.config, encoder.parts
    columns = parts.columns
    z = normalised(config, x, parts.b_dec).z
    h = _pre_acts(columns, z)
    if config.architecture == "gated":
        assert columns.b_gate is not None
        assert columns.r_mag is not None
        assert columns.b_mag is not None
        magnitudes = torch.relu(h * torch.exp(columns.r_mag) + columns.b_mag)
        return magnitudes * (h + columns.b_gate > 0)
    judged = columns.judged(h)
    if config.architecture in RANKED:
        assert parts.dictionary is not None
        kept = _among_top_k(encoder, parts.dictionary, z)
        return torch.where(kept, judged if config.decoder_norms == "acts" else h, 0.0)
    if parts.place is not None:
        assert config.k is not None
        size = config.d_sae // config.k
        grouped = h.reshape(-1, h.shape[1] // size, size)
        winners = grouped.argmax(dim=-1, keepdim=True) == torch.arange(size)
        acts = torch.where(winners, torch.relu(grouped), 0.0).reshape(-1, h.shape[1])
        return acts[:, parts.place]
    if config.architecture in ("jumprelu", "batchtopk"):
        assert columns.threshold is not None
        gate = gates.jumprelu if config.architecture == "jumprelu" else gates.batchtopk
        acts = gate(judged, columns.threshold)
    else:
        acts = torch.relu(judged)
        if config.architecture == "tanh_relu":
            acts = torch.tanh(acts)
    return torch.relu(h) * (acts > 0) if config.decoder_norms == "gate" else acts


def _pre_acts(columns: Columns, z: Tensor) -> Tensor:
    h = z @ columns.W[:, : columns.n].contiguous()
    if columns.b_enc is not None:
        h = h + columns.b_enc
    if columns.W_glu is not None:
        assert columns.b_glu is not None
        h = h * torch.sigmoid(z @ columns.W_glu[:, : columns.n].contiguous() + columns.b_glu)
    return h


def _among_top_k(encoder: Encoder, dictionary: Columns, z: Tensor) -> Tensor:
    """Whether each registered latent is one of its token's k first, [n, n_latents]."""
    config = encoder.config
    if dictionary.W_glu is not None:
        raise ExportError(
            f"{config.architecture} encoder: found a gated linear unit, expected none "
            "(its ranks cannot be had from one product)"
        )
    assert dictionary.b_enc is not None
    norms = dictionary.norms
    inputs = [
        z,
        dictionary.W[:, : dictionary.n].contiguous(),
        dictionary.b_enc,
        torch.ones(dictionary.n) if norms is None else norms,
        encoder.latent_ids,
    ]
    shape = (z.shape[0], len(encoder.latent_ids))
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{AMONG_TOP_K}",
        inputs,
        {
            "k": int(config.k or 0),
            "lowest": max(lowest_key(config), -3.0e38),
            "is_absolute": int(config.architecture == "abstopk"),
        },
        dtype=torch.bool,
        shape=shape,
        version=1,
    )


def among_top_k_function(
    name: str, k: int, lowest: float, is_absolute: bool, opset: int
) -> onnx.FunctionProto:
    """The ranking for one k.

    Inputs: z [n, d_in], W [d_in, d_sae], b_enc and norms [d_sae], latent ids [n_latents]. Output:
    bool [n, n_latents]. Of equal keys the lowest ids come first, as TopK has it.
    """
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {name} (z, W, b_enc, norms, latent_ids) => (kept) {{
        zero = Constant<value_ints=[0]>()
        one = Constant<value_ints=[1]>()
        two = Constant<value_ints=[2]>()
        last = Constant<value_ints=[-1]>()
        k = Constant<value_ints=[{k}]>()
        size = Constant<value_ints=[{BLOCK_TOKENS}]>()
        lowest = Constant<value_float={lowest!r}>()
        go = Constant<value=bool {{1}}>()
        n_tokens = Shape<start=0, end=1>(z)
        n_more = Add(n_tokens, size)
        n_up = Sub(n_more, one)
        n_blocks_list = Div(n_up, size)
        n_blocks = Squeeze(n_blocks_list)
        nothing = SequenceEmpty<dtype=9>()
        parts = Loop(n_blocks, go, nothing) <body = rank (
            int64 number, bool go_on, seq(bool[?, ?]) before
        ) => (bool goes_on, seq(bool[?, ?]) after) {{
              goes_on = Identity(go_on)
              start = Mul(number, size)
              stop = Add(start, size)
              rows = Slice(z, start, stop, zero)
              products = MatMul(rows, W)
              pre_acts = Add(products, b_enc)
              judged = Mul(pre_acts, norms)
              keys = {"Abs" if is_absolute else "Identity"}(judged)
              first_keys, first_ids = TopK<axis=-1, sorted=0>(keys, k)
              is_asked = Greater(first_keys, lowest)
              leaders = Where(is_asked, first_ids, last)
              leaders_3d = Unsqueeze(leaders, two)
              same = Equal(leaders_3d, latent_ids)
              same_numbers = Cast<to=6>(same)
              found = ReduceMax<keepdims=0>(same_numbers, one)
              part = Cast<to=9>(found)
              after = SequenceInsert(before, part)
        }}>
        kept = ConcatFromSequence<axis=0>(parts)
    }}
    """
    return parser.parse_function(text)
