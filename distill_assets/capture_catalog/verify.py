"""Does the catalog say what the store holds?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb

from distill_assets.capture_catalog import schema
from distill_assets.capture_catalog.lineage import read_lineages
from distill_assets.capture_catalog.refresh import read_every_table
from distill_assets.foundation.errors import CaptureError, UnreadableFile, first_line
from distill_assets.foundation.fingerprints import SHORT, content_hash
from distill_assets.foundation.problems import FileListener, Problem
from distill_assets.teacher_capture.contents import Item, Needs
from distill_assets.teacher_capture.store import Capture, CaptureStore, read_capture
from distill_assets.teacher_capture.verify import remedy_for

ANEW = "delete it, then `distill run` builds it anew"
_Learnt = tuple[str | None, set[tuple[Any, ...]]]  # a student's kind, and the captures it learnt from


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
        return [f"{catalog} cannot be read ({first_line(error)})"]
    problems = []
    held = {(c.shard, c.capture_id, c.version): c for c in captures}
    problems += [f"shard {shard} is listed, but its capture is not in the store" for shard, *_ in listed.keys() - held]
    for key, capture in held.items():
        try:
            rows = read_capture(capture.path).stats.rows
        except CaptureError as error:
            problems.append(str(error))
            continue
        if key not in listed:
            problems.append(f"shard {capture.shard} is captured, but not listed")
        elif not rows == listed[key] == counted.get(capture.shard, 0):
            problems.append(
                f"shard {capture.shard}: {rows} rows in the file, {listed[key]} in captures, "
                f"{counted.get(capture.shard, 0)} in examples"
            )
    return sorted(problems)


def verify_catalog(
    catalog: Path,
    store: CaptureStore,
    needs: Needs,
    students: Path,
    current: Sequence[Capture],
    is_current: bool,
    damaged: Collection[Path],
    on_file: FileListener,
) -> Iterator[Problem]:
    """Problems of the catalog: every table is read, every capture and student it lists is looked for, and every
    byte of the captures compared with those it was told of.

    `is_current`: it claims to describe the captures in `current`, so it must list them. One that does not is
    merely behind, and what it lists must be there all the same. Of the files in `damaged` that was said already.
    A catalog that is not there has none: whether it ever was, it does not know.
    """
    if not catalog.exists():
        return
    on_file(catalog)
    try:
        with duckdb.connect(catalog, read_only=True) as connection:
            read_every_table(connection)
            meta = connection.execute("SELECT schema_version, home FROM catalog_meta").fetchall()
            listed = _captures_listed(connection)
            learnt = _students_listed(connection)
    except duckdb.Error as error:
        yield Problem("damaged", catalog, f"cannot be read ({first_line(error)}); {ANEW}")
        return
    if meta != [(schema.SCHEMA_VERSION, str(catalog.parent))]:
        reason = "not the catalog of this home as this version writes it"
        yield Problem("mismatch", catalog, f"{reason} (was the home moved?); `distill run` builds it anew")
        return
    for row in listed:
        yield from _verify_listed(catalog, store, needs, row, damaged)
    yield from _verify_students(catalog, students, learnt)
    if is_current:
        for reason in compare_with_store(catalog, current):
            yield Problem("mismatch", catalog, f"{reason}; {ANEW}")


def _captures_listed(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    cursor = connection.execute(
        "SELECT path, capture_id, shard, version, current, bytes, examples, tokens, supervised_tokens, kept_ids, "
        "sha256, teacher, strftime(timezone('UTC', created), '%Y-%m-%dT%H:%M:%S+00:00') AS created FROM capture_files"
    )
    names = [column[0] for column in cursor.description or []]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _verify_listed(
    catalog: Path, store: CaptureStore, needs: Needs, listed: dict[str, Any], damaged: Collection[Path]
) -> Iterator[Problem]:
    """A line of the catalog against its file."""
    # By name, for a home may be reached by another path; imported captures may have another shard's.
    path = store.root.joinpath(*Path(listed["path"]).parts[-2:])
    if not path.exists():
        remedy = (
            "`distill run` makes it again if its shard is still there"
            if listed["current"]
            else "`distill gc` takes it off the list"
        )
        yield Problem("missing", path, f"the catalog lists it; {remedy}")
        return
    try:
        capture = read_capture(path)
    except CaptureError:
        return  # damaged: said where it was read
    found = {
        "bytes": capture.bytes,
        "examples": capture.stats.rows,
        "tokens": capture.stats.tokens,
        "supervised_tokens": capture.stats.supervised_tokens,
        "kept_ids": capture.stats.kept_ids,
        "teacher": capture.teacher["name"],
        "created": capture.created,
        "version": capture.version,
    }
    for name, value in found.items():
        if listed[name] != value:
            remedy = f"delete {catalog.name}, then `distill run` builds it anew"
            yield Problem("mismatch", path, f"{name} is {value}, the catalog says {listed[name]}; {remedy}")
            return
    if path in damaged:
        return
    item = Item("capture", path, path.parent.name, listed["shard"], listed["version"][:SHORT])
    remedy = remedy_for(item, needs)
    try:
        if listed["sha256"] not in (None, content_hash(path)):
            yield Problem("damaged", path, f"its bytes are not those that the catalog was told of; {remedy}")
    except UnreadableFile as error:
        yield Problem("damaged", path, f"cannot be read ({error}); {remedy}")


def _students_listed(connection: duckdb.DuckDBPyConnection) -> dict[str, _Learnt]:
    kinds = dict(connection.execute("SELECT student_id, kind FROM students").fetchall())
    used: dict[str, set[tuple[Any, ...]]] = {name: set() for name in kinds}
    for name, *capture in connection.execute(
        "SELECT student_id, shard, version, capture_id, examples, chosen::BLOB FROM student_captures"
    ).fetchall():
        used.setdefault(name, set()).add(tuple(capture))
    return {name: (kinds.get(name), captures) for name, captures in used.items()}


def _verify_students(catalog: Path, students: Path, listed: dict[str, _Learnt]) -> Iterator[Problem]:
    """Students of the catalog against their folders. One that it does not list was trained, or its removal cut
    off, a moment after it was written.
    """
    found: dict[str, _Learnt] = {
        lineage.student_id: (lineage.kind, set(lineage.captures)) for lineage in read_lineages(students)
    }
    for name, lineage in listed.items():
        folder = students / name
        if not folder.exists():
            remedy = "`distill run` trains it again if it is still wanted, else `distill gc` takes it off the list"
            yield Problem("missing", folder, f"the catalog lists it; {remedy}")
        elif name in found and found[name] != lineage:  # a record that cannot be read is said where it was read
            yield Problem(
                "mismatch",
                catalog,
                f"it says that student {name} learnt from other captures than its record does; {ANEW}",
            )
