"""Refresh the catalog: built beside the old one and renamed, so that readers are never blocked.

Examples and hashes of captures that did not change are taken over from the old catalog; only new
capture files are read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from filelock import FileLock

from distill_assets.capture_catalog import schema
from distill_assets.capture_catalog.lineage import StudentLineage, read_lineages
from distill_assets.foundation.errors import CaptureError, UnreadableFile
from distill_assets.foundation.files import replacing
from distill_assets.foundation.fingerprints import content_hash, digest
from distill_assets.teacher_capture.store import IMPORTED, Capture, CaptureStore, read_capture


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
    identity = catalog_identity(catalog.parent, entries)
    with _writer_lock(catalog), _replacing(catalog) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(schema.TABLES)
        connection.execute(
            "INSERT INTO catalog_meta VALUES (?, ?, ?)", [schema.SCHEMA_VERSION, str(catalog.parent), identity]
        )
        current = {str(entry.capture.path) for entry in entries}
        history = _history(store, current | {str(path) for path in without})
        hashes = _known_hashes(catalog)
        _insert_captures(connection, entries, hashes, current=True)
        _insert_captures(connection, history, hashes, current=False)
        files_read = _insert_examples(connection, catalog, [entry.capture for entry in entries])
        lineages = read_lineages(students)
        _insert_students(connection, [lineage for lineage in lineages if Path(lineage.folder) not in without])
        files = {str(entry.capture.path): entry.capture.identity["targets"] for entry in entries}
        connection.execute(schema.positions_view(files))
        connection.execute(schema.KEPT_IDS)
        return _report(connection, identity, files_read)


def refresh_lineage(catalog: Path, students: Path) -> None:
    """Bring only the students of an existing catalog up to date; what it says of captures stays.

    A training takes long: whoever trained must not write down the captures it saw when it began.
    """
    with _writer_lock(catalog):
        if read_meta(catalog) is None:
            return  # the next refresh builds it, with its students
        with _replacing(catalog, start_from_it=True) as connection:
            connection.execute("DELETE FROM students; DELETE FROM student_captures")
            _insert_students(connection, read_lineages(students))


@contextmanager
def _replacing(catalog: Path, start_from_it: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a database that takes the catalog's place, whole, when the block succeeds."""
    with replacing(catalog) as beside:
        if start_from_it:
            shutil.copyfile(catalog, beside)
        connection = duckdb.connect(beside)
        try:
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
                    entries.append(CatalogEntry(read_capture(path), role="history"))
                except CaptureError:
                    continue  # a damaged superseded file serves nobody and stops nobody
    return entries


def _known_hashes(old: Path) -> dict[tuple[Any, ...], str]:
    """SHA-256 of capture files, by what the old catalog says of each (see `_file_key`)."""
    if read_meta(old) is None:
        return {}
    with duckdb.connect(old, read_only=True) as connection:
        found = connection.execute(
            "SELECT path, capture_id, version, strftime(timezone('UTC', created), '%Y-%m-%dT%H:%M:%S+00:00'), bytes, "
            "seconds, teacher, sha256 FROM capture_files WHERE sha256 IS NOT NULL"
        ).fetchall()
    return {(*Path(path).parts[-2:], *described): sha256 for path, *described, sha256 in found}


def _file_key(capture: Capture) -> tuple[Any, ...]:
    """What tells one making of a capture file from another, without reading it; the home may be moved."""
    described = (capture.capture_id, capture.version, capture.created, capture.bytes)
    return (*capture.path.parts[-2:], *described, capture.stats.seconds, capture.teacher["name"])


def _sha256(capture: Capture, known: Mapping[tuple[Any, ...], str]) -> str | None:
    """Of the file as it was when it came into the catalog, so that bytes that change later show; None when it cannot
    be read.
    """
    try:
        return known.get(_file_key(capture)) or content_hash(capture.path)
    except UnreadableFile:
        return None


def _insert_captures(
    connection: duckdb.DuckDBPyConnection,
    entries: Sequence[CatalogEntry],
    hashes: Mapping[tuple[Any, ...], str],
    current: bool,
) -> None:
    rows = []
    for entry in entries:
        capture, stats = entry.capture, entry.capture.stats
        rows.append(
            [
                capture.shard, entry.role, capture.capture_id, capture.version, current, str(capture.path),
                stats.rows, stats.tokens, stats.supervised_tokens, stats.kept_ids,
                capture.bytes, capture.bytes_per_token,
                stats.mean_entropy, stats.mean_kept_mass, stats.mean_kept_ids, stats.teacher_perplexity,
                stats.truncated_rows, stats.bad_rows, stats.rows_without_target,
                stats.rows_captured, stats.rows_reused, stats.tokens_captured, stats.seconds, stats.tokens_per_second,
                capture.teacher["name"], capture.teacher["revision"], capture.identity.get("dtype"),
                json.dumps(capture.identity["targets"]), list(capture.derived_from), capture.created,
                _sha256(capture, hashes),
            ]
        )  # fmt: skip
    if rows:
        connection.executemany(f"INSERT INTO capture_files VALUES ({', '.join('?' * len(rows[0]))})", rows)


def _insert_examples(connection: duckdb.DuckDBPyConnection, old: Path, captures: Sequence[Capture]) -> int:
    """Examples of `captures`, from the old catalog where it has them; returns the files that were read."""
    known = _take_over_examples(connection, old)
    read = 0
    for capture in captures:
        if tuple(_key(capture)) in known:
            continue
        statement = schema.examples_of_file(capture.identity["targets"]["precision"])
        values: Mapping[str, str] = {
            "path": str(capture.path),
            "shard": capture.shard,
            "capture_id": capture.capture_id,
            "version": capture.version,
            "created": capture.created,
        }
        connection.execute(statement, values)
        read += 1
    return read


def _take_over_examples(connection: duckdb.DuckDBPyConnection, old: Path) -> set[tuple[str, ...]]:
    if not old.exists():
        return set()
    try:
        connection.execute(f"ATTACH {schema.quoted(str(old))} AS old (READ_ONLY)")
    except duckdb.Error:
        return set()  # not a database: everything is read again and the damaged file replaced
    try:
        version = connection.execute("SELECT schema_version FROM old.catalog_meta").fetchall()
        if version != [(schema.SCHEMA_VERSION,)]:
            return set()
        connection.execute(
            "INSERT INTO examples SELECT e.* FROM old.examples AS e SEMI JOIN captures AS c "
            "ON (e.shard, e.capture_id, e.version, e.created) = (c.shard, c.capture_id, c.version, c.created)"
        )
        taken = connection.execute(
            "SELECT DISTINCT shard, capture_id, version, strftime(created, '%Y-%m-%dT%H:%M:%S+00:00') FROM examples"
        ).fetchall()
        return {tuple(row) for row in taken}
    except duckdb.Error:
        connection.execute("DELETE FROM examples")
        return set()
    finally:
        connection.execute("DETACH old")


def _insert_students(connection: duckdb.DuckDBPyConnection, students: Sequence[StudentLineage]) -> None:
    for student in students:
        connection.execute(
            "INSERT INTO students VALUES (?, ?, ?, ?)",
            [student.student_id, student.kind, student.folder, student.created],
        )
        if student.captures:
            connection.executemany(
                "INSERT INTO student_captures VALUES (?, ?, ?, ?, ?)",
                [[student.student_id, *capture] for capture in student.captures],
            )


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
