"""The catalog against the Parquet it describes, and readers beside its writer."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest

from distill_assets.capture_catalog.query import run_query
from distill_assets.capture_catalog.refresh import (
    CatalogEntry,
    CatalogReport,
    read_meta,
    refresh_catalog,
    refresh_lineage,
)
from distill_assets.capture_catalog.verify import compare_with_store
from distill_assets.foundation.errors import CatalogError
from distill_assets.foundation.files import disk_problem
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import Capture, read_rows
from tests import tiny
from tests.bench import Bench


def capture_all(bench: Bench) -> list[CatalogEntry]:
    return [
        CatalogEntry(capture_shard(bench.spec, shard, bench.store, device="cpu").capture, shard.role)
        for shard in bench.shards.values()
    ]


def refresh(bench: Bench, entries: list[CatalogEntry]) -> CatalogReport:
    return refresh_catalog(bench.home.catalog, bench.store, entries, bench.home.students)


def ask(bench: Bench, sql: str) -> list[tuple[object, ...]]:
    return list(run_query(bench.home.catalog, bench.home.captures, sql).rows)


def captures(entries: list[CatalogEntry]) -> list[Capture]:
    return [entry.capture for entry in entries]


def test_captures_and_examples_say_what_the_files_hold(bench: Bench) -> None:
    entries = capture_all(bench)
    report = refresh(bench, entries)
    assert (report.shards, report.examples, report.files_read) == (4, 24, 4)
    assert ask(bench, "SELECT shard, role, examples FROM captures ORDER BY shard") == [
        ("heldout", "heldout", 6), ("s0", "train", 6), ("s1", "train", 6), ("s2", "train", 6),
    ]  # fmt: skip
    rows = {row.row: row for entry in entries if entry.capture.shard == "s1" for row in read_rows(entry.capture.path)}
    found = ask(
        bench,
        "SELECT row, key, tokens, supervised_tokens, mean_entropy, mean_kept_mass, teacher_perplexity, top1_is_gold "
        "FROM examples WHERE shard = 's1' ORDER BY row",
    )
    for number, key, tokens, supervised, entropy, mass, perplexity, top1 in found:
        row = rows[number]  # type: ignore[index]
        targets = row.targets
        first = targets.support_ids_N[targets.offsets_P1[:-1]]
        assert (key, tokens, supervised) == (row.key, len(row.input_ids), targets.n_positions)
        assert entropy == pytest.approx(targets.entropy_P.mean(), rel=1e-5)
        assert mass == pytest.approx(targets.kept_mass_P().mean(), rel=1e-5)
        assert perplexity == pytest.approx(np.exp(-targets.gold_logprob_P.mean()), rel=1e-5)
        assert top1 == pytest.approx((first == row.input_ids[targets.positions_P + 1]).mean())


def test_the_views_unnest_positions(bench: Bench) -> None:
    entries = capture_all(bench)
    refresh(bench, entries)
    row = read_rows(next(c for c in captures(entries) if c.shard == "s0").path)[2]
    found = ask(bench, "SELECT * FROM positions WHERE shard = 's0' AND row = 2 ORDER BY position")
    for p, (_, _, key, position, gold, ids, logprobs, *_rest) in enumerate(found):
        part = slice(row.targets.offsets_P1[p], row.targets.offsets_P1[p + 1])
        assert (key, position) == (row.key, row.targets.positions_P[p])
        assert gold == row.input_ids[row.targets.positions_P[p] + 1]
        assert ids == row.targets.support_ids_N[part].tolist()
        assert logprobs == pytest.approx(row.targets.support_logprobs_N[part].tolist())
    [(n,)] = ask(bench, "SELECT count(*) FROM kept_ids")
    assert n == sum(c.stats.kept_ids for c in captures(entries))


def test_refresh_reads_only_what_changed_and_keeps_history(bench: Bench) -> None:
    refresh(bench, capture_all(bench))
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(7))
    entries = capture_all(bench)
    report = refresh(bench, entries)
    assert (report.files_read, report.superseded, report.examples) == (1, 1, 25)
    assert compare_with_store(bench.home.catalog, captures(entries)) == []
    assert ask(bench, "SELECT shard, examples FROM capture_history") == [("s0", 6)]
    without = [entry for entry in entries if entry.capture.shard != "s1"]
    assert refresh(bench, without).shards == 3
    assert ask(bench, "SELECT count(*) FROM examples WHERE shard = 's1'") == [(0,)]


def test_what_was_superseded_and_comes_back_is_not_read_again(bench: Bench) -> None:
    file = bench.home.root / "shards" / "s0.jsonl"
    before = file.read_text()
    entries = capture_all(bench)
    refresh(bench, entries)
    tiny.write_jsonl(file, [*tiny.example_rows(5), *tiny.example_rows(2, start=700)])
    refresh(bench, capture_all(bench))
    changed = "SELECT o.key FROM example_history AS o ANTI JOIN examples AS n ON (o.shard, o.key) = (n.shard, n.key)"
    assert ask(bench, changed) == ask(bench, "SELECT key FROM example_history WHERE shard = 's0' AND row = 5")
    file.write_text(before)
    report = refresh(bench, entries)
    assert (report.files_read, report.examples, report.superseded) == (0, 24, 1)
    superseded = next(file for file in bench.store.files(bench.spec.capture_id).values() if file not in
                      {entry.capture.path for entry in entries})  # fmt: skip
    refresh_catalog(bench.home.catalog, bench.store, entries, bench.home.students, without=[superseded])
    assert ask(bench, "SELECT count(*) FROM example_history") == [(0,)]
    assert ask(bench, "SELECT count(*) FROM capture_examples") == [(24,)]
    superseded.write_bytes(superseded.read_bytes()[:8] + bytes(200) + superseded.read_bytes()[208:])
    assert refresh(bench, entries).superseded == 0  # its footer is whole, its rows are not: it stops nobody


def test_lineage_goes_both_ways_through_superseded_captures_too(bench: Bench) -> None:
    entries = capture_all(bench)
    [first] = [c for c in captures(entries) if c.shard == "s0"]
    used = {"shard": "s0", "version": first.version, "capture_id": first.capture_id, "rows": 6}
    record = {"spec": {"student_id": "abc", "kind": "student", "captures": [used]}, "created": "2026-01-02T03:04:05Z"}
    student = bench.home.students / "abc"
    student.mkdir(parents=True)
    (student / "distillation.json").write_text(json.dumps(record))
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(2, start=600))
    entries = capture_all(bench)
    refresh(bench, entries)
    keys = [row.key for row in read_rows(first.path)]
    made_of = "SELECT shard, row, key, current FROM student_examples WHERE student_id = 'abc' ORDER BY row"
    assert ask(bench, made_of) == [("s0", i, key, False) for i, key in enumerate(keys)]
    assert ask(bench, f"SELECT student_id FROM student_examples WHERE key = '{keys[3]}'") == [("abc",)]
    [unused] = [c for c in captures(entries) if c.shard == "s1"]
    key = read_rows(unused.path)[0].key
    assert ask(bench, f"SELECT student_id FROM student_examples WHERE key = '{key}'") == []
    assert ask(bench, f"SELECT shard, row, current FROM example('{keys[3]}')") == [("s0", 3, False)]
    assert ask(bench, "SELECT * FROM example('no key')") == []


def test_each_key_is_found_once_as_captures_come_and_go(bench: Bench) -> None:
    entries = capture_all(bench)
    for name, rows in (("few", tiny.example_rows(1, start=800)), ("more", tiny.example_rows(3, start=900))):
        tiny.write_jsonl(bench.home.root / "shards" / f"{name}.jsonl", rows)
    every = {entry.capture.shard: entry for entry in capture_all(bench)}

    def listed(now: list[CatalogEntry]) -> tuple[int, int]:
        """How many keys are in order, and how many came since, after a refresh that keeps no history."""
        rest = [entry.capture.path for entry in every.values() if entry not in now]
        refresh_catalog(bench.home.catalog, bench.store, now, bench.home.students, without=rest)
        held = {row.key: (entry.capture.shard, row.row) for entry in now for row in read_rows(entry.capture.path)}
        for entry in every.values():
            for row in read_rows(entry.capture.path):
                found = ask(bench, f"SELECT shard, row FROM example('{row.key}')")
                assert found == ([held[row.key]] if row.key in held else [])
        [counts] = ask(bench, "SELECT (SELECT count(*) FROM sorted_keys), (SELECT count(*) FROM new_keys)")
        return counts  # type: ignore[return-value]

    assert listed(entries) == (24, 0)
    assert listed([*entries, every["few"]]) == (24, 1)
    assert listed(entries) == (24, 1)  # its entry stays, and finds nothing
    assert listed([*entries, every["few"]]) == (24, 2)  # under the number it had before
    assert listed([*entries, every["few"], every["more"]]) == (28, 0)
    assert listed([every["more"]]) == (28, 0)


def test_a_catalog_damaged_inside_is_built_anew_by_the_next_refresh(bench: Bench) -> None:
    entries = capture_all(bench)
    refresh(bench, entries[:2])
    content = bench.home.catalog.read_bytes()
    keys = [row.key for row in read_rows(entries[0].capture.path)]
    for start in range(12_288, len(content), 262_144):  # block after block, one is read first when it changes
        damaged = bytearray(content)
        damaged[start + 100] ^= 1
        bench.home.catalog.write_bytes(damaged)
        assert refresh(bench, entries).examples == 24
        assert [len(ask(bench, f"SELECT * FROM example('{key}')")) for key in keys] == [1] * 6
        assert compare_with_store(bench.home.catalog, captures(entries)) == []


def test_a_reader_goes_on_while_the_catalog_is_replaced(bench: Bench) -> None:
    entries = capture_all(bench)
    refresh(bench, entries[:2])
    reader = duckdb.connect(bench.home.catalog, read_only=True)
    refresh(bench, entries)
    assert reader.execute("SELECT count(*) FROM captures").fetchall() == [(2,)]
    reader.close()
    assert ask(bench, "SELECT count(*) FROM captures") == [(4,)]


REFRESH_AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from distill_assets.capture_catalog.refresh import CatalogEntry, refresh_catalog
from distill_assets.foundation.home import Home
from distill_assets.teacher_capture.store import CaptureStore, read_capture

home = Home(Path(sys.argv[1]))
files = [Path(path) for path in sys.argv[2:]]
entries = [CatalogEntry(read_capture(file), "train") for file in files]
while True:
    for some in (entries[:1], entries):
        refresh_catalog(home.catalog, CaptureStore(home.captures), some, home.students, without=files)
        print("refreshed", flush=True)
"""


def test_readers_beside_a_writer_see_one_state_or_the_other(bench: Bench) -> None:
    paths = [str(capture.path) for capture in captures(capture_all(bench))]
    writer = subprocess.Popen(
        [sys.executable, "-c", REFRESH_AGAIN_AND_AGAIN, str(bench.home.root), *paths], stdout=subprocess.PIPE, text=True
    )
    sizes = "SELECT count(*), sum(examples), (SELECT count(*) FROM examples) FROM captures"
    states, seen = {(1, 6, 6), (4, 24, 24)}, set()
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        until = time.monotonic() + 60
        while seen != states:
            seen |= {ask(bench, sizes)[0] for _ in range(8)}
            assert seen <= states and writer.poll() is None and time.monotonic() < until, seen
    finally:
        writer.kill()
        writer.wait()
    assert ask(bench, sizes)[0] in seen  # a writer that was killed leaves one of them, too
    assert refresh(bench, capture_all(bench)).shards == 4


def test_lineage_is_read_from_the_students(bench: Bench) -> None:
    student = bench.home.students / "abc"
    student.mkdir(parents=True)
    used = [{"shard": "s0", "version": "v" * 64, "capture_id": "c" * 16, "rows": 6}]
    spec = {"student_id": "abc", "kind": "student", "captures": used}
    (student / "distillation.json").write_text(json.dumps({"spec": spec, "created": "2026-01-02T03:04:05+00:00"}))
    (bench.home.students / "damaged").mkdir()
    (bench.home.students / "damaged" / "distillation.json").write_text("{")
    entries = capture_all(bench)
    refresh(bench, entries)
    sql = "SELECT s.kind, l.shard, l.examples FROM students AS s JOIN student_captures AS l USING (student_id)"
    assert ask(bench, sql) == [("student", "s0", 6)]
    spec["kind"] = "control"
    (student / "distillation.json").write_text(json.dumps({"spec": spec, "created": "2026-01-02T03:04:05+00:00"}))
    refresh_lineage(bench.home.catalog, bench.home.students)
    assert ask(bench, sql) == [("control", "s0", 6)]
    assert compare_with_store(bench.home.catalog, captures(entries)) == []


def test_a_catalog_of_nothing_can_be_asked(bench: Bench) -> None:
    refresh(bench, [])
    assert ask(bench, "SELECT count(*) FROM positions") == ask(bench, "SELECT count(*) FROM kept_ids") == [(0,)]


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "other tables"])
def test_a_damaged_catalog_is_no_catalog_and_is_built_anew(bench: Bench, damage: str) -> None:
    entries = capture_all(bench)
    refresh(bench, entries)
    catalog = bench.home.catalog
    whole = catalog.read_bytes()
    if damage == "other tables":
        catalog.unlink()
        duckdb.connect(catalog).close()
    else:
        catalog.write_bytes({"garbage": b"not a database" * 100, "empty": b"", "cut": whole[: len(whole) // 2]}[damage])
    assert read_meta(catalog) is None
    assert compare_with_store(catalog, captures(entries))
    refresh_lineage(catalog, bench.home.students)  # leaves it to the next refresh
    with pytest.raises(CatalogError):
        run_query(catalog, bench.home.captures, "SELECT shard FROM captures")
    assert refresh(bench, entries).shards == 4
    assert compare_with_store(catalog, captures(entries)) == []


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_disk_that_fills_up_leaves_the_old_catalog(bench: Bench, share: float) -> None:
    """A file may grow to a share of what the catalog needs; its end is written only when it is closed."""
    entries = capture_all(bench)
    refresh(bench, entries[:2])
    before = bench.home.catalog.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), hard))
    try:
        for change in (lambda: refresh(bench, entries), lambda: refresh_lineage(bench.home.catalog, bench.home.root)):
            with pytest.raises((duckdb.Error, OSError)) as caught:
                change()
            assert "File too large" in (disk_problem(caught.value) or "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert bench.home.catalog.read_bytes() == before
    assert not list(bench.home.root.glob(".partial-*"))
    assert refresh(bench, entries).shards == 4


def test_a_log_somebody_left_behind_does_not_lock_the_new_catalog(bench: Bench) -> None:
    entries = capture_all(bench)
    refresh(bench, entries[:2])
    script = (
        f"import duckdb, os; c = duckdb.connect({str(bench.home.catalog)!r}); "
        "c.execute('CREATE TABLE mine (i INTEGER)'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    log = bench.home.catalog.with_name("catalog.duckdb.wal")
    assert log.exists()
    refresh(bench, entries)
    assert not log.exists()
    assert compare_with_store(bench.home.catalog, captures(entries)) == []


def test_a_path_that_looks_like_a_hive_partition(tmp_path: Path, teacher_folder: Path) -> None:
    bench = Bench(tiny.make_home(tmp_path / "shard=x" / "row=7", teacher_folder))
    refresh(bench, capture_all(bench))
    assert ask(bench, "SELECT DISTINCT shard FROM positions ORDER BY 1") == [("heldout",), ("s0",), ("s1",), ("s2",)]
    assert ask(bench, "SELECT max(row) FROM examples WHERE shard = 's0'") == [(5,)]


def test_shards_with_hostile_names(bench: Bench) -> None:
    name = 'it\'s; DROP TABLE captures -- "x"'
    tiny.write_jsonl(bench.home.root / "shards" / f"{name}.jsonl", tiny.example_rows(2, start=400))
    refresh(bench, capture_all(bench))
    assert ask(bench, "SELECT count(*) FROM positions WHERE shard LIKE 'it%'") != [(0,)]
    assert ask(bench, "SELECT shard FROM captures WHERE shard LIKE 'it%'") == [(name,)]


def test_differences_from_the_store_are_found(bench: Bench) -> None:
    entries = capture_all(bench)
    refresh(bench, entries[:3])
    [problem] = compare_with_store(bench.home.catalog, captures(entries))
    assert problem == f"shard {entries[3].capture.shard} is captured, but not listed"
    refresh(bench, entries)
    [problem] = compare_with_store(bench.home.catalog, captures(entries[1:]))
    assert "is listed, but its capture is not in the store" in problem
    connection = duckdb.connect(bench.home.catalog)
    connection.execute(
        "DELETE FROM capture_examples USING capture_files WHERE capture = number AND shard = 's0' AND row = 0"
    )
    connection.close()
    assert compare_with_store(bench.home.catalog, captures(entries)) == [
        "shard s0: 6 rows in the file, 6 in captures, 5 in examples"
    ]


def test_the_homes_place_is_part_of_the_identity(bench: Bench, tmp_path: Path) -> None:
    entries = capture_all(bench)
    refresh(bench, entries)
    meta = read_meta(bench.home.catalog)
    assert meta is not None and meta[1] == ["heldout", "s0", "s1", "s2"]
    moved = refresh_catalog(tmp_path / "elsewhere" / "catalog.duckdb", bench.store, entries, tmp_path)
    assert moved.identity != meta[0]


def test_derived_captures_say_from_which(home: Path, teacher_folder: Path) -> None:
    bench = Bench(home)
    refresh(bench, capture_all(bench))
    source = bench.spec.capture_id
    bench = Bench(tiny.make_home(home, teacher_folder, targets={"k": 3}))
    refresh(bench, capture_all(bench))
    assert ask(bench, "SELECT DISTINCT derived_from FROM captures") == [([source],)]
    assert ask(bench, "SELECT DISTINCT capture_id, derived_from FROM capture_history") == [(source, [])]


def test_the_views_join_files_of_different_kinds(tmp_path: Path, teacher_folder: Path) -> None:
    """A shard of each kind; what a kind does not have is null."""
    kinds: dict[str, dict[str, object]] = {
        "s0": {"k": 5},
        "s1": {"kind": "sampled", "samples": 6, "precision": "exact"},
        "s2": {"kind": "threshold"},
        "heldout": {"k": 4, "tail_samples": 2},
    }
    entries = []
    for key, targets in kinds.items():
        bench = Bench(tiny.make_home(tmp_path, teacher_folder))
        settings = bench.home.settings_file
        settings.write_text(settings.read_text().replace("targets:\n  k: 8\n", f"targets: {json.dumps(targets)}\n"))
        entries.append(
            CatalogEntry(capture_shard(bench.spec, bench.shards[key], bench.store, device="cpu").capture, "train")
        )
    refresh(bench, entries)
    rows = {entry.capture.shard: read_rows(entry.capture.path)[2].targets for entry in entries}
    for key, targets in rows.items():
        found = ask(
            bench,
            "SELECT support_ids, support_logprobs, weights, tail_sample_ids, tail_logprob FROM positions "
            f"WHERE shard = '{key}' AND row = 2 ORDER BY position",
        )
        assert len(found) == targets.n_positions
        for p, (ids, logprobs, weights, samples, tail) in enumerate(found):
            part = slice(targets.offsets_P1[p], targets.offsets_P1[p + 1])
            assert ids == targets.support_ids_N[part].tolist()
            assert logprobs == pytest.approx(targets.support_logprobs_N[part].tolist())
            assert weights == (None if targets.weights_N is None else targets.weights_N[part].tolist())
            drawn = targets.tail_sample_ids_PS
            assert samples == (None if drawn is None else drawn[p].tolist())
            assert tail == pytest.approx(float(targets.tail_logprob_P[p]))
    means = ask(
        bench,
        "SELECT shard, sum(weight) / count(DISTINCT position) FROM kept_ids WHERE row = 2 GROUP BY ALL ORDER BY shard",
    )
    assert [(shard, mean is None) for shard, mean in means] == [
        ("heldout", True), ("s0", True), ("s1", False), ("s2", False),
    ]  # fmt: skip
    assert means[2][1] == pytest.approx(1.0)  # counts / samples
    assert [n for _, n in ask(bench, "SELECT shard, count(*) FROM examples GROUP BY shard")] == [6] * 4


def test_the_readmes_queries_run(bench: Bench) -> None:
    refresh(bench, capture_all(bench))
    queries = re.findall(
        r'distill sql "([^"]*)"', (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    )
    assert len(queries) >= 6
    for query in queries:
        if query != "SELECT ...":
            run_query(bench.home.catalog, bench.home.captures, query)
