"""The processes of a model that is split over ranks: rank 0 plans each step, all run it.

Plans go through a pipe to each process, on which an idle rank waits for ever and which tells at
once when the other end is gone; tensors go through torch.distributed, whose waits end. A rank that
dies, fails or does not answer ends the group: its streams cannot be brought in step again.
One group at a time in a process, as torch.distributed has it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from sae_core.errors import ModelLoadError, RankError, SAECoreError
from sae_core.hook_points import HookPoint
from sae_core.language_model.checkpoint import one_line
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.mirrored import (
    Doing,
    Mirror,
    MirroredSpan,
    MirroredStream,
    Script,
    mirrored_spans,
)
from sae_core.language_model.model import LanguageModel
from sae_core.language_model.packed import PackedPlan
from sae_core.language_model.token_streams import KVStream

STEP_TIMEOUT_SECONDS = 60.0
"""How long a rank waits for another one within a step; one of them takes seconds at most."""

END_SECONDS = 5.0
"""What a rank gets to end by itself before it is killed."""


def load_tensor_parallel(
    folder: str | Path,
    hook_points: Iterable[HookPoint],
    *,
    n_ranks: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    timeout_seconds: float = STEP_TIMEOUT_SECONDS,
) -> LanguageModel:
    """As `load_language_model`, with every block split over `n_ranks` processes of this machine.

    This process is rank 0, on the first CUDA device; it starts the others, one on each further
    device. `close` the model to end them; they also end with this process. On CPU all share it.

    Args:
        n_ranks: at least 2; must divide the model's heads, and its key-value heads.
        device: cpu or cuda.
        timeout_seconds: see `STEP_TIMEOUT_SECONDS`.

    Raises:
        ModelLoadError: as `load_language_model`; or the family cannot be split so.
        HookPointError: as `load_language_model`; or a place where each rank sees a part only.
        RankError: another rank ended while it loaded; or this process has a group already.
    """
    if n_ranks < 2:
        raise ModelLoadError(f"tensor parallel: found {n_ranks} ranks, expected at least 2")
    if dist.is_initialized():
        raise RankError("tensor parallel: this process has a process group, expected none yet")
    wanted = tuple(hook_points)
    leader = _Leader(n_ranks, _Load(Path(folder), wanted, device, dtype, timeout_seconds))
    try:
        with leader.failing():
            model = load_language_model(
                folder, wanted, device=_device(device, 0), dtype=dtype, peers=leader
            )
    except BaseException:
        leader.close()
        raise
    model.lead(leader)
    return model


class _Load(NamedTuple):
    """What every rank loads."""

    folder: Path
    hook_points: tuple[HookPoint, ...]
    device: str
    dtype: torch.dtype
    timeout_seconds: float


class _Step(NamedTuple):
    """One forward pass, and what was done to streams before it."""

    doings: list[Doing]
    spans: list[MirroredSpan]
    token_ids: list[int]
    positions: list[int]


class _Leader:
    """Rank 0's `Peers`: it starts the other ranks, tells them what to do, and watches them."""

    def __init__(self, n_ranks: int, load: _Load) -> None:
        self._n_ranks = n_ranks
        self._load = load
        self._failure = ""
        self._is_closed = False
        self._script = Script()
        self._lock = threading.Lock()  # one step at a time: all ranks run them in one order
        self._reaping = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, SpawnProcess] = {}
        self._meeting = TemporaryDirectory(prefix="sae-monitor-ranks-")

    @property
    def n_ranks(self) -> int:
        return self._n_ranks

    @property
    def failure(self) -> str:
        return self._failure

    def join(self) -> Any:
        spawn = multiprocessing.get_context("spawn")
        atexit.register(self.close)  # before multiprocessing's own, which would wait for ever
        for rank in range(1, self._n_ranks):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_follow,
                args=(rank, self._n_ranks, self._meeting.name, theirs, self._load),
                name=f"rank-{rank}",
            )
            process.start()
            theirs.close()
            self._pipes[rank], self._processes[rank] = ours, process
        self._hear_all("ready to join")
        self._tell_all("join")
        return _mesh(0, self._n_ranks, self._meeting.name, self._load)

    def wait_until_loaded(self) -> None:
        self._hear_all("loaded")
        self._watcher.start()
        self._tell_all("run")

    def open_stream(self, n_layers: int) -> KVStream:
        return MirroredStream(n_layers, self._script)

    @contextmanager
    def step(self, plan: PackedPlan, token_ids: list[int], positions: list[int]) -> Iterator[None]:
        with self._lock:
            self._check()
            step = _Step(self._script.take(), mirrored_spans(plan), token_ids, positions)
            self._tell_all(step)
            with self.failing():
                yield

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What fails in here ends the group: the others may have come further."""
        try:
            yield
        except SAECoreError:
            self._fail("rank 0 failed")
            raise
        except BaseException as error:
            if self._watcher.ident is not None:
                self._watcher.join(END_SECONDS)  # where another rank ended, it says how
            self._fail(f"rank 0 failed ({one_line(error)})")
            if not isinstance(error, Exception):
                raise
            raise RankError(self._failure) from error

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        self._fail("the model was closed")
        for pipe in self._pipes.values():
            with suppress(OSError):
                pipe.send(None)
        for rank, process in self._processes.items():
            if self._exit_code(rank, END_SECONDS) is None:
                process.kill()
                self._exit_code(rank, None)
        if self._watcher.ident is not None:
            self._watcher.join()
        for pipe in self._pipes.values():
            pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._meeting.cleanup()

    def _check(self) -> None:
        if self._failure:
            raise RankError(self._failure)

    def _fail(self, what: str) -> None:
        """The first reason stays: those after it follow from it."""
        if not self._failure:
            self._failure = what

    def _tell_all(self, message: object) -> None:
        for rank, pipe in self._pipes.items():
            try:
                pipe.send(message)
            except OSError as error:
                self._lost(rank, error)

    def _hear_all(self, expected: str) -> None:
        for rank, pipe in self._pipes.items():
            try:
                found = pipe.recv()
            except (EOFError, OSError) as error:
                self._lost(rank, error)
            if isinstance(found, SAECoreError):
                raise found
            if found != expected:
                self._fail(f"rank {rank} failed: {found}")
                self._check()

    def _lost(self, rank: int, error: BaseException) -> NoReturn:
        self._fail(self._end_of(rank))
        raise RankError(self._failure) from error

    def _end_of(self, rank: int) -> str:
        code = self._exit_code(rank, END_SECONDS)
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        return f"rank {rank} of {self._n_ranks} {how}"

    def _exit_code(self, rank: int, seconds: float | None) -> int | None:
        """Waits for a process to end; None where it runs on."""
        with self._reaping:  # of two who wait only one would be told
            self._processes[rank].join(seconds)
            return self._processes[rank].exitcode

    def _watch(self) -> None:
        """Until the first rank says that it failed, or ends."""
        ranks = {pipe: rank for rank, pipe in self._pipes.items()}
        pipe = wait(list(ranks))[0]
        assert isinstance(pipe, Connection)
        if self._is_closed:
            return
        try:
            self._fail(f"rank {ranks[pipe]} failed: {pipe.recv()}")
        except (EOFError, OSError):
            self._fail(self._end_of(ranks[pipe]))


def _mesh(rank: int, n_ranks: int, meeting: str, load: _Load) -> Any:
    """Meets the other ranks through a file in a folder that only this user can read."""
    from torch.distributed.device_mesh import init_device_mesh

    place = _device(load.device, rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        init_method=f"file://{meeting}/store",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=load.timeout_seconds),
        device_id=place if place.type == "cuda" else None,
    )
    return init_device_mesh(place.type, (n_ranks,))


def _device(device: str, rank: int) -> torch.device:
    return torch.device(device, rank) if device == "cuda" else torch.device(device)


class _Follower:
    """Another rank's `Peers`: it does as it is told."""

    def __init__(
        self, rank: int, n_ranks: int, meeting: str, pipe: Connection, load: _Load
    ) -> None:
        self._rank = rank
        self._n_ranks = n_ranks
        self._meeting = meeting
        self._pipe = pipe
        self._load = load

    @property
    def n_ranks(self) -> int:
        return self._n_ranks

    def join(self) -> Any:
        self._pipe.send("ready to join")
        self._hear()
        return _mesh(self._rank, self._n_ranks, self._meeting, self._load)

    def wait_until_loaded(self) -> None:
        self._pipe.send("loaded")
        self._hear()

    def run(self) -> None:
        """Loads, and repeats rank 0's steps until it closes the pipe."""
        folder, hook_points, device, dtype, _ = self._load
        model = load_language_model(
            folder, hook_points, device=_device(device, self._rank), dtype=dtype, peers=self
        )
        mirror = Mirror(model.config.n_layers)
        while True:
            step = self._hear()
            mirror.repeat(step.doings)
            model.run(mirror.plan(step.spans), step.token_ids, step.positions)

    def _hear(self) -> Any:
        """The next message; EOFError when there will be none."""
        message = self._pipe.recv()
        if message is None:
            raise EOFError
        return message


def _follow(rank: int, n_ranks: int, meeting: str, pipe: Connection, load: _Load) -> None:
    """The main function of another rank's process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains first, then closes the pipe
    if load.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // n_ranks))
    try:
        _Follower(rank, n_ranks, meeting, pipe, load).run()
    except EOFError:
        return
    except Exception as error:
        with suppress(OSError):
            pipe.send(error if isinstance(error, SAECoreError) else one_line(error))
        raise SystemExit(1) from None
