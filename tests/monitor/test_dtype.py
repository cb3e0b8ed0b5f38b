"""`--dtype auto`: bfloat16 where the hardware multiplies in it and the SAEs still fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from monitor import engine
from monitor.engine import placement
from monitor.errors import SettingsError
from monitor.fidelity import load_fitting
from monitor.local import load_local
from monitor.served import Served
from sae_core.language_model import products
from sae_core.language_model.products import bfloat16_is_faster


@pytest.fixture(autouse=True)
def with_fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "bfloat16_is_faster", lambda device: True)


def load(bundle: Path, dtype: str, *, check_fit: bool = True) -> Served:
    return load_local(
        bundle, model=None, cache=bundle.parent, device="cpu", dtype=dtype, check_fit=check_fit
    )


@pytest.fixture
def strict(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose bands are too narrow for bfloat16."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "strict"))
    path = bundle / "fidelity" / "l1.json"
    bands = json.loads(path.read_text())
    for name in ("fvu", "fvu_median"):
        bands[f"{name}_min"], bands[f"{name}_max"] = (bands[name] * (1 + d) for d in (-1e-5, 1e-5))
    path.write_text(json.dumps(bands))
    return bundle


def test_auto_takes_bfloat16_where_the_saes_fit(tiny_bundle: Path) -> None:
    served = load(tiny_bundle, "auto")
    assert served.provenance.dtype == "bfloat16"
    assert served.scorer.language_model.config.dtype is torch.bfloat16


def test_auto_falls_back_to_float32_where_they_do_not(strict: Path) -> None:
    served = load(strict, "auto", check_fit=True)
    assert served.provenance.dtype == "float32"
    assert load(strict, "auto", check_fit=False).provenance.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "calibrated": False}, "bfloat16"),
        ({"dtype": "float32", "backend": "torch-cuda"}, "bfloat16"),
        ({"dtype": "float32", "model_digest": "0" * 64}, "bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_auto_keeps_to_the_type_that_thresholds_were_calibrated_in(
    tiny_bundle: Path, tmp_path: Path, claim: dict[str, object], expected: str
) -> None:
    digest = load(tiny_bundle, "float32").provenance.model_digest
    artefact = {"model_digest": digest, "backend": "torch-cpu", "calibrated": True, **claim}
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "calibration").mkdir()
    (bundle / "calibration" / "a.json").write_text(json.dumps(artefact))
    spec = yaml.safe_load((bundle / "bundle.yaml").read_text())
    spec["clusters"][0]["calibration"] = "calibration/a.json"
    (bundle / "bundle.yaml").write_text(yaml.safe_dump(spec))
    assert load(bundle, "auto").provenance.dtype == expected


def test_what_does_not_fit_is_closed_before_the_next_is_loaded(
    strict: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    def loading(dtype: str) -> Served:
        events.append(f"load {dtype}")
        return load(strict, dtype, check_fit=False)

    def closing(served: Served) -> None:
        events.append(f"close {served.provenance.dtype}")

    monkeypatch.setattr(Served, "close", closing)
    load_fitting(loading, ("bfloat16", "float32"))
    assert events == ["load bfloat16", "close bfloat16", "load float32"]


def test_auto_is_float32_without_the_hardware(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "bfloat16_is_faster", lambda device: False)
    assert load(tiny_bundle, "auto").provenance.dtype == "float32"


def test_what_is_asked_for_is_taken() -> None:
    assert placement("cpu", "float32") == ("cpu", ("float32",))
    assert placement("cpu", "bfloat16") == ("cpu", ("bfloat16",))
    assert placement("cpu", "auto") == ("cpu", ("bfloat16", "float32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="device: found no usable CUDA device"):
        placement("cuda", "auto")


@pytest.mark.parametrize(("float32", "bfloat16", "faster"), [(2.0, 1.0, True), (1.0, 1.0, False)])
def test_the_processor_is_timed(
    float32: float, bfloat16: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(products, "_timed", lambda x, weight: seconds[x.dtype])
    assert bfloat16_is_faster(torch.device("cpu")) == faster
