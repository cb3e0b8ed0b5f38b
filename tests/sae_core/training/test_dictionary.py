from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sae_core.sae import SAE
from sae_core.sae_config import SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.training.dictionary import Dictionary, PlacedSAE, ReadTexts, some_texts
from sae_core.training.examples import ResidualSet, cached_streams
from sae_core.training.token_features import text_means

STARTS = np.array([0, 3, 3, 8, 12])


def _sae(d_in: int, d_sae: int, seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    weights = SAEWeights(
        W_enc=torch.randn(d_in, d_sae, generator=generator),
        b_enc=torch.randn(d_sae, generator=generator),
        W_dec=torch.randn(d_sae, d_in, generator=generator),
        b_dec=torch.zeros(d_in),
    )
    return SAE(SAEConfig(architecture="relu", d_in=d_in, d_sae=d_sae), weights)


def _streams() -> dict[str, ResidualSet]:
    rng = np.random.default_rng(0)
    ids = np.arange(STARTS[-1], dtype=np.int32)
    return {
        "early": ResidualSet(rng.normal(size=(len(ids), 4)).astype(np.float32), ids, STARTS),
        "late": ResidualSet(rng.normal(size=(len(ids), 6)).astype(np.float32), ids, STARTS),
    }


def _dictionary() -> Dictionary:
    return Dictionary(
        [PlacedSAE("a", "late", _sae(6, 5, 1)), PlacedSAE("b", "early", _sae(4, 7, 2))]
    )


def test_latents_are_counted_through() -> None:
    names = [_dictionary().name_of(latent) for latent in range(12)]
    assert names == [("a", i) for i in range(5)] + [("b", i) for i in range(7)]


def test_each_sae_reads_its_own_stream() -> None:
    dictionary, streams = _dictionary(), _streams()
    (a, b) = (one.sae for one in dictionary.saes)
    late = a.encode(torch.from_numpy(streams["late"].resid)).numpy()
    early = b.encode(torch.from_numpy(streams["early"].resid)).numpy()
    whole = np.concatenate([late, early], axis=1)
    assert (whole > 0).any(axis=0).sum() > 8
    chosen = [11, 2, 5, 4]
    np.testing.assert_array_equal(dictionary.acts_of(streams, chosen), whole[:, chosen])
    acts = dictionary.text_acts(streams)
    np.testing.assert_allclose(acts.mean, text_means(whole, STARTS), rtol=1e-5)
    assert acts.clipped.shape == acts.fires.shape == (4, 12)
    assert acts.scale.shape == (12,)


def test_some_texts_are_the_same_texts_at_every_place() -> None:
    read = ReadTexts.of(_streams(), _dictionary(), "early")
    assert read.means.shape == (4, 4)
    part = some_texts(read.streams, np.array([2, 0]))
    for name, stream in part.items():
        whole = read.streams[name]
        np.testing.assert_array_equal(stream.resid[:5], whole.resid[whole.rows_of(2)])
        np.testing.assert_array_equal(stream.resid[5:], whole.resid[whole.rows_of(0)])


def test_streams_are_computed_in_one_pass_and_once(tmp_path: Path) -> None:
    class Letters:
        def encode(self, text: str, add_bos: bool = True) -> list[int]:
            return [0, *map(ord, text)]

    class Forward:
        def __init__(self, *names: str) -> None:
            self.widths = {name: index + 1 for index, name in enumerate(names)}
            self.n_calls = 0

        def __call__(self, contexts):  # type: ignore[no-untyped-def]
            self.n_calls += 1
            ids = torch.tensor([float(i) for context in contexts for i in context[1:]])
            return {name: ids[:, None].expand(-1, n) + n for name, n in self.widths.items()}

    forward = Forward("x", "y")
    for _ in range(2):
        found = cached_streams(["ab", "", "c"], Letters(), forward, tmp_path, identity="m")
        assert found["x"].resid.tolist() == [[98.0], [99.0], [100.0]]
        assert found["y"].resid.tolist() == [[99.0] * 2, [100.0] * 2, [101.0] * 2]
        assert found["y"].starts.tolist() == [0, 2, 2, 3]
    assert forward.n_calls == 1
    other = Forward("y")
    cached_streams(["ab", "", "c"], Letters(), other, tmp_path, identity="m")
    assert other.n_calls == 1
