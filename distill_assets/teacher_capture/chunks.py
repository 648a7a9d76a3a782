"""Finished chunks of a capture under way: what a killed run goes on from.

A chunk is a Parquet file with the schema of the capture, whole or absent, filed under the number of
its first row and how many there are; its footer says which rows it holds, their sums, and what they
cost. When all are there they become one capture file, a row group each.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_assets.dataset_shards.encode import EncodedRow
from distill_assets.foundation.files import replacing, write_json
from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import capture_schema, older_schema, to_arrow
from distill_assets.teacher_capture.sealed import SEAL, sealed_writer
from distill_assets.teacher_capture.sparse_targets import CapturedRow, weighting
from distill_assets.teacher_capture.store import (
    FOOTER,
    CaptureFile,
    CaptureStats,
    WithoutDamaged,
    finished_files,
    reading,
    unreadable,
)

CHUNK_BATCHES = 32  # forward passes in one chunk: the most of the finished ones that a kill can cost, and a row group
WINDOW_TOKENS = 524_288  # tokens of the chunks whose targets are in memory at once: 0.3 GB with 64 ids a position
_FOOTER = b"distill_chunk"
SHORT_LIVED = 1  # level of zstd for files that live as long as the capture is under way
_BUDGET, _IDENTITY = "forward_tokens.json", "identity.json"
_FORCED = "forced"  # marks chunks that trust nothing captured before


@dataclass(frozen=True)
class Chunk:
    """Rows `start`, `start + 1`, ... of a shard."""

    start: int
    rows: Sequence[EncodedRow]

    @property
    def fingerprint(self) -> str:
        """Hash of what the capture file says of these rows besides their targets."""
        return digest([self.start, list(map(_told, self.rows))])


def _told(row: EncodedRow) -> list[Any]:
    told = [row.key, row.id, row.weight, row.truncated]
    return told if row.token_weights is None else [*told, weighting(row.position_weights)]


def plan_chunks(rows: Sequence[EncodedRow], batch_tokens: int) -> list[Chunk]:
    """All rows in order, in chunks of about CHUNK_BATCHES forward passes of at most `batch_tokens` tokens.

    The plan depends on the rows and the budget alone, so a run that goes on finds the same chunks.
    """
    most = CHUNK_BATCHES * batch_tokens
    chunks: list[Chunk] = []
    start = tokens = 0
    for i, row in enumerate(rows):
        if tokens and tokens + len(row.input_ids) > most:
            chunks.append(Chunk(start, rows[start:i]))
            start, tokens = i, 0
        tokens += len(row.input_ids)
    return [*chunks, Chunk(start, rows[start:])]


def plan_windows(chunks: Sequence[Chunk], window_tokens: int = WINDOW_TOKENS) -> Iterator[Sequence[Chunk]]:
    """Consecutive chunks of at most `window_tokens` tokens, or one chunk, for which captured rows are read together.

    Rows that were shuffled lie in every row group of the files they are read from: read chunk by chunk,
    each row group would be read once a chunk.
    """
    start = tokens = 0
    for i, chunk in enumerate(chunks):
        n = sum(len(row.input_ids) for row in chunk.rows)
        if tokens and tokens + n > window_tokens:
            yield chunks[start:i]
            start, tokens = i, 0
        tokens += n
    if chunks:
        yield chunks[start:]


@dataclass(frozen=True)
class Cost:
    """What the teacher did for a chunk: rows and tokens it saw, in so many seconds."""

    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """Sums over rows (float64; NaN where a term is not known), and what the teacher did for them."""

    rows: int
    tokens: int
    supervised_tokens: int
    kept_ids: int
    truncated_rows: int
    entropy: float
    kept_mass: float
    gold_logprob: float
    rows_captured: int
    tokens_captured: int
    seconds: float

    @staticmethod
    def of(rows: Sequence[CapturedRow], cost: Cost) -> Figures:
        targets = [row.targets for row in rows]
        return Figures(
            rows=len(rows),
            tokens=sum(len(row.input_ids) for row in rows),
            supervised_tokens=sum(t.n_positions for t in targets),
            kept_ids=sum(len(t.support_ids_N) for t in targets),
            truncated_rows=sum(row.truncated for row in rows),
            entropy=sum(float(t.entropy_P.sum(dtype=np.float64)) for t in targets),
            kept_mass=sum(float(t.kept_mass_P().sum(dtype=np.float64)) for t in targets),
            gold_logprob=sum(float(t.gold_logprob_P.sum(dtype=np.float64)) for t in targets),
            rows_captured=cost.rows,
            tokens_captured=cost.tokens,
            seconds=cost.seconds,
        )


def total_stats(parts: Iterable[Figures], bad_rows: int, rows_without_target: int) -> CaptureStats:
    """Statistics of a whole capture from those of its chunks, in their order."""
    columns = zip(*(asdict(part).values() for part in parts), strict=True)
    whole = Figures(*(sum(column) for column in columns))
    n = whole.supervised_tokens
    return CaptureStats(
        rows=whole.rows,
        tokens=whole.tokens,
        supervised_tokens=n,
        kept_ids=whole.kept_ids,
        mean_entropy=None if math.isnan(whole.entropy) else whole.entropy / n,
        mean_kept_mass=whole.kept_mass / n,
        teacher_perplexity=_perplexity(whole.gold_logprob / n),
        truncated_rows=whole.truncated_rows,
        bad_rows=bad_rows,
        rows_without_target=rows_without_target,
        rows_captured=whole.rows_captured,
        rows_reused=whole.rows - whole.rows_captured,
        tokens_captured=whole.tokens_captured,
        seconds=whole.seconds,
    )


def _perplexity(mean_logprob: float) -> float | None:
    """None where it is not known, or more than a float holds."""
    return math.exp(-mean_logprob) if -mean_logprob < math.log(sys.float_info.max) else None


def derived_sources(file: Path) -> tuple[str, ...]:
    """The other captures that a capture file, or a chunk of one under way, was derived from; CaptureError when it is
    damaged, or gone.
    """
    with reading(file) as parquet:
        metadata = parquet.metadata.metadata or {}
        return tuple(json.loads(metadata.get(FOOTER) or metadata[_FOOTER]).get("derived_from", ()))


@dataclass(frozen=True)
class ChunkFooter:
    """What a chunk file says of its rows."""

    rows: str
    figures: Figures
    derived_from: tuple[str, ...]


@contextmanager
def reading_chunk(file: Path) -> Iterator[tuple[ChunkFooter, pq.ParquetFile]]:
    """A chunk file to read from; CaptureError when it is damaged. One without a seal is not believed."""
    with reading(file, "`distill run` redoes it") as parquet:
        metadata = parquet.metadata.metadata
        if SEAL not in metadata:
            raise ValueError("it has no seal")
        said = json.loads(metadata[_FOOTER])
        yield ChunkFooter(said["rows"], Figures(**said["figures"]), tuple(said["derived_from"])), parquet


def told_identity(folder: Path) -> Mapping[str, Any] | None:
    """The capture identity that a folder of finished chunks belongs to, or None where it does not say;
    CaptureOutOfReach where nobody can tell.
    """
    file = folder / _IDENTITY
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError:
        return None
    return told if isinstance(told, dict) and "targets" in told else None


class ChunkFolder:
    """The finished chunks of one shard version under one capture identity.

    The folder says which identity: other settings may be served by it before the capture is finished.
    """

    def __init__(
        self, folder: Path, targets: TargetSettings, identity: Mapping[str, Any], position_weights: bool = False
    ) -> None:
        self.folder = folder
        self._targets, self._position_weights = targets, position_weights
        self._schema = capture_schema(targets, position_weights)
        self._identity = identity

    def _file(self, chunk: Chunk) -> Path:
        # With the number of its rows: one that was planned for larger passes is not written over by a smaller one.
        return self.folder / f"{chunk.start:09d}-{len(chunk.rows)}.parquet"

    def files(self) -> list[Path]:
        return finished_files(self.folder)

    def is_finished(self, chunk: Chunk) -> bool:
        """Whether these very rows were finished before, undamaged to the last byte."""
        with WithoutDamaged(), reading_chunk(self._file(chunk)) as (said, parquet):
            known = [self._schema, older_schema(self._schema)]
            return said.rows == chunk.fingerprint and any(map(parquet.read().schema.equals, known))
        return False

    def _footer(self, chunk: Chunk) -> ChunkFooter:
        with reading_chunk(self._file(chunk)) as (said, _):
            return said

    def write(
        self, chunk: Chunk, rows: Sequence[CapturedRow], figures: Figures, derived_from: Collection[str]
    ) -> pa.Table:
        """Finish a chunk; from now on a kill does not cost it. Returns it as the capture file has it."""
        if not (self.folder / _IDENTITY).exists():
            write_json(self.folder / _IDENTITY, dict(self._identity))
        table = to_arrow(rows, self._targets, self._position_weights)
        with (
            replacing(self._file(chunk)) as beside,
            sealed_writer(beside, self._targets, SHORT_LIVED, self._position_weights) as writer,
        ):
            writer.write_table(table)
            footer = {"rows": chunk.fingerprint, "figures": asdict(figures), "derived_from": sorted(derived_from)}
            writer.add_key_value_metadata({_FOOTER.decode(): json.dumps(footer)})
        return table

    def forward_tokens(self, start: int, planned: int) -> int:
        """Tokens a forward pass from the chunk at `start` on: as planned, or less where memory ran out."""
        return min((tokens for at, tokens in self._reductions(planned) if at <= start), default=planned)

    def reduce_forward_tokens(self, start: int, planned: int, tokens: int) -> None:
        """Remember that memory ran out in the chunk at `start`: a run that goes on must batch alike."""
        write_json(
            self.folder / _BUDGET, {"planned": planned, "reductions": [*self._reductions(planned), (start, tokens)]}
        )

    def _reductions(self, planned: int) -> list[tuple[int, int]]:
        try:
            journal = json.loads((self.folder / _BUDGET).read_text(encoding="utf-8"))
            reductions = [(int(start), int(tokens)) for start, tokens in journal["reductions"]]
            return reductions if journal["planned"] == planned else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def figures(self, chunks: Sequence[Chunk]) -> list[Figures]:
        return [self._footer(chunk).figures for chunk in chunks]

    def derived_from(self, chunks: Sequence[Chunk]) -> list[str]:
        """Captures that served some of these rows."""
        return sorted({source for chunk in chunks for source in self._footer(chunk).derived_from})

    def table(self, chunk: Chunk) -> pa.Table:
        """The rows of a finished chunk, as the capture file has them; CaptureError when the file is damaged."""
        with reading_chunk(self._file(chunk)) as (_, parquet):
            return parquet.read().cast(self._schema)

    def begin_anew(self) -> None:
        """Forget all chunks but those of a forced capture that was killed."""
        if not (self.folder / _FORCED).exists():
            self.clear()
            self.folder.mkdir(parents=True)
            (self.folder / _FORCED).touch()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class ChunkWriter:
    """Writes chunks, each into its own file, so that a kill does not cost it, and then, in the order of the shard,
    into the capture file.

    `beside` the teacher: in a thread, one at a time, while the next one is computed; an error of the thread is
    raised by the next call. Else at once, which takes less memory. What a kill costs is bounded by `keep`.
    """

    def __init__(self, folder: ChunkFolder, capture: CaptureFile, chunks: Sequence[Chunk], beside: bool) -> None:
        self._folder, self._capture, self._ahead = folder, capture, deque(chunks)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chunk-writer") if beside else None
        self._keeping: Future[pa.Table] | None = None  # into a file of its own
        self._writing: Future[None] | None = None  # and then into the capture file
        self._keys: frozenset[str] = frozenset()

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def write(self, chunk: Chunk, rows: Sequence[CapturedRow], cost: Cost, derived_from: Collection[str]) -> None:
        """Have a chunk written; waits while there is another one in hand."""
        if self._thread is None:
            self._append(chunk, self._keep(chunk, rows, cost, derived_from))
            return
        self._wait()
        self._keys = frozenset(row.key for row in rows)
        self._keeping = keeping = self._thread.submit(self._keep, chunk, rows, cost, derived_from)
        self._writing = self._thread.submit(lambda: self._append(chunk, keeping.result()))

    def _keep(self, chunk: Chunk, rows: Sequence[CapturedRow], cost: Cost, derived_from: Collection[str]) -> pa.Table:
        return self._folder.write(chunk, rows, Figures.of(rows, cost), derived_from)

    def _append(self, chunk: Chunk, table: pa.Table) -> None:
        self._append_up_to(chunk)
        self._ahead.popleft()
        self._capture.append(table)

    def _append_up_to(self, chunk: Chunk | None) -> None:
        """Append chunks that were finished before this run."""
        while self._ahead and self._ahead[0] is not chunk:
            self._capture.append(self._folder.table(self._ahead.popleft()))

    def keep(self) -> None:
        """Wait until a kill does not cost the chunk in hand: before anything of the next one is finished, so that it
        never costs more than one.
        """
        if self._keeping is not None:
            self._keeping.result()

    def finish(self, keys: Collection[str]) -> None:
        """Wait until the chunk in hand can be read if it holds one of `keys`."""
        if not self._keys.isdisjoint(keys):
            self.keep()

    def finish_all(self) -> None:
        """Wait until every chunk is in the capture file."""
        self._wait()
        self._append_up_to(None)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._keeping, self._writing, self._keys = None, None, frozenset()
