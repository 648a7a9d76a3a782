from __future__ import annotations

from pathlib import Path

import polars as pl

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.sample import CHARACTERS, ROWS, sample_texts
from tests import tiny


def test_the_first_texts_of_each_kind_of_row_once_and_cut(tmp_path: Path) -> None:
    rows = [
        {"text": "one"},
        {"prompt": "two", "completion": "three"},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "one"}]},
        {"input_ids": [1, 2]},
        {"nonsense": 1},
        {"text": "x" * 9000},
    ]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    pl.DataFrame({"text": [f"row {i}" for i in range(100)]}).write_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip")
    shards = [Shard(name[0], tmp_path / name, "train", "v") for name in ("a.jsonl", "b.parquet", "c.jsonl.gz", "gone")]
    found = sample_texts(shards)
    assert found[:5] == ["one", "two", "three", "four", "x" * CHARACTERS]
    assert found[5:] == [f"row {i}" for i in range(ROWS)]
