"""Log-probabilities of another engine (vLLM, SGLang, an API) made a shard and its pinned capture.

The file is read once, a chunk of rows in memory at a time. What the shard's version and the capture's identity
are is known only at its end, so both are staged beside the imported captures and then published: the
capture first. A kill between the two leaves a capture that the same import finds and uses.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from distill_assets.dataset_shards.read import count_lines, read_json_lines
from distill_assets.dataset_shards.rows import BadRow
from distill_assets.foundation.errors import InterchangeError
from distill_assets.foundation.files import PARTIAL, replacing
from distill_assets.foundation.fingerprints import content_hash, digest
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import parquet_writer, to_arrow
from distill_assets.teacher_capture.checks import LEAST_RATE, AlignedReport, count_aligned
from distill_assets.teacher_capture.chunks import SHORT_LIVED, Cost, Figures, total_stats
from distill_assets.teacher_capture.foreign_rows import ForeignRow, ForeignRows
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.imported import ImportedContent, content_of
from distill_assets.teacher_capture.inspection import capture_row_groups, inspect_capture
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import IMPORTED, Capture, CaptureStore, WithoutDamaged, read_capture

CHUNK_NUMBERS = 1 << 19  # tokens and kept ids of the rows in memory at once, which are one row group
LINES_A_REPORT = 256  # of progress
SHIFTED_RATE = 0.05  # of positions: so many more hits beside the next token than twice those on it are no chance


@dataclass(frozen=True)
class ImportReport:
    """An imported shard. `written` is False when this very content was there already.

    `dropped_last` counts rows whose last position was filled, `dropped_unsupervised` filled positions
    whose next token is no target.
    """

    capture: Capture
    shard_file: Path
    written: bool
    dropped_last: int
    dropped_unsupervised: int
    aligned: AlignedReport

    @property
    def guesses_nothing(self) -> bool:
        """Whether the likeliest ids are so rarely the next tokens that they look like ids of another tokenizer."""
        return self.aligned.enough and self.aligned.rates[1] < LEAST_RATE


def import_jsonl(
    source: Path,
    key: str,
    spec: CaptureSpec,
    store: CaptureStore,
    shard_file: Path,
    *,
    shifted: bool = False,
    replace: bool = False,
    chunk_numbers: int = CHUNK_NUMBERS,
    on_progress: ProgressListener = ignore_progress,
) -> ImportReport:
    """Import `source` (plain, .gz or .zst) as the shard `key`, whose rows become `shard_file`.

    Raises InterchangeError, naming the line, when a line cannot be used, when the lists belong to other
    positions than they stand at, and when other content is there already, unless `replace`; UnreadableFile
    when `source` is gone or damaged. Then nothing changed. A capture of this content that is damaged is replaced;
    with `replace` the capture is written anew in any case, for some damage only the catalog knows of.
    At most `chunk_numbers` numbers, and those of one row, are in memory at once, beside a key and a hash for each row.
    """
    if spec.targets.kind != "top_k":
        raise InterchangeError(
            "imported captures hold the likeliest ids, and a student learns from one kind of targets: "
            "set targets.kind: top_k in distill.yaml"
        )
    folder = store.root / IMPORTED
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as scratch:
        staged = _Staged(Path(scratch), spec.targets.precision)
        staged.write(_chunks(_rows(source, ForeignRows(spec.encoder, shifted), on_progress), chunk_numbers))
        if not staged.parts:
            raise InterchangeError(f"{source}: there are no rows in it, so nothing was imported")
        aligned = staged.aligned()
        _require_aligned(source, aligned)
        version = content_hash(staged.shard)
        content = staged.content()
        capture_id = digest(content.identity(spec))
        before = None if replace else _imported_before(store.pinned_path(key, version), capture_id)
        capture = before if before and before.capture_id == capture_id else None
        same_shard = shard_file.exists() and content_hash(shard_file) == version
        if not replace:
            _require_free(key, shard_file, same_shard, before, capture)
        written = capture is None or not same_shard
        if capture is None:
            teacher = {"name": f"{IMPORTED} from {source.name}", "revision": None}
            with store.publishing(IMPORTED, key, version, content.settings, staged.has_position_weights) as file:
                for table in staged.tables():
                    file.append(table)
                stats = total_stats(staged.parts, bad_rows=0, rows_without_target=0)
                content.describe(file, spec, key, version, teacher, stats)
            capture = read_capture(file.path)
        if not same_shard:
            with replacing(shard_file) as beside:
                shutil.copyfile(staged.shard, beside)
        return ImportReport(capture, shard_file, written, staged.dropped_last, staged.dropped_unsupervised, aligned)


def _rows(source: Path, foreign: ForeignRows, on_progress: ProgressListener) -> Iterator[ForeignRow]:
    total, began = count_lines(source), time.monotonic()
    seen: dict[str, tuple[int, bytes]] = {}
    for line, value in read_json_lines(source):
        if line % LINES_A_REPORT == 0:
            on_progress(Progress("import", line, max(line, total), "lines", time.monotonic() - began))
        row = foreign.read(line, value)
        if isinstance(row, BadRow):
            raise InterchangeError(f"{source} line {line}: {row.reason}\nnothing was imported")
        said = content_of(row.targets)
        before, said_before = seen.setdefault(row.encoded.key, (line, said))
        if said != said_before:  # a row is known by its key, and would get either
            raise InterchangeError(
                f"{source} line {line}: its tokens and targets are those of line {before}, its log-probabilities are "
                "not; keep one of the two\nnothing was imported"
            )
        yield row


def _imported_before(path: Path, capture_id: str) -> Capture | None:
    """The capture at `path`. Of what is to be imported now it must be whole, read to its last byte: else it is
    none, and made again.
    """
    found = None
    with WithoutDamaged():
        found = read_capture(path) if path.exists() else None
    if found and found.capture_id == capture_id and any(inspect_capture(path, n_ids=None)):
        return None
    return found


def _require_free(
    key: str, shard_file: Path, same_shard: bool, before: Capture | None, capture: Capture | None
) -> None:
    """InterchangeError when rows or log-probabilities of other content are in the way."""
    if shard_file.exists() and not same_shard:
        other = f"shard {key} is there with other rows ({shard_file})"
    elif before and capture is None:
        other = f"shard {key} was imported before, with other log-probabilities ({before.path})"
    else:
        return
    raise InterchangeError(f"{other}; import with --replace to replace it, or give another --shard")


def _require_aligned(source: Path, found: AlignedReport) -> None:
    """InterchangeError when the lists plainly tell of the token before or after the one that they should."""
    before, here, after = found.rates
    if not found.enough or max(before, after) < 2 * here + SHIFTED_RATE:
        return
    where, mend = (
        ("token t", "leave out the first list of each row and import with --rows shifted")
        if before > after
        else ("token t + 2", "put an empty list before each row's lists, and drop the last of them")
    )
    raise InterchangeError(
        f"{source}: list t must tell of token t + 1, but its likeliest id is {where} at {max(before, after):.0%} of "
        f"{found.positions:,} positions, token t + 1 at {here:.0%}\n{mend}; nothing was imported"
    )


class _Staged:
    """What was read so far: the shard's rows and the capture's row groups, and their sums."""

    def __init__(self, folder: Path, precision: Literal["compact", "exact"]) -> None:
        self.shard, self._file = folder / "shard.jsonl", folder / "targets.parquet"
        self._precision: Literal["compact", "exact"] = precision
        self.parts: list[Figures] = []
        self.dropped_last = self.dropped_unsupervised = 0
        self.has_position_weights = False

    def write(self, chunks: Iterator[list[ForeignRow]]) -> None:
        """Take in all rows, a chunk at a time."""
        settings = TargetSettings(precision=self._precision)  # how many ids are kept is no matter of the schema
        with (
            self.shard.open("w", encoding="utf-8") as shard,
            parquet_writer(self._file, settings, SHORT_LIVED, position_weights=True) as writer,
        ):
            start = 0
            for chunk in chunks:
                shard.writelines(json.dumps(row.own, ensure_ascii=False, separators=(",", ":")) + "\n" for row in chunk)
                captured = [CapturedRow.of(start + i, row.encoded, row.targets) for i, row in enumerate(chunk)]
                writer.write_table(to_arrow(captured, settings, position_weights=True))
                self.has_position_weights |= any(row.position_weights is not None for row in captured)
                self.parts.append(Figures.of(captured, Cost(0, 0, 0.0)))
                self.dropped_last += sum(row.dropped_last for row in chunk)
                self.dropped_unsupervised += sum(row.dropped_unsupervised for row in chunk)
                start += len(chunk)

    def content(self) -> ImportedContent:
        """What the capture is, by its rows as they are stored: what rounding takes away makes no other capture."""
        content = ImportedContent(self._precision)
        for group in capture_row_groups(self._file):
            content.add(group)
        return content

    def aligned(self) -> AlignedReport:
        """How often the likeliest ids are the tokens that follow, and their neighbours."""
        return count_aligned(row for group in capture_row_groups(self._file) for row in group)

    def tables(self) -> Iterator[pa.Table]:
        """The capture's row groups, as stored."""
        with pq.ParquetFile(self._file, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name != "position_weights" or self.has_position_weights]
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns)


def _chunks(rows: Iterator[ForeignRow], chunk_numbers: int) -> Iterator[list[ForeignRow]]:
    chunk: list[ForeignRow] = []
    numbers = 0
    for row in rows:
        chunk.append(row)
        numbers += len(row.encoded.input_ids) + len(row.targets.support_ids_N)
        if numbers >= chunk_numbers:
            yield chunk
            chunk, numbers = [], 0
    if chunk:
        yield chunk
