"""Captured rows as plain Arrow columns and back (capture format, version 1).

One row an example; nested lists follow its supervised positions. DuckDB, Polars and pandas open
the Parquet made of it with no code of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill_assets.teacher_capture.sparse_targets import (
    CapturedRow,
    SparseTargets,
    decode_logprobs,
    encode_logprobs,
)

_PER_POSITION = ("tail_logprob", "gold_logprob", "entropy")


def capture_schema(precision: str) -> pa.Schema:
    """Columns of a capture file; `support_q` for compact precision, `support_logprobs` for exact."""
    support = (
        ("support_q", pa.list_(pa.list_(pa.uint8())))
        if precision == "compact"
        else ("support_logprobs", pa.list_(pa.list_(pa.float32())))
    )
    return pa.schema(
        [
            pa.field("row", pa.int32(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            ("id", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("weight", pa.float32()),
            ("positions", pa.list_(pa.int32())),
            ("support_ids", pa.list_(pa.list_(pa.int32()))),
            support,
            *[(name, pa.list_(pa.float16())) for name in _PER_POSITION],
            ("truncated", pa.bool_()),
        ]
    )


def parquet_writer(path: Path, precision: str) -> pq.ParquetWriter:
    """A writer of capture files; what compresses best was measured on real text."""
    quantised = "support_q" if precision == "compact" else "support_logprobs"
    leaf = "list.element.list.element"
    return pq.ParquetWriter(
        path,
        capture_schema(precision),
        compression="zstd",
        compression_level=6,
        write_page_checksum=True,
        use_dictionary=["key", "id", f"support_ids.{leaf}", f"{quantised}.{leaf}", "input_ids.list.element"],
    )


def _known(values_P: NDArray[np.float16]) -> pa.Array:
    return pa.array(values_P, mask=np.isnan(values_P))


def _lists(values: pa.Array, lengths: Sequence[int] | NDArray[np.int64]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def to_arrow(rows: Sequence[CapturedRow], precision: str) -> pa.Table:
    """Rows as one table. A position without a tail has a null in `tail_logprob`; an unknown `gold_logprob` or
    `entropy` is null.
    """
    schema = capture_schema(precision)
    targets = [row.targets for row in rows]
    positions = [t.n_positions for t in targets]
    kept_P = np.concatenate([t.kept_P for t in targets]) if rows else np.zeros(0, dtype=np.int64)

    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([getattr(t, name) for t in targets]).astype(dtype) if rows else np.zeros(0, dtype=dtype)

    logprobs_N = joined("support_logprobs_N", np.float32)
    support = pa.array(encode_logprobs(logprobs_N) if precision == "compact" else logprobs_N)
    tail_P = joined("tail_logprob_P", np.float32)
    per_position = {
        "tail_logprob": pa.array(tail_P.astype(np.float16), mask=np.isneginf(tail_P)),
        **{name: _known(joined(f"{name}_P", np.float16)) for name in ("gold_logprob", "entropy")},
    }
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int32) if rows else np.zeros(0, dtype=np.int32)
    columns = [
        pa.array([row.row for row in rows], pa.int32()),
        pa.array([row.key for row in rows], pa.string()),
        pa.array([row.id for row in rows], pa.string()),
        _lists(pa.array(ids), [len(row.input_ids) for row in rows]),
        pa.array([row.weight for row in rows], pa.float32()),
        _lists(pa.array(joined("positions_P", np.int32)), positions),
        _lists(_lists(pa.array(joined("support_ids_N", np.int32)), kept_P), positions),
        _lists(_lists(support, kept_P), positions),
        *[_lists(per_position[name], positions) for name in _PER_POSITION],
        pa.array([row.truncated for row in rows], pa.bool_()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _split(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Row offsets and flat values of a list column."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty table has no chunk to combine
        array = pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], array.flatten()


def from_arrow(table: pa.Table) -> list[CapturedRow]:
    """Rows as they were stored: log-probabilities decoded, not normalised."""
    ids_offsets, ids = _split(table["input_ids"])
    row_offsets, positions = _split(table["positions"])
    _, support_ids_lists = _split(table["support_ids"])
    kept_offsets = support_ids_lists.offsets.to_numpy().astype(np.int64)
    kept_offsets = kept_offsets - kept_offsets[0]
    support_ids = support_ids_lists.flatten().to_numpy()
    if "support_q" in table.column_names:
        logprobs = decode_logprobs(_split(table["support_q"])[1].flatten().to_numpy())
    else:
        logprobs = _split(table["support_logprobs"])[1].flatten().to_numpy()

    def floats(name: str, null: float) -> NDArray[np.float32]:
        return _split(table[name])[1].cast(pa.float32()).fill_null(null).to_numpy(zero_copy_only=False)

    tail, gold, entropy = (
        floats(name, null) for name, null in zip(_PER_POSITION, (-np.inf, np.nan, np.nan), strict=True)
    )
    ids, positions = ids.to_numpy(), positions.to_numpy()
    plain = table.select(["row", "key", "id", "weight", "truncated"]).to_pylist()
    rows: list[CapturedRow] = []
    for i, values in enumerate(plain):
        part = slice(row_offsets[i], row_offsets[i + 1])
        offsets_P1 = kept_offsets[part.start : part.stop + 1]
        kept = slice(offsets_P1[0], offsets_P1[-1])
        targets = SparseTargets(
            positions_P=positions[part],
            offsets_P1=offsets_P1 - offsets_P1[0],
            support_ids_N=support_ids[kept],
            support_logprobs_N=logprobs[kept],
            tail_logprob_P=tail[part],
            gold_logprob_P=gold[part],
            entropy_P=entropy[part],
        )
        rows.append(CapturedRow(input_ids=ids[ids_offsets[i] : ids_offsets[i + 1]], targets=targets, **values))
    return rows
