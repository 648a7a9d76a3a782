"""`distill sql` reads the catalog and nothing else, and writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill_assets.capture_catalog.query import run_query
from distill_assets.capture_catalog.refresh import CatalogEntry, refresh_catalog
from distill_assets.foundation.errors import CatalogError, UsageError
from distill_assets.teacher_capture.capture import capture_shard
from tests.bench import Bench


@pytest.fixture
def catalog(bench: Bench) -> Bench:
    report = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu")
    refresh_catalog(bench.home.catalog, bench.store, [CatalogEntry(report.capture, "train")], bench.home.students)
    return bench


def ask(catalog: Bench, sql: str) -> list[tuple[object, ...]]:
    return list(run_query(catalog.home.catalog, catalog.home.captures, sql).rows)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM captures",
        "  with x AS (SELECT 1 AS a) SELECT a FROM x;",
        "FROM captures SELECT shard",
        "SUMMARIZE examples",
        "EXPLAIN SELECT * FROM positions",
        "EXPLAIN ANALYZE SELECT count(*) FROM positions",
    ],
)
def test_what_only_reads_is_run(catalog: Bench, sql: str) -> None:
    assert ask(catalog, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{capture}'",
        "COPY captures TO '{folder}/out.parquet'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{folder}/out.csv'",
        "explain analyze /* x */ COPY (SELECT 1) TO '{folder}/out.csv'",
        "SELECT 1; SELECT 2",
        "DROP TABLE examples",
        "INSTALL httpfs",
        "LOAD httpfs",
        "ATTACH '{folder}/new.duckdb'",
        "SET enable_external_access = true",
        "PRAGMA database_list",
        "CREATE TEMP TABLE t AS SELECT 1",
        "EXPORT DATABASE '{folder}/all'",
        "PREPARE p AS COPY (SELECT 1) TO '{capture}'",
        "INSERT INTO students VALUES ('x', 'student', '', now())",
        "VACUUM",
        "",
    ],
)
def test_everything_else_is_refused(catalog: Bench, sql: str) -> None:
    files = {path: path.read_bytes() for path in catalog.home.captures.rglob("*") if path.is_file()}
    capture = next(iter(files))
    with pytest.raises(UsageError, match="SELECT"):
        ask(catalog, sql.format(capture=capture, folder=capture.parent))
    assert {path: path.read_bytes() for path in catalog.home.captures.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    "source",
    [
        "read_text('{secret}')",
        "read_csv('{secret}')",
        "read_blob('{captures}/../secret.csv')",
        "read_parquet('{secret}')",
        "glob('{home}/*')",
        "'{secret}'",
        "read_csv('https://example.org/table.csv')",
        "parquet_metadata('{secret}')",
        "query('FROM read_text(''{secret}'')')",
    ],
)
def test_other_files_cannot_be_read(catalog: Bench, source: str) -> None:
    secret = catalog.home.root / "secret.csv"
    secret.write_text("a\n1\n")
    places = {"secret": secret, "captures": catalog.home.captures, "home": catalog.home.root}
    with pytest.raises(CatalogError, match="disabled by configuration"):
        ask(catalog, f"SELECT * FROM {source.format(**places)}")


def test_mistakes_are_one_line(catalog: Bench) -> None:
    with pytest.raises(CatalogError, match="no_such_column") as caught:
        ask(catalog, "SELECT no_such_column FROM captures")
    assert "\n" not in str(caught.value)
    with pytest.raises(CatalogError, match="the query failed"):
        ask(catalog, "SELEC 1")


def test_a_copied_home_says_what_mends_its_catalog(catalog: Bench, tmp_path: Path) -> None:
    copied = shutil.copytree(catalog.home.root, tmp_path / "copied")
    with pytest.raises(CatalogError, match=f"moved or copied from {catalog.home.root}; `distill run` mends"):
        run_query(copied / "catalog.duckdb", copied / "captures", "SELECT count(*) FROM positions")


def test_without_a_catalog(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="does not exist yet"):
        run_query(tmp_path / "catalog.duckdb", tmp_path, "SELECT 1")
