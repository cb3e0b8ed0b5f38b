"""What ends a model that is split over processes: said clearly, waited for by nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sae_core.errors import ModelLoadError, RankError
from sae_core.hook_points import HookPoint
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.ranks import load_tensor_parallel
from sae_core.testing.models import tiny_model_folder

END = HookPoint(2, "resid_post")


@contextmanager
def split(folder: Path, *, timeout_seconds: float = 60.0) -> Iterator[LanguageModel]:
    loaded = load_tensor_parallel(folder, [END], n_ranks=2, timeout_seconds=timeout_seconds)
    with closing(loaded) as model:
        yield model
    assert not multiprocessing.active_children()
    assert not dist.is_initialized()


def test_a_killed_rank_is_named_and_nothing_waits(folder_of: Callable[[str], Path]) -> None:
    with split(folder_of("llama")) as model:
        stream = model.open_stream()
        model.step([Segment(stream, [1, 2, 3])])
        assert model.failure == ""
        [other] = multiprocessing.active_children()
        other.kill()
        with pytest.raises(RankError, match="rank 1 of 2 ended with exit code -9"):
            model.step([Segment(stream, [4])])
        assert stream.length == 3
        assert model.failure == "rank 1 of 2 ended with exit code -9"
        with pytest.raises(RankError, match="rank 1 of 2 ended with exit code -9"):
            model.step([Segment(stream, [4])])


def test_a_rank_that_does_not_answer_ends_the_group(folder_of: Callable[[str], Path]) -> None:
    with split(folder_of("llama"), timeout_seconds=5.0) as model:
        [other] = multiprocessing.active_children()
        assert other.pid is not None
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(RankError, match="rank 0 failed"):
            model.step([Segment(model.open_stream(), [1, 2, 3])])
        assert model.failure.startswith("rank 0 failed")


def test_a_step_that_fails_here_is_not_taken_for_one_that_succeeded(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with split(folder_of("llama")) as model:
        stream = model.open_stream()

        def out_of_memory(*_: object) -> None:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(model, "run", out_of_memory)
        with pytest.raises(RankError, match=r"rank 0 failed \(no room\)"):
            model.step([Segment(stream, [1])])
        monkeypatch.undo()
        with pytest.raises(RankError, match=r"rank 0 failed \(no room\)"):
            model.step([Segment(stream, [1])])


def test_a_folder_that_lacks_a_tensor_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="missing tensor model.layers.1.mlp.up_proj.weight"):
        load_tensor_parallel(folder, [END], n_ranks=2)
    assert not multiprocessing.active_children()
    assert not dist.is_initialized()
