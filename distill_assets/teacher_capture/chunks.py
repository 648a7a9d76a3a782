"""Finished chunks of a capture under way: what a killed run goes on from.

A chunk is a Parquet file with the schema of the capture, whole or absent, filed under the number of
its first row; its footer says which rows it holds, their sums, and what they cost. When all are
there they become one capture file, a row group each.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_assets.dataset_shards.encode import EncodedRow
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.files import PARTIAL, replacing
from distill_assets.foundation.fingerprints import digest
from distill_assets.teacher_capture.arrow import parquet_writer, to_arrow
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import FOOTER, CaptureStats

CHUNK_BATCHES = 32  # forward passes in one chunk, which is the most a kill can cost, and one row group
WINDOW_TOKENS = 524_288  # tokens of the chunks whose targets are in memory at once: 0.3 GB with 64 ids a position
_FOOTER = b"distill_chunk"


@dataclass(frozen=True)
class Chunk:
    """Rows `start`, `start + 1`, ... of a shard."""

    start: int
    rows: Sequence[EncodedRow]

    @property
    def fingerprint(self) -> str:
        """Hash of what the capture file says of these rows besides their targets."""
        return digest([self.start, [[row.key, row.id, row.weight, row.truncated] for row in self.rows]])


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
    def of(rows: Sequence[CapturedRow], rows_captured: int, tokens_captured: int, seconds: float) -> Figures:
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
            rows_captured=rows_captured,
            tokens_captured=tokens_captured,
            seconds=seconds,
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


def derived_sources(file: Path) -> list[str]:
    """The other captures that a capture file, or a chunk of one under way, was derived from."""
    metadata = pq.read_metadata(file).metadata or {}
    footer = json.loads(metadata.get(FOOTER) or metadata[_FOOTER])
    return list(footer.get("derived_from", ()))


class ChunkFolder:
    """The finished chunks of one shard version under one capture identity."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.folder = folder
        self._precision = precision

    def _file(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.start:09d}.parquet"

    def files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.parquet")) if not path.name.startswith(PARTIAL)]

    def is_finished(self, chunk: Chunk) -> bool:
        """Whether these very rows were finished before, undamaged to the last byte."""
        try:
            pq.read_table(self._file(chunk), page_checksum_verification=True)
            return bool(self._footer(chunk)["rows"] == chunk.fingerprint)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return False

    def _footer(self, chunk: Chunk) -> dict[str, Any]:
        metadata = pq.read_metadata(self._file(chunk)).metadata or {}
        footer: dict[str, Any] = json.loads(metadata[_FOOTER])
        return footer

    def write(self, chunk: Chunk, rows: Sequence[CapturedRow], figures: Figures, derived_from: Collection[str]) -> None:
        """Finish a chunk; from now on a kill does not cost it."""
        with replacing(self._file(chunk)) as beside, parquet_writer(beside, self._precision) as writer:
            writer.write_table(to_arrow(rows, self._precision))
            footer = {"rows": chunk.fingerprint, "figures": asdict(figures), "derived_from": sorted(derived_from)}
            writer.add_key_value_metadata({_FOOTER.decode(): json.dumps(footer)})

    def figures(self, chunks: Sequence[Chunk]) -> list[Figures]:
        return [Figures(**self._footer(chunk)["figures"]) for chunk in chunks]

    def derived_from(self, chunks: Sequence[Chunk]) -> list[str]:
        """Captures that served some of these rows."""
        return sorted({source for chunk in chunks for source in self._footer(chunk).get("derived_from", ())})

    def tables(self, chunks: Sequence[Chunk]) -> Iterator[pa.Table]:
        """The rows of these chunks, as stored; CaptureError when a file is damaged."""
        for chunk in chunks:
            file = self._file(chunk)
            try:
                yield pq.read_table(file, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                raise CaptureError(f"{file}: damaged or unreadable ({error}); delete it and run again") from error

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
