"""Ids of students are remembered under the stamps of captures, and never outlive what they are made of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dagster as dg
import pytest
import torch
from safetensors.torch import load_file

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.students import StudentSide
from distill_assets.teacher_capture.capture import capture_shard
from tests import tiny
from tests.bench import Bench, edit

WRONG = {"student": "0123456789abcdef", "control": "fedcba9876543210"}


@pytest.fixture
def root(tmp_path: Path, teacher_folder: Path) -> Path:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=2, rows=3)
    Pipeline(Home(root)).check_tokenizers()
    capture_all(root)
    return root


def capture_all(root: Path) -> None:
    bench = Bench(root)
    for shard in bench.shards.values():
        capture_shard(bench.spec, shard, bench.store, device="cpu")


def ids(root: Path, rehash: bool = False) -> dict[str, str]:
    return {str(kind): name for kind, name in StudentSide(Pipeline(Home(root), rehash)).ids.items()}


def without_memory(root: Path) -> dict[str, str]:
    (root / ".cache" / "hashes.json").unlink()
    return ids(root)


def remember(root: Path, found: object) -> None:
    """Put `found` where the ids are that were found last."""
    cache = root / ".cache" / "hashes.json"
    told = json.loads(cache.read_text())
    cache.write_text(json.dumps({**told, "students": [told["students"][0], found]}))


def test_what_is_remembered_is_believed_as_long_as_nothing_changed(root: Path) -> None:
    right = ids(root)
    remember(root, WRONG)
    assert ids(root) == WRONG
    assert ids(root, rehash=True) == right == ids(root)


def test_a_capture_that_was_written_again_is_read_again(root: Path) -> None:
    right = ids(root)
    capture = next((root / "captures").glob("*/s1@*.parquet"))
    remember(root, WRONG)
    os.utime(capture)
    assert ids(root) == right


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"epochs": 3}},
        {"data": {"validation": ["s1"]}},
        {"student": {"from_teacher_layers": [1]}},
        {"data": {"heldout": ["heldout*", "s1"]}},
    ],
)
def test_no_id_outlives_a_setting(root: Path, sections: dict[str, object]) -> None:
    before = ids(root)
    edit(root, **sections)
    after = ids(root)
    assert after["student"] != before["student"]
    assert after == without_memory(root)


def test_a_weight_makes_another_student_and_its_return_the_first(root: Path) -> None:
    before = ids(root)
    shard = root / "shards" / "s0.jsonl"
    content = shard.read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    tiny.write_jsonl(shard, [{**rows[0], "weight": 2.0}, *rows[1:]])
    capture_all(root)
    after = ids(root)
    assert after["student"] != before["student"]
    assert after == without_memory(root)
    shard.write_bytes(content)
    assert ids(root) == before


def test_a_cache_with_something_else_in_it_is_not_believed(root: Path) -> None:
    right = ids(root)
    for wrong in ("abc", None, 5, {}, [], {"student": WRONG["student"]}, {**WRONG, "control": "../x"}):
        remember(root, wrong)
        assert ids(root) == right == ids(root), wrong


def test_nothing_is_trained_under_a_name_that_is_only_remembered(root: Path) -> None:
    right = ids(root)
    remember(root, WRONG)
    record = StudentSide(Pipeline(Home(root))).train("student", device="cpu", force=False)
    assert record.spec.student_id == right["student"]
    assert [folder.name for folder in (root / "students").iterdir()] == [right["student"]]


def test_what_was_chosen_is_remembered_and_asked_again_only_when_something_changed(root: Path) -> None:
    edit(root, training={"where": "row > 0"})
    Pipeline(Home(root)).refresh_catalog()
    right = ids(root)
    remember(root, WRONG)
    assert ids(root) == WRONG
    edit(root, training={"where": "row > 1"})
    assert right != ids(root) != WRONG
    edit(root, training={"where": "row > 0"})
    assert ids(root) == right
    remember(root, WRONG)
    os.utime(next((root / "captures").glob("*/s1@*.parquet")))
    assert ids(root) == right


def test_how_a_student_is_trained_changes_its_rounding_and_never_its_id(root: Path) -> None:
    def trained(**how: object) -> dict[str, torch.Tensor]:
        with open_instance(Home(root)) as instance:
            defs.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey("student_model")],
                run_config={
                    "ops": {"student_model": {"config": {"device": "cpu", "force": True, **how}}},
                    "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                },
            )
        [folder] = (root / "students").iterdir()
        return load_file(folder / "model.safetensors")

    whole, passes = trained(), trained(pass_tokens=48, gradient_checkpointing=True)
    assert any((whole[name] != passes[name]).any() for name in whole)
    torch.testing.assert_close(passes, whole, rtol=1e-3, atol=1e-4)
