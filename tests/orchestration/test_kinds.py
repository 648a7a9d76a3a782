"""Each kind of targets through the whole chain of real Dagster runs: capture to report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.bring_up_to_date import RunReport, bring_up_to_date
from tests import tiny
from tests.bench import edit, replace

KINDS = {
    "sampled": {"kind": "sampled", "samples": 12},
    "threshold": {"kind": "threshold", "tau": 0.03},
    "tail samples": {"kind": "top_k", "k": 6, "tail_samples": 3},
}


def run(root: Path) -> RunReport:
    return bring_up_to_date(defs, Home(root), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_a_student_a_control_and_a_report(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    training = {"learning_rate": 2.0e-3, "batch_tokens": 256, "epochs": 6, "kd_weight": 1.0}
    home = Home(tiny.make_home(tmp_path / "home", teacher_folder, shards=2, training=training))
    replace(home.root, targets=KINDS[kind])
    report = run(home.root)
    assert report.failures == {} and report.rows_captured == 18
    assert report.report is not None and report.student_id is not None and report.control_id is not None
    record = json.loads((Path(report.report).parent / "report.json").read_text())
    assert record["details"]["targets"]["kind"] == KINDS[kind]["kind"]
    assert record["overall"]["differences"]["untrained"]["kl_nats"]["high"] < 0  # paired on held-out rows: it learnt
    curve = [point["kd"] for point in record["curves"]["student"]]
    assert curve[-1] < curve[0]
    card = (home.students / report.student_id / "README.md").read_text()
    assert ("forward_kl" in card) == (kind == "tail samples")
    assert run(home.root).materialized == []

    edit(home.root, training={"tail_sample_weight": 1.0})
    again = run(home.root)
    assert (again.student_id != report.student_id) == (kind == "tail samples")
    assert again.control_id == report.control_id and again.rows_captured == 0
    assert again.report is not None
    losses = json.loads((Path(again.report).parent / "report.json").read_text())["curves"]["student"]
    assert (losses[0]["kd"] > 1.1 * curve[0]) == (
        kind == "tail samples"
    )  # the same rows and weights, twice the samples' share
