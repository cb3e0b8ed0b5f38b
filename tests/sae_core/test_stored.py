"""Tensors that lie in files: whole or in part they equal NumPy's, in little memory."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core import stored
from sae_core.errors import SAEFormatError
from sae_core.formats.files import open_npz, open_safetensors
from sae_core.stored import NUMPY_DTYPES, InMemory, Mapped, Stored, Streamed

DTYPES = tuple(NUMPY_DTYPES)
SHAPES = ((7, 5), (1, 9), (6,), (0, 4), (4, 0), (0,))
OFFSET = 13
"""Where tensors begin in the test's files: on no boundary, as nothing promises one."""


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def mapped(tensor: torch.Tensor, folder: Path) -> Stored:
    path = folder / "numbers"
    path.write_bytes(b"\xff" * OFFSET + bytes_of(tensor) + b"\xff" * 3)
    shape = tuple(tensor.shape)
    return Mapped(path=path, name="it", dtype=tensor.dtype, shape=shape, offset=OFFSET)


def streamed(tensor: torch.Tensor, folder: Path) -> Stored:
    data, shape = bytes_of(tensor), tuple(tensor.shape)
    return Streamed(name="it", dtype=tensor.dtype, shape=shape, open=lambda: io.BytesIO(data))


def other_way(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(tuple(reversed(range(tensor.ndim)))).contiguous()


def changed(tensor: torch.Tensor, folder: Path) -> Stored:
    return mapped(tensor, folder).changed(lambda found: found + 1).changed(lambda found: found - 1)


KINDS: dict[str, Callable[[torch.Tensor, Path], Stored]] = {
    "mapped": mapped,
    "streamed": streamed,
    "in memory": lambda tensor, folder: InMemory(tensor),
    "transposed": lambda tensor, folder: mapped(other_way(tensor), folder).T,
    "transposed stream": lambda tensor, folder: streamed(other_way(tensor), folder).T,
    "changed": changed,
}


@pytest.mark.parametrize("window_bytes", [1, 48, 2**26])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_in_part_it_is_numpys(
    kind: str,
    dtype: torch.dtype,
    window_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "WINDOW_BYTES", window_bytes)
    for shape in SHAPES:
        tensor = numbers(shape, dtype)
        expected = tensor.double().numpy().astype(np.float32)
        it = KINDS[kind](tensor, tmp_path)
        tolerance = 1e-6 if kind == "changed" else 0.0
        assert it.shape == shape
        whole = it.read()
        assert (whole.dtype, tuple(whole.shape)) == (torch.float32, shape)
        np.testing.assert_allclose(whole.numpy(), expected, rtol=0, atol=tolerance)
        for axis, length in enumerate(shape):
            some = [length - 1, 0, length // 2, 0, length - 1] if length else []
            for ids in (some, some[:1], list(range(length)), []):
                wanted = np.array(ids, dtype=np.int64)
                taken = it.take(wanted, axis)
                part = np.take(expected, wanted, axis=axis)
                assert (taken.dtype, tuple(taken.shape)) == (torch.float32, part.shape)
                np.testing.assert_allclose(taken.numpy(), part, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_one_number_without_axes(kind: str, tmp_path: Path) -> None:
    it = KINDS[kind](torch.tensor(2.5), tmp_path)
    assert float(it.T.read()) == 2.5
    assert (it.shape, it.read().shape, float(it.read())) == ((), (), 2.5)


def test_what_was_read_is_no_view_of_the_source(tmp_path: Path) -> None:
    tensor = torch.ones(3, 2)
    for it in (InMemory(tensor), InMemory(tensor).T, mapped(tensor, tmp_path)):
        it.read().zero_()
        it.take(np.array([0, 1]), 1).zero_()
        assert torch.equal(it.read(), torch.ones(it.shape))


@pytest.mark.parametrize("window_bytes", [1, 2**26])
@pytest.mark.parametrize("n_missing", [1, 4, 60, 139])
def test_file_cut_short_is_an_error_whatever_is_asked_for(
    n_missing: int, window_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "WINDOW_BYTES", window_bytes)
    tensor = numbers((7, 5), torch.float32)
    it = mapped(tensor, tmp_path)
    path = tmp_path / "numbers"
    path.write_bytes(path.read_bytes()[: OFFSET + 7 * 5 * 4 - n_missing])
    asked: tuple[Callable[[], object], ...] = (
        it.read,
        lambda: it.take(np.array([6, 0]), 0),
        lambda: it.take(np.array([4]), 1),
    )
    for ask in asked:
        with pytest.raises(SAEFormatError, match="it: cannot be read: mmap"):
            ask()
    path.unlink()
    with pytest.raises(SAEFormatError, match="it: cannot be read: .*No such file"):
        it.read()


def test_stream_cut_short_is_an_error() -> None:
    data = bytes_of(numbers((7, 5), torch.float32))[:-1]
    it = Streamed(name="it", dtype=torch.float32, shape=(7, 5), open=lambda: io.BytesIO(data))
    with pytest.raises(SAEFormatError, match=r"it: ends early, expected shape \(7, 5\)"):
        it.read()
    with pytest.raises(SAEFormatError, match="it: ends early"):
        it.take(np.array([0]), 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_what_was_asked_for_has_to_be_finite(bad: float, tmp_path: Path) -> None:
    tensor = numbers((7, 5), torch.float32)
    tensor[2, 3] = bad
    for it in (mapped(tensor, tmp_path), streamed(tensor, tmp_path), InMemory(tensor)):
        it.take(np.array([0, 1, 2, 4]), 1)
        for ask in (it.T.read, it.read):
            with pytest.raises(SAEFormatError, match="found 1 numbers not finite"):
                ask()
        with pytest.raises(SAEFormatError, match="found 1 numbers not finite"):
            it.take(np.array([2]), 0)


def test_a_number_too_large_for_float32_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(SAEFormatError, match="found 1 numbers not finite"):
        mapped(torch.tensor([1.0, 1e300], dtype=torch.float64), tmp_path).read()


def test_a_change_may_bring_back_what_was_not_finite() -> None:
    logarithms = InMemory(torch.tensor([0.0, 2.0]).log())
    assert torch.equal(logarithms.changed(torch.exp).read(), torch.tensor([0.0, 2.0]))
    with pytest.raises(SAEFormatError, match="found 1 numbers not finite"):
        InMemory(torch.tensor([torch.nan, 0.0])).changed(torch.exp).read()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_npz_in_either_order_stored_or_compressed(
    save: Callable[..., None], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "WINDOW_BYTES", 48)
    C = np.random.default_rng(0).normal(size=(7, 5)).astype(dtype)
    arrays = {"C": C, "F": np.asfortranarray(C), "flat": C[0], "none": C[:0], "one": C[0, 0]}
    save(tmp_path / "a.npz", **arrays)
    tensors = open_npz(tmp_path / "a.npz")
    assert set(tensors.by_name) == set(arrays)
    for name, array in arrays.items():
        it = tensors[name]
        assert it.shape == array.shape
        assert np.array_equal(it.read().numpy(), array.astype(np.float32))
        for axis, length in enumerate(array.shape):
            ids = np.array([length - 1, 0, 0] if length else [], dtype=np.int64)
            part = np.take(array, ids, axis).astype(np.float32)
            assert np.array_equal(it.take(ids, axis).numpy(), part)


def test_damaged_npz_is_an_error_wherever_it_is_damaged(tmp_path: Path) -> None:
    """Every other byte is flipped in turn; what is read is the array, or refused by name."""
    path = tmp_path / "a.npz"
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    np.savez_compressed(path, a=array)
    data = path.read_bytes()
    n_refused = 0
    for place in range(0, len(data), 2):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            found = open_npz(path)["a"].read()
        except SAEFormatError as error:
            assert str(path) in str(error)
            n_refused += 1
        else:
            assert np.array_equal(found.numpy(), array)
    assert n_refused > len(data) // 4


def test_damaged_safetensors_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = b'{"W":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    path.write_bytes(data)
    assert torch.equal(open_safetensors(path)["W"].read(), torch.zeros(2, 2))
    for n_bytes in range(len(data)):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(SAEFormatError, match="cannot be read as safetensors"):
            open_safetensors(path)


TAKE_FROM_A_HUGE_FILE = """
import sys
from pathlib import Path
import numpy as np, torch
from sae_core.stored import WINDOW_BYTES, Mapped

def peak_bytes():  # of this program alone; getrusage counts its parent's too, before the exec
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

path, ids = Path(sys.argv[1]), np.array([16000, 3, 8191])
shape = (path.stat().st_size // 2 // 16384, 16384)
it = Mapped(path=path, name="it", dtype=torch.bfloat16, shape=shape, offset=0)
it.take(ids, 0)
before = peak_bytes()
assert it.take(ids, 1).shape == (shape[0], 3)
print((peak_bytes() - before) / WINDOW_BYTES)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_columns_of_a_file_larger_than_memory_need_a_few_windows(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: it takes no room on disk
    done = subprocess.run(
        [sys.executable, "-c", TAKE_FROM_A_HUGE_FILE, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 4  # of the 48 windows that the file has
