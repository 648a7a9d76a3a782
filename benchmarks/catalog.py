"""The catalog of many shards: one shard changed against building it anew, an example by its key, a sample for training.

A tiny teacher captures one shard; the others are that capture under other names and row keys, so that
files, catalog and queries are those of a real home, and only the teacher's time is saved.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from workload import BenchHome, Row, arguments, as_shard, random_model, scratch, seconds_of, show

from distill_assets.capture_catalog.choosing import chosen_rows
from distill_assets.capture_catalog.query import run_query
from distill_assets.capture_catalog.refresh import CatalogEntry, CatalogReport, refresh_catalog
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import Capture

VOCABULARY = 512
REPEATS = 5


def main() -> None:
    options = arguments(
        __doc__, shards=(int, 2000, "shards"), examples=(int, 100, "examples of a shard; 5000 makes ten million in all")
    )
    with scratch() as folder:
        root = Path(folder)
        home = BenchHome(root / "home", random_model(root / "teacher", VOCABULARY, width=32, layers=1), k=4)
        draw = random.Random(0)
        home.write("s0", (Row([draw.randrange(3, VOCABULARY) for _ in range(6)]) for _ in range(options.examples)))
        first = capture_shard(home.spec, home.shards()["s0"], home.store, device="cpu").capture
        captures = [first, *(named(home, first, i, 0) for i in range(1, options.shards))]
        results = measure(home, captures)
    n = options.shards * options.examples
    show("catalog", results, options.json, shards=options.shards, examples=f"{n:,}")


def named(home: BenchHome, first: Capture, number: int, edition: int) -> Capture:
    """The first capture as another shard, or another edition of one."""
    shard = f"s{number}"
    return as_shard(home, first, shard, hashlib.sha256(f"{shard} {edition}".encode()).hexdigest())


def measure(home: BenchHome, captures: list[Capture]) -> list[dict[str, Any]]:
    def refresh() -> CatalogReport:
        entries = [CatalogEntry(capture, "train") for capture in captures]
        return refresh_catalog(home.home.catalog, home.store, entries, home.home.students)

    def refresh_one(edition: int) -> None:
        captures[7] = named(home, captures[0], 7, edition)
        began = time.perf_counter()
        assert refresh().files_read == 1
        changed.append(time.perf_counter() - began)

    changed: list[float] = []
    anew = seconds_of(refresh)
    for edition in range(1, REPEATS + 1):
        refresh_one(edition)
    key = pq.read_table(captures[len(captures) // 2].path, columns=["key"])["key"][3].as_py()
    ask = lambda sql: run_query(home.home.catalog, home.home.captures, sql)  # noqa: E731
    by_key = [seconds_of(lambda: ask(f"SELECT * FROM example('{key}')")) for _ in range(REPEATS)]
    chosen = "SELECT shard, row, key FROM examples WHERE teacher_perplexity > 2 USING SAMPLE 10000 ROWS"
    sample = [seconds_of(lambda: ask(chosen)) for _ in range(REPEATS)]
    identity = refresh().identity
    ask_each = lambda: chosen_rows(home.home.catalog, home.home.captures, identity, "hash(key) % 2 = 0")  # noqa: E731
    condition = [seconds_of(ask_each) for _ in range(REPEATS)]
    shutil.rmtree(home.home.captures)
    return [
        {"what": "built anew", "seconds": anew, "of building anew": 1.0},
        *(
            {"what": name, "seconds": (middle := statistics.median(found)), "of building anew": middle / anew}
            for name, found in (
                ("refresh after one changed shard", changed),
                ("an example by its key, with opening the catalog", by_key),
                ("10,000 examples drawn of those above a perplexity", sample),
                ("half of all examples, as training.where chooses them", condition),
            )
        ),
    ]


if __name__ == "__main__":
    main()
