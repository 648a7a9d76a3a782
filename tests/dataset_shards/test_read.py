from __future__ import annotations

import gzip
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_assets.dataset_shards.read import read_rows
from distill_assets.dataset_shards.rows import BadRow, Chat, Completion, Ids, Message, Row, Text, parse_row
from distill_assets.foundation.errors import ShardError, UnreadableFile

ROWS: list[tuple[dict[str, Any], Any]] = [
    ({"text": "hé"}, Text("hé")),
    ({"prompt": "", "completion": "c"}, Completion("", "c")),
    (
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a", "name": "x"}]},
        Chat((Message("user", ""), Message("assistant", "a"))),
    ),
    ({"input_ids": [0, 5]}, Ids((0, 5), None)),
    ({"input_ids": [7, 8, 9], "loss_mask": [0, True, 1]}, Ids((7, 8, 9), (False, True, True))),
    ({"input_ids": [7, 8], "token_weights": [0, 2.5]}, Ids((7, 8), None, (0.0, 2.5))),
    (
        {
            "messages": [
                {"role": "assistant", "content": "a", "weight": 0},
                {"role": "user", "content": "b", "weight": None},
            ]
        },
        Chat((Message("assistant", "a", 0.0), Message("user", "b"))),
    ),
]


@pytest.mark.parametrize(("values", "content"), ROWS)
def test_every_kind_of_row(values: dict[str, Any], content: Any) -> None:
    assert parse_row(3, values) == Row(3, content, None, 1.0)


def test_id_weight_and_metadata() -> None:
    row = parse_row(1, {"text": "a", "id": 12, "weight": 2, "source": {"any": "thing"}, "prompt": None})
    assert row == Row(1, Text("a"), "12", 2.0)
    assert parse_row(1, {"text": "a", "id": "x", "weight": 0.0}) == Row(1, Text("a"), "x", 0.0)
    most = 3.4028235e38  # as the largest float32 is exported
    assert parse_row(1, {"text": "a", "weight": most}) == Row(1, Text("a"), None, most)


BAD: list[tuple[Any, str]] = [
    ([1], "JSON object, not a list"),
    ("text", "JSON object, not text"),
    ({}, "it is empty"),
    ({"txt": "a"}, "it has txt"),
    ({"text": None}, "it is empty"),
    ({"text": "a", "messages": []}, "text as well as messages"),
    ({"text": "a", "loss_mask": [1]}, "text as well as input_ids"),
    ({"text": ""}, "text is empty"),
    ({"text": 5}, "text must be text, not a number"),
    ({"text": "a\ud800b"}, "surrogate pair at character 2"),
    ({"prompt": "a"}, "prompt without completion"),
    ({"completion": "a"}, "completion without prompt"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": ["a"], "completion": "b"}, "prompt must be text, not a list"),
    ({"messages": []}, "at least one"),
    ({"messages": "hi"}, "list of at least one"),
    ({"messages": ["hi"]}, r"messages\[0\] must be an object with role and content, not text"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}, r"\[1\]: role is 'asis"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "role is"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: content must be text, not null"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content must be text, not a list"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, "tool_calls"),
    ({"input_ids": []}, "at least one integer"),
    ({"input_ids": 5}, "list of at least one"),
    ({"input_ids": [1, -1]}, r"input_ids\[1\] is -1"),
    ({"input_ids": [1.0]}, r"input_ids\[0\] is 1.0"),
    ({"input_ids": [True]}, r"input_ids\[0\] is True"),
    ({"input_ids": [None]}, r"input_ids\[0\] is None"),
    ({"loss_mask": [1]}, "loss_mask without input_ids"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "1 entries for 2"),
    ({"input_ids": [1], "loss_mask": 1}, "loss_mask must be a list"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, r"loss_mask\[1\] is 2"),
    ({"input_ids": [1, 2], "loss_mask": [0.0, 1]}, r"loss_mask\[0\] is 0.0"),
    ({"token_weights": [1]}, "token_weights without input_ids"),
    ({"text": "a", "token_weights": [1]}, "text as well as input_ids"),
    ({"input_ids": [1, 2], "token_weights": [1]}, "token_weights has 1 entries for 2"),
    ({"input_ids": [1], "token_weights": 2}, "token_weights must be a list"),
    ({"input_ids": [1, 2], "token_weights": [1, -1]}, r"token_weights\[1\] is -1"),
    ({"input_ids": [1, 2], "token_weights": [1, math.nan]}, r"token_weights\[1\] is nan"),
    ({"input_ids": [1, 2], "token_weights": [None, 1]}, r"token_weights\[0\] must be a number, not null"),
    (
        {"messages": [{"role": "user", "content": "a", "weight": 1}]},
        r"messages\[0\]: weight belongs to messages of the as",
    ),
    ({"messages": [{"role": "assistant", "content": "a", "weight": "1"}]}, r"\[0\]: weight must be a number, not text"),
    ({"text": "a", "weight": 1e39}, "weight is 1e"),
    ({"text": "a", "weight": math.nan}, "weight is nan"),
    ({"text": "a", "weight": math.inf}, "weight is inf"),
    ({"text": "a", "weight": 10**400}, "weight is inf"),
    ({"text": "a", "weight": 1e39}, r"weight is 1e\+39; it must be at least 0 and below 3.4e38"),
    ({"text": "a", "weight": -1}, "weight is -1"),
    ({"text": "a", "weight": "1"}, "weight must be a number, not text"),
    ({"text": "a", "weight": True}, "weight must be a number, not a boolean"),
    ({"text": "a", "id": 1.5}, "id must be text or an integer, not a number"),
    ({"text": "a", "id": False}, "id must be text or an integer, not a boolean"),
]


@pytest.mark.parametrize(("values", "reason"), BAD)
def test_every_bad_row_says_why(values: Any, reason: str) -> None:
    row = parse_row(4, values)
    assert isinstance(row, BadRow)
    assert row.line == 4
    assert re.search(reason, row.reason), row.reason


def jsonl(tmp_path: Path, content: bytes, name: str = "s.jsonl") -> list[Row | BadRow]:
    path = tmp_path / name
    path.write_bytes(content)
    return list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b'{"text": "a", "id": 1, "text": "b"}', "text"),
        (b'{"text": "a", "text": "a"}', "text"),
        (b'{"text": "a", "t\\u0065xt": "b"}', "text"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "role": "user", "content": "a"}]}', "role"),
        (b'{"text": "a", "mine": {"x": {"y": 1, "y": 2}}}', "y"),
    ],
)
def test_an_object_with_a_key_twice_is_a_bad_row(tmp_path: Path, content: bytes, key: str) -> None:
    first, bad, last = jsonl(tmp_path, b'{"text": "a"}\n' + content + b'\n{"text": "c"}\n')
    assert isinstance(first, Row) and isinstance(last, Row)
    assert bad == BadRow(2, f"it has the key '{key}' more than once")


def test_jsonl_names_the_line_of_what_is_wrong(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"text": "a"}\r\n'
        b"\n  \n"
        b'{"text": "caf\xff"}\n'
        b'{"text": }\n'
        b'{"text": "b", "weight": NaN}\n' + b"[" * 100_000 + b"\n"
        b'{"text": "c", "weight": ' + b"1" * 5000 + b"}\n"
        b'{"text": "last'
    )
    first, *bad = jsonl(tmp_path, content)
    assert first == Row(1, Text("a"), None, 1.0)
    assert [row.line for row in bad] == [4, 5, 6, 7, 8, 9]
    assert all(isinstance(row, BadRow) for row in bad)
    reasons = [row.reason for row in bad if isinstance(row, BadRow)]
    assert "byte 0xff at byte 14 of the line" in reasons[0]
    assert "not valid JSON (Expecting value at character 10)" in reasons[1] and "cut off" not in reasons[1]
    assert "weight is nan" in reasons[2]
    assert "nested too deeply" in reasons[3]
    assert "cut off" in reasons[5]


def test_a_place_in_the_line_is_given_once(tmp_path: Path) -> None:
    [bad] = jsonl(tmp_path, b'{"text": "a\tb"}\n')
    assert isinstance(bad, BadRow) and bad.reason == "not valid JSON (Invalid control character at character 12)"
    [bad] = jsonl(tmp_path, b'{"text": "broken\r\n')
    assert isinstance(bad, BadRow) and bad.reason == "not valid JSON (Unterminated string starting at character 10)"


def test_compressed_files_read_like_plain_ones(tmp_path: Path) -> None:
    content = "".join(json.dumps(values) + "\n" for values, _ in ROWS).encode()
    path = tmp_path / "z.jsonl.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as compressor:
        compressor.write(content)
    plain = jsonl(tmp_path, content)
    assert [row.content for row in plain if isinstance(row, Row)] == [content for _, content in ROWS]
    assert jsonl(tmp_path, gzip.compress(content), "g.jsonl.gz") == plain
    assert list(read_rows(path)) == plain


def test_text_files_give_a_row_a_line(tmp_path: Path) -> None:
    rows = jsonl(tmp_path, b"one\r\n\n   \n two \nbad \xfe\nlast", "s.txt")
    assert rows[0] == Row(1, Text("one"), None, 1.0)
    assert rows[1] == Row(4, Text(" two "), None, 1.0)
    assert isinstance(rows[2], BadRow) and "0xfe at byte 5" in rows[2].reason
    assert rows[3] == Row(6, Text("last"), None, 1.0)


def test_a_row_of_five_megabytes_is_read_in_linear_time(tmp_path: Path) -> None:
    started = time.monotonic()
    [row] = jsonl(tmp_path, json.dumps({"text": "word " * 1_000_000}).encode())
    assert isinstance(row, Row) and isinstance(row.content, Text) and len(row.content.text) == 5_000_000
    assert time.monotonic() - started < 5


def test_parquet_counts_rows_and_takes_nulls_for_absent(tmp_path: Path) -> None:
    path = tmp_path / "a=[1]*.parquet"  # neither a pattern nor a column
    frame = pl.DataFrame(
        {
            "text": ["a", None, None, None],
            "input_ids": [None, [1, 2], [3, None], None],
            "weight": [1.0, 0.5, None, None],
            "noise": ["x"] * 4,
        },
        schema_overrides={"input_ids": pl.List(pl.UInt16), "weight": pl.Float32},
    )
    frame.write_parquet(path)
    rows = list(read_rows(path))
    assert rows[:2] == [Row(1, Text("a"), None, 1.0), Row(2, Ids((1, 2), None), None, 0.5)]
    assert rows[2:] == [
        BadRow(3, "input_ids[1] is None; an id is an integer of at least 0"),
        BadRow(4, "a row needs text, prompt and completion, messages, or input_ids; it is empty"),
    ]


def test_a_parquet_without_any_known_column_is_refused_whole(tmp_path: Path) -> None:
    pl.DataFrame({"content": ["a"]}).write_parquet(tmp_path / "s.parquet")
    with pytest.raises(ShardError, match="columns are content"):
        list(read_rows(tmp_path / "s.parquet"))


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet", "gone.jsonl"])
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b'{"text": "hello"}\n' * 1000
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(content)[:-10])
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
        path.write_bytes(b"\x00" * 4 + path.read_bytes()[4:])
    elif name.endswith(".parquet"):
        pl.DataFrame({"text": ["a"] * 100}).write_parquet(path)
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UnreadableFile, match=name.split(".")[0]):
        list(read_rows(path))


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
common = {"id": st.none() | text, "weight": st.none() | st.floats(0, 1e6)}
row_values = st.one_of(
    st.fixed_dictionaries({"text": text, **common}),
    st.fixed_dictionaries({"prompt": text, "completion": text, **common}),
    st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), **common}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": text}),
                min_size=1,
                max_size=3,
            ),
            **common,
        }
    ),
)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(row_values, min_size=1, max_size=6))
def test_jsonl_and_parquet_of_the_same_rows_are_equal(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "s.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    message = pl.Struct({"role": pl.String, "content": pl.String})
    schema: dict[str, Any] = {
        "text": pl.String,
        "prompt": pl.String,
        "completion": pl.String,
        "messages": pl.List(message),
        "input_ids": pl.List(pl.Int64),
        "id": pl.String,
        "weight": pl.Float64,
    }
    pl.DataFrame(values, schema=schema).write_parquet(folder / "s.parquet")
    assert list(read_rows(folder / "s.jsonl")) == list(read_rows(folder / "s.parquet"))
