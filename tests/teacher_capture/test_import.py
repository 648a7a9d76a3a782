"""An imported file becomes a shard and a pinned capture that everything else takes as its own."""

from __future__ import annotations

import cProfile
import gzip
import io
import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_assets.dataset_shards.discover import discover_shards, place_of_shard
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.errors import CaptureError, InterchangeError, PinnedCapture, UnreadableFile, UsageError
from distill_assets.foundation.settings import DataSettings
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.checks import check_complete
from distill_assets.teacher_capture.derive import sources
from distill_assets.teacher_capture.importing import ImportReport, import_jsonl
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.interchange import export_jsonl
from distill_assets.teacher_capture.plan import ShardPlan, plan_capture
from distill_assets.teacher_capture.reuse import captured_rows
from distill_assets.teacher_capture.sparse_targets import ROUNDED_LOG_MASS
from distill_assets.teacher_capture.store import FOOTER, read_row_keys, read_rows
from tests import tiny
from tests.bench import Bench, edit

HALF = math.log(0.5)


def lines(n: int = 3) -> list[dict[str, Any]]:
    """Rows of four tokens, all but the first a target; every position keeps the token that came and another."""
    return [
        {
            "input_ids": [7, 10 + i, 11, 12],
            "topk_ids": [[10 + i, 40], [11, 41], [12, 42], []],
            "topk_logprobs": [[HALF, -2.0]] * 3 + [[]],
        }
        for i in range(n)
    ]


def import_lines(bench: Bench, rows: list[dict[str, Any]] | Path, shard: str = "s0", **options: Any) -> ImportReport:
    source = rows if isinstance(rows, Path) else tiny.write_jsonl(bench.home.root / "in.jsonl", rows)
    place = place_of_shard(bench.home.root, bench.home.settings().data, shard)
    return import_jsonl(source, shard, bench.spec, bench.store, place, **options)


def planned(bench: Bench, shard: str) -> ShardPlan:
    found = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
    return {p.shard: p for p in plan_capture(bench.spec, found, bench.store, ()).shards}[shard]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_shard_s0(bench: Bench) -> None:
    (bench.home.root / "shards" / "s0.jsonl").unlink()


def test_shard_and_capture_are_what_the_ordinary_code_makes_of_them(bench: Bench) -> None:
    rows = [row | {"id": f"r{i}", "weight": 0.5 + i} for i, row in enumerate(lines())]
    report = import_lines(bench, rows)
    shard = bench.shards["s0"]
    assert (report.written, report.shard_file) == (True, shard.path)
    assert report.capture.version == shard.version
    encoded = encode_shard(shard, bench.spec.encoder).rows
    assert [(k.key, k.weight) for k in read_row_keys(report.capture.path)] == [(r.key, r.weight) for r in encoded]
    for row, ours in zip(read_rows(report.capture.path), encoded, strict=True):
        assert row.input_ids.tolist() == ours.input_ids.tolist() and row.id == ours.id
        assert row.targets.positions_P.tolist() == np.flatnonzero(ours.loss_mask[1:]).tolist()
    assert report.capture.stats.rows == 3 and report.capture.stats.supervised_tokens == 9
    assert report.capture.stats.teacher_perplexity == pytest.approx(2.0)
    assert report.capture.stats.mean_entropy is None
    assert all(np.isnan(row.targets.entropy_P).all() for row in read_rows(report.capture.path))
    assert planned(bench, "s0").state == "current" and planned(bench, "s0").rows_to_capture == 0


def test_weights_of_tokens_come_in_go_out_and_may_be_edited(bench: Bench, tmp_path: Path) -> None:
    rows = lines()
    rows[1] |= {"token_weights": [1.0, 0.5, 0.0, 3.0], "loss_mask": [0, 1, 1, 0]}
    capture = import_lines(bench, rows).capture
    assert "position_weights" not in pq.read_schema(import_lines(bench, lines(), "s9").capture.path).names
    weights = [row.position_weights for row in read_rows(capture.path)]
    assert [None if w is None else w.tolist() for w in weights] == [None, [0.5, 0.0], None]
    assert list(inspect_capture(capture.path, n_ids=None)) == []
    export_jsonl([capture], out := tmp_path / "out.jsonl")
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("token_weights") for line in written] == [None, [1.0, 0.5, 0.0, 1.0], None]
    assert import_lines(bench, out, "again").capture.capture_id == capture.capture_id

    shard = bench.shards["s0"].path
    own = [json.loads(line) for line in shard.read_text().splitlines()]
    tiny.write_jsonl(shard, [{**own[0], "token_weights": [1, 2, 2, 1]}, *own[1:]])
    edited = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu")
    found = [row.position_weights for row in read_rows(edited.capture.path)]
    assert [None if w is None else w.tolist() for w in found] == [[2.0, 2.0, 1.0], [0.5, 0.0], None]
    assert edited.capture.is_imported and edited.capture.capture_id == capture.capture_id


def test_the_footer_says_that_it_was_imported(bench: Bench) -> None:
    capture = import_lines(bench, lines()).capture
    footer = json.loads(pq.read_metadata(capture.path).metadata[FOOTER])
    assert capture.path.parent.name == footer["source"] == "imported" and capture.is_imported
    assert footer["identity"]["source"] == "imported" and footer["identity"]["targets"]["k"] == 2
    assert footer["identity"]["tokenizer"] == bench.spec.identity["tokenizer"]
    assert capture.teacher["name"] == "imported from in.jsonl"


def test_the_teacher_never_sees_it_whatever_is_asked(bench: Bench) -> None:
    imported = import_lines(bench, lines()).capture
    for options in ({}, {"force": True}):
        report = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", **options)  # type: ignore[arg-type]
        assert (report.capture, report.written) == (imported, False)
    file = bench.home.settings_file
    file.write_text(file.read_text().replace("k: 8", "k: 3"))
    assert planned(bench, "s0").state == "current" and planned(bench, "s1").state == "new"
    assert bench.store.capture_ids() == []


def test_neither_serves_rows_of_the_other(bench: Bench) -> None:
    import_lines(bench, lines())
    keys = {row.key for row in read_rows(bench.store.pinned_path("s0", bench.shards["s0"].version))}
    own_rows = [{"input_ids": row["input_ids"], "loss_mask": [0, 1, 1, 1]} for row in lines()]
    tiny.write_jsonl(bench.home.root / "shards" / "copy.jsonl", [*own_rows, {"input_ids": [9, 8, 7]}])
    assert not captured_rows(bench.store, bench.spec.capture_id).places(keys) and not sources(bench.store, bench.spec)
    stats = capture_shard(bench.spec, bench.shards["copy"], bench.store, device="cpu").capture.stats
    assert (stats.rows_captured, stats.rows_reused) == (4, 0)
    again = import_lines(bench, lines(2), "other").capture
    assert np.array_equal(read_rows(again.path)[0].targets.support_ids_N, [10, 40, 11, 41, 12, 42])


@pytest.mark.parametrize("data", [{"supervise": "all"}, {"max_length": 3}])
def test_settings_of_the_data_make_no_other_rows_of_it(bench: Bench, data: dict[str, Any]) -> None:
    """Neither when it is checked, nor when it is edited: nobody here could make its log-probabilities again."""
    rows = [row | {"loss_mask": [0, 0, 1, 1]} for row in lines()]
    imported = import_lines(bench, rows)
    edit(bench.home.root, data=data)
    assert check_complete(bench.spec, [(bench.shards["s0"], imported.capture)]).problems == ()
    imported.shard_file.write_text("".join(reversed(imported.shard_file.read_text().splitlines(True))))
    assert planned(bench, "s0").state == "changed"
    copied = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    assert [row.key for row in read_rows(copied.path)] == [row.key for row in read_rows(imported.capture.path)][::-1]


def test_what_is_wrong_with_an_import_asks_for_it_again(bench: Bench) -> None:
    imported, other = import_lines(bench, lines()), import_lines(bench, lines(2), "other")
    [problem] = check_complete(bench.spec, [(bench.shards["s0"], other.capture)]).problems
    assert "2 rows, the shard has 3; import it again (`distill import --replace`)" in problem
    assert imported.capture.path.is_file()


def test_one_row_with_two_distributions_is_refused(bench: Bench) -> None:
    """Rows are known by their keys: an edit of the shard would give both the same."""
    row = lines(1)[0]
    other = row | {"topk_logprobs": [[HALF, -2.5]] * 3 + [[]]}
    with pytest.raises(InterchangeError, match=r"line 3: its tokens and targets are those of line 1, .* are not"):
        import_lines(bench, [row, *lines(2)[1:], other])
    assert not bench.home.captures.exists() or not list(bench.home.captures.rglob("*.parquet"))
    assert import_lines(bench, [row, row]).capture.stats.rows == 2


def test_the_same_again_is_nothing_to_do(bench: Bench) -> None:
    first = import_lines(bench, lines())
    before = {path: path.stat().st_mtime_ns for path in bench.home.root.rglob("*") if path.name != "in.jsonl"}
    reordered = [dict(reversed(list(row.items()))) for row in lines()]  # content, not bytes
    again = import_lines(bench, reordered)
    assert (again.written, again.capture) == (False, first.capture)
    after = {path: path.stat().st_mtime_ns for path in bench.home.root.rglob("*") if path.name != "in.jsonl"}
    assert {p for p in before if p.is_file() and before[p] != after[p]} == set() and before.keys() == after.keys()


def test_other_content_needs_replace(bench: Bench) -> None:
    first = import_lines(bench, lines()).capture
    sharper = [row | {"topk_logprobs": [[-0.1, -3.0]] * 3 + [[]]} for row in lines()]
    before = contents(bench.home.root)
    with pytest.raises(InterchangeError, match=r"imported before, with other log-probabilities .*--replace"):
        import_lines(bench, sharper)
    with pytest.raises(InterchangeError, match=r"there with other rows .*--replace"):
        import_lines(bench, lines(4))
    assert contents(bench.home.root).keys() == before.keys()
    second = import_lines(bench, sharper, replace=True).capture
    assert second.path == first.path and second.capture_id != first.capture_id
    assert read_rows(second.path)[0].targets.support_logprobs_N[0] == pytest.approx(-0.1, abs=1 / 32)
    elsewhere = [row | {"input_ids": [8, *row["input_ids"][1:]]} for row in sharper]
    assert import_lines(bench, elsewhere, replace=True).capture.capture_id != second.capture_id
    third = import_lines(bench, lines(4), replace=True).capture
    assert third.version == bench.shards["s0"].version != first.version
    assert planned(bench, "s0").state == "current"


def moved(row: dict[str, Any], by: int) -> dict[str, Any]:
    """The row with its filled lists told of the token before (1) or after (-1) the one that they should."""
    lists = {name: row[name][:-1] for name in ("topk_ids", "topk_logprobs")}
    return row | {name: [*filled[-by:], *filled[:-by], []] for name, filled in lists.items()}


def telling(n: int) -> list[dict[str, Any]]:
    """Rows of six different tokens; every list's likeliest id is the next token."""
    tokens = [[10 + i, 80 + i, 150 + i, 220 + i, 11 + i, 81 + i] for i in range(n)]
    lists = {"topk_logprobs": [[HALF, -2.0]] * 5 + [[]]}
    return [{"input_ids": ids, "topk_ids": [[i, 5] for i in ids[1:]] + [[]]} | lists for ids in tokens]


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (1, r"is token t at 75% of 240 positions, token t \+ 1 at 0%\nleave out the first list .*--rows shifted"),
        (-1, r"is token t \+ 2 at 100% of 240 positions, token t \+ 1 at 0%\nput an empty list before"),
    ],
)
def test_lists_that_stand_at_the_wrong_position_are_refused(bench: Bench, by: int, message: str) -> None:
    before = contents(bench.home.root)
    with pytest.raises(InterchangeError, match=message):
        import_lines(bench, [moved(row, by) for row in telling(60)])
    assert contents(bench.home.root).keys() - {"in.jsonl"} == before.keys()
    few = import_lines(bench, [moved(row, by) for row in telling(10)])  # too few positions to tell
    assert few.written and not few.aligned.enough
    right = import_lines(bench, telling(60), replace=True)
    assert right.aligned.rates[1] == 1.0


def test_progress_is_told_in_lines(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    import_lines(bench, lines(20) * 30, on_progress=lambda step: seen.append((step.done, step.total)))
    assert seen == [(256, 600), (512, 600)]


def test_a_shard_of_text_is_not_overwritten_unasked(bench: Bench) -> None:
    before = (bench.home.root / "shards" / "s1.jsonl").read_bytes()
    with pytest.raises(InterchangeError, match="shard s1 is there with other rows"):
        import_lines(bench, lines(), "s1")
    assert (bench.home.root / "shards" / "s1.jsonl").read_bytes() == before
    assert not list(bench.home.captures.rglob("*.parquet"))


def test_an_edited_shard_fails_until_it_is_imported_or_let_go(bench: Bench) -> None:
    report = import_lines(bench, lines())
    report.shard_file.write_bytes(report.shard_file.read_bytes() + b'{"input_ids": [7, 8, 9]}\n')
    plan = planned(bench, "s0")
    assert plan.state == "failed" and not plan.is_to_capture
    assert "not what was imported: line 4 of " in plan.reason and "import it again" in plan.reason
    lists = {"topk_ids": [[8], [9], []], "topk_logprobs": [[HALF], [HALF], []]}
    import_lines(bench, [*lines(), {"input_ids": [7, 8, 9], **lists}], "other")
    assert planned(bench, "s0").state == "failed"  # what another name was imported with is not its own
    for options in ({}, {"force": True}):
        with pytest.raises(PinnedCapture, match="not what was imported"):
            capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", **options)  # type: ignore[arg-type]
    assert not bench.store.capture_ids()
    report.capture.path.unlink()
    assert planned(bench, "s0").state == "new"
    assert capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture.stats.rows_captured == 4


def edit_lines(file: Path, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    tiny.write_jsonl(file, edit([json.loads(line) for line in file.read_text().splitlines()]))


EDITS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "ids and weights": lambda rows: [row | {"id": f"new{i}", "weight": 2.0} for i, row in enumerate(rows)],
    "order": lambda rows: rows[::-1],
    "deleted": lambda rows: rows[1:],
    "repeated": lambda rows: [*rows, rows[0]],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("force", [False, True])
def test_an_edited_shard_whose_rows_were_all_imported_is_brought_up_to_date_from_them(
    bench: Bench, edit: str, force: bool
) -> None:
    imported = import_lines(bench, [row | {"id": f"r{i}"} for i, row in enumerate(lines(4))])
    targets = {row.key: row.targets for row in read_rows(imported.capture.path)}
    edit_lines(imported.shard_file, EDITS[edit])
    plan, shard = planned(bench, "s0"), bench.shards["s0"]
    encoded = encode_shard(shard, bench.spec.encoder).rows
    assert (plan.state, plan.rows, plan.rows_to_capture, plan.tokens_to_capture) == ("changed", len(encoded), 0, 0)
    assert plan.is_to_capture and "edited since it was imported" in plan.reason
    report = capture_shard(bench.spec, shard, bench.store, device="cpu", force=force)
    capture = report.capture
    assert report.written and capture.path == bench.store.pinned_path("s0", shard.version) != imported.capture.path
    assert capture.is_imported and capture.derived_from == (imported.capture.capture_id,)
    assert capture.teacher == imported.capture.teacher
    assert (capture.stats.rows, capture.stats.rows_captured) == (len(encoded), 0)
    for row, ours in zip(read_rows(capture.path), encoded, strict=True):
        assert (row.key, row.id, row.weight) == (ours.key, ours.id, ours.weight)
        assert np.array_equal(row.targets.support_ids_N, targets[row.key].support_ids_N)
        assert np.array_equal(row.targets.support_logprobs_N, targets[row.key].support_logprobs_N)
    assert list(inspect_capture(capture.path, None)) == [] and imported.capture.path.exists()
    assert planned(bench, "s0").state == "current" and not bench.store.capture_ids()
    edit_lines(imported.shard_file, lambda rows: [{"input_ids": [7, 8, 9]}, *rows])
    assert "line 1 of " in planned(bench, "s0").reason


def test_importing_the_edited_rows_themselves_is_nothing_to_do(bench: Bench) -> None:
    file = import_lines(bench, lines(4)).shard_file
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    derived = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    again = import_lines(bench, lines(4)[1:])
    assert (again.written, again.capture) == (False, derived)


def test_of_two_imports_of_a_name_the_newest_that_holds_all_rows_serves(bench: Bench) -> None:
    import_lines(bench, lines(4))
    sharper = [row | {"topk_logprobs": [[-0.1, -3.0]] * 3 + [[]]} for row in lines(3)]
    second = import_lines(bench, sharper, replace=True)
    edit_lines(second.shard_file, EDITS["order"])
    newest = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    assert read_rows(newest.path)[0].targets.support_logprobs_N[0] == pytest.approx(-0.1, abs=1 / 32)
    own = [{"input_ids": row["input_ids"], "loss_mask": [0, 1, 1, 1]} for row in lines(4)]
    tiny.write_jsonl(second.shard_file, own[::-1])
    whole = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    assert {float(row.targets.support_logprobs_N[0]) for row in read_rows(whole.path)} == {-0.6875}
    import_lines(bench, lines(6)[4:], replace=True)
    tiny.write_jsonl(second.shard_file, [*own, {"input_ids": [7, 14, 11, 12], "loss_mask": [0, 1, 1, 1]}])
    assert "imported at different times, and no import has them all" in planned(bench, "s0").reason


def test_a_damaged_import_gives_an_edited_shard_nothing(bench: Bench) -> None:
    imported = import_lines(bench, lines(4))
    edit_lines(imported.shard_file, EDITS["order"])
    path, whole = imported.capture.path, imported.capture.path.read_bytes()
    path.write_bytes(whole[:-20])
    assert f"{path} is damaged; import it again" in planned(bench, "s0").reason
    group = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    last = columns["tail_logprob.list.element"].data_page_offset - 1  # of the log-probabilities before it
    path.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
    assert planned(bench, "s0").state == "changed"  # keys can be read
    with pytest.raises(PinnedCapture, match=r"is damaged where it holds line 1 of .*s0.jsonl; import it again"):
        capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu")
    assert not bench.store.pinned_path("s0", bench.shards["s0"].version).exists()


def test_a_damaged_import_is_not_made_again_by_the_teacher(bench: Bench) -> None:
    report = import_lines(bench, lines())
    report.capture.path.write_bytes(report.capture.path.read_bytes()[:-20])
    assert planned(bench, "s0").state == "failed" and "is damaged; import it again" in planned(bench, "s0").reason
    with pytest.raises(CaptureError, match="is damaged; import it again"):
        capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu")
    assert import_lines(bench, lines(), replace=True).written and planned(bench, "s0").state == "current"


@pytest.mark.parametrize("whole", [1.04, 0.96])
def test_what_is_taken_in_is_not_called_damaged(bench: Bench, whole: float) -> None:
    """The extremes of mass that may be imported, of ids that storage rounds all to the same side."""
    sign = 1 if whole > 1 else -1
    logprob = -(64 + sign * 0.48) / 16
    kept = int(whole / math.exp(logprob)) if whole > 1 else math.ceil(whole / math.exp(logprob))
    row = {
        "input_ids": [7, 8],
        "topk_ids": [list(range(10, 10 + kept)), []],
        "topk_logprobs": [[logprob] * kept, []],
        "tail_logprob": [None, None],
    }
    path = import_lines(bench, [row]).capture.path
    stored = float(read_rows(path)[0].targets.log_total_mass_P()[0])
    assert sign * stored > ROUNDED_LOG_MASS
    assert list(inspect_capture(path, None)) == []


def test_an_import_cut_off_after_the_capture_says_so_and_is_mended_by_the_same_import(bench: Bench) -> None:
    shard = bench.home.root / "shards" / "s1.jsonl"
    own_rows = shard.read_bytes()
    import_lines(bench, lines(), "s1", replace=True)
    shard.write_bytes(own_rows)  # what a kill between the two publications leaves
    assert "or an import was cut off" in planned(bench, "s1").reason
    import_lines(bench, lines(), "s1", replace=True)
    assert planned(bench, "s1").state == "current"


def test_the_same_rows_imported_twice_with_other_log_probabilities_stand_for_no_third_shard(bench: Bench) -> None:
    file = import_lines(bench, lines(), "a").shard_file
    sharper = [row | {"topk_logprobs": [[-0.1, -3.0]] * 3 + [[]]} for row in lines()]
    import_lines(bench, sharper, "b")
    shutil.copy(file, file.with_name("c.jsonl"))
    assert planned(bench, "a").state == planned(bench, "b").state == "current"
    assert "imported as a and b, with different log-probabilities" in planned(bench, "c").reason


def test_the_imports_are_listed_once_for_all_shards(bench: Bench) -> None:
    folder = import_lines(bench, lines()).capture.path.parent
    os.utime(folder, (1, 1))  # it settled long ago
    with cProfile.Profile() as profile:
        assert not any(bench.store.is_pinned(f"native{i}") for i in range(50))
    listings = [entry.callcount for entry in profile.getstats() if getattr(entry.code, "co_name", "") == "files"]
    assert listings == [1]
    import_lines(bench, lines(2), "native7")
    assert bench.store.is_pinned("native7")


def test_another_tokenizer_makes_an_import_unusable(bench: Bench, tmp_path: Path) -> None:
    import_lines(bench, lines())
    tokenizer = tiny.train_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    other = tiny.save_model(tmp_path / "other", tokenizer)
    file = bench.home.settings_file
    file.write_text(file.read_text().replace(str(bench.home.settings().teacher.model), str(other)))
    assert planned(bench, "s0").state == "failed"
    assert "imported with another tokenizer" in planned(bench, "s0").reason
    edit_lines(bench.shards["s0"].path, EDITS["order"])
    assert "imported, but with another tokenizer" in planned(bench, "s0").reason


def test_what_was_cut_off_between_capture_and_shard_is_finished_by_the_next_import(bench: Bench) -> None:
    shutil.rmtree(bench.home.root / "shards")
    (bench.home.root / "shards").write_text("in the way of the folder")
    source = tiny.write_jsonl(bench.home.root / "in.jsonl", lines())
    place = bench.home.root / "shards" / "s0.jsonl"
    with pytest.raises(OSError):
        import_jsonl(source, "s0", bench.spec, bench.store, place)
    [orphan] = (bench.home.captures / "imported").iterdir()
    created = orphan.stat().st_mtime_ns
    (bench.home.root / "shards").unlink()
    report = import_lines(bench, lines())
    assert report.written and report.capture.path == orphan and orphan.stat().st_mtime_ns == created
    assert planned(bench, "s0").state == "current"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"input_ids": [7, 8\n', r"in.jsonl line 2: not valid JSON"),
        (b'{"input_ids": [7, 8]}\n', r"in.jsonl line 2: topk_ids is missing"),
        (b"\xff\n", r"in.jsonl line 2: not UTF-8"),
        (b"", None),
    ],
)
def test_a_refused_file_leaves_nothing(bench: Bench, content: bytes, message: str | None) -> None:
    source = tiny.write_jsonl(bench.home.root / "in.jsonl", lines(1) if message else [])
    source.write_bytes(source.read_bytes() + content)
    with pytest.raises(InterchangeError, match=message or "no rows in it") as refused:
        import_lines(bench, source)
    assert len(str(refused.value).splitlines()) <= 2 and "nothing was imported" in str(refused.value)
    assert not bench.store.is_pinned("s0") and "s0" not in bench.shards
    assert list((bench.home.captures / "imported").iterdir()) == []


def test_compressed_files_and_blank_lines(bench: Bench) -> None:
    plain = import_lines(bench, lines()).capture
    text = "\n\n".join(json.dumps(row) for row in lines())
    packed = bench.home.root / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    other = import_lines(bench, packed, "other").capture
    assert (other.capture_id, other.version) == (plain.capture_id, plain.version)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UnreadableFile):
        import_lines(bench, packed, "third")


def test_what_was_left_out_is_counted(bench: Bench) -> None:
    rows = lines()
    rows[0] |= {"topk_ids": [*rows[0]["topk_ids"][:3], [5]], "topk_logprobs": [*rows[0]["topk_logprobs"][:3], [HALF]]}
    rows[1]["loss_mask"] = [0, 0, 1, 0]
    report = import_lines(bench, rows)
    assert (report.dropped_last, report.dropped_unsupervised) == (1, 2)


@pytest.mark.parametrize(
    ("pattern", "key", "message"),
    [
        ("shards/*.jsonl", "a/b", "contains a slash"),
        ("shards/train-*", "s0", "does not match s0.jsonl"),
        ("shards/*.parquet", "s0", "does not match s0.jsonl"),
        ("*/x*", "x0", "names no one folder"),
        ("shards/**", "s0", "names no one folder"),
        ("shards/*", "t0", "is there as .*t0.txt"),
    ],
)
def test_where_no_shard_could_be_put(bench: Bench, pattern: str, key: str, message: str) -> None:
    (bench.home.root / "shards" / "t0.txt").write_text("a text\n")
    with pytest.raises(UsageError, match=message):
        place_of_shard(bench.home.root, DataSettings(shards=pattern), key)


def test_the_place_of_a_shard_is_where_it_is_found(bench: Bench) -> None:
    for pattern in ("shards/*", "*.jsonl", "deep/er/s*.jsonl"):
        data = DataSettings(shards=pattern)
        tiny.write_jsonl(place_of_shard(bench.home.root, data, "s7"), [{"text": "a"}])
        found = discover_shards(bench.home.root, data, bench.home.hashes())
        assert "s7" in {shard.key for shard in found.shards}


@pytest.mark.parametrize("precision", ["compact", "exact"])
def test_an_exported_capture_comes_back_as_the_same_table(tmp_path: Path, teacher_folder: Path, precision: str) -> None:
    options = {"shards": 1, "targets": {"precision": precision, "k": 320}, "data": {"max_length": 128}}
    bench = Bench(tiny.make_home(tmp_path / "one", teacher_folder, **options))  # type: ignore[arg-type]
    capture = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    export_jsonl([capture], tmp_path / "out.jsonl")
    other = Bench(tiny.make_home(tmp_path / "two", teacher_folder, **options))  # type: ignore[arg-type]
    imported = import_lines(other, tmp_path / "out.jsonl", "back").capture
    assert not capture.stats.truncated_rows
    assert pq.read_table(imported.path).equals(pq.read_table(capture.path))
    assert pq.read_table(imported.path)["tail_logprob"].combine_chunks().flatten().null_count > 0


def _float(value: float, dtype: type[np.floating] = np.float32) -> float:
    """The shortest decimal of the value as it is stored."""
    return float(str(np.float32(dtype(value))))


@st.composite
def exported_lines(draw: st.DrawFn) -> dict[str, Any]:
    """A line as `export` writes it: every key, ids likeliest first, numbers that storage holds exactly, and a gold
    log-probability that a kept one, or the tail, allows.
    """
    n_tokens = draw(st.integers(2, 6))
    line: dict[str, Any] = {
        "input_ids": draw(st.lists(st.integers(0, 319), min_size=n_tokens, max_size=n_tokens)),
        "topk_ids": [[] for _ in range(n_tokens)],
        "topk_logprobs": [[] for _ in range(n_tokens)],
        **{name: [None] * n_tokens for name in ("tail_logprob", "gold_logprob", "entropy")},
        "loss_mask": [0] * n_tokens,
    }
    scored = draw(st.sets(st.integers(0, n_tokens - 2), min_size=1))
    for t in scored:
        shares = sorted(draw(st.lists(st.integers(1, 10**6), min_size=2, max_size=6)), reverse=True)
        *kept, rest = shares
        has_tail = draw(st.booleans())
        total = sum(shares) if has_tail else sum(kept)
        line["topk_ids"][t] = draw(st.lists(st.integers(0, 319), min_size=len(kept), max_size=len(kept), unique=True))
        line["topk_logprobs"][t] = [_float(min(0.0, math.log(share / total))) for share in kept]
        if has_tail:
            line["tail_logprob"][t] = _float(math.log(rest / total), np.float16)
        if (gold := line["input_ids"][t + 1]) in line["topk_ids"][t]:
            most = line["topk_logprobs"][t][line["topk_ids"][t].index(gold)]
            said = st.floats(0, 0.1).map(lambda off: _float(max(-60000.0, most - off), np.float16))  # noqa: B023
        else:
            most = line["tail_logprob"][t] if has_tail else -20.0
            said = st.floats(-60000, 0, width=16).map(lambda below: _float(max(-60000.0, most + below), np.float16))  # noqa: B023
        line["gold_logprob"][t] = draw(st.none() | said)
        line["entropy"][t] = draw(st.none() | st.floats(0, 5.75, width=16).map(_float))
        line["loss_mask"][t + 1] = 1
    if draw(st.booleans()):
        line["id"] = draw(st.text(st.characters(codec="utf-8"), max_size=4))
    weight = draw(st.floats(0, 8, width=32))
    if weight != 1:
        line["weight"] = _float(weight)
    return line


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Callable[[], Bench]:
    """A home that keeps log-probabilities exactly; its spec is made once."""
    bench = Bench(tiny.make_home(tmp_path_factory.mktemp("exact"), teacher_folder, targets={"precision": "exact"}))
    spec, data = bench.spec, bench.home.settings().data

    def round_trip(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        source = tiny.write_jsonl(bench.home.root / "in.jsonl", lines)
        place = place_of_shard(bench.home.root, data, "any")
        capture = import_jsonl(source, "any", spec, bench.store, place, replace=True).capture
        assert export_jsonl([capture], bench.home.root / "out.jsonl") == len(lines)
        with (bench.home.root / "out.jsonl").open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]

    return round_trip  # type: ignore[return-value]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        exported_lines(), min_size=1, max_size=4, unique_by=lambda line: str([line["input_ids"], line["loss_mask"]])
    )
)
def test_what_was_exported_comes_back(exact: Any, lines: list[dict[str, Any]]) -> None:
    assert exact(lines) == lines


def wide_rows(n: int) -> Iterator[str]:
    """Lines of 2,112 numbers each, the tokens included, all different."""
    lists = {"topk_ids": [list(range(10, 42))] * 64 + [[]], "topk_logprobs": [[-3.5] * 32] * 64 + [[]]}
    for i in range(n):
        yield json.dumps({"input_ids": [10 + i % 200, 10 + i // 200] + [7] * 63} | lists) + "\n"


def test_memory_does_not_grow_with_the_file(bench: Bench, tmp_path: Path) -> None:
    file = bench.home.settings_file
    file.write_text(file.read_text().replace("max_length: 64", "max_length: 65"))

    def peaks(name: str, rows: int) -> tuple[int, int]:
        source = tmp_path / f"{name}.jsonl"
        with source.open("w") as stream:
            stream.writelines(wide_rows(rows))
        tracemalloc.start()
        capture = import_lines(bench, source, name, chunk_numbers=20_000).capture
        while_importing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        export_jsonl([capture], tmp_path / "out.jsonl")
        while_exporting = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with pq.ParquetFile(capture.path) as parquet:
            assert parquet.metadata.row_group(0).num_rows == 10 and parquet.num_row_groups == rows // 10
        return while_importing, while_exporting

    peaks("warm", 10)
    small, large = peaks("small", 30), peaks("large", 120)
    assert large[0] < 1.3 * small[0] and large[1] < 1.3 * small[1]
