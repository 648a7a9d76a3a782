"""`training.where`: the examples a student learns from, chosen by a predicate over the catalog.

The predicate is one boolean expression over COLUMNS of the training examples. What it says may depend on them
alone, so that the same captures always give the same student: DuckDB binds it, and in the plan that comes out there is
no other table, no time and no chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from distill_assets.capture_catalog import schema
from distill_assets.capture_catalog.query import lock_down, reading
from distill_assets.foundation.errors import CatalogError, SettingsError, StaleInputs, first_line

# Of `examples`; not when a capture was made, for that is no content.
COLUMNS = (
    "shard", "row", "key", "id", "tokens", "supervised_tokens", "weight", "truncated", "mean_entropy",
    "mean_kept_mass", "teacher_perplexity", "top1_is_gold", "capture_id", "version",
)  # fmt: skip
_EXAMPLES = f"(SELECT {', '.join(COLUMNS)} FROM examples WHERE role = 'train') AS examples"
_OF_ONE_TABLE = {"LOGICAL_PROJECTION", "LOGICAL_FILTER", "LOGICAL_GET"}  # what its plan is made of
_TIMES = ("DATE", "TIME", "INTERVAL")  # how the types begin

Rows = NDArray[np.int32]  # numbers of rows of a shard, ascending


@lru_cache(maxsize=8)
def require_predicate(where: str) -> None:
    """SettingsError unless `where` is a predicate, by its text alone: no catalog is needed."""
    with duckdb.connect() as connection:
        connection.execute("PRAGMA disable_optimizer")  # it would put its value in the place of what asks for the time
        lock_down(connection)
        connection.execute(f"{schema.TABLES}; CREATE TABLE none AS FROM {_EXAMPLES}")
        connection.execute("CREATE VIEW learnable AS FROM none")  # which has no rowid
        try:
            condition = _condition(where)
            if reason := _objection(connection, condition):
                raise _refused(where, reason)
        except duckdb.Error as error:
            raise _refused(where, first_line(error)) from error


def _objection(connection: duckdb.DuckDBPyConnection, condition: str) -> str | None:
    """Why the expression is no predicate over `learnable`, or None; duckdb.Error where it is wrong by itself."""
    select = f"SELECT row FROM learnable WHERE {condition}"
    [texts] = connection.execute("SELECT json_serialize_sql($1), json_serialize_plan($1)", [select]).fetchall()
    parsed, plan = map(json.loads, texts)
    if plan["error"]:
        return str(plan["error_message"]).splitlines()[0]
    nodes = list(_nodes(plan["plans"]))
    if not {kind for node in nodes if (kind := str(node.get("type"))).startswith("LOGICAL_")} <= _OF_ONE_TABLE:
        return "it asks for more than the example itself; leave the subquery out"
    if any(str(node["id"]).startswith(_TIMES) for node in nodes if "type_info" in node):
        return "it asks for a time, and a student must not depend on when it was made"
    called = {str(node["qname"]["path"][-1]) for node in nodes if "qname" in node}
    called |= {str(node["function_name"]) for node in _nodes(parsed) if "function_name" in node}
    if changing := sorted(called & _changing()):
        return f"{changing[0]}() is not the same every time, so no student could be made a second time"
    kinds = [str(column[1]) for column in connection.sql(f"SELECT {condition} FROM learnable").description]
    return None if kinds == ["BOOLEAN"] else f"it gives {' and '.join(kinds[:3])}, not true or false"


@lru_cache(maxsize=1)
def _changing() -> frozenset[str]:
    """Functions whose value is not that of their arguments alone."""
    with duckdb.connect() as connection:
        functions = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        return frozenset(name for (name,) in connection.execute(functions).fetchall())


def _condition(where: str) -> str:
    """The expression as SQL, in brackets: nothing of the text can reach beyond them."""
    return f"({duckdb.SQLExpression(where)})"


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(part)


def _refused(where: str, reason: str) -> SettingsError:
    return SettingsError(
        f"distill.yaml: training.where ({' '.join(where.split())}): {reason}\n"
        f"write one condition on {', '.join(COLUMNS)}, such as mean_entropy < 4 AND NOT truncated"
    )


def chosen_rows(catalog: Path, captures: Path, identity: str, where: str) -> dict[str, Rows]:
    """The rows that fulfil `where`, by shard; a shard of which none does is not there.

    StaleInputs unless the catalog is the one of `identity`, SettingsError where `where` is no predicate, cannot be
    computed, or chooses nothing; CatalogError where the catalog cannot be read.
    """
    require_predicate(where)
    with reading(catalog, captures) as connection:
        try:
            found = connection.execute("SELECT identity FROM catalog_meta").fetchall()
        except duckdb.Error as error:
            raise CatalogError(f"{catalog}: cannot be read ({first_line(error)}); `distill run` mends it") from error
        if found != [(identity,)]:
            raise StaleInputs(
                "training.where is asked of the catalog, which is behind the captures; `distill run` refreshes it"
            )
        chosen = (
            f"SELECT shard, list(row ORDER BY row) AS rows FROM {_EXAMPLES} WHERE {_condition(where)} GROUP BY shard"
        )
        try:
            table = connection.sql(chosen).to_arrow_table()
        except duckdb.Error as error:
            raise _refused(where, first_line(error)) from error
    if not table.num_rows:
        raise _refused(where, "no training example fulfils it (nor does one of which a figure is not known)")
    lists = zip(table["shard"].to_pylist(), table["rows"], strict=True)
    return {shard: rows.values.to_numpy() for shard, rows in lists}
