"""Records filled at random from their own type hints, so that no field can be forgotten."""

from __future__ import annotations

import dataclasses
import random
import struct
import types
import typing
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

import pytest

from monitor.records import Decision, StreamUpdate

Record = TypeVar("Record")


def _value(hint: Any, rng: random.Random) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        present = next(arg for arg in args if arg is not types.NoneType)
        return None if rng.random() < 0.3 else _value(present, rng)
    if origin is tuple:
        return tuple(_value(args[0], rng) for _ in range(rng.randrange(4)))
    if origin is dict:
        return {_value(args[0], rng): _value(args[1], rng) for _ in range(rng.randrange(4))}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _record(hint, rng)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return rng.choice(list(hint))
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.randrange(2**31)
    if hint is float:
        (as_float32,) = struct.unpack("f", struct.pack("f", rng.uniform(-9, 9)))
        return as_float32
    assert hint is str, f"no rule for {hint}"
    return "".join(rng.choice("aä漢🙂 \n\\") for _ in range(rng.randrange(1, 9)))


def _record(cls: type[Record], rng: random.Random) -> Record:
    hints = typing.get_type_hints(cls)
    made = cls(**{name: _value(hint, rng) for name, hint in hints.items()})
    if isinstance(made, Decision | StreamUpdate):
        width = len(made.clusters)
        rows = tuple(
            dataclasses.replace(
                token,
                fused=_row(width, rng),
                dense=_row(width, rng),
                sae=_row(width, rng),
            )
            for token in made.tokens
        )
        return dataclasses.replace(made, tokens=rows)
    return made


def _row(width: int, rng: random.Random) -> tuple[float, ...]:
    return tuple(_value(float, rng) for _ in range(width))


@pytest.fixture
def make_record() -> Callable[[type[Record], int], Record]:
    """`make_record(cls, seed)`: an instance with every field filled, the same for the same seed."""
    return lambda cls, seed: _record(cls, random.Random(seed))
