"""Imported shards in the whole chain: they train students, and no run ever gives them to the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from safetensors.torch import load_file

from distill_assets.capture_catalog.query import run_query
from distill_assets.definitions import defs
from distill_assets.foundation.errors import HomeError, InterchangeError, TrainingError
from distill_assets.foundation.home import Home
from distill_assets.orchestration.bring_up_to_date import RunReport, bring_up_to_date
from distill_assets.orchestration.due import due
from distill_assets.orchestration.garbage import collect_garbage
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.partitions import recorded_versions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.orchestration.status import home_status
from distill_assets.orchestration.students import StudentSide
from distill_assets.orchestration.verify import verify
from distill_assets.teacher_capture.importing import ImportReport
from distill_assets.teacher_capture.interchange import export_jsonl
from tests import tiny
from tests.bench import edit, replace


def run(root: Path, **options: object) -> RunReport:
    return bring_up_to_date(defs, Home(root), device="cpu", **options)  # type: ignore[arg-type]


def states(root: Path) -> dict[str, str]:
    return {shard.shard: shard.state for shard in home_status(Pipeline(Home(root))).shards}


def weights(root: Path, student: str | None) -> dict[str, torch.Tensor]:
    return load_file(root / "students" / str(student) / "model.safetensors")


def of_another_engine(home: Path, teacher: Path, scratch: Path) -> Path:
    """What another teacher says of shard s1 of `home`, as few keys as an engine gives: no tail, gold or entropy."""
    other = tiny.make_home(scratch / "other", teacher, shards=2)
    run(other, shards=["s1"])
    export_jsonl([entry.capture for entry in Pipeline(Home(other)).entries], scratch / "full.jsonl")
    rows = [json.loads(line) for line in (scratch / "full.jsonl").read_text().splitlines()]
    return tiny.write_jsonl(
        scratch / "in.jsonl",
        [{name: row[name] for name in ("input_ids", "topk_ids", "topk_logprobs", "loss_mask")} for row in rows],
    )


def test_a_student_learns_from_an_imported_shard(tmp_path: Path, teacher_folder: Path, tokenizer: object) -> None:
    home = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    before = run(home)
    another = tiny.save_model(tmp_path / "teacher", tokenizer, seed=7)  # type: ignore[arg-type]
    source = of_another_engine(home, another, tmp_path)
    imported = Pipeline(Home(home)).import_jsonl(source, "s1", shifted=False, replace=True).capture
    assert set(states(home).values()) == {"current"}

    after = run(home)
    assert (after.captured_shards, after.rows_captured, after.failures) == ([], 0, {})
    assert after.student_id != before.student_id and after.control_id == before.control_id  # the same rows
    old, new = weights(home, before.student_id), weights(home, after.student_id)
    assert any(not torch.equal(old[name], new[name]) for name in old)
    record = json.loads((home / "students" / str(after.student_id) / "distillation.json").read_text())
    assert {c["shard"]: c["capture_id"] for c in record["spec"]["captures"]}["s1"] == imported.capture_id
    with open_instance(Home(home)) as instance:
        recorded = recorded_versions(instance, "teacher_capture")
    assert recorded["s1"].endswith(imported.capture_id) and recorded["s0"].endswith(
        Pipeline(Home(home)).spec.capture_id
    )
    assert run(home).materialized == []

    query = "SELECT teacher, dtype, mean_entropy, teacher_perplexity, kept_ids FROM captures WHERE shard = 's1'"
    [(teacher, dtype, entropy, perplexity, kept)] = run_query(home / "catalog.duckdb", home / "captures", query).rows
    assert (teacher, dtype, entropy) == ("imported from in.jsonl", None, None)
    assert kept == imported.stats.kept_ids and perplexity == imported.stats.teacher_perplexity

    edit(home, targets={"k": 4, "precision": "exact"})  # imported captures keep their own
    third = run(home)
    assert "s1" not in third.captured_shards and {"s0", "heldout"} <= set(third.captured_shards)
    counts = run_query(
        home / "catalog.duckdb", home / "captures", "SELECT shard, count(*) FROM kept_ids GROUP BY ALL"
    ).rows
    assert dict(counts)["s1"] == imported.stats.kept_ids
    assert run(home, force=True, shards=["s1"]).captured_shards == []


def test_an_edited_import_stops_the_students_and_is_never_given_to_the_teacher(
    tmp_path: Path, teacher_folder: Path
) -> None:
    home = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    source = of_another_engine(home, teacher_folder, tmp_path)
    pinned = Pipeline(Home(home)).import_jsonl(source, "s1", shifted=False, replace=True).capture.path
    shard = home / "shards" / "s1.jsonl"
    own_rows = shard.read_text()
    shard.write_text(own_rows + '{"input_ids": [7, 8, 9]}\n')
    report = run(home)
    assert report.captured_shards == ["heldout", "s0"] and "import it again" in report.failures["s1"]
    assert report.student_id is None and states(home)["s1"] == "failed"
    with open_instance(Home(home)) as instance:
        failing = due(instance, AssetStates(Pipeline(Home(home))), "teacher_capture")
        pinned.unlink()
        mended = due(instance, AssetStates(Pipeline(Home(home))), "teacher_capture")
    assert failing is not None and mended is not None and failing.keys() == mended.keys() == {"s1"}
    assert failing["s1"] != mended["s1"]  # asked for again once there is something new to try
    assert run(home).captured_shards == ["s1"]


def test_an_import_with_a_row_deleted_needs_no_teacher(tmp_path: Path, teacher_folder: Path) -> None:
    home = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    source = of_another_engine(home, teacher_folder, tmp_path)
    pinned = Pipeline(Home(home)).import_jsonl(source, "s1", shifted=False, replace=True).capture.path
    whole = run(home)
    shard = home / "shards" / "s1.jsonl"
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[1:]))
    assert states(home)["s1"] == "changed"
    kept = collect_garbage(Home(home), dry_run=False, imported=True)
    assert pinned.exists() and not kept.removed  # the capture to come is copied from it
    with open_instance(Home(home)) as instance:
        asked = due(instance, AssetStates(Pipeline(Home(home))), "teacher_capture")
    assert asked is not None and asked.keys() == {"s1"}
    report = run(home)
    assert (report.captured_shards, report.rows_captured, report.rows_reused) == (["s1"], 0, 5)
    assert report.checks and all(check["passed"] for check in report.checks.values())
    assert report.student_id not in (None, whole.student_id) and run(home).materialized == []
    assert verify(Home(home)).problems == ()
    query = "SELECT derived_from, examples FROM captures WHERE shard = 's1'"
    [(derived_from, examples)] = run_query(home / "catalog.duckdb", home / "captures", query).rows
    assert derived_from and examples == 5


def test_an_imported_held_out_shard_is_evaluated_without_gold_or_entropy(tmp_path: Path, teacher_folder: Path) -> None:
    home = tiny.make_home(tmp_path / "home", teacher_folder, shards=1, evaluation={"dense": True})
    assert StudentSide(Pipeline(Home(home))).is_dense
    run(home, shards=["heldout"])
    [entry] = Pipeline(Home(home)).entries
    export_jsonl([entry.capture], tmp_path / "full.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    unknown = [{**row, "gold_logprob": [None] * len(row["input_ids"]), "entropy": None} for row in rows]
    source = tiny.write_jsonl(tmp_path / "in.jsonl", unknown)
    capture = Pipeline(Home(home)).import_jsonl(source, "heldout", shifted=False, replace=True).capture
    assert capture.stats.teacher_perplexity is None and capture.stats.mean_entropy is None
    report = run(home)
    assert report.evaluation is not None and report.captured_shards == ["s0"]
    assert report.evaluation["models"]["teacher"]["perplexity"] is None
    assert report.evaluation["models"]["student"]["kl_nats"]["value"] > 0
    assert (
        "dense_kl_nats" not in report.evaluation["models"]["student"]
    )  # the teacher at hand is not the one that spoke
    text = (Path(str(report.report)).parent / "report.json").read_text()
    assert "NaN" not in text and "teacher's entropy" not in Path(str(report.report)).read_text()
    query = "SELECT count(*), count(mean_entropy), count(teacher_perplexity) FROM examples WHERE shard = 'heldout'"
    assert run_query(home / "catalog.duckdb", home / "captures", query).rows == ((len(rows), 0, 0),)


def test_verify_knows_imports_gc_keeps_them_and_kinds_do_not_mix(
    tmp_path: Path, teacher_folder: Path, tokenizer: object
) -> None:
    home = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    another = tiny.save_model(tmp_path / "teacher", tokenizer, seed=7)  # type: ignore[arg-type]
    source = of_another_engine(home, another, tmp_path)
    (home / "shards" / "s1.jsonl").unlink()
    replace(home, targets={"k": 8, "tail_samples": 2})  # learnt from beside rows without
    pinned = Pipeline(Home(home)).import_jsonl(source, "s1", shifted=False, replace=False).capture.path
    assert verify(Home(home)).problems == ()  # no catalog was ever made
    report = run(home)
    assert report.checks and all(check["passed"] for check in report.checks.values())
    assert verify(Home(home)).problems == ()
    shard = home / "shards" / "s1.jsonl"
    rows = shard.read_text()
    shard.write_text(rows + rows.splitlines()[0] + "\n")  # it was edited: failed, but the import is all there is
    assert collect_garbage(Home(home), dry_run=False).removed == () and pinned.exists()
    shard.write_text(rows)
    assert states(home)["s1"] == "current"

    replace(home, targets={"kind": "sampled", "samples": 5})
    with pytest.raises(InterchangeError, match=r"set targets\.kind: top_k"):
        Pipeline(Home(home)).import_jsonl(source, "s2", shifted=False, replace=False)
    with pytest.raises(TrainingError, match="captures of different kinds of targets"):
        run(home)

    (home / "catalog.duckdb").unlink()
    pinned.unlink()
    missing = [problem for problem in verify(Home(home)).problems if problem.path == pinned]
    assert [problem.kind for problem in missing] == ["missing"] and "it was imported" in missing[0].message


def foreign_lines(n: int) -> list[dict[str, object]]:
    """Rows of three tokens, of another engine."""
    lists = {"topk_ids": [[7, 40], [8, 41], []], "topk_logprobs": [[-0.5, -2.0]] * 2 + [[]]}
    return [{"input_ids": [10 + i % 200, 10 + i // 200, 9], **lists} for i in range(n)]


def do_import(home: Path, key: str, n: int = 3, **options: Any) -> ImportReport:
    source = tiny.write_jsonl(home / "in.jsonl", foreign_lines(n))
    return Pipeline(Home(home)).import_jsonl(source, key, **{"shifted": False, "replace": False, **options})


def problems(home: Path) -> list[str]:
    return [f"{problem.kind} {problem.path.name}" for problem in verify(Home(home)).problems]


def test_gc_waits_for_an_import_and_verify_leaves_it_alone(home: Path) -> None:
    staged: list[list[str]] = []

    def look(_: object) -> None:
        if not staged:
            staged.append([path.name for path in (home / "captures" / "imported").iterdir()])
            with pytest.raises(HomeError, match="import"):
                collect_garbage(Home(home), dry_run=False)
            assert problems(home) == []

    done = do_import(home, "mine", 600, on_progress=look)
    assert staged and staged[0][0].startswith(".partial-") and done.capture.stats.rows == 600
    (home / "captures" / "imported" / ".partial-1234").mkdir()  # what one that was killed leaves
    (home / "catalog.duckdb").unlink(missing_ok=True)
    assert "orphaned .partial-1234" in problems(home)
    assert [r.path.name for r in collect_garbage(Home(home), dry_run=False).removed] == [".partial-1234"]


def test_an_import_belongs_to_its_content_whatever_the_shard_is_called(home: Path) -> None:
    pinned = do_import(home, "mine").capture
    (home / "shards" / "mine.jsonl").rename(home / "shards" / "yours.jsonl")
    assert states(home)["yours"] == "current"
    [entry] = Pipeline(Home(home)).entries
    assert (entry.capture.path, entry.capture.shard) == (pinned.path, "yours")
    Pipeline(Home(home)).refresh_catalog()
    assert problems(home) == []
    tiny.write_jsonl(home / "shards" / "mine.jsonl", [{"text": "Other rows under the old name."}])
    plan = {shard.shard: shard for shard in Pipeline(Home(home)).plan().shards}["mine"]
    assert plan.state == "failed" and "give the file another name" in plan.reason
    (home / "shards" / "mine.jsonl").unlink()

    def gone(imported: bool) -> tuple[list[Path], str]:
        found = collect_garbage(Home(home), dry_run=False, imported=imported)
        return [removal.path for removal in found.removed], " ".join(found.kept)

    for imported in (False, True):
        assert gone(imported)[0] == [] and "imported captures" not in gone(imported)[1]
    edit(home, data={"shards": "shards/s*"})
    assert gone(False)[0] == [] and "nobody can make them again; `distill gc --imported`" in gone(False)[1]
    assert gone(True)[0] == [] and "does not match their file" in gone(True)[1]
    (home / "shards" / "yours.jsonl").unlink()
    assert gone(False)[0] == [] and pinned.path.exists()
    assert gone(True)[0] == [pinned.path, pinned.path.parent] and not pinned.path.parent.exists()


def test_shards_of_one_imported_content_share_its_examples(home: Path) -> None:
    path = do_import(home, "mine").capture.path
    shutil.copy(home / "shards" / "mine.jsonl", home / "shards" / "yours.jsonl")

    def refreshed() -> tuple[dict[str, int], int]:
        """Examples by shard, and how many the catalog has stored."""
        pipeline = Pipeline(Home(home))
        pipeline.refresh_catalog()
        with duckdb.connect(pipeline.home.catalog, read_only=True) as catalog:
            by_shard = catalog.execute("SELECT shard, count(*) FROM examples GROUP BY ALL").fetchall()
            [(stored,)] = catalog.execute("SELECT count(*) FROM capture_examples").fetchall()
        return dict(by_shard), stored

    assert refreshed() == ({"mine": 3, "yours": 3}, 3)
    do_import(home, "other", 2)
    assert refreshed() == ({"mine": 3, "yours": 3, "other": 2}, 5) and problems(home) == []
    for shard in ("mine", "yours"):
        (home / "shards" / f"{shard}.jsonl").unlink()
    refreshed()
    assert path in [removal.path for removal in collect_garbage(Home(home), dry_run=False, imported=True).removed]
    assert refreshed() == ({"other": 2}, 2)


def test_a_damaged_import_is_mended_by_importing_it_again(home: Path) -> None:
    path = do_import(home, "mine").capture.path
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    [damage] = [problem for problem in verify(Home(home)).problems if problem.kind == "damaged"]
    assert damage.path == path and "import it again" in damage.message and "gc" not in damage.message
    assert do_import(home, "mine").written
    assert "damaged" not in " ".join(problems(home)) and not do_import(home, "mine").written
