"""Refresh the catalog: a copy of the old one is changed and renamed, so that readers are never blocked.

Only captures that are new, or not there any more, cost anything: their files are read, their examples
put in or taken out. A catalog that cannot be read, or is of another version, is built from nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from filelock import FileLock

from distill_assets.capture_catalog import schema
from distill_assets.capture_catalog.lineage import StudentLineage, read_lineages
from distill_assets.foundation.errors import CaptureError, UnreadableFile
from distill_assets.foundation.files import disk_problem, replacing
from distill_assets.foundation.fingerprints import content_hash, digest
from distill_assets.teacher_capture.store import IMPORTED, Capture, CaptureStore, read_capture

HISTORY = "history"  # role of a capture that is not current


@dataclass(frozen=True)
class CatalogEntry:
    """A current capture and the role of its shard."""

    capture: Capture
    role: str


@dataclass(frozen=True)
class CatalogReport:
    """A catalog as it is after a refresh. `identity` is a hash of all it describes."""

    identity: str
    shards: int
    examples: int
    tokens: int
    bytes: int
    superseded: int
    students: int
    files_read: int


def catalog_identity(root: Path, entries: Sequence[CatalogEntry]) -> str:
    """What the catalog says about current captures; the home's place counts, for views hold full paths."""
    return digest(
        {
            "schema": schema.SCHEMA_VERSION,
            "home": str(root),
            "captures": sorted([*_key(entry.capture), entry.role] for entry in entries),
        }
    )


def _key(capture: Capture) -> list[str]:
    return [capture.shard, capture.capture_id, capture.version, capture.created]


def refresh_catalog(
    catalog: Path,
    store: CaptureStore,
    entries: Sequence[CatalogEntry],
    students: Path,
    without: Collection[Path] = (),
) -> CatalogReport:
    """Build the catalog of these current captures and put it in `catalog`'s place.

    Captures of the store that are not among `entries` are listed as history; `students` is the
    folder of students, whose lineage is read from their own records. Superseded captures and students in
    `without` are left out: they are about to be removed. One writer at a time: another one waits.
    """
    with _writer_lock(catalog):
        kept_out = {str(entry.capture.path) for entry in entries} | {str(path) for path in without}
        history = _history(store, kept_out)
        lineages = [lineage for lineage in read_lineages(students) if Path(lineage.folder) not in without]
        if read_meta(catalog) is not None:
            try:
                return _write(catalog, entries, history, lineages, start_from_old=True)
            except duckdb.Error as error:
                if disk_problem(error):
                    raise
                # Somewhere in it the old file is damaged: what it said is read from the captures again.
        return _write(catalog, entries, history, lineages, start_from_old=False)


def _write(
    catalog: Path,
    entries: Sequence[CatalogEntry],
    history: Sequence[CatalogEntry],
    lineages: Sequence[StudentLineage],
    start_from_old: bool,
) -> CatalogReport:
    identity = catalog_identity(catalog.parent, entries)
    with _replacing(catalog, start_from_old) as connection:
        if start_from_old:
            read_every_table(connection)
        else:
            connection.execute(schema.TABLES)
        files_read = _write_captures(connection, entries, history)
        _write_students(connection, lineages)
        targets = {str(entry.capture.path): entry.capture.identity["targets"] for entry in entries}
        connection.execute(schema.positions_view(targets))
        connection.execute(schema.KEPT_IDS)
        connection.execute("DELETE FROM catalog_meta")
        meta = [schema.SCHEMA_VERSION, str(catalog.parent), identity]
        connection.execute("INSERT INTO catalog_meta VALUES (?, ?, ?)", meta)
        return _report(connection, identity, files_read)


def read_every_table(connection: duckdb.DuckDBPyConnection) -> None:
    """duckdb.Error if a block of any table is damaged: a copy that is changed here and there would keep it for ever."""
    for (table,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
        # Every value is read for it; statistics alone would answer for the largest.
        connection.execute(f"SELECT any_value(COLUMNS(*)) FROM {table}")


def refresh_lineage(catalog: Path, students: Path) -> None:
    """Bring only the students of an existing catalog up to date; what it says of captures stays.

    A training takes long: whoever trained must not write down the captures it saw when it began.
    """
    with _writer_lock(catalog):
        if read_meta(catalog) is None:
            return  # the next refresh builds it, with its students
        with _replacing(catalog, start_from_old=True) as connection:
            _write_students(connection, read_lineages(students))


@contextmanager
def _replacing(catalog: Path, start_from_old: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a database that takes the catalog's place, whole, when the block succeeds."""
    with replacing(catalog) as beside:
        if start_from_old:
            shutil.copyfile(catalog, beside)
        connection = duckdb.connect(beside)
        try:
            connection.execute("SET TimeZone = 'UTC'")
            yield connection
            # Closing writes everything into the file too, but says nothing when the disk is full.
            connection.execute("CHECKPOINT")
        finally:
            connection.close()
            _log_of(beside).unlink(missing_ok=True)
        # Left by somebody who wrote into the old file and was killed; DuckDB opens no other file beside it.
        _log_of(catalog).unlink(missing_ok=True)


def _log_of(database: Path) -> Path:
    return database.with_name(f"{database.name}.wal")


def _writer_lock(catalog: Path) -> FileLock:
    file = catalog.parent / ".cache" / "catalog.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file)


def _history(store: CaptureStore, besides: set[str]) -> list[CatalogEntry]:
    entries = []
    for folder in [*store.capture_ids(), IMPORTED]:
        for path in store.files(folder).values():
            if str(path) not in besides:
                try:
                    entries.append(CatalogEntry(read_capture(path), HISTORY))
                except CaptureError:
                    continue  # a damaged superseded file serves nobody and stops nobody
    return entries


def _write_captures(
    connection: duckdb.DuckDBPyConnection, entries: Sequence[CatalogEntry], history: Sequence[CatalogEntry]
) -> int:
    """Make the catalog one of these captures; returns how many files were read for their examples."""
    listed = connection.execute(
        "SELECT path, capture_id, version, strftime(created, '%Y-%m-%dT%H:%M:%S+00:00'), bytes, seconds, teacher, "
        "number, sha256 FROM capture_files"
    ).fetchall()
    numbers = {(*Path(path).parts[-2:], *described): number for path, *described, number, _ in listed}
    hashes = {number: sha256 for *_, number, sha256 in listed}
    gone = hashes.keys() - {numbers.get(_file_key(entry.capture)) for entry in (*entries, *history)}
    if gone:
        connection.execute("DELETE FROM capture_examples WHERE capture IN (SELECT unnest(?))", [sorted(gone)])
    unused = max(hashes, default=0) + 1
    rows: list[dict[str, Any]] = []
    read: list[int] = []
    for entry in (*entries, *history):
        number = numbers.get(_file_key(entry.capture))
        if number is None:
            number, unused = unused, unused + 1
            read.append(number)
            try:
                _insert_examples(connection, number, entry.capture)
            except duckdb.Error as error:
                if entry.role != HISTORY or disk_problem(error):
                    raise
                continue  # a damaged superseded file serves nobody and stops nobody
            numbers[_file_key(entry.capture)] = number  # an imported file may stand for several shards
        rows.append(_row(number, hashes.get(number) or _sha256(entry.capture), entry))
    connection.execute("DELETE FROM capture_files")
    _insert(connection, "capture_files", rows)
    _list_keys(connection, read)
    return len(read)


def _list_keys(connection: duckdb.DuckDBPyConnection, captures: Sequence[int]) -> None:
    """List the keys of captures that came, or sort all keys anew once those not in order are an eighth."""
    [(come, new, in_order)] = connection.execute(
        "SELECT (SELECT count(*) FROM capture_examples WHERE capture IN (SELECT unnest(?))), "
        "(SELECT count(*) FROM new_keys), (SELECT count(*) FROM sorted_keys)",
        [list(captures)],
    ).fetchall()
    if come + new > in_order / 8:
        connection.execute(schema.SORT_KEYS)
    else:
        connection.execute(schema.ADD_KEYS, {"captures": list(captures)})


def _file_key(capture: Capture) -> tuple[Any, ...]:
    """What tells one making of a capture file from another, without reading it; the home may be moved."""
    described = (capture.capture_id, capture.version, capture.created, capture.bytes)
    return (*capture.path.parts[-2:], *described, capture.stats.seconds, capture.teacher["name"])


def _sha256(capture: Capture) -> str | None:
    """Of the file as it was when it came into the catalog, so that bytes that change later show; None when it cannot
    be read.
    """
    try:
        return content_hash(capture.path)
    except UnreadableFile:
        return None


def _insert_examples(connection: duckdb.DuckDBPyConnection, number: int, capture: Capture) -> None:
    statement = schema.examples_of_file(capture.identity["targets"]["precision"])
    connection.execute(statement, {"path": str(capture.path), "number": number})


def _row(number: int, sha256: str | None, entry: CatalogEntry) -> dict[str, Any]:
    capture, stats = entry.capture, entry.capture.stats
    return {
        "number": number, "shard": capture.shard, "role": entry.role, "capture_id": capture.capture_id,
        "version": capture.version, "current": entry.role != HISTORY, "path": str(capture.path),
        "examples": stats.rows, "tokens": stats.tokens, "supervised_tokens": stats.supervised_tokens,
        "kept_ids": stats.kept_ids, "bytes": capture.bytes, "bytes_per_token": capture.bytes_per_token,
        "mean_entropy": stats.mean_entropy, "mean_kept_mass": stats.mean_kept_mass,
        "mean_kept_ids": stats.mean_kept_ids, "teacher_perplexity": stats.teacher_perplexity,
        "truncated_rows": stats.truncated_rows, "bad_rows": stats.bad_rows,
        "rows_without_target": stats.rows_without_target, "rows_captured": stats.rows_captured,
        "rows_reused": stats.rows_reused, "tokens_captured": stats.tokens_captured, "seconds": stats.seconds,
        "tokens_per_second": stats.tokens_per_second, "teacher": capture.teacher["name"],
        "teacher_revision": capture.teacher["revision"], "dtype": capture.identity.get("dtype"),
        "targets": json.dumps(capture.identity["targets"]), "derived_from": list(capture.derived_from),
        "created": capture.created, "sha256": sha256,
    }  # fmt: skip


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of values by column, all at once: one after another takes a millisecond each."""
    if rows:
        connection.register("incoming", pa.Table.from_pylist(rows))
        connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
        connection.unregister("incoming")


def _write_students(connection: duckdb.DuckDBPyConnection, students: Sequence[StudentLineage]) -> None:
    connection.execute("DELETE FROM students; DELETE FROM student_captures")
    _insert(
        connection,
        "students",
        [{"student_id": s.student_id, "kind": s.kind, "folder": s.folder, "created": s.created} for s in students],
    )
    names = ("shard", "version", "capture_id", "examples", "chosen")
    used = [{"student_id": s.student_id, **dict(zip(names, c, strict=True))} for s in students for c in s.captures]
    _insert(connection, "student_captures", used)


def _report(connection: duckdb.DuckDBPyConnection, identity: str, files_read: int) -> CatalogReport:
    [(shards, examples, tokens, size)] = connection.execute(
        "SELECT count(*), coalesce(sum(examples), 0), coalesce(sum(tokens), 0), coalesce(sum(bytes), 0) FROM captures"
    ).fetchall()
    [(superseded,)] = connection.execute("SELECT count(*) FROM capture_history").fetchall()
    [(students,)] = connection.execute("SELECT count(*) FROM students").fetchall()
    return CatalogReport(identity, shards, int(examples), int(tokens), int(size), superseded, students, files_read)


def read_meta(catalog: Path) -> tuple[str, list[str]] | None:
    """(identity, shards of current captures), or None when there is no catalog of this version that can be
    read: whoever asks builds it anew, from the captures.
    """
    if not catalog.exists():
        return None
    try:
        with duckdb.connect(catalog, read_only=True) as connection:
            [(version, identity)] = connection.execute("SELECT schema_version, identity FROM catalog_meta").fetchall()
            shards = connection.execute("SELECT shard FROM captures ORDER BY shard").fetchall()
    except (duckdb.Error, ValueError):
        return None
    return (identity, [shard for (shard,) in shards]) if version == schema.SCHEMA_VERSION else None
