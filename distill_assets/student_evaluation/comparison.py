"""Any students of a home beside each other, from what their reports kept: no model runs.

A student is compared only with students measured on the same held-out rows, and only by figures
that mean the same for all of them. Differences are from the first one named, paired over rows.

Legend: R = rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_assets.foundation.errors import DistillError, StaleInputs, UsageError
from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.settings import TargetSettings
from distill_assets.student_evaluation.bootstrap import INTERVAL, Estimate, Resampled
from distill_assets.student_evaluation.identity import CONTROL, JSON_FILE, ROWS_FILE, STUDENT
from distill_assets.student_evaluation.metrics import BY_KEY, DENSE_METRICS, METRICS, RECORD_METRICS, Metric
from distill_assets.student_evaluation.per_row import RowSums
from distill_assets.student_model.identity import TARGETS_ONLY
from distill_assets.student_model.saving import RECORD_FILE, StudentRecord, read_student


@dataclass(frozen=True)
class Measured:
    """A student in one report: under which name, on which rows, against which teacher."""

    report_id: str
    name: str
    details: Mapping[str, Any]
    written: float  # of the report's file: the newer of two is taken
    per_row: RowSums

    @property
    def rows(self) -> str:
        """A hash of the rows and of how many positions of each were scored, whatever their order."""
        return digest(sorted(zip(self.per_row.keys, self.per_row.positions_R.tolist(), strict=True)))


@dataclass(frozen=True)
class Compared:
    """A student: its figures, and what they are away from the first one's (none for the first itself)."""

    student_id: str
    kind: str
    report_id: str
    figures: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """Students in the order they were named. `settings` are those that differ, by student in that order;
    `notes` say what is not compared and why.
    """

    students: tuple[Compared, ...]
    metrics: tuple[str, ...]
    settings: Mapping[str, tuple[str, ...]]
    heldout: tuple[str, ...]
    n_rows: int
    n_positions: int
    notes: tuple[str, ...]

    @property
    def comparison_id(self) -> str:
        """16 hexadecimal digits: which students of which reports, in which order."""
        return digest([[s.student_id, s.report_id] for s in self.students])

    @property
    def measures(self) -> tuple[Metric, ...]:
        return tuple(BY_KEY[key] for key in self.metrics)

    @property
    def names(self) -> dict[str, str]:
        """Beginnings of the ids, as long as it takes to tell them apart."""
        ids = [s.student_id for s in self.students]
        length = next(n for n in range(8, 17) if len({i[:n] for i in ids}) == len(ids))
        return {i: i[:length] for i in ids}

    def to_json(self) -> dict[str, Any]:
        told = {
            "metrics": {m.key: m.to_json() for m in self.measures},
            "intervals": INTERVAL,
            "differences_are": "a student's figure minus that of the first",
        }
        return {"comparison_id": self.comparison_id, **asdict(self), **told}


def compare_students(given: Sequence[str], students: Path, reports: Path) -> Comparison:
    """Compare the students whose ids, or unmistakable beginnings of them, are given.

    UsageError for an id that is unknown, ambiguous or given twice; StaleInputs for one that was never
    measured, or not on the rows of the others; TrainingError where a student's record is damaged.
    """
    ids = [resolve_id(start, students) for start in given]
    if len(ids) < 2:
        raise UsageError("name at least two students to compare; their ids are the folders in students/")
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise UsageError(f"student {twice} is named twice; name different ones")
    found = {i: [m for m in _measured(reports) if m.details[f"{m.name}_id"] == i] for i in ids}
    chosen = _on_the_same_rows(found)
    records = [read_student(students / i) for i in ids]
    metrics, notes = _comparable(chosen)
    compared, n_rows, n_positions = _figures(ids, chosen, records, metrics)
    first = chosen[0].details["heldout"]
    return Comparison(
        students=compared,
        metrics=tuple(m.key for m in metrics),
        settings=_what_differs(records),
        heldout=tuple(f"{h['shard']} version {h['version'][:12]}" for h in first),
        n_rows=n_rows,
        n_positions=n_positions,
        notes=notes,
    )


def resolve_id(start: str, students: Path) -> str:
    """The one student in the folder whose id begins so."""
    known = sorted(file.parent.name for file in students.glob(f"*/{RECORD_FILE}"))
    fitting = [i for i in known if start and i.startswith(start)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(f"student {start} may be {' or '.join(fitting)}; write more of its id")
    there = f"there are: {', '.join(known)}" if known else "none is trained yet; `distill run` trains one"
    raise UsageError(f"there is no student {start or '(empty)'} in {students}; {there}")


def _measured(reports: Path) -> Iterator[Measured]:
    """Both students of each whole report; one that cannot be read measured nobody."""
    for file in sorted(reports.glob(f"*/{JSON_FILE}")):
        try:
            details = json.loads(file.read_text(encoding="utf-8"))["details"]
            per_row = RowSums.read(file.with_name(ROWS_FILE))
            for name in (STUDENT, CONTROL):
                if details[f"{name}_id"] is not None:
                    yield Measured(details["report_id"], name, details, file.stat().st_mtime, per_row)
        except (OSError, ValueError, KeyError, TypeError, DistillError):
            continue


def _on_the_same_rows(found: Mapping[str, Sequence[Measured]]) -> list[Measured]:
    """A report for each student, all on the same rows: dense ones if all have one there, then the newest."""
    for i, measured in found.items():
        if not measured:
            raise StaleInputs(
                f"student {i} was never measured, or its report is gone; set distill.yaml back to what made it, and "
                "`distill run` measures it without training it again"
            )
    common = set.intersection(*({m.rows for m in measured} for measured in found.values()))
    if not common:
        told = "; ".join(
            f"{i} on {' and '.join(sorted({_heldout(m) for m in measured}))}" for i, measured in found.items()
        )
        raise StaleInputs(
            f"these students were not measured on the same held-out rows ({told}), so they are not compared; set "
            "distill.yaml back to what made one of them, and `distill run` measures it on the rows of now"
        )

    def best(rows: str) -> list[Measured]:
        on_them = [[m for m in measured if m.rows == rows] for measured in found.values()]
        if all(any(m.details["dense"] for m in measured) for measured in on_them):
            on_them = [[m for m in measured if m.details["dense"]] for measured in on_them]
        return [max(measured, key=lambda m: m.written) for measured in on_them]

    return max(map(best, sorted(common)), key=lambda chosen: min(m.written for m in chosen))


def _heldout(m: Measured) -> str:
    shards = ", ".join(f"{h['shard']} {h['version'][:8]}" for h in m.details["heldout"])
    return f"{shards} ({len(m.per_row.keys)} rows, {int(m.per_row.positions_R.sum()):,} positions)"


def _comparable(chosen: Sequence[Measured]) -> tuple[list[Metric], tuple[str, ...]]:
    """The metrics that mean the same for all, and a sentence for each group that does not."""
    details = [m.details for m in chosen]
    one_teacher = len({d["teacher_weights"] for d in details}) == 1
    one_record = len({tuple(sorted(h["capture_id"] for h in d["heldout"])) for d in details}) == 1
    all_dense = all(d["dense"] for d in details)
    wanted = {"perplexity"}
    notes = []
    if not one_teacher:
        notes.append("Their teachers differ, so only what needs no teacher is compared.")
    else:
        wanted.add("agreement_share")
        if all_dense:  # what else there is, is a bound of these
            wanted |= {m.key for m in DENSE_METRICS}
        elif one_record:
            wanted |= {m.key for m in RECORD_METRICS}
        else:
            notes.append(
                "Their records of the held-out rows keep different ids, so KL and acceptance on the kept ids do not "
                "mean the same and are left out; with evaluation.dense true for all, the dense ones can be compared."
            )
    return [m for m in METRICS if m.key in wanted], tuple(notes)


def _figures(
    ids: Sequence[str], chosen: Sequence[Measured], records: Sequence[StudentRecord], metrics: Sequence[Metric]
) -> tuple[tuple[Compared, ...], int, int]:
    """Figures and differences from the first, from the same replicates; rows are joined by their keys.

    They stay in the order of the first student's report, so that its intervals are those of that report.
    """
    by_key = [np.argsort(np.array(m.per_row.keys), kind="stable") for m in chosen]
    place_R = np.argsort(by_key[0])
    values = {
        (i, metric.key): m.per_row.sums[m.name, metric.key][order_R[place_R]]
        for i, m, order_R in zip(ids, chosen, by_key, strict=True)
        for metric in metrics
    }
    positions_R = chosen[0].per_row.positions_R
    found = Resampled.of(np.stack([positions_R.astype(np.float64), *values.values()], axis=1), list(values))
    compared = tuple(
        Compared(
            student_id=i,
            kind=record.spec.kind,
            report_id=m.report_id,
            figures={metric.key: found.figure(i, metric.key) for metric in metrics},
            differences={}
            if i == ids[0]
            else {metric.key: found.difference(i, ids[0], metric.key) for metric in metrics},
        )
        for i, m, record in zip(ids, chosen, records, strict=True)
    )
    return compared, found.n_rows, found.n_positions


def _what_differs(records: Sequence[StudentRecord]) -> dict[str, tuple[str, ...]]:
    """Settings and data that are not the same for all, by dotted name, in the order of the students."""
    flat = [_settings(record) for record in records]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    told = {name: tuple(settings.get(name, "–") for settings in flat) for name in names}
    return {name: values for name, values in told.items() if len(set(values)) > 1}


def _settings(record: StudentRecord) -> dict[str, str]:
    """What made a student, without what makes no difference to one of its kind."""
    spec = record.spec
    training = spec.training.effective(TargetSettings.model_validate(dict(spec.targets)))
    without = TARGETS_ONLY if spec.kind == "control" else frozenset()
    captures = {used.shard: used for used in spec.captures}
    values: dict[str, Any] = {"kind": spec.kind, "teacher": spec.teacher}
    values |= {f"student.{name}": value for name, value in spec.origin.model_dump(exclude_none=True).items()}
    values |= {f"targets.{name}": value for name, value in spec.targets.items()}
    values |= {f"training.{name}": value for name, value in training.items() if name not in without}
    values["data.capture"] = ", ".join(sorted({used.capture_id for used in spec.captures}))
    values |= {f"data.{shard}": f"{used.version[:12]}, {used.rows} rows" for shard, used in captures.items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
