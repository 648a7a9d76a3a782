"""A capture file read to its last byte: is it what its name, its footer and its own rows say?

Row group by row group, so that a file of any size takes the memory of one. Checksums find bytes that
changed on disk; the rest finds what was written wrong: a key that is not the hash of its row, mass that
is not one, statistics that are not those of the rows.

Legend: P = supervised positions of a row, N = ids kept in the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_assets.dataset_shards.encode import row_key
from distill_assets.foundation.errors import CaptureError, CaptureOutOfReach
from distill_assets.foundation.fingerprints import SHORT, digest
from distill_assets.foundation.problems import ProblemKind
from distill_assets.teacher_capture.arrow import from_arrow
from distill_assets.teacher_capture.chunks import Cost, Figures, total_stats
from distill_assets.teacher_capture.sparse_targets import LEAST_MASS, ROUNDED_LOG_MASS, CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import IMPORTED, Capture, CaptureStats, read_capture, reading
from distill_assets.teacher_capture.target_rules import TargetRules, position_rounding

_KEPT_MASS_OFF = 0.01  # what rounding may change of a mean: a mass m by m (1 - m) / 32 at most
_COUNTED = ("rows", "tokens", "supervised_tokens", "kept_ids", "truncated_rows")
_A_LIST_A_POSITION = ("support_ids", "support_q", "support_logprobs", "weights")


def inspect_capture(path: Path, n_ids: int | None) -> Iterator[tuple[ProblemKind, str]]:
    """What is wrong with a capture file, each in a few words. Ids must be below `n_ids`, where that is known.

    A file that cannot be read, or whose rows are wrong, is one problem: the first that is found.
    CaptureOutOfReach where nobody can tell.
    """
    try:
        capture = read_capture(path)
        if reason := _footer_problem(capture):
            yield "mismatch", reason
        rules = TargetRules.of(capture, n_ids)
        parts: list[Figures] = []
        for rows in capture_row_groups(path):
            start = sum(part.rows for part in parts)
            for i, row in enumerate(rows):
                if reason := _row_problem(row, start + i, n_ids, capture) or rules.broken_by(row):
                    raise CaptureError(f"row {start + i}: {reason}")
            parts.append(Figures.of(rows, Cost(0, 0, 0.0)))
        if reason := statistics_problem(capture, parts):
            raise CaptureError(reason)
    except CaptureOutOfReach:
        raise
    except CaptureError as error:
        yield "damaged", str(error).removeprefix(f"{path}: ").partition("; ")[0]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        yield "damaged", f"its footer cannot be true ({error!r})"


def capture_row_groups(path: Path) -> Iterator[list[CapturedRow]]:
    """The rows of a capture file, a row group at a time, as stored; CaptureError where it is damaged."""
    with reading(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            if (uneven := _uneven_column(table)) is not None:
                raise CaptureError(f"{path}: row group {group}: {uneven} has not one entry a position")
            yield from_arrow(table)


def _uneven_column(table: pa.Table) -> str | None:
    """The first list column that does not follow `positions`, or does not hold a number for each kept id."""
    followers = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
    expected = pc.list_value_length(table["positions"])
    for name in followers:
        lengths = pc.list_value_length(table[name])
        if name == "position_weights":
            lengths = pc.coalesce(lengths, expected)  # null: each position counts 1
        if name != "input_ids" and not lengths.equals(expected):
            return str(name)
    kept = pc.list_value_length(pc.list_flatten(table["support_ids"]))
    for name in _A_LIST_A_POSITION:
        if name in followers and not pc.list_value_length(pc.list_flatten(table[name])).equals(kept):
            return name
    return None


def _footer_problem(capture: Capture) -> str | None:
    """What the footer says that its file's place or its own identity does not."""
    place = (capture.path.parent.name, capture.path.stem)
    folder = IMPORTED if capture.is_imported else capture.capture_id
    if place != (folder, f"{capture.shard}@{capture.version[:SHORT]}"):
        return f"by its footer it is {folder}/{capture.shard}@{capture.version[:SHORT]}, by its name {'/'.join(place)}"
    if digest(dict(capture.identity)) != capture.capture_id:
        return f"the identity in its footer is not that of capture {capture.capture_id}"
    return None


def _row_problem(row: CapturedRow, number: int, n_ids: int | None, capture: Capture) -> str | None:
    targets, n_tokens = row.targets, len(row.input_ids)
    positions_P = targets.positions_P
    if row.row != number:
        return f"numbered {row.row}"
    if not (math.isfinite(row.weight) and row.weight >= 0):
        return f"weight {row.weight}"
    if row.position_weights is not None and not ((row.position_weights >= 0) & np.isfinite(row.position_weights)).all():
        return "position_weights that are not finite, or below 0"
    if not _in_range(row.input_ids, n_ids):
        return "input_ids outside the vocabulary"
    if not len(positions_P) or not _in_range(positions_P, n_tokens - 1) or (np.diff(positions_P) <= 0).any():
        return "positions that are not ascending within the row"
    mask_T = np.zeros(n_tokens, dtype=bool)
    mask_T[positions_P + 1] = True
    if row_key(row.input_ids, mask_T) != row.key:
        return "its key is not the hash of its tokens and positions"
    return _targets_problem(targets, n_ids, capture)


def _in_range(values: np.ndarray, end: int | None) -> bool:
    return bool((values >= 0).all() and (end is None or (values < end).all()))


def _targets_problem(targets: SparseTargets, n_ids: int | None, capture: Capture) -> str | None:
    position_N = np.repeat(np.arange(targets.n_positions), targets.kept_P)
    logprobs_N = targets.support_logprobs_N
    if not targets.kept_P.all():
        return "a position without an id"
    if not _in_range(targets.support_ids_N, n_ids):
        return "support_ids outside the vocabulary"
    order = np.lexsort((targets.support_ids_N, position_N))
    twice = (np.diff(position_N[order]) == 0) & (np.diff(targets.support_ids_N[order]) == 0)
    if twice.any():
        return "an id twice at one position"
    if not np.isfinite(logprobs_N).all():
        return "log-probabilities that are not finite"
    if ((np.diff(logprobs_N) > 0) & (np.diff(position_N) == 0)).any():
        return "log-probabilities that are not descending"
    if targets.weights_N is not None and not np.isfinite(targets.weights_N).all():
        return "weights that are not finite"
    if targets.weights_N is not None and (targets.weights_N < 0).any():
        return "weights below 0"
    if targets.tail_sample_ids_PS is not None and not _in_range(targets.tail_sample_ids_M, n_ids):
        return "tail_sample_ids outside the vocabulary"
    for name in ("tail_logprob", "gold_logprob", "entropy"):
        values_P = getattr(targets, f"{name}_P")
        may_be_unknown = capture.is_imported and name != "tail_logprob"
        if (np.isnan(values_P).any() and not may_be_unknown) or np.isposinf(values_P).any():
            return f"{name} that is not a number"
    log_mass_P = targets.log_total_mass_P()
    off_P = np.abs(log_mass_P)
    if (off_P > _most_log_mass(capture)).any():
        worst = int(off_P.argmax())
        return f"position {targets.positions_P[worst]} holds a mass of {math.exp(log_mass_P[worst]):.3f}, not 1"
    return None


def _most_log_mass(capture: Capture) -> float:
    """Nats that the stored mass of a position may be off one: by rounding, and by what was taken in."""
    return ROUNDED_LOG_MASS - (math.log(LEAST_MASS) if capture.is_imported else 0.0)


def statistics_problem(capture: Capture, parts: Sequence[Figures]) -> str | None:
    """The first statistic of a footer that is not that of the rows: counts exactly, means but for the rounding
    of storage, before which they were taken.
    """
    said = capture.stats
    if not parts:
        return None if said.rows == 0 else f"its footer says rows {said.rows}, it holds none"
    found = total_stats(parts, said.bad_rows, said.rows_without_target)
    for name in _COUNTED:
        if getattr(found, name) != getattr(said, name):
            return f"its footer says {name} {getattr(said, name)}, its rows {getattr(found, name)}"
    precision = capture.identity["targets"]["precision"]
    means = {
        "mean_entropy": (said.mean_entropy, found.mean_entropy),
        "mean gold_logprob": (_mean_gold(said), _mean_gold(found)),
    }
    for name, (in_footer, in_rows) in means.items():
        if in_footer is None or in_rows is None:
            if in_footer is not in_rows:
                return f"{name} is known to its footer or to its rows, not to both"
            continue
        most = position_rounding(in_footer, precision) + 1e-4
        if math.isfinite(in_footer) and math.isfinite(in_rows) and abs(in_footer - in_rows) > most:
            return f"its footer says {name} {in_footer:.4f}, its rows {in_rows:.4f}"
    if abs(said.mean_kept_mass - found.mean_kept_mass) > _KEPT_MASS_OFF:
        return f"its footer says mean_kept_mass {said.mean_kept_mass:.4f}, its rows {found.mean_kept_mass:.4f}"
    return None


def _mean_gold(stats: CaptureStats) -> float | None:
    return None if stats.teacher_perplexity is None else -math.log(stats.teacher_perplexity)
