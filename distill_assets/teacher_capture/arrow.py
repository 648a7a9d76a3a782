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

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.sparse_targets import (
    CapturedRow,
    SparseTargets,
    decode_logprobs,
    encode_logprobs,
)

_PER_POSITION = ("tail_logprob", "gold_logprob", "entropy")
NOT_LEARNT_FROM = frozenset({"gold_logprob", "entropy"})  # columns that say nothing to a student
POSITION_STEPS = 64  # a nat, of these three in compact precision: finer than the support's 1/16, coarser than float16

# Of zstd. With k = 32 a core writes 460,000 positions/s at level 7, and 75,000 at 17, in 3% less room: too few if a
# teacher is ever faster than that.
LEVEL = 7


def capture_schema(targets: TargetSettings, position_weights: bool = False) -> pa.Schema:
    """Columns of a capture file; `support_q` for compact precision, `support_logprobs` for exact.

    `weights` and `tail_sample_ids` exist only where these targets have them, `position_weights` only where rows do.
    Numbers of positions' lists are said never to be null: that reads 15 to 19% faster.
    """

    def lists(value: pa.DataType) -> pa.DataType:
        return pa.list_(_of_none_null(value))

    support = (
        ("support_q", lists(pa.uint8()))
        if targets.precision == "compact"
        else ("support_logprobs", lists(pa.float32()))
    )
    weights = [("weights", lists(pa.float32()))] if targets.has_weights else []
    tail_samples = [("tail_sample_ids", lists(pa.int32()))] if targets.tail_samples else []
    return pa.schema(
        [
            pa.field("row", pa.int32(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            ("id", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("weight", pa.float32()),
            *([("position_weights", pa.list_(pa.float32()))] if position_weights else []),
            ("positions", pa.list_(pa.int32())),
            ("support_ids", lists(pa.int32())),
            support,
            *weights,
            *tail_samples,
            *[(name, pa.list_(pa.float16())) for name in _PER_POSITION],
            ("truncated", pa.bool_()),
        ]
    )


def _of_none_null(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


def older_schema(schema: pa.Schema) -> pa.Schema:
    """The columns as files have them that were written when any number of a list might be null by the schema."""

    def older(kind: pa.DataType) -> pa.DataType:
        return pa.list_(older(kind.value_type)) if pa.types.is_list(kind) else kind

    return pa.schema([field.with_type(older(field.type)) for field in schema])


def parquet_writer(
    path: Path, targets: TargetSettings, level: int = LEVEL, position_weights: bool = False
) -> pq.ParquetWriter:
    """A writer of capture files. `level` of zstd: 1 for what is soon read and removed.

    Encodings are those that came out smallest on real text (benchmarks/storage.py). Splitting ids into their
    bytes gives zstd what bit-packed dictionary indices hide from it: high bytes that repeat.
    """
    schema = capture_schema(targets, position_weights)
    split = {"support_ids", "support_q", "support_logprobs", "tail_sample_ids"}.intersection(schema.names)
    compact = targets.precision == "compact"  # then few different values
    numbers = [f"{name}.list.element" for name in (*_PER_POSITION, "input_ids") if compact or name == "input_ids"]
    weights = ["weights.list.element.list.element"] if targets.has_weights else []
    weights += ["position_weights.list.element"] if position_weights else []
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=level,
        write_page_checksum=True,
        use_dictionary=["key", "id", *numbers, *weights],
        column_encoding={f"{name}.list.element.list.element": "BYTE_STREAM_SPLIT" for name in sorted(split)},
    )


def _known(values_P: NDArray[np.float16]) -> pa.Array:
    return pa.array(values_P, mask=np.isnan(values_P))


def _lists(
    values: pa.Array, lengths: Sequence[int] | NDArray[np.int64], kind: pa.DataType | None = None
) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def to_arrow(rows: Sequence[CapturedRow], settings: TargetSettings, position_weights: bool = False) -> pa.Table:
    """Rows as one table. A position without a tail has a null in `tail_logprob` and no tail samples; an unknown
    `gold_logprob` or `entropy` is null, and so are the `position_weights` of a row of which each position counts 1.
    """
    schema = capture_schema(settings, position_weights)
    targets = [row.targets for row in rows]
    positions = [t.n_positions for t in targets]

    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([getattr(t, name) for t in targets]).astype(dtype) if rows else np.zeros(0, dtype=dtype)

    def at_positions(numbers: NDArray[Any], lengths_P: NDArray[np.int64]) -> pa.ListArray:
        values = pa.array(numbers)
        return _lists(_lists(values, lengths_P, _of_none_null(values.type)), positions)

    kept_P = joined("kept_P", np.int64)
    logprobs_N = joined("support_logprobs_N", np.float32)
    compact = settings.precision == "compact"
    drawn = []
    if settings.has_weights:
        drawn.append(at_positions(joined("weights_N", np.float32), kept_P))
    if settings.tail_samples:
        drawn.append(at_positions(joined("tail_sample_ids_M", np.int32), joined("tail_samples_P", np.int64)))

    def rounded(name: str) -> NDArray[np.float16]:
        values = joined(name, np.float32)
        return (np.rint(values * POSITION_STEPS) / POSITION_STEPS if compact else values).astype(np.float16)

    tail_P = rounded("tail_logprob_P")
    per_position = {
        "tail_logprob": pa.array(tail_P, mask=np.isneginf(tail_P)),
        **{name: _known(rounded(f"{name}_P")) for name in ("gold_logprob", "entropy")},
    }
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int32) if rows else np.zeros(0, dtype=np.int32)
    columns = [
        pa.array([row.row for row in rows], pa.int32()),
        pa.array([row.key for row in rows], pa.string()),
        pa.array([row.id for row in rows], pa.string()),
        _lists(pa.array(ids), [len(row.input_ids) for row in rows]),
        pa.array([row.weight for row in rows], pa.float32()),
        *([pa.array([row.position_weights for row in rows], pa.list_(pa.float32()))] if position_weights else []),
        _lists(pa.array(joined("positions_P", np.int32)), positions),
        at_positions(joined("support_ids_N", np.int32), kept_P),
        at_positions(encode_logprobs(logprobs_N) if compact else logprobs_N, kept_P),
        *drawn,
        *[_lists(per_position[name], positions) for name in _PER_POSITION],
        pa.array([row.truncated for row in rows], pa.bool_()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _split(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Row offsets and flat values of a list column."""
    if column.num_chunks == 1:
        array = column.chunk(0)  # to combine a single chunk is to copy it
    else:
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], array.values.slice(offsets[0], offsets[-1] - offsets[0])


def _split_lists(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Offsets of the positions' lists, from 0, and flat values of a column of lists of lists."""
    _, lists = _split(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy()


def _padded_ids(offsets_P1: NDArray[np.int64], ids_M: NDArray[np.int32]) -> NDArray[np.int32]:
    """The lists as rows [P, longest], -1 where a list has ended."""
    lengths_P = np.diff(offsets_P1)
    filled_PS = np.arange(lengths_P.max(initial=0)) < lengths_P[:, None]
    ids_PS = np.full(filled_PS.shape, -1, dtype=np.int32)
    ids_PS[filled_PS] = ids_M
    return ids_PS


def from_arrow(table: pa.Table) -> list[CapturedRow]:
    """Rows as they were stored: log-probabilities decoded, not normalised. Columns of NOT_LEARNT_FROM may be left out:
    then nothing is known of them. ValueError where a number is none: what is not known is stored as null.
    """
    ids_offsets, ids = _split(table["input_ids"])
    row_offsets, positions = _split(table["positions"])
    kept_offsets, support_ids = _split_lists(table["support_ids"])
    if "support_q" in table.column_names:
        logprobs = decode_logprobs(_split_lists(table["support_q"])[1])
    else:
        logprobs = _split_lists(table["support_logprobs"])[1]
    weights = _split_lists(table["weights"])[1] if "weights" in table.column_names else None
    samples = _padded_ids(*_split_lists(table["tail_sample_ids"])) if "tail_sample_ids" in table.column_names else None

    def floats(name: str, null: float) -> NDArray[np.float32]:
        if name not in table.column_names:
            return np.full(len(positions), np.nan, dtype=np.float32)
        stored = _split(table[name])[1].cast(pa.float32())
        values_P = stored.fill_null(null).to_numpy(zero_copy_only=False)
        if np.count_nonzero(np.isnan(values_P)) != (stored.null_count if np.isnan(null) else 0):
            raise ValueError(f"{name} that is not a number")
        return values_P

    tail, gold, entropy = (
        floats(name, null) for name, null in zip(_PER_POSITION, (-np.inf, np.nan, np.nan), strict=True)
    )
    ids, positions = ids.to_numpy(), positions.to_numpy()
    # One loop a row, and lists of Python's own integers for it: slicing by numpy's is slow.
    row_starts, ids_starts, kept_starts = row_offsets.tolist(), ids_offsets.tolist(), kept_offsets[row_offsets].tolist()
    plain = table.select(["row", "key", "id", "weight", "truncated"]).to_pylist()
    position_weights = position_weights_of(table)
    rows: list[CapturedRow] = []
    for i, values in enumerate(plain):
        start, stop = row_starts[i], row_starts[i + 1]
        kept_start, kept_stop = kept_starts[i], kept_starts[i + 1]
        targets = SparseTargets(
            positions_P=positions[start:stop],
            offsets_P1=kept_offsets[start : stop + 1] - kept_start,
            support_ids_N=support_ids[kept_start:kept_stop],
            support_logprobs_N=logprobs[kept_start:kept_stop],
            tail_logprob_P=tail[start:stop],
            gold_logprob_P=gold[start:stop],
            entropy_P=entropy[start:stop],
            weights_N=None if weights is None else weights[kept_start:kept_stop],
            tail_sample_ids_PS=None if samples is None else samples[start:stop],
        )
        input_ids = ids[ids_starts[i] : ids_starts[i + 1]]
        weights_P = position_weights[i]
        rows.append(CapturedRow(input_ids=input_ids, targets=targets, position_weights=weights_P, **values))
    return rows


def position_weights_of(table: pa.Table) -> list[NDArray[np.float32] | None]:
    """The weights of each row's positions; None where the row has none."""
    if "position_weights" not in table.column_names:
        return [None] * table.num_rows
    return [row.values.to_numpy() if row.is_valid else None for row in table["position_weights"]]
