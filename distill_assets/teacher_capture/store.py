"""The capture store: `captures/<capture_id>/<shard>@<version>.parquet`, each file whole or absent.

The store is the truth; catalog and Dagster records describe it. A file's footer says what it is:
identity, settings, what a position means, statistics, tool versions.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_assets.dataset_shards.discover import Shard
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.files import PARTIAL, replacing, write_json
from distill_assets.foundation.fingerprints import SHORT
from distill_assets.teacher_capture.arrow import capture_schema, from_arrow, to_arrow
from distill_assets.teacher_capture.sparse_targets import CapturedRow

FOOTER = b"distill"
POSITION_MEANING = "position t holds the teacher's distribution of token t+1 given tokens <= t; logprob = -support_q/16"
_TOOLS = ("distill_assets", "torch", "transformers", "pyarrow")


@dataclass(frozen=True)
class CaptureStats:
    """What a capture holds (means are over supervised positions) and what making it took."""

    rows: int
    tokens: int
    supervised_tokens: int
    kept_ids: int
    mean_entropy: float
    mean_kept_mass: float
    teacher_perplexity: float
    truncated_rows: int
    bad_rows: int
    rows_without_target: int
    rows_captured: int
    rows_reused: int
    tokens_captured: int
    seconds: float

    @property
    def mean_kept_ids(self) -> float:
        return self.kept_ids / self.supervised_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Teacher speed, or None when the teacher saw nothing."""
        return self.tokens_captured / self.seconds if self.tokens_captured and self.seconds > 0 else None


@dataclass(frozen=True)
class Capture:
    """One file of the store, as its footer describes it."""

    path: Path
    capture_id: str
    shard: str
    version: str
    bytes: int
    stats: CaptureStats
    identity: Mapping[str, Any] = field(compare=False)
    teacher: Mapping[str, Any] = field(compare=False)
    created: str = field(compare=False)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk, everything included, a supervised position."""
        return self.bytes / self.stats.supervised_tokens


def read_capture(path: Path) -> Capture:
    """Read a capture file's footer; CaptureError when it is damaged or not one of ours."""
    try:
        metadata = (pq.read_metadata(path).metadata or {}).get(FOOTER)
        if metadata is None:
            raise CaptureError(f"{path}: a Parquet file, but not a capture; move it out of captures/")
        footer = json.loads(metadata)
        return Capture(
            path=path,
            capture_id=footer["capture_id"],
            shard=footer["shard"],
            version=footer["version"],
            bytes=path.stat().st_size,
            stats=CaptureStats(**footer["stats"]),
            identity=footer["identity"],
            teacher=footer["teacher"],
            created=footer["created"],
        )
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise CaptureError(f"{path}: damaged or unreadable ({error}); delete it and run again") from error


def read_rows(path: Path) -> list[CapturedRow]:
    """All rows of a capture file, in order, as stored; CaptureError when it is damaged."""
    try:
        return from_arrow(pq.read_table(path, page_checksum_verification=True))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise CaptureError(f"{path}: damaged or unreadable ({error}); delete it and run again") from error


@dataclass(frozen=True)
class RowKey:
    """A captured row by name, with its training weight."""

    key: str
    weight: float


def read_row_keys(path: Path) -> list[RowKey]:
    """Keys and weights of a capture file's rows, in order; CaptureError when it is damaged."""
    try:
        return [
            RowKey(**row)
            for row in pq.read_table(path, columns=["key", "weight"], page_checksum_verification=True).to_pylist()
        ]
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise CaptureError(f"{path}: damaged or unreadable ({error}); delete it and run again") from error


class StatsMeter:
    """Sums what `CaptureStats` needs, row by row, in float64."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.positions = self.kept_ids = self.truncated = 0
        self._entropy = self._mass = self._gold = 0.0

    def add(self, row: CapturedRow) -> None:
        targets = row.targets
        self.rows += 1
        self.tokens += len(row.input_ids)
        self.positions += targets.n_positions
        self.kept_ids += len(targets.support_ids_N)
        self.truncated += row.truncated
        self._entropy += float(targets.entropy_P.sum(dtype=np.float64))
        self._mass += float(targets.kept_mass_P().sum(dtype=np.float64))
        self._gold += float(targets.gold_logprob_P.sum(dtype=np.float64))

    def stats(self, **made: Any) -> CaptureStats:
        return CaptureStats(
            rows=self.rows,
            tokens=self.tokens,
            supervised_tokens=self.positions,
            kept_ids=self.kept_ids,
            mean_entropy=self._entropy / self.positions,
            mean_kept_mass=self._mass / self.positions,
            teacher_perplexity=math.exp(-self._gold / self.positions),
            truncated_rows=self.truncated,
            **made,
        )


class CaptureWriter:
    """Writes one capture file, a row group a call, and its footer at the end."""

    def __init__(self, beside: Path, precision: str) -> None:
        schema = capture_schema(precision)
        quantised = "support_q" if precision == "compact" else "support_logprobs"
        leaf = "list.element.list.element"
        self._precision = precision
        self._writer = pq.ParquetWriter(
            beside,
            schema,
            compression="zstd",
            compression_level=6,
            write_page_checksum=True,
            use_dictionary=["key", "id", f"support_ids.{leaf}", f"{quantised}.{leaf}", "input_ids.list.element"],
        )
        self.meter = StatsMeter()

    def write(self, rows: Iterable[CapturedRow]) -> None:
        rows = list(rows)
        for row in rows:
            self.meter.add(row)
        self._writer.write_table(to_arrow(rows, self._precision))

    def finish(self, footer: Mapping[str, Any], stats: CaptureStats) -> None:
        tools = {name: package_version(name) for name in _TOOLS} | {"python": platform.python_version()}
        content = {**footer, "position": POSITION_MEANING, "stats": asdict(stats), "tools": tools}
        self._writer.add_key_value_metadata({FOOTER.decode(): json.dumps(content, ensure_ascii=False)})
        self._writer.close()

    def abandon(self) -> None:
        self._writer.close()


class CaptureStore:
    """Finds and writes the files below `captures/`. Holds no state of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, capture_id: str, shard: str, version: str) -> Path:
        return self.root / capture_id / f"{shard}@{version[:SHORT]}.parquet"

    def capture_ids(self) -> list[str]:
        return sorted(folder.name for folder in self.root.glob("*") if folder.is_dir())

    def files(self, capture_id: str) -> dict[tuple[str, str], Path]:
        """(shard, short version) -> file, for one capture identity."""
        found: dict[tuple[str, str], Path] = {}
        for path in sorted((self.root / capture_id).glob("*.parquet")):
            shard, at, version = path.stem.rpartition("@")
            if at and not path.name.startswith(PARTIAL):
                found[shard, version] = path
        return found

    def find(self, capture_id: str, shard: str, version: str) -> Capture | None:
        """The capture of this content under this identity, or None; CaptureError when it is damaged."""
        path = self.path_of(capture_id, shard, version)
        return read_capture(path) if path.exists() else None

    def current(self, capture_id: str, shard: Shard, skip_bad_rows: bool) -> Capture | None:
        """`find`, but a capture that left out bad rows is not current where such rows fail the shard."""
        found = self.find(capture_id, shard.key, shard.version)
        return found if found is None or skip_bad_rows or not found.stats.bad_rows else None

    def known_shards(self, capture_id: str) -> set[str]:
        """Shards of which any version was captured under this identity."""
        return {shard for shard, _ in self.files(capture_id)}

    @contextmanager
    def writing(self, capture_id: str, shard: str, version: str, precision: str) -> Iterator[CaptureWriter]:
        """A writer whose file appears under its name when the block has called `finish`."""
        with replacing(self.path_of(capture_id, shard, version)) as beside:
            writer = CaptureWriter(beside, precision)
            try:
                yield writer
            finally:
                writer.abandon()

    def _failure_file(self, capture_id: str, shard: str, version: str) -> Path:
        return self.path_of(capture_id, shard, version).with_suffix(".failed.json")

    def record_failure(self, capture_id: str, shard: str, version: str, message: str) -> None:
        """Remember why this content could not be captured, so that plans can say so."""
        write_json(self._failure_file(capture_id, shard, version), {"shard": shard, "message": message})

    def forget_failure(self, capture_id: str, shard: str, version: str) -> None:
        self._failure_file(capture_id, shard, version).unlink(missing_ok=True)

    def failure(self, capture_id: str, shard: str, version: str) -> str | None:
        """Why the last try on this content failed, or None."""
        try:
            record = json.loads(self._failure_file(capture_id, shard, version).read_text(encoding="utf-8"))
            return str(record["message"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
