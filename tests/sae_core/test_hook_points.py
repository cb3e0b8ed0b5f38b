"""Names of places: what is accepted, what each one says, and how deep a model must be for it."""

from __future__ import annotations

import pytest

from sae_core.errors import HookPointError
from sae_core.hook_points import (
    SITES_IN_BLOCK,
    HookPoint,
    ModulePath,
    n_layers_needed,
    parse_hook_point,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hook_embed", HookPoint(0, "embed")),
        ("blocks.0.hook_resid_pre", HookPoint(0, "resid_pre")),
        ("blocks.31.hook_resid_mid", HookPoint(31, "resid_mid")),
        ("blocks.8.hook_resid_post", HookPoint(8, "resid_post")),
        ("blocks.8.hook_attn_out", HookPoint(8, "attn_out")),
        ("blocks.8.hook_mlp_out", HookPoint(8, "mlp_out")),
        ("blocks.8.attn.hook_z", HookPoint(8, "z")),
        ("blocks.8.mlp.hook_in", HookPoint(8, "mlp_in")),
        ("blocks.8.mlp.hook_post", HookPoint(8, "mlp_post")),
        ("blocks.8.ln2.hook_normalized", HookPoint(8, "mlp_normalized")),
        ("encoder.blocks.3.hook_resid_post", HookPoint(3, "resid_post", "encoder")),
        ("decoder.blocks.3.hook_resid_pre", HookPoint(3, "resid_pre", "decoder")),
        ("layers.5", ModulePath("layers.5")),
        ("h.3", ModulePath("h.3")),
        ("embed_tokens", ModulePath("embed_tokens")),
        ("layers.5.mlp", ModulePath("layers.5.mlp")),
        ("layers.5.mlp.input", ModulePath("layers.5.mlp", "input")),
        ("transformer.h.0.mlp.output", ModulePath("transformer.h.0.mlp", "output")),
        ("decoder.layers.7.fc1", ModulePath("decoder.layers.7.fc1")),
        (
            "model.language_model.layers.10.output",
            ModulePath("model.language_model.layers.10", "output"),
        ),
        (
            "model.layers.5.post_feedforward_layernorm.output",
            ModulePath("model.layers.5.post_feedforward_layernorm", "output"),
        ),
        (
            "model.layers.5.self_attn.o_proj.input",
            ModulePath("model.layers.5.self_attn.o_proj", "input"),
        ),
    ],
)
def test_name_is_understood_and_survives_the_round_trip(text: str, expected: HookPoint) -> None:
    hook_point = parse_hook_point(text)
    assert hook_point == expected
    assert type(hook_point) is type(expected)
    assert str(hook_point) == text


def test_every_site_has_a_name_of_its_own() -> None:
    names = {str(HookPoint(2, site)) for site in SITES_IN_BLOCK}
    assert len(names) == len(SITES_IN_BLOCK) == 9
    assert {parse_hook_point(name).site for name in names} == set(SITES_IN_BLOCK)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blocks.8.hook_mlp",
        "blocks.-1.hook_resid_post",
        "blocks.08.hook_resid_post",
        "blocks.8.hook_resid_post ",
        "Blocks.8.hook_resid_post",
        "blocks.8.hook_z",
        "layers.05",
        "layers",
        "layers.5.",
        "layers.5/seed1",
        "model.norm",
        "model.vision_tower.layers.3",
        "vision_tower.encoder.layers.3.mlp",
        "encoder.layers.3",
    ],
)
def test_other_names_are_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(
        HookPointError, match=r"found .*expected blocks\.LAYER\.hook_resid_pre"
    ) as e:
        parse_hook_point(text)
    for form in ("attn.hook_z", "ln2.hook_normalized", "hook_embed", "self_attn.o_proj.input"):
        assert form in str(e.value)


def test_name_that_tools_disagree_about_is_refused_with_both_meanings() -> None:
    expected = r"blocks.7.hook_resid_mid \(before .* blocks.7.mlp.hook_in \(after"
    with pytest.raises(HookPointError, match=expected):
        parse_hook_point("blocks.7.hook_mlp_in")


def test_module_path_says_its_layer_and_side() -> None:
    path = ModulePath("model.layers.12.mlp.down_proj")
    assert (path.layer, path.blocks, path.submodule) == (12, "layers", "mlp.down_proj")
    assert (path.io, path.side) == (None, "output")
    assert ModulePath("h.3", "input").side == "input"
    embedding = ModulePath("transformer.wte")
    assert (embedding.layer, embedding.blocks, embedding.submodule) == (0, "", "wte")


def test_module_path_is_a_key() -> None:
    assert ModulePath("h.3") == ModulePath("h.3") != ModulePath("h.3", "output")
    assert len({ModulePath("h.3"), ModulePath("h.3"), HookPoint(3, "resid_post")}) == 2


@pytest.mark.parametrize("path", ["layers.3.output", "vision.layers.3", ""])
def test_module_path_that_cannot_be_written_back_is_refused(path: str) -> None:
    with pytest.raises(HookPointError, match="module path: found"):
        ModulePath(path)


def test_impossible_hook_points_are_refused() -> None:
    with pytest.raises(HookPointError, match="expected a ModulePath"):
        HookPoint(3, "module")
    with pytest.raises(HookPointError, match="hook_embed: found layer 3, expected 0"):
        HookPoint(3, "embed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hook_embed", 0),
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.9.hook_resid_pre", 9),
        ("blocks.8.attn.hook_z", 9),
        ("blocks.8.hook_resid_mid", 9),
        ("blocks.8.hook_resid_post", 9),
        ("embed_tokens", 0),
        ("layers.9.input", 9),
        ("layers.8", 9),
        ("layers.8.mlp.input", 9),
    ],
)
def test_layers_needed_reach_the_hook_point(text: str, expected: int) -> None:
    assert n_layers_needed([parse_hook_point(text)]) == expected


def test_layers_needed_reach_the_deepest_of_several() -> None:
    assert n_layers_needed([]) == 0
    assert n_layers_needed([HookPoint(8, "resid_mid"), HookPoint(3, "resid_post")]) == 9
