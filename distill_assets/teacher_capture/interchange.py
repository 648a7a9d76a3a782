"""The JSONL interchange: one example a line, plain lists, for tools that read no Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.files import replacing
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import Capture, read_rows


def export_jsonl(captures: Iterable[Capture], out: Path) -> int:
    """Write captures as `{"input_ids":[T], "topk_ids":[T lists], "topk_logprobs":[T lists], ...}`.

    Log-probabilities are as stored. Positions that were not scored, and the last, are `[]` (null
    in the lists of one number a position). `id` and `weight` are written where a row has one; a
    weight of 1 is left out. One shard is in memory at a time; the file appears whole
    or not at all. Returns the number of rows written. Raises CaptureError for captures of anything but
    plain top_k: what was drawn would read there as if it were the teacher's likeliest ids.
    """
    rows = 0
    with replacing(out) as beside, beside.open("w", encoding="utf-8") as stream:
        for capture in captures:
            _require_plain(capture)
            for row in read_rows(capture.path):
                stream.write(json.dumps(_as_object(row), ensure_ascii=False, separators=(",", ":")) + "\n")
                rows += 1
    return rows


def _require_plain(capture: Capture) -> None:
    targets = capture.identity["targets"]
    if targets["kind"] != "top_k" or targets.get("tail_samples"):
        kept = "tail samples" if targets["kind"] == "top_k" else f"targets of kind {targets['kind']}"
        raise CaptureError(
            f"shard {capture.shard} was captured with {kept}, which JSONL has no place for; read its Parquet file "
            "instead, or capture it with plain targets.kind: top_k"
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
    for p, t in enumerate(targets.positions_P.tolist()):
        part = slice(targets.offsets_P1[p], targets.offsets_P1[p + 1])
        topk_ids[t] = targets.support_ids_N[part].tolist()
        topk_logprobs[t] = [_short(x) for x in targets.support_logprobs_N[part]]
        for name, values in numbers.items():
            value = getattr(targets, f"{name}_P")[p]
            values[t] = _short(value) if np.isfinite(value) else None
        loss_mask[t + 1] = 1
    line: dict[str, Any] = {"input_ids": row.input_ids.tolist(), "topk_ids": topk_ids, "topk_logprobs": topk_logprobs}
    line |= numbers | {"loss_mask": loss_mask}
    if row.id is not None:
        line["id"] = row.id
    if row.weight != 1:
        line["weight"] = _short(np.float32(row.weight))
    return line


def _short(value: np.float32) -> float:
    """The shortest decimal that reads back as the same float32."""
    return float(np.format_float_positional(value, unique=True, trim="0"))
