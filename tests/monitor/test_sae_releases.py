from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from monitor import sae_releases
from monitor.errors import SAEStoreError
from monitor.sae_releases import PublishedSAE, find_published, hints_of

CENTRED = {
    "gpt2-small-res-jb": "blocks.8.hook_resid_pre",
    "gpt2-small-res-jb-feature-splitting": "blocks.8.hook_resid_pre_6144",
    "gpt2-small-mlp-tm": "blocks.8.hook_mlp_out",
}


def every_release() -> list[str]:
    return sorted({name for family in sae_releases._table().families for name in family.choices})


@pytest.mark.parametrize(
    ("release", "sae_id", "repo", "path", "model", "hook_point"),
    [
        (
            "gemma-scope-2b-pt-res-canonical",
            "layer_12/width_16k/canonical",
            "google/gemma-scope-2b-pt-res",
            "layer_12/width_16k/average_l0_82",
            "google/gemma-2-2b",
            "blocks.12.hook_resid_post",
        ),
        (
            "gemma-scope-9b-it-res-canonical",
            "layer_20/width_131k/canonical",
            "google/gemma-scope-9b-it-res",
            "layer_20/width_131k/average_l0_81",
            "google/gemma-2-9b-it",
            "blocks.20.hook_resid_post",
        ),
        (
            "gemma-scope-9b-pt-att",
            "layer_3/width_16k/average_l0_102",
            "google/gemma-scope-9b-pt-att",
            "layer_3/width_16k/average_l0_102",
            "google/gemma-2-9b",
            "blocks.3.attn.hook_z",
        ),
        (
            "gemma-scope-2b-pt-res",
            "embedding/width_4k/average_l0_6",
            "google/gemma-scope-2b-pt-res",
            "embedding/width_4k/average_l0_6",
            "google/gemma-2-2b",
            "hook_embed",
        ),
        (
            "gemma-scope-2-270m-pt-res",
            "layer_12_width_16k_l0_big",
            "google/gemma-scope-2-270m-pt",
            "resid_post/layer_12_width_16k_l0_big",
            "google/gemma-3-270m",
            "blocks.12.hook_resid_post",
        ),
        (
            "gemma-scope-2-4b-it-mlp-all",
            "layer_0_width_16k_l0_small",
            "google/gemma-scope-2-4b-it",
            "mlp_out_all/layer_0_width_16k_l0_small",
            "google/gemma-3-4b-it",
            "blocks.0.hook_mlp_out",
        ),
        (
            "gemma-scope-2-1b-pt-transcoders",
            "transcoder/layer_13_width_16k_l0_big_affine",
            "google/gemma-scope-2-1b-pt",
            "transcoder/layer_13_width_16k_l0_big_affine",
            "google/gemma-3-1b-pt",
            None,
        ),
        (
            "llama_scope_lxm_32x",
            "l15m_32x",
            "fnlp/Llama3_1-8B-Base-LXM-32x",
            "Llama3_1-8B-Base-L15M-32x",
            "meta-llama/Llama-3.1-8B",
            "blocks.15.hook_mlp_out",
        ),
        (
            "gpt2-small-resid-post-v5-32k",
            "blocks.0.hook_resid_post",
            "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs",
            "v5_32k_layer_0.pt",
            "openai-community/gpt2",
            "blocks.0.hook_resid_post",
        ),
        (
            "pythia-70m-deduped-res-sm",
            "blocks.0.hook_resid_pre",
            "ctigges/pythia-70m-deduped__res-sm_processed",
            "e-res-sm",
            "EleutherAI/pythia-70m-deduped",
            "blocks.0.hook_resid_pre",
        ),
        (
            "goodfire-llama-3.1-8b-instruct",
            "layer_19",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
            "Llama-3.1-8B-Instruct-SAE-l19.pth",
            "meta-llama/Llama-3.1-8B-Instruct",
            "blocks.19.hook_resid_post",
        ),
        (
            "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109",
            "blocks.5.hook_resid_post__trainer_5_step_9765",
            "canrager/saebench_gemma-2-2b_width-2pow12_date-1109",
            "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_5_checkpoints/"
            "trainer_5_step_9765",
            "google/gemma-2-2b",
            "blocks.5.hook_resid_post",
        ),
    ],
)
def test_release_is_where_its_publisher_put_it(
    release: str, sae_id: str, repo: str, path: str, model: str, hook_point: str | None
) -> None:
    assert find_published(release, sae_id) == PublishedSAE(
        repo=repo, path=path, model=model, hook_point=hook_point, hints={}
    )


def test_exactly_three_releases_are_centred() -> None:
    for release, sae_id in CENTRED.items():
        assert find_published(release, sae_id).hints["center"] is True
    centred = [repo for repo, hints in sae_releases._table().hints.items() if "center" in hints]
    assert len(centred) == len(CENTRED)


def test_scale_of_inputs_is_the_one_of_that_sae() -> None:
    first = find_published("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out").hints
    last = find_published("gpt2-small-mlp-tm", "blocks.11.hook_mlp_out").hints
    assert first["norm_scaling_factor"] == pytest.approx(1.0493, abs=1e-4)
    assert last["norm_scaling_factor"] == pytest.approx(0.2852, abs=1e-4)
    twelfth = find_published("gemma-2b-res-jb", "blocks.12.hook_resid_post").hints
    assert twelfth == {"norm_scaling_factor": pytest.approx(0.2138, abs=1e-4)}
    assert find_published("gemma-2b-res-jb", "blocks.10.hook_resid_post").hints == {}


def test_k_of_qwen_scope_is_read_from_the_repository_name() -> None:
    found = find_published("qwen-scope-3-30b-a3b-base-w128k-l100", "layer47")
    assert found.repo == "Qwen/SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100"
    assert found.hints == {"k": 100}
    assert hints_of("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50", "layer3.sae.pt") == {"k": 50}
    assert hints_of("Qwen/Qwen3-8B", "layer3.sae.pt") == {}


@pytest.mark.parametrize(
    ("release", "sae_id", "message"),
    [
        ("gemma-scope-2b-pt-ress", "layer_1", "saelens.release: found 'gemma-scope-2b-pt-ress'.*"
         "near: .*gemma-scope-2b-pt-res"),
        ("gemma-scope-2b-pt-res", "layer_1/width_16k", "expected an SAE of gemma-scope-2b-pt-res: "
         "layer_LAYER/width_WIDTH/average_l0_N; embedding/"),
        ("gemma-scope-2b-pt-res-canonical", "layer_99/width_16k/canonical", "saelens.id: found"),
        ("gpt2-small-hook-z-kk", "blocks.1.hook_zz", "near: .*blocks.1.hook_z"),
        ("gpt2-small-res-jb", "blocks.x.hook_resid_pre", "blocks.LAYER.hook_resid_pre; near: "),
        ("EleutherAI/sae-pythia", "layers.3", "hub: {repo: EleutherAI/sae-pythia, path: layers.3}"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_what_comes_near(
    release: str, sae_id: str, message: str
) -> None:
    with pytest.raises(SAEStoreError, match=message):
        find_published(release, sae_id)


def test_no_pattern_is_left_unfilled() -> None:
    for family in sae_releases._table().families:
        for release in family.choices:
            for sae_id in [*family.ids, "layer_0_width_16k_l0_big"]:
                found = family.find(release, sae_id, {})
                for text in [] if found is None else [found.repo, found.path, found.model]:
                    assert text is not None and "{" not in text, release


@pytest.fixture
def installed_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sae_lens that must not be imported, with a registry of its own."""
    package = tmp_path / "sae_lens"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    registry = {
        "new-release": {
            "repo_id": "someone/new",
            "model": "gpt2-small",
            "conversion_func": None,
            "config_overrides": {
                "model_from_pretrained_kwargs": {"center_writing_weights": True},
                "normalize_activations": "constant_norm_rescale",
            },
            "saes": [
                {
                    "id": "blocks.3.hook_resid_pre_768",
                    "path": "three",
                    "norm_scaling_factor": 0.5,
                }
            ],
        },
        "new-scope": {
            "repo_id": "someone/scope",
            "model": "m",
            "conversion_func": "llama_scope",
            "saes": [{"id": "l0r", "path": 0, "norm_scaling_factor": 7.0}],
        },
        "gpt2-small-res-jb": {
            "repo_id": "someone/else",
            "model": "m",
            "saes": [{"id": "blocks.8.hook_resid_pre", "path": "elsewhere"}],
        },
    }
    (package / "pretrained_saes.yaml").write_text(yaml.safe_dump(registry))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    sae_releases._installed_registry.cache_clear()
    yield package
    sae_releases._installed_registry.cache_clear()


def test_installed_registry_is_read_for_what_the_table_lacks(installed_registry: Path) -> None:
    assert find_published("new-release", "blocks.3.hook_resid_pre_768") == PublishedSAE(
        repo="someone/new",
        path="three",
        model="gpt2-small",
        hook_point="blocks.3.hook_resid_pre",
        hints={
            "norm_scaling_factor": 0.5,
            "center": True,
            "normalize_activations": "constant_norm_rescale",
        },
    )
    assert "sae_lens" not in sys.modules


def test_scale_that_the_files_hold_is_not_given_twice(installed_registry: Path) -> None:
    found = find_published("new-scope", "l0r")
    assert (found.path, found.hints) == ("0", {})


def test_table_wins_over_the_installed_registry(installed_registry: Path) -> None:
    found = find_published("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert found.repo == "jbloom/GPT2-Small-SAEs-Reformatted"


def test_unknown_id_of_an_installed_release_is_refused(installed_registry: Path) -> None:
    with pytest.raises(SAEStoreError, match="near: blocks.3.hook_resid_pre_768"):
        find_published("new-release", "blocks.3.hook_resid_pre")


def test_damaged_registry_is_named(installed_registry: Path) -> None:
    (installed_registry / "pretrained_saes.yaml").write_text("{")
    with pytest.raises(SAEStoreError, match="pretrained_saes.yaml cannot be read"):
        find_published("newer-release", "x")


def test_table_agrees_with_a_real_sae_lens() -> None:
    """Every SAE that both know, from the registry's side: place, and what scoring needs."""
    if importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae-lens is not installed")
    registry = sae_releases._installed_registry()
    n_compared = 0
    for release in set(every_release()) & registry.keys():
        entry = registry[release]
        kwargs = (entry.get("config_overrides") or {}).get("model_from_pretrained_kwargs") or {}
        for sae in entry["saes"]:
            found = find_published(release, sae["id"])
            assert (found.repo, found.path) == (entry["repo_id"], str(sae["path"]))
            assert ("center" in found.hints) == bool(kwargs.get("center_writing_weights"))
            if entry.get("conversion_func") not in sae_releases.SCALE_IN_FILES:
                scale = found.hints.get("norm_scaling_factor")
                assert scale == sae.get("norm_scaling_factor")
            n_compared += 1
    assert n_compared > 10_000
