"""Leave one source out: which rows are held out together, and whether the rest can be fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from sae_core.evaluation.data import EvaluationError, LabelledText


class SourceFold(NamedTuple):
    """One data set held out."""

    source: str
    train: Int64[ndarray, " n_train"]
    held: Int64[ndarray, " n_held"]


def source_folds(rows: Sequence[LabelledText]) -> tuple[SourceFold, ...]:
    """A fold for each source, in order of name.

    Raises:
        EvaluationError: a row names no source, there is one source only, or without one of them
            no harmful or no benign row is left.
    """
    for row in rows:
        if not row.source:
            raise EvaluationError(f"{row.place or 'a row'}: found no source, expected one")
    sources = np.array([row.source for row in rows])
    names = sorted(set(sources.tolist()))
    if len(names) < 2:
        raise EvaluationError(f"found one source ({names[0]}), expected two or more")
    return tuple(_folds(rows, sources, names))


def _folds(
    rows: Sequence[LabelledText], sources: ndarray, names: Sequence[str]
) -> Iterator[SourceFold]:
    harmful = np.array([row.is_harmful for row in rows])
    for name in names:
        train = np.flatnonzero(sources != name)
        n_harmful = int(harmful[train].sum())
        if n_harmful in (0, len(train)):
            label = "harmful" if n_harmful == 0 else "benign"
            raise EvaluationError(f"without source {name} found no {label} row, expected some")
        yield SourceFold(name, train, np.flatnonzero(sources == name))


def fold_numbers(folds: Sequence[SourceFold]) -> Int64[ndarray, " n_texts"]:
    """For each text the index of the fold that holds it out."""
    numbers = np.empty(sum(len(fold.held) for fold in folds), np.int64)
    for index, fold in enumerate(folds):
        numbers[fold.held] = index
    return numbers
