"""Model folders of every family, made once, and the slow oracle that they are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers import AutoModelForCausalLM

from sae_core.hook_points import SITES_IN_BLOCK, HookPoint, Site
from sae_core.testing.models import N_LAYERS, tiny_model_folder

Oracle = Callable[[Sequence[int]], dict[HookPoint, Tensor]]
EXPERT_LAYERS = {"mixtral": (0, 1, 2), "qwen2_moe": (0, 2), "qwen3_moe": (0, 2)}


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
    """Every named hook point that a tiny model of the family has."""

    def hook_points(family: str) -> list[HookPoint]:
        named = [HookPoint(0, "embed")]
        for layer in range(N_LAYERS):
            missing: set[Site] = set()
            if family in ("gpt_neox", "phi"):
                missing.add("resid_mid")
            if layer in EXPERT_LAYERS.get(family, ()):
                missing.add("mlp_post")
            named += [HookPoint(layer, site) for site in SITES_IN_BLOCK if site not in missing]
        return named

    return hook_points


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[Path], Oracle]:
    """Every site of every block, by hand in float64 from the tensors of the checkpoint.

    What enters a block and how much each token attends to each other one is taken from the whole
    model as transformers runs it (`output_hidden_states`, `output_attentions`: dense eager
    attention, no cache, one sequence). No hook is used, and nothing of the code under test.
    """

    @cache
    def oracle(folder: Path) -> Oracle:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        by_hand = ByHand(folder)

        @cache
        def acts_of(token_ids: tuple[int, ...]) -> dict[HookPoint, Tensor]:
            with torch.no_grad():
                output = model(
                    torch.tensor([list(token_ids)]),
                    output_hidden_states=True,
                    output_attentions=True,
                    use_cache=False,
                )
            found = {HookPoint(0, "embed"): by_hand.embed(token_ids).float()}
            for layer, attention in enumerate(output.attentions):
                x = output.hidden_states[layer][0].double()
                for site, value in by_hand.block(layer, x, attention[0].double()).items():
                    found[HookPoint(layer, site)] = value.float()
            return found

        return lambda token_ids: acts_of(tuple(token_ids))

    return oracle


class ByHand:
    """A model's formulas written out, over the tensors of its model.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.family: str = self.config["model_type"]
        self.is_gemma = self.family.startswith("gemma")
        prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(self.family, "model.")
        tensors = load_file(folder / "model.safetensors")
        self.w = {name.removeprefix(prefix): t.double() for name, t in tensors.items()}

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        name = {"gpt2": "wte", "gpt_neox": "embed_in", "opt": "decoder.embed_tokens"}
        table = self.w[name.get(self.family, "embed_tokens") + ".weight"]
        scale = table.shape[1] ** 0.5 if self.is_gemma else 1.0
        return table[list(token_ids)] * scale

    def block(self, layer: int, x: Tensor, attention: Tensor) -> dict[Site, Tensor]:
        """`attention` is head, query, key."""
        path = {"gpt2": "h", "opt": "decoder.layers"}.get(self.family, "layers")
        self.at = f"{path}.{layer}."
        attn_norm, o, mlp_norm = {
            "gpt2": ("ln_1", "attn.c_proj", "ln_2"),
            "gpt_neox": ("input_layernorm", "attention.dense", "post_attention_layernorm"),
            "opt": ("self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm"),
            "phi": ("input_layernorm", "self_attn.dense", "input_layernorm"),
            "gemma2": ("input_layernorm", "self_attn.o_proj", "pre_feedforward_layernorm"),
            "gemma3_text": ("input_layernorm", "self_attn.o_proj", "pre_feedforward_layernorm"),
        }.get(self.family, ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm"))
        is_parallel = self.family == "phi" or self.config.get("use_parallel_residual", False)
        is_post_norm = not self.config.get("do_layer_norm_before", True)

        v = self.values(x if is_post_norm else self.norm(x, attn_norm))  # pos kv_head head_dim
        v = v.repeat_interleave(len(attention) // v.shape[1], dim=1)
        z = torch.einsum("hqk,khd->qhd", attention, v).flatten(1)
        attn_out = self.linear(z, o)
        if self.is_gemma:
            attn_out = self.norm(attn_out, "post_attention_layernorm")
        found: dict[Site, Tensor] = {"resid_pre": x, "z": z, "attn_out": attn_out}

        mid = x + attn_out
        if is_post_norm:
            mlp_in = mid = self.norm(mid, attn_norm)
        else:
            if not is_parallel:
                found["resid_mid"] = mid
            enters = x if is_parallel else mid
            found["mlp_normalized"] = self.without_gain(enters)
            mlp_in = self.norm(enters, mlp_norm)
        mlp_post, mlp_out = self.mlp(mlp_in)
        if self.is_gemma:
            mlp_out = self.norm(mlp_out, "post_feedforward_layernorm")
        if mlp_post is not None:
            found["mlp_post"] = mlp_post
        post = mid + mlp_out
        if is_post_norm:
            post = self.norm(post, mlp_norm)
        return found | {"mlp_in": mlp_in, "mlp_out": mlp_out, "resid_post": post}

    def values(self, x: Tensor) -> Tensor:
        n_heads = self.config.get("num_attention_heads") or self.config["n_head"]
        if self.family == "gpt2":
            return self.linear(x, "attn.c_attn")[:, 2 * x.shape[1] :].unflatten(1, (n_heads, -1))
        if self.family == "gpt_neox":
            fused = self.linear(x, "attention.query_key_value").unflatten(1, (n_heads, 3, -1))
            return fused[:, :, 2]
        n_kv_heads = self.config.get("num_key_value_heads") or n_heads
        if self.family == "phi3":
            fused = self.linear(x, "self_attn.qkv_proj").unflatten(
                1, (n_heads + 2 * n_kv_heads, -1)
            )
            return fused[:, -n_kv_heads:]
        return self.linear(x, "self_attn.v_proj").unflatten(1, (n_kv_heads, -1))

    def mlp(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Neurons, where there is one set of them, and what they write."""
        if self.family == "gpt2":
            post = gelu(self.linear(x, "mlp.c_fc"), approximate="tanh")
            return post, self.linear(post, "mlp.c_proj")
        if self.family == "gpt_neox":
            post = gelu(self.linear(x, "mlp.dense_h_to_4h"))
            return post, self.linear(post, "mlp.dense_4h_to_h")
        if self.family == "opt":
            post = self.linear(x, "fc1").relu()
            return post, self.linear(post, "fc2")
        if self.family == "phi":
            post = gelu(self.linear(x, "mlp.fc1"), approximate="tanh")
            return post, self.linear(post, "mlp.fc2")
        if self.family == "phi3":
            gate, up = self.linear(x, "mlp.gate_up_proj").chunk(2, dim=1)
            return silu(gate) * up, self.linear(silu(gate) * up, "mlp.down_proj")
        experts = "block_sparse_moe" if self.family == "mixtral" else "mlp"
        if f"{self.at}{experts}.gate.weight" in self.w:
            return None, self.mixture(x, experts)
        return self.gated(x, "mlp", ("gate_proj", "up_proj", "down_proj"))

    def gated(self, x: Tensor, path: str, names: tuple[str, str, str]) -> tuple[Tensor, Tensor]:
        gate, up, down = (f"{path}.{name}" for name in names)
        act = self.linear(x, gate)
        act = gelu(act, approximate="tanh") if self.is_gemma else silu(act)
        post = act * self.linear(x, up)
        return post, self.linear(post, down)

    def mixture(self, x: Tensor, path: str) -> Tensor:
        is_mixtral = self.family == "mixtral"
        names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        out = torch.zeros_like(x)
        for t, chances in enumerate(self.linear(x, f"{path}.gate").softmax(dim=-1)):
            best = chances.argsort(descending=True)[: self.config["num_experts_per_tok"]]
            total = chances[best].sum()
            if not is_mixtral and not self.config["norm_topk_prob"]:
                total = torch.ones(())
            for e in best.tolist():
                written = self.gated(x[t], f"{path}.experts.{e}", names)[1]
                out[t] += chances[e] / total * written
        if self.family == "qwen2_moe":
            names = ("gate_proj", "up_proj", "down_proj")
            shared = self.gated(x, f"{path}.shared_expert", names)[1]
            out += self.linear(x, f"{path}.shared_expert_gate").sigmoid() * shared
        return out

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{self.at}{name}.weight"]
        y = x @ (weight if self.family == "gpt2" else weight.T)
        return y + self.w.get(f"{self.at}{name}.bias", 0.0)

    def norm(self, x: Tensor, name: str) -> Tensor:
        gain = self.w[f"{self.at}{name}.weight"] + (1.0 if self.is_gemma else 0.0)
        return self.without_gain(x) * gain + self.w.get(f"{self.at}{name}.bias", 0.0)

    def without_gain(self, x: Tensor) -> Tensor:
        if self.family in ("gpt2", "gpt_neox", "opt", "phi"):
            x = x - x.mean(dim=-1, keepdim=True)
        names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
        eps = next((self.config[name] for name in names if name in self.config), 1e-5)
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
