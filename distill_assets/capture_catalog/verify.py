"""Does the catalog say what the store holds?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from distill_assets.teacher_capture.store import Capture


def compare_with_store(catalog: Path, captures: Sequence[Capture]) -> list[str]:
    """One sentence for each difference between the catalog and these current captures; [] if none."""
    if not catalog.exists():
        return [f"{catalog} does not exist"]
    try:
        with duckdb.connect(catalog, read_only=True) as connection:
            listed = {
                (shard, capture_id, version): examples
                for shard, capture_id, version, examples in connection.execute(
                    "SELECT shard, capture_id, version, examples FROM captures"
                ).fetchall()
            }
            counted = dict(connection.execute("SELECT shard, count(*) FROM examples GROUP BY shard").fetchall())
    except duckdb.Error as error:
        return [f"{catalog} cannot be read ({str(error).splitlines()[0]})"]
    problems = []
    held = {(c.shard, c.capture_id, c.version): c for c in captures}
    problems += [f"shard {shard} is listed, but its capture is not in the store" for shard, *_ in listed.keys() - held]
    for key, capture in held.items():
        rows = pq.read_metadata(capture.path).num_rows
        if key not in listed:
            problems.append(f"shard {capture.shard} is captured, but not listed")
        elif not rows == listed[key] == counted.get(capture.shard, 0):
            problems.append(
                f"shard {capture.shard}: {rows} rows in the file, {listed[key]} in captures, "
                f"{counted.get(capture.shard, 0)} in examples"
            )
    return sorted(problems)
