"""OpenAI's SAEs of GPT-2 small: one `.pt` file per layer.

With mean and unbiased standard deviation of each token, z = (x - mean) / (std + 1e-5):

    h = (z - pre_bias) @ We + latent_bias
    a = the k largest of h, rectified or as they are
    y = (a @ Wd + pre_bias) std + mean

A file of another gate than TopK is ReLU, without any normalisation. Nothing in the file says where
it was trained; the published path does: `gpt2-small/<location>_v5_32k/autoencoders/<layer>.pt`.
Source: openai/sparse_autoencoder model.py and paths.py; Gao et al. 2024, arXiv:2406.04093.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_core.formats.files import Cfg, load_torch, torch_tensors
from sae_core.formats.single_file import names_in, torch_file
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

TENSORS = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
LOCATIONS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}
_LOCATION = re.compile(rf"({'|'.join(LOCATIONS)})(_v\d\w*)?")


def is_openai(path: Path) -> bool:
    """Whether it is a torch file with the two biases that only this format names so."""
    return {"pre_bias", "latent_bias"} <= names_in(path)


def read_openai(path: Path) -> SAE:
    """The SAE in the file, or in the one file of the folder."""
    file = torch_file(path)
    content = load_torch(file)
    tensors = torch_tensors(file, content)
    tensors.only(TENSORS, optional=STATISTICS)
    d_sae, d_in = tensors.shape("encoder.weight", 2)
    says = Cfg(file, content)
    stray = {"activation.k", "activation_state_dict"} & content.keys()
    if "activation" not in content and stray:
        raise says.error("activation", f"TopK, as the file has {min(stray)}")
    is_topk = "activation" in content and says.one_of("activation", ("TopK", "ReLU")) == "TopK"
    k, signed = None, False
    if is_topk:
        state = says.mapping("activation_state_dict")
        k = state.count("k")
        signed = state.one_of("postact_fn", ("ReLU", "Identity")) == "Identity"
    config = SAEConfig(
        architecture="topk" if is_topk else "relu",
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        signed=signed,
        normalize="layer_norm" if is_topk else "none",
        apply_b_dec_to_input=True,
    )
    named = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["pre_bias"],
    }
    card = SAECard(
        format="OpenAI",
        source=str(file),
        hook_point=_hook_point(file),
        model_name="gpt2" if "gpt2-small" in file.absolute().parts else None,
    )
    return SAE(config, SAEStore(config, named), card)


def _hook_point(file: Path) -> str | None:
    if not re.fullmatch(r"\d+", file.stem):
        return None
    for part in reversed(file.absolute().parts[:-1]):
        if found := _LOCATION.fullmatch(part):
            return f"blocks.{int(file.stem)}.{LOCATIONS[found[1]]}"
    return None
