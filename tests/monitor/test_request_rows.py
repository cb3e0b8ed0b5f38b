from __future__ import annotations

import json
from typing import Any

import pytest

from monitor.errors import InvalidRequestError
from monitor.records import Message, ScoreRequest, Stage
from monitor.request_rows import RequestRow, read_lines, row_of


def read(*rows: Any) -> list[RequestRow]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return list(read_lines(lines, policy="default"))


def test_a_row_is_a_text_turns_or_ids_with_its_own_stage_and_policy() -> None:
    turns = [{"role": "user", "content": "hi"}]
    rows = read(
        {"text": "a", "kind": "completion", "id": 7},
        {"messages": turns, "policy": "strict", "id": "x"},
        {"token_ids": [2, 5], "tokenizer_fingerprint": "f"},
    )
    assert [row.request for row in rows] == [
        ScoreRequest(text="a", stage=Stage.COMPLETION),
        ScoreRequest(messages=(Message(role="user", content="hi"),), policy="strict"),
        ScoreRequest(token_ids=(2, 5), tokenizer_fingerprint="f"),
    ]
    assert [row.id for row in rows] == [7, "x", 3]


def test_empty_lines_count_as_lines_and_are_no_rows() -> None:
    assert [row.number for row in read({"text": "a"}, "", "  ", {"text": "b"})] == [1, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 1: found Expecting"),
        ("[1]", "line 1: found list, expected a JSON object"),
        ({}, "row 1: found no keys"),
        ({"prompt": "x"}, "row 1: found keys prompt"),
        ({"messages": [{"role": "user"}]}, "row 1: found keys messages"),
        ({"token_ids": [1, True]}, "row 1: found keys token_ids"),
        ({"text": "a", "policy": 3}, "row 1, policy: found 3"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row: Any, message: str) -> None:
    (found,) = read(row)
    assert isinstance(found.request, InvalidRequestError)
    assert message in str(found.request)


def test_an_absent_value_is_as_an_absent_key() -> None:
    row = row_of({"id": None, "text": "a", "messages": None, "policy": None}, 3, policy="strict")
    assert (row.id, row.request) == (3, ScoreRequest(text="a", policy="strict"))
