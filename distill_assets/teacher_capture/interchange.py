"""The JSONL interchange: one example a line, plain lists, for tools that read no Parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.encode import EncodedRow, Encoder, encode_shard
from distill_assets.foundation.errors import CaptureError, UsageError
from distill_assets.foundation.files import replacing
from distill_assets.teacher_capture.inspection import capture_row_groups
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import Capture


def require_free(out: Path, taken: Iterable[Path], replace: bool) -> None:
    """UsageError where an export to `out` would be lost or lose something: in a `taken` place or below one, in a
    folder that is not there, or, unless `replace`, over a file."""
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder; make it, or export elsewhere")
    reached = {out.resolve(), out.parent.resolve() / out.name}
    for place in taken:
        if any(path.is_relative_to(place.resolve()) for path in reached):
            raise UsageError(f"{out} lies in {place}, which is the home's own; export elsewhere")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file in it")
    if not replace and (out.exists() or out.is_symlink()):
        raise UsageError(f"{out} is there already; export with --replace to replace it, or name another file")


def export_jsonl(captures: Iterable[Capture], out: Path) -> int:
    """Write captures as `{"input_ids":[T], "topk_ids":[T lists], "topk_logprobs":[T lists], ...}`.

    Log-probabilities are as stored. Positions that were not scored, and the last, are `[]` (null
    in the lists of one number a position). `id` and weights are written where a row has them; a
    `weight` of 1 is left out, and so are `token_weights` [T] of which each is 1. One row group is in memory at
    a time; the file appears whole or not at all. Returns the number of rows written. Raises CaptureError for
    targets that are not top_k: what was drawn would read there as if it were the teacher's likeliest ids. Tail samples
    are left out: the mass they were drawn from is there.
    """
    rows = 0
    with replacing(out) as beside, beside.open("w", encoding="utf-8") as stream:
        for capture in captures:
            _require_top_k(capture)
            for group in capture_row_groups(capture.path):
                for row in group:
                    stream.write(_as_line(_as_object(row), row, _token_weights(row)))
                rows += len(group)
    return rows


def export_encoded(shards: Iterable[Shard], encoder: Encoder, out: Path) -> int:
    """Write shards' rows as the teacher reads them, `{"input_ids":[T], "loss_mask":[T]}` with `id` and weights as
    `export_jsonl`, for another engine to score. Whole or not at all; returns the number of rows.

    Raises ShardError and UnreadableFile as `encode_shard`.
    """
    rows = 0
    with replacing(out) as beside, beside.open("w", encoding="utf-8") as stream:
        for shard in shards:
            for row in encode_shard(shard, encoder).rows:
                line = {"input_ids": row.input_ids.tolist(), "loss_mask": row.loss_mask.astype(int).tolist()}
                stream.write(_as_line(line, row, row.token_weights))
                rows += 1
    return rows


def _require_top_k(capture: Capture) -> None:
    if (kind := capture.identity["targets"]["kind"]) != "top_k":
        raise CaptureError(
            f"shard {capture.shard} was captured with targets of kind {kind}, which JSONL has no place for; read its "
            "Parquet file instead, or capture it with targets.kind: top_k"
        )


def _as_object(row: CapturedRow) -> dict[str, Any]:
    n_tokens = len(row.input_ids)
    targets = row.targets
    topk_ids: list[list[int]] = [[] for _ in range(n_tokens)]
    topk_logprobs: list[list[float]] = [[] for _ in range(n_tokens)]
    numbers: dict[str, list[float | None]] = {
        name: [None] * n_tokens for name in ("tail_logprob", "gold_logprob", "entropy")
    }
    loss_mask = [0] * n_tokens
    ids, logprobs = targets.support_ids_N.tolist(), _short(targets.support_logprobs_N)
    known = {name: _short(getattr(targets, f"{name}_P")) for name in numbers}
    for p, t in enumerate(targets.positions_P.tolist()):
        part = slice(targets.offsets_P1[p], targets.offsets_P1[p + 1])
        topk_ids[t], topk_logprobs[t] = ids[part], logprobs[part]
        for name, values in numbers.items():
            values[t] = known[name][p] if math.isfinite(known[name][p]) else None
        loss_mask[t + 1] = 1
    line: dict[str, Any] = {"input_ids": row.input_ids.tolist(), "topk_ids": topk_ids, "topk_logprobs": topk_logprobs}
    return line | numbers | {"loss_mask": loss_mask}


def _token_weights(row: CapturedRow) -> NDArray[np.float32] | None:
    if row.position_weights is None:
        return None
    weights_T = np.ones(len(row.input_ids), dtype=np.float32)
    weights_T[row.targets.positions_P + 1] = row.position_weights
    return weights_T


def _as_line(values: dict[str, Any], row: CapturedRow | EncodedRow, token_weights: NDArray[np.float32] | None) -> str:
    """The line of a row, with its own id and weights."""
    if token_weights is not None:
        values["token_weights"] = _short(token_weights)
    if row.id is not None:
        values["id"] = row.id
    if row.weight != 1:
        [values["weight"]] = _short(np.array([row.weight], dtype=np.float32))
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"


def _short(values: NDArray[np.float32]) -> list[float]:
    """The shortest decimals that read back as the same float32s."""
    return values.astype(str).astype(np.float64).tolist()
