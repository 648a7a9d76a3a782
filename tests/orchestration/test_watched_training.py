"""A training with validation rows, adapters and early stopping in real Dagster runs: seen while it runs, told after."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from transformers import AutoModelForCausalLM

from distill_assets.definitions import defs
from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.home import Home
from distill_assets.foundation.progress import Progress
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.progress import FIRST_SECONDS, shown_by
from distill_assets.student_model.saving import read_student
from tests import tiny
from tests.bench import Bench, edit
from tests.student_model.events import scalars

WATCHED: dict[str, Any] = {
    "data": {"validation": ["s1"]},
    "training": {
        "learning_rate": 0.6,  # far too large: it gets worse
        "batch_tokens": 64, "epochs": 4, "lora": {"rank": 2}, "early_stopping": 1, "validate_every": 2,
    },
}  # fmt: skip
LINE = re.compile(
    r"train student: \d+ of \d+ steps, [\d.e+]+ steps/s, \d+ s left, loss [\d.]+(, validation KL [\d.]+)?, "
    r"[\d,]+ supervised tokens/s"
)


class Page:
    """What the page of the run that trains the student shows, asked while the training is under way."""

    def __init__(self, home: Home) -> None:
        self._home, self.lines = home, list[str]()

    def listen(self, progress: Progress) -> None:
        if progress.step == "train student" and progress.done == 2:
            time.sleep(FIRST_SECONDS)
        if progress.step == "train student" and progress.done == 3:
            with open_instance(self._home) as instance:
                [run] = instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
                messages = [entry.user_message for entry in instance.all_logs(run.run_id)]
            self.lines = [message for message in messages if message.startswith("train student")]


def test_a_watched_training_is_seen_while_it_runs_and_told_of_after(tmp_path: Path, teacher_folder: Path) -> None:
    home = Home(tiny.make_home(tmp_path / "home", teacher_folder, shards=2, **WATCHED))
    page = Page(home)
    with shown_by(page.listen):
        report = bring_up_to_date(defs, home, device="cpu")
    assert page.lines and all(LINE.fullmatch(line) for line in page.lines)

    assert report.student_id and report.control_id and report.report
    stopped_early: list[bool] = []
    for kind, student in (("student", report.student_id), ("control", report.control_id)):
        made = read_student(home.students / student).report
        assert made.stopping is not None
        stopped_early.append(made.steps < made.stopping.planned_steps)
        AutoModelForCausalLM.from_pretrained(home.students / student)
        shown = scalars(home.tensorboard / f"{kind}-{student}")
        assert len(shown["train/loss"]) == made.steps and len(shown["validation/ce"]) == len(made.validation)
        words = f"{kind}: {made.stopping.in_words()}"
        assert words in Path(report.report).read_text()
        details = json.loads(Path(report.report).with_name("report.json").read_text())["details"]
        assert details["stopping"][kind] == made.stopping.in_words()
    assert any(stopped_early)
    assert {use.shard for use in read_student(home.students / report.student_id).spec.captures} == {"s0", "s1"}
    assert bring_up_to_date(defs, home, device="cpu").materialized == []


def test_a_home_without_validation_rows_is_refused_before_the_teacher_is_paid_for(bench: Bench) -> None:
    edit(bench.home.root, data={"validation": ["val*"]}, training={"early_stopping": 3})
    for attempt in (lambda: Pipeline(bench.home).plan(), lambda: bring_up_to_date(defs, bench.home, device="cpu")):
        with pytest.raises(SettingsError, match=r"early_stopping needs .* no shard matches data\.validation \(val\*\)"):
            attempt()
    assert not bench.home.captures.exists()
    tiny.write_jsonl(bench.home.root / "shards" / "val-1.jsonl", tiny.example_rows(2, start=700))
    assert len(Pipeline(bench.home).plan().todo) == 5
