"""`distill sql`: one SELECT over the catalog, in a connection that can only read it.

The statement's kind is checked on what DuckDB parsed, not on its text: COPY into an allowed folder
gets through DuckDB's own sandbox. The sandbox then keeps a SELECT from reading other files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from distill_assets.capture_catalog.schema import quoted
from distill_assets.foundation.errors import CatalogError, UsageError, first_line

_EXPLAIN = re.compile(r"\s*explain(\s+analyze)?\s", re.IGNORECASE)


@dataclass(frozen=True)
class QueryResult:
    """Column names and rows of a query."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def run_query(catalog: Path, captures: Path, sql: str) -> QueryResult:
    """Run one SELECT (or EXPLAIN of one). UsageError for another statement, CatalogError for SQL errors."""
    with reading(catalog, captures) as connection:
        try:
            _require_select(connection, sql)
            cursor = connection.execute(sql)
            columns = tuple(column[0] for column in cursor.description or [])
            return QueryResult(columns, tuple(cursor.fetchall()))
        except duckdb.Error as error:
            if isinstance(error, duckdb.PermissionException) and (made_in := _made_elsewhere(connection, catalog)):
                said = f"the home was moved or copied from {made_in}; `distill run` mends its catalog"
                raise CatalogError(said) from error
            raise CatalogError(f"the query failed: {first_line(error)}") from error


@contextmanager
def reading(catalog: Path, captures: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that reads the catalog and the files in `captures`, and nothing else. CatalogError without one."""
    if not catalog.exists():
        raise CatalogError(f"{catalog} does not exist yet; `distill run` makes it")
    try:
        connection = duckdb.connect(catalog, read_only=True)
    except duckdb.Error as error:
        raise CatalogError(f"{catalog}: not a readable DuckDB file; `distill run` builds it anew") from error
    with connection:
        lock_down(connection, [captures])
        yield connection


def lock_down(connection: duckdb.DuckDBPyConnection, folders: Sequence[Path] = ()) -> None:
    """From now on the connection reads no other files than those in `folders`, and this cannot be taken back."""
    for setting in (
        "SET TimeZone = 'UTC'",
        f"SET allowed_directories = [{', '.join(quoted(str(folder)) for folder in folders)}]",
        "SET enable_external_access = false",
        "SET autoinstall_known_extensions = false",
        "SET autoload_known_extensions = false",
        "SET lock_configuration = true",
    ):
        connection.execute(setting)


def _made_elsewhere(connection: duckdb.DuckDBPyConnection, catalog: Path) -> str | None:
    """Where the home lay when the catalog was written, if not here: its views read files by their full paths."""
    [(home,)] = connection.execute("SELECT home FROM catalog_meta").fetchall()
    return None if home == str(catalog.parent) else str(home)


def mass_by_rank(catalog: Path, captures: Path, shards: Sequence[str], rows: int) -> list[float]:
    """Mean probability of the likeliest kept id of a position, the second, ... over the first `rows` rows of `shards`.

    Support and tail are made a distribution by dividing by their sum; a position that keeps fewer ids counts with 0.
    """
    chosen = f"row < {rows} AND shard IN ({', '.join(map(quoted, shards))})"
    sql = f"""
        WITH kept AS (SELECT rank, sum(exp(logprob)) AS mass FROM kept_ids WHERE {chosen} GROUP BY rank),
        tail AS (SELECT coalesce(sum(exp(tail_logprob)), 0) AS mass FROM positions WHERE {chosen})
        SELECT mass / ((SELECT sum(mass) FROM kept) + (SELECT mass FROM tail)) FROM kept ORDER BY rank
    """
    return [mass for (mass,) in run_query(catalog, captures, sql).rows]


def _require_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise UsageError(f"give exactly one SELECT (this is {len(statements)} statements)")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN and (explain := _EXPLAIN.match(statements[0].query)):
        _require_select(connection, statements[0].query[explain.end() :])
    elif kind != duckdb.StatementType.SELECT:
        raise UsageError(f"only SELECT is allowed here, this is {kind.name}; the catalog is read-only")
