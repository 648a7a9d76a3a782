"""Students that learn from a part of what was captured: what they see, what names them, and who says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_assets.capture_catalog.query import run_query
from distill_assets.capture_catalog.verify import verify_catalog
from distill_assets.foundation.errors import CaptureError, SettingsError, StaleInputs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.orchestration.status import home_status, what_follows
from distill_assets.orchestration.students import StudentSide
from distill_assets.student_model.saving import StudentRecord
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.contents import Needs
from tests import tiny
from tests.bench import Bench, edit, put_back

WHERE = "supervised_tokens > 25 AND shard <> 's1'"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A home whose shards are captured and catalogued, and whose students are not trained."""
    root = tiny.make_home(tmp_path_factory.mktemp("made") / "home", teacher_folder, rows=10)
    Pipeline(Home(root)).check_tokenizers()
    capture_all(root)
    return root


@pytest.fixture
def root(made: Path) -> Iterator[Path]:
    with put_back(made):
        yield made


def capture_all(root: Path) -> None:
    bench = Bench(root)
    for shard in bench.shards.values():
        capture_shard(bench.spec, shard, bench.store, device="cpu")
    Pipeline(Home(root)).refresh_catalog()


def ask(root: Path, sql: str) -> list[tuple[object, ...]]:
    return list(run_query(root / "catalog.duckdb", root / "captures", sql).rows)


def ids(root: Path) -> dict[str, str]:
    return {str(kind): name for kind, name in StudentSide(Pipeline(Home(root))).ids.items()}


def train(root: Path, kind: str = "student") -> StudentRecord:
    return StudentSide(Pipeline(Home(root))).train(kind, device="cpu", force=False)  # type: ignore[arg-type]


def asset(root: Path, name: str) -> tuple[str, str]:
    [found] = [a for a in home_status(Pipeline(Home(root))).assets if a.asset == name]
    return found.state, found.reason


def test_students_learn_from_the_chosen_rows_and_the_catalog_lists_no_other(root: Path) -> None:
    edit(root, training={"where": WHERE})
    wanted = ask(root, f"SELECT shard, row, key FROM examples WHERE role = 'train' AND ({WHERE}) ORDER BY ALL")
    assert 0 < len(wanted) < 20
    for kind in ("student", "control"):
        record = train(root, kind)
        assert record.report.rows == len(wanted)
        name = record.spec.student_id
        learnt = f"SELECT shard, row, key FROM student_examples WHERE student_id = '{name}' ORDER BY ALL"
        assert ask(root, learnt) == wanted
        listed = ask(root, f"SELECT shard, examples FROM student_captures WHERE student_id = '{name}' ORDER BY ALL")
        assert listed == [(s, sum(shard == s for shard, *_ in wanted)) for s in ("s0", "s2")]
    assert WHERE in (root / "students" / name / "README.md").read_text()
    pipeline = Pipeline(Home(root))
    needs = Needs(pipeline.spec, pipeline.discovery, pipeline.store)
    captures = [entry.capture for entry in pipeline.entries]
    found = verify_catalog(pipeline.home.catalog, pipeline.store, needs, root / "students", captures, True, (), print)
    assert list(found) == []


def test_a_record_that_names_too_few_rows_leaves_the_others_readable(root: Path) -> None:
    edit(root, training={"where": WHERE})
    name = train(root).spec.student_id
    file = root / "students" / name / "distillation.json"
    record = json.loads(file.read_text())
    first, second = record["spec"]["captures"]
    first["chosen"], second["chosen"] = "", "a0"  # of ten rows: none, and the first eight with two of them chosen
    file.write_text(json.dumps(record))
    Pipeline(Home(root)).refresh_catalog()
    assert ask(root, "SELECT shard, row FROM student_examples ORDER BY ALL") == [("s2", 0), ("s2", 2)]


def test_predicate_and_rows_are_in_the_id(root: Path) -> None:
    everything = ids(root)
    found = []
    for where in ("true", "row >= 0", "row > 0", "row > 0 OR shard = 's1'"):
        edit(root, training={"where": where})
        found.append(ids(root))
    edit(root, training={"where": None})
    assert ids(root) == everything
    for kind in ("student", "control"):
        assert len({each[kind] for each in (everything, *found)}) == 5


def test_a_mixture_leaves_out_and_repeats_whole_rows(root: Path) -> None:
    edit(root, training={"mixture": {"s0": 0, "s1": 0.5, "s2": 2}, "epochs": 2})
    record = train(root)
    listed = ask(root, "SELECT shard, examples, chosen IS NULL FROM student_captures ORDER BY ALL")
    assert listed == [("s1", 10, True), ("s2", 10, True)]
    tokens = dict(ask(root, "SELECT shard, supervised_tokens FROM captures"))
    assert record.report.supervised_tokens == tokens["s1"] + 4 * tokens["s2"]  # type: ignore[operator]
    assert "s0 0, s1 0.5, s2 2" in (root / "students" / record.spec.student_id / "README.md").read_text()

    edit(root, training={"mixture": {"s*": 0.3}, "where": "row < 5", "epochs": 1})
    record = train(root)
    name = record.spec.student_id
    seen = ask(root, f"SELECT row FROM student_examples WHERE student_id = '{name}'")
    assert 0 < len(seen) == record.report.rows < 15 and {row for (row,) in seen} <= set(range(5))


def test_what_a_shard_is_called_is_not_part_of_a_mixture(root: Path) -> None:
    edit(root, training={"mixture": {"s1": 0.5}})
    before = ids(root)
    (root / "shards" / "s1.jsonl").rename(root / "shards" / "web.jsonl")
    capture_all(root)
    edit(root, training={"mixture": {"web*": 0.5}})
    assert ids(root) == before
    edit(root, training={"mixture": {"web*": 0.6}})
    assert ids(root) != before
    edit(root, training={"mixture": {"*": 1}})
    everything = ids(root)
    edit(root, training={"mixture": {}})
    assert ids(root) == everything


def test_rows_that_come_change_the_id_only_where_they_are_chosen(root: Path) -> None:
    edit(root, training={"where": "shard <> 's9'"})
    before = ids(root)
    tiny.write_jsonl(root / "shards" / "s9.jsonl", tiny.example_rows(2, start=500))
    capture_all(root)
    assert ids(root) == before
    edit(root, training={"where": "shard <> 's8'"})
    other = ids(root)
    tiny.write_jsonl(root / "shards" / "s9.jsonl", tiny.example_rows(3, start=500))
    capture_all(root)
    assert ids(root) != other


def test_weights_of_positions_are_in_the_id_and_cost_no_teacher(root: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The cat sat"}]
    tiny.write_jsonl(root / "shards" / "s0.jsonl", [{"messages": talk}, *tiny.example_rows(2)])
    capture_all(root)
    before = ids(root)
    tiny.write_jsonl(
        root / "shards" / "s0.jsonl", [{"messages": [talk[0], {**talk[1], "weight": 0.5}]}, *tiny.example_rows(2)]
    )
    capture_all(root)
    after = ids(root)
    assert all(after[kind] != before[kind] for kind in ("student", "control"))
    assert ask(root, "SELECT sum(rows_captured) FROM captures WHERE shard = 's0'") == [(0,)]
    assert ask(root, "SELECT count(*) > 0 FROM positions WHERE shard = 's0' AND row = 0") == [(True,)]
    assert ask(root, "SELECT count(DISTINCT shard) FROM positions") == [(4,)]  # files with the column and without


def test_a_damaged_capture_makes_no_student(root: Path) -> None:
    capture = next((root / "captures").glob("*/s1@*.parquet"))
    content = bytearray(capture.read_bytes())
    content[len(content) // 3] ^= 0xFF  # its footer is whole, so it is current
    capture.write_bytes(content)
    with pytest.raises(CaptureError, match=r"s1@.*damaged or unreadable .*; delete it and run again"):
        train(root)
    assert not list((root / "students").glob("*/model.safetensors"))


def test_a_capture_of_another_tokenizer_makes_no_student(root: Path, tmp_path: Path) -> None:
    files = list((root / "captures").glob("*/*.parquet"))
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([text[::-1] for text in tiny.TEXT]))
    edit(root, teacher={"model": str(other)})
    home = Home(root)
    Pipeline(home).check_tokenizers()
    folder = root / "captures" / Pipeline(home).spec.capture_id
    folder.mkdir()
    for file in files:  # under the name that one of this teacher would have
        shutil.copy(file, folder)
    assert len(Pipeline(home).uncaptured) == 4
    with pytest.raises(StaleInputs, match="has no current capture, so no student is trained"):
        train(root)


def test_while_the_catalog_is_behind_nobody_is_named(root: Path) -> None:
    edit(root, training={"where": WHERE})
    train(root)
    assert asset(root, "student_model") == ("current", "")
    (root / "catalog.duckdb").unlink()
    assert asset(root, "student_model") == ("stale", "capture_catalog is not current")
    assert asset(root, "student_evaluation") == ("missing", "never made")
    pipeline = Pipeline(Home(root))
    assert "student_model" in [following.asset for following in what_follows(pipeline, pipeline.plan())]
    Pipeline(Home(root)).refresh_catalog()
    assert asset(root, "student_model") == ("current", "")

    tiny.write_jsonl(root / "shards" / "s0.jsonl", tiny.example_rows(2, start=700))
    bench = Bench(root)
    capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu")
    with pytest.raises(StaleInputs, match="which is behind the captures"):
        train(root)
    assert not AssetStates(Pipeline(Home(root))).is_current("student_model")


def test_what_is_no_predicate_is_said_before_the_teacher_is_paid_for(root: Path) -> None:
    edit(root, training={"where": "entropy < 4"})
    with pytest.raises(SettingsError, match=r"training\.where \(entropy < 4\)"):
        Pipeline(Home(root)).plan()
    with pytest.raises(SettingsError, match=r"training\.where"):
        Pipeline(Home(root)).require_usable_pair()


def test_what_chooses_nothing_fails_the_student_and_nothing_else(root: Path) -> None:
    edit(root, training={"where": "tokens > 1000000"})
    state, reason = asset(root, "student_model")
    assert state == "failed" and "no training example fulfils it" in reason
    assert asset(root, "capture_catalog") == ("current", "")
    with pytest.raises(SettingsError, match="no training example fulfils it"):
        train(root)
