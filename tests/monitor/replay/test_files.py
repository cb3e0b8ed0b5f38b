from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.errors import InvalidRequestError
from monitor.records import Message, ScoreRequest, Stage
from monitor.replay.files import open_file
from monitor.replay.rows import ReplayRow


def silent(what: str, share: float) -> None:
    pass


def in_segments(path: Path, part_rows: int) -> list[list[ReplayRow]]:
    file = open_file(path)
    survey = file.survey(part_rows, silent)
    found = [list(file.rows(start, n, policy="default")) for start, n in survey.starts]
    assert sum(map(len, found)) == survey.identity["rows"]
    return found


@pytest.mark.parametrize("part_rows", [1, 2, 3, 7, 100])
def test_segments_of_lines_tile_the_file(tmp_path: Path, part_rows: int) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"text": f"ä {i}"}, ensure_ascii=False) if i % 4 else " " for i in range(10)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    segments = in_segments(path, part_rows)
    assert {len(rows) for rows in segments[:-1]} <= {part_rows}
    rows = [row for segment in segments for row in segment]
    assert [row.place for row in rows] == [2, 3, 4, 6, 7, 8, 10]
    assert [row.id for row in rows] == [str(row.place) for row in rows]
    assert [row.request for row in rows] == [ScoreRequest(text=f"ä {r.place - 1}") for r in rows]


@pytest.mark.parametrize("part_rows", [1, 3, 4, 300])
@pytest.mark.parametrize("group_rows", [2, 3, 1000])
def test_segments_of_parquet_tile_the_file(tmp_path: Path, part_rows: int, group_rows: int) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"id": [f"i{i}" for i in range(700)], "text": [f"t {i}" for i in range(700)]})
    pq.write_table(table.slice(0, 11 if group_rows < 9 else 700), path, row_group_size=group_rows)
    rows = [row for segment in in_segments(path, part_rows) for row in segment]
    assert [row.place for row in rows] == list(range(1, len(rows) + 1))
    assert [row.id for row in rows] == [f"i{i}" for i in range(len(rows))]
    assert [row.request for row in rows] == [ScoreRequest(text=f"t {i}") for i in range(len(rows))]


def test_parquet_has_the_keys_of_lines_as_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows: list[dict[str, Any]] = [
        {"text": "a", "kind": "completion"},
        {"messages": [{"role": "user", "content": "hi"}], "policy": "strict"},
        {"token_ids": [2, 5], "tokenizer_fingerprint": "f"},
        {"kind": "prompt"},
    ]
    columns = sorted({key for row in rows for key in row})
    whole = [{key: row.get(key) for key in columns} | {"label": "x"} for row in rows]
    pq.write_table(pa.Table.from_pylist(whole), path)
    ((*good, bad),) = in_segments(path, 10)
    assert [row.request for row in good] == [
        ScoreRequest(text="a", stage=Stage.COMPLETION),
        ScoreRequest(messages=(Message(role="user", content="hi"),), policy="strict"),
        ScoreRequest(token_ids=(2, 5), tokenizer_fingerprint="f"),
    ]
    assert isinstance(bad.request, InvalidRequestError)


def test_what_is_no_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"absent.jsonl: found what cannot be read"):
        open_file(tmp_path / "absent.jsonl")
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    with pytest.raises(InvalidRequestError, match=r"columns prompt, expected one of text"):
        open_file(path).survey(10, silent)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidRequestError, match=r"other.parquet: found what cannot be read"):
        open_file(path).survey(10, silent)


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    before = open_file(path).survey(10, silent).identity
    path.write_text('{"text": "b"}\n')
    after = open_file(path).survey(10, silent).identity
    assert before["sha256"] != after["sha256"]
    assert {k: v for k, v in before.items() if k != "sha256"} == {
        k: v for k, v in after.items() if k != "sha256"
    }
