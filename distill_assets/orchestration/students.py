"""What the students and their evaluation would be now: the second half of a home's pipeline.

As in the first half, what needs torch is imported where it is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_assets.capture_catalog.choosing import Rows, chosen_rows
from distill_assets.capture_catalog.refresh import CatalogEntry, refresh_lineage
from distill_assets.foundation.errors import DistillError, ModelError, StaleInputs, TrainingError
from distill_assets.foundation.files import alone, remove
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.foundation.tokenizers import load_tokenizer
from distill_assets.orchestration import compatibility
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.student_ids import LEARNT_FROM, student_ids
from distill_assets.orchestration.training_processes import train_in_processes
from distill_assets.student_evaluation.identity import HTML_FILE, JSON_FILE, ROWS_FILE, SUMMARY_FILE, report_id
from distill_assets.student_model.checkpoints import folder_under_way
from distill_assets.student_model.choice import Choice, choices
from distill_assets.student_model.identity import StudentKind, events_folder
from distill_assets.student_model.origin import initial_weights_fingerprint
from distill_assets.student_model.saving import StudentRecord, StudentReport, StudentSpec, read_student
from distill_assets.student_model.vocabulary import FitReport, StudentVocabulary, fit_rows, shared_vocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import read_row_keys, read_rows
from distill_assets.tokenizer_compatibility.facts import tokenizer_facts

if TYPE_CHECKING:
    from distill_assets.student_evaluation.report import ReportDetails


class StudentSide:
    """Students of a pipeline: names, training, evaluation."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.home = pipeline.home
        self.settings = pipeline.settings

    def _entries(self, role: str) -> list[CatalogEntry]:
        return [entry for entry in self.pipeline.entries if entry.role == role]

    def _rows(self, role: str) -> list[CapturedRow]:
        return Choice.read_all(self._choices(role))

    def _choices(self, role: str) -> list[Choice]:
        """What of the captures is learnt from; validation rows are watched, all of them."""
        captures = [entry.capture for entry in self._entries(role)]
        if role != "train":
            return [Choice(capture) for capture in captures]
        return choices(captures, self.settings.training, self._chosen)

    @cached_property
    def _chosen(self) -> dict[str, Rows] | None:
        """What `training.where` chooses of the training shards; StaleInputs while the catalog is not current."""
        if (where := self.settings.training.where) is None:
            return None
        return chosen_rows(self.home.catalog, self.home.captures, self.pipeline.catalog_identity, where)

    @property
    def can_be_named(self) -> bool:
        """Whether it is known which rows the students learn from: what is chosen is known to a current catalog only."""
        return self.settings.training.where is None or self.pipeline.catalog_is_current

    @property
    def kinds(self) -> tuple[StudentKind, ...]:
        return ("student", "control") if self.settings.control else ("student",)

    def require_inputs(self) -> None:
        """StaleInputs unless every shard on disk is captured: a student never trains on part of the data unsaid."""
        if missing := self.pipeline.uncaptured:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise StaleInputs(
                f"shard {missing[0]}{more} has no current capture, so no student is trained; `distill plan` says why"
            )
        self.pipeline.require_roles()
        self.pipeline.require_validation()

    # identities ------------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> StudentVocabulary:
        """Ids that both sides have: the outcomes of the student's softmax."""
        folder = self.pipeline.student_folder
        width = compatibility.student_head_width(self.settings, self.pipeline.spec, folder)
        student = tokenizer_facts(folder, self.pipeline.hashes).ids if folder else None
        return shared_vocabulary(self.pipeline.spec.tokenizer.ids, student, width)

    @cached_property
    def ids(self) -> dict[StudentKind, str]:
        """Identity of each student that should exist."""
        return self._find_ids()

    def _find_ids(self, anew: bool = False) -> dict[StudentKind, str]:
        hashes = self.pipeline.hashes
        start = initial_weights_fingerprint(
            self.settings.student,
            self.pipeline.spec.teacher,
            self.pipeline.student_folder,
            self.vocabulary.n_real,
            self.settings.training.seed,
            hashes,
        )
        captures = {role: [entry.capture for entry in self._entries(role)] for role in LEARNT_FROM}
        found = student_ids(
            self.kinds,
            captures,
            self.pipeline.spec,
            self.settings.training,
            start,
            self.vocabulary,
            hashes,
            self._choices,
            anew,
        )
        hashes.save()
        return found

    def folder(self, kind: StudentKind) -> Path:
        return self.home.students / self.ids[kind]

    def exists(self, kind: StudentKind) -> bool:
        """Whether the student of this identity is there, whole; not while it has no name."""
        if not self.can_be_named:
            return False
        try:
            ModelFolder(kind, self.folder(kind), None).weight_files()
            return read_student(self.folder(kind)).spec.student_id == self.ids[kind]
        except (TrainingError, ModelError):
            return False

    @property
    def is_dense(self) -> bool:
        """Whether figures are made against the teacher's whole distribution: where that is asked for, and the
        teacher of all held-out rows is the one at hand, not another engine's.
        """
        return self.settings.evaluation.dense and not any(e.capture.is_imported for e in self._entries("heldout"))

    @property
    def report_id(self) -> str:
        heldout = [(e.capture.shard, e.capture.version, e.capture.capture_id) for e in self._entries("heldout")]
        spec = self.pipeline.spec
        dense = [spec.identity["weights"], spec.dtype] if self.is_dense else None
        return report_id({str(kind): i for kind, i in self.ids.items()}, heldout, dense)

    @property
    def report_folder(self) -> Path:
        return self.home.reports / self.report_id

    @property
    def report_exists(self) -> bool:
        return self.evaluation() is not None

    # making ----------------------------------------------------------------------------------

    def train(
        self,
        kind: StudentKind,
        *,
        device: str,
        force: bool,
        processes: int = 1,
        on_progress: ProgressListener = ignore_progress,
        **how: Any,
    ) -> StudentRecord:
        """The student of this kind, trained unless it exists, and the catalog told of it. `how`: to `train_student`."""
        self.require_inputs()
        self.pipeline.require_usable_pair()
        if force or not self.exists(kind):
            self.ids = self._find_ids(anew=True)  # nothing is made under a name that is only remembered
        with alone(self.home.training / f"{self.ids[kind]}.lock"):  # two would work in one folder of checkpoints
            if force or not self.exists(kind):
                self._train(kind, device, force, processes, on_progress, how)
        refresh_lineage(self.home.catalog, self.home.students)
        return read_student(self.folder(kind))

    def _train(
        self,
        kind: StudentKind,
        device: str,
        force: bool,
        processes: int,
        on_progress: ProgressListener,
        how: dict[str, Any],
    ) -> None:
        from distill_assets.foundation.devices import resolve_device
        from distill_assets.teacher_capture.teacher import release_teacher

        where = [str(resolve_device(device)), *([processes] if processes > 1 else [])]
        under_way = folder_under_way(self.home.training, self.ids[kind], " x ".join(map(str, where)))
        if force:
            remove(under_way)
        release_teacher()  # the student needs the room, and never the teacher
        if processes == 1:
            self.train_here(kind, device=device, under_way=under_way, on_progress=on_progress, **how)
        else:
            train_in_processes(
                self.home,
                kind,
                self.ids[kind],
                under_way,
                processes=processes,
                device=device,
                how=how,
                on_progress=on_progress,
            )

    def train_here(
        self, kind: StudentKind, *, device: str, under_way: Path, on_progress: ProgressListener, **how: Any
    ) -> None:
        """Train in this process, which may be one of several, whatever there is already."""
        from distill_assets.student_model.training import train_student

        train_student(
            self._spec(kind),
            self._initial(device),
            load_tokenizer(self.pipeline.spec.teacher),
            self._rows("train"),
            self.folder(kind),
            validation=self._rows("validation"),
            max_missing_mass=self.settings.tokenizer.max_missing_mass,
            device=device,
            under_way=under_way,
            events=events_folder(self.home.tensorboard, kind, self.ids[kind]),
            on_progress=on_progress,
            **how,
        )

    def _spec(self, kind: StudentKind) -> StudentSpec:
        return StudentSpec(
            student_id=self.ids[kind],
            kind=kind,
            teacher=self.pipeline.spec.teacher.name,
            origin=self.settings.student,
            training=self.settings.training,
            vocabulary=self.vocabulary,
            captures=tuple(choice.used() for role in LEARNT_FROM for choice in self._choices(role)),
            accepted_differences=tuple(self.pipeline.tokenizer_report().accepted),
            targets=self.pipeline.spec.targets.identity if kind == "student" else {},
        )

    def _initial(self, device: str) -> Any:
        from distill_assets.foundation.devices import resolve_device
        from distill_assets.student_model.initial import initial_student

        return initial_student(
            self.settings.student,
            self.pipeline.spec.teacher,
            self.pipeline.student_folder,
            self.vocabulary.n_real,
            self.settings.training.seed,
            resolve_device(device),
        )

    def evaluate(self, *, device: str, force: bool, on_progress: ProgressListener = ignore_progress) -> Path:
        """The report's folder; written unless it exists. StaleInputs when a student is missing."""
        self.require_inputs()
        for kind in self.kinds:
            if not self.exists(kind):
                raise StaleInputs(f"the {kind} {self.ids[kind]} is not trained yet; `distill run` trains it")
        if force or not self.report_exists:
            self._write_report(device, on_progress)
        return self.report_folder

    def _write_report(self, device: str, on_progress: ProgressListener) -> None:
        from distill_assets.foundation.devices import resolve_device
        from distill_assets.foundation.language_model import load_model
        from distill_assets.student_evaluation.evaluation import evaluate
        from distill_assets.student_evaluation.report import write_report
        from distill_assets.teacher_capture.teacher import teacher_in_turn

        target = resolve_device(device)
        models = {"untrained": lambda: self._initial(device).eval()}
        for kind in self.kinds:
            saved = ModelFolder(kind, self.folder(kind), None)
            models[kind] = lambda saved=saved: load_model(saved, "float32", target)  # type: ignore[misc]
        heldout = self._entries("heldout")
        width = compatibility.student_head_width(self.settings, self.pipeline.spec, self.pipeline.student_folder)
        fitted = {e.capture.shard: fit_rows(read_rows(e.capture.path), self.vocabulary, width) for e in heldout}
        spec = self.pipeline.spec
        tokenizer = load_tokenizer(spec.teacher)
        evaluation = evaluate(
            {shard: rows for shard, (rows, _) in fitted.items()},
            models,
            self.vocabulary,
            teacher=partial(teacher_in_turn, spec.weights, spec.dtype, device) if self.is_dense else None,
            end_id=tokenizer.eos_token_id,
            on_progress=on_progress,
        )
        trained = {kind: read_student(self.folder(kind)).report for kind in self.kinds}
        curves: dict[str, list[dict[str, Any]]] = {
            kind: [asdict(point) for point in report.curve] for kind, report in trained.items()
        }
        details = self._details({shard: fit for shard, (_, fit) in fitted.items()}, trained)
        write_report(evaluation, curves, details, tokenizer, self.report_folder)

    def _details(self, fits: Mapping[str, FitReport], trained: Mapping[StudentKind, StudentReport]) -> ReportDetails:
        from distill_assets.student_evaluation.report import Heldout, ReportDetails, TrainedOn

        spec, student = self.pipeline.spec, trained["student"]
        learnt = {row.key for choice in self._choices("train") for row in choice.row_keys()}
        heldout = tuple(
            Heldout(
                shard=c.shard,
                version=c.version,
                capture_id=c.capture_id,
                rows_trained_on=sum(row.key in learnt for row in read_row_keys(c.path)),
                fit=fits[c.shard],
            )
            for c in (e.capture for e in self._entries("heldout"))
        )
        return ReportDetails(
            report_id=self.report_id,
            teacher=spec.teacher.name,
            student=self.settings.student.in_words(),
            student_id=self.ids["student"],
            control_id=self.ids.get("control"),
            heldout=heldout,
            teacher_weights=spec.identity["weights"],
            teacher_dtype=spec.dtype,
            dense=self.is_dense,
            n_ids=len(self.vocabulary),
            supervise=self.settings.data.supervise,
            max_length=self.settings.data.max_length,
            targets=spec.targets.identity,
            training=self.settings.training.effective(spec.targets),
            trained_on=TrainedOn(student.rows, student.supervised_tokens, student.steps),
            stopping={kind: report.stopping.in_words() for kind, report in trained.items() if report.stopping},
        )

    # what was found --------------------------------------------------------------------------

    def evaluation(self) -> dict[str, Any] | None:
        """report.json of the current report, or None when it was not made, whole."""
        try:
            if not all((self.report_folder / name).is_file() for name in (HTML_FILE, SUMMARY_FILE, ROWS_FILE)):
                return None
            record: dict[str, Any] = json.loads((self.report_folder / JSON_FILE).read_text(encoding="utf-8"))
            return record if {"verdict", "summary", "overall"} <= record.keys() else None
        except (OSError, ValueError, AttributeError, DistillError):
            return None
