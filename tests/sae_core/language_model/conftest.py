"""Model folders of every family, made once, and the slow oracle that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_core.hook_points import HookPoint, Site
from sae_core.testing.models import N_LAYERS, tiny_model_folder

SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post")
Oracle = Callable[[Sequence[int]], dict[HookPoint, Tensor]]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_model_folder(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def all_hook_points() -> Callable[[str], list[HookPoint]]:
    """Every hook point that a tiny model of the family has."""

    def hook_points(family: str) -> list[HookPoint]:
        return [
            HookPoint(layer, site)
            for layer in range(N_LAYERS)
            for site in SITES
            if not (family == "gpt_neox" and site == "resid_mid")
        ]

    return hook_points


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[Path], Oracle]:
    """The whole model as transformers runs it: dense eager attention, no cache, one sequence.

    resid_pre and resid_post come from output_hidden_states; what it does not give, resid_mid and
    the stream before the final norm, is read off the block's own modules by name.
    """

    def oracle(folder: Path) -> Oracle:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        model_type = model.config.model_type
        base = model.base_model
        blocks = base.h if model_type == "gpt2" else base.layers
        mid = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}
        mid["gemma3_text"] = mid["gemma2"]
        mid_name = mid.get(model_type, "post_attention_layernorm")

        def resid(token_ids: Sequence[int]) -> dict[HookPoint, Tensor]:
            found: dict[HookPoint, Tensor] = {}
            handles = []
            for layer, block in enumerate(blocks):

                def keep_mid(_m: object, args: tuple[Tensor], layer: int = layer) -> None:
                    found[HookPoint(layer, "resid_mid")] = args[0][0].clone()

                handles.append(getattr(block, mid_name).register_forward_pre_hook(keep_mid))

            def keep_last(_m: object, _args: object, output: Tensor | tuple[Tensor]) -> None:
                last = output[0] if isinstance(output, tuple) else output
                found[HookPoint(len(blocks) - 1, "resid_post")] = last[0].clone()

            handles.append(blocks[-1].register_forward_hook(keep_last))
            with torch.no_grad():
                output = model(
                    torch.tensor([list(token_ids)]), output_hidden_states=True, use_cache=False
                )
            for handle in handles:
                handle.remove()
            for layer in range(len(blocks)):
                found[HookPoint(layer, "resid_pre")] = output.hidden_states[layer][0]
                if layer:
                    found[HookPoint(layer - 1, "resid_post")] = output.hidden_states[layer][0]
            return found

        return resid

    return oracle
