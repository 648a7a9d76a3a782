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
POSITION_STEPS = 64  # a nat, of these three in compact precision: finer than the support's 1/16, coarser than float16


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


def parquet_writer(path: Path, precision: str, level: int = 17) -> pq.ParquetWriter:
    """A writer of capture files. `level` of zstd: 1 for what is soon read and removed.

    Encodings are those that came out smallest on real text (benchmarks/storage.py). Splitting ids into their
    bytes gives zstd what bit-packed dictionary indices hide from it: high bytes that repeat.
    """
    leaf = "list.element.list.element"
    support = "support_q" if precision == "compact" else "support_logprobs"
    split = [f"support_ids.{leaf}", f"{support}.{leaf}"]
    numbers = [f"{name}.list.element" for name in _PER_POSITION]
    return pq.ParquetWriter(
        path,
        capture_schema(precision),
        compression="zstd",
        compression_level=level,
        write_page_checksum=True,
        use_dictionary=["key", "id", "input_ids.list.element", *(numbers if precision == "compact" else ())],
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
    )


def _lists(values: pa.Array, lengths: Sequence[int] | NDArray[np.int64]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def to_arrow(rows: Sequence[CapturedRow], precision: str) -> pa.Table:
    """Rows as one table. A position without a tail has a null in `tail_logprob`."""
    schema = capture_schema(precision)
    targets = [row.targets for row in rows]
    positions = [t.n_positions for t in targets]
    kept_P = np.concatenate([t.kept_P for t in targets]) if rows else np.zeros(0, dtype=np.int64)

    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([getattr(t, name) for t in targets]).astype(dtype) if rows else np.zeros(0, dtype=dtype)

    logprobs_N = joined("support_logprobs_N", np.float32)
    support = pa.array(encode_logprobs(logprobs_N) if precision == "compact" else logprobs_N)

    def rounded(name: str) -> NDArray[np.float16]:
        values = joined(name, np.float32)
        return (np.rint(values * POSITION_STEPS) / POSITION_STEPS if precision == "compact" else values).astype(
            np.float16
        )

    tail_P = rounded("tail_logprob_P")
    per_position = {
        "tail_logprob": pa.array(tail_P, mask=np.isneginf(tail_P)),
        "gold_logprob": pa.array(rounded("gold_logprob_P")),
        "entropy": pa.array(rounded("entropy_P")),
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

    def floats(name: str) -> NDArray[np.float32]:
        return _split(table[name])[1].cast(pa.float32()).fill_null(-np.inf).to_numpy(zero_copy_only=False)

    tail, gold, entropy = (floats(name) for name in _PER_POSITION)
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
