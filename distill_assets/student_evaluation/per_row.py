"""What the figures are sums of, a held-out row each: kept beside a report, so that students of
different reports can be compared row by row, without any model.

Legend: R = rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill_assets.foundation.errors import UnreadableFile
from distill_assets.student_evaluation.figures import PositionTable
from distill_assets.teacher_capture.sparse_targets import CapturedRow

_ABOUT = ("shard", "row", "key", "positions")


@dataclass(frozen=True)
class RowSums:
    """Rows with at least one scored position. `sums` is by (model, metric), over the row's positions;
    that of `perplexity` is the negative log-likelihood in nats.
    """

    shards: tuple[str, ...]
    rows: tuple[int, ...]
    keys: tuple[str, ...]
    positions_R: NDArray[np.int64]
    sums: Mapping[tuple[str, str], NDArray[np.float64]]

    @classmethod
    def of(cls, named: Sequence[tuple[str, CapturedRow]], table: PositionTable) -> RowSums:
        """The sums of a table of positions, whose rows are `named` (shard, row)."""
        counts_R = table.row_sums(np.ones(len(table.row_N))).astype(np.int64)
        there_R = counts_R > 0
        kept = [pair for pair, there in zip(named, there_R, strict=True) if there]
        return cls(
            shards=tuple(shard for shard, _ in kept),
            rows=tuple(row.row for _, row in kept),
            keys=tuple(row.key for _, row in kept),
            positions_R=counts_R[there_R],
            sums={name: table.row_sums(values_N)[there_R] for name, values_N in table.columns().items()},
        )

    def write(self, file: Path) -> None:
        """As Parquet: what row it is, and a column `model.metric` for each of the sums."""
        about = dict(zip(_ABOUT, (self.shards, self.rows, self.keys, self.positions_R), strict=True))
        sums = {f"{model}.{key}": values_R for (model, key), values_R in self.sums.items()}
        pq.write_table(pa.table(about | sums), file, compression="zstd")

    @classmethod
    def read(cls, file: Path) -> RowSums:
        """What `write` wrote; UnreadableFile when it is missing or damaged."""
        try:
            table = pq.read_table(file)
            shards, rows, keys, positions = (table[name].to_pylist() for name in _ABOUT)
        except (OSError, KeyError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UnreadableFile(
                f"{file}: cannot be read ({reason}); `distill run` writes the current one again"
            ) from None
        sums = {
            (model, key): table[name].to_numpy()
            for name in table.column_names
            if name not in _ABOUT
            for model, key in [name.split(".", 1)]
        }
        return cls(tuple(shards), tuple(rows), tuple(keys), np.array(positions, dtype=np.int64), sums)
