"""`training.where` chooses exactly what a loop over the captured rows would, or is refused in two lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill_assets.capture_catalog.choosing import COLUMNS, chosen_rows, require_predicate
from distill_assets.capture_catalog.refresh import CatalogEntry, catalog_identity, refresh_catalog
from distill_assets.foundation.errors import DistillError, SettingsError, StaleInputs
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import Bench


@dataclass(frozen=True)
class Catalogued:
    bench: Bench
    entries: list[CatalogEntry]

    @property
    def identity(self) -> str:
        return catalog_identity(self.bench.home.root, self.entries)

    def choose(self, where: str) -> dict[str, list[int]]:
        home = self.bench.home
        chosen = chosen_rows(home.catalog, home.captures, self.identity, where)
        return {shard: rows.tolist() for shard, rows in chosen.items()}


@pytest.fixture(scope="module")
def catalogued(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Catalogued:
    root = tiny.make_home(tmp_path_factory.mktemp("choosing") / "home", teacher_folder, data={"max_length": 44})
    tiny.write_jsonl(root / "shards" / "s0.jsonl", [{**row, "weight": i} for i, row in enumerate(tiny.example_rows(9))])
    bench = Bench(root)
    entries = [
        CatalogEntry(capture_shard(bench.spec, shard, bench.store, device="cpu").capture, shard.role)
        for shard in bench.shards.values()
    ]
    refresh_catalog(bench.home.catalog, bench.store, entries, bench.home.students)
    return Catalogued(bench, entries)


def entropy(row: CapturedRow) -> float:
    return float(row.targets.entropy_P.mean())


@pytest.mark.parametrize(
    ("where", "fulfils"),
    [
        ("true", lambda shard, row: True),
        ("NOT truncated", lambda shard, row: not row.truncated),
        ("mean_entropy < 4.1 AND NOT truncated", lambda shard, row: entropy(row) < 4.1 and not row.truncated),
        ("weight BETWEEN 2 AND 6 OR shard = 's1'", lambda shard, row: 2 <= row.weight <= 6 or shard == "s1"),
        ("shard LIKE 's%' AND row % 3 = 1 -- a third", lambda shard, row: row.row % 3 == 1),
        ("key < '8'\n  and tokens < 44", lambda shard, row: row.key < "8" and len(row.input_ids) < 44),
        ("list_contains([1, 5], row)", lambda shard, row: row.row in (1, 5)),
        ("id IS NOT NULL OR row = 0", lambda shard, row: row.row == 0),
    ],
)
def test_what_is_chosen_is_what_fulfils(
    catalogued: Catalogued, where: str, fulfils: Callable[[str, CapturedRow], bool]
) -> None:
    wanted = {}
    for entry in catalogued.entries:
        rows = [row.row for row in read_rows(entry.capture.path) if fulfils(entry.capture.shard, row)]
        if entry.role == "train" and rows:
            wanted[entry.capture.shard] = rows
    assert catalogued.choose(where) == wanted


def test_a_figure_that_is_not_known_fulfils_nothing(catalogued: Catalogued) -> None:
    assert "s0" not in catalogued.choose("CASE WHEN shard = 's0' THEN NULL ELSE 1 END < 2")


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("entropy < 4", 'Referenced column "entropy" not found'),
        ("created > '2026-01-01'", 'Referenced column "created" not found'),
        ("role = 'heldout'", 'Referenced column "role" not found'),
        ("rowid < 3", 'Referenced column "rowid" not found'),
        ("tokens >", "syntax error"),
        ("SELECT 1", "syntax error"),
        ("true) OR (true", "syntax error"),
        ("true) UNION SELECT (true", "syntax error"),
        ("true; DROP TABLE examples", "more than one statement"),
        ("true, false", "single expression"),
        ("tokens", "it gives INTEGER, not true or false"),
        ("NULL", "not true or false"),
        ("COLUMNS(*) IS NOT NULL", "not true or false"),
        ("count(*) > 3", "cannot contain aggregates"),
        ("row_number() OVER () < 3", "cannot contain window functions"),
        ("tokens > ?", "parameters"),
        ("key IN (SELECT key FROM learnable)", "leave the subquery out"),
        ("EXISTS (FROM students)", "leave the subquery out"),
        ("tokens > (SELECT 3)", "leave the subquery out"),
        ("get_block_size('memory') > 1", "leave the subquery out"),
        ("shard IN (SELECT content FROM read_text('{secret}'))", "disabled by configuration"),
        ("shard IN (SELECT shard FROM '{secret}')", "disabled by configuration"),
        ("random() < 0.5", "random() is not the same every time"),
        ("list_sum([random()]) < 0.5", "random() is not the same every time"),
        ("txid_current() % 2 = 0", "txid_current() is not the same every time"),
        ("getvariable('x') = 'a'", "getvariable() is not the same every time"),
        ("now() > '2026-01-01'", "it asks for a time"),
        ("date_part('year', current_date) > 2000", "it asks for a time"),
        ("ago(INTERVAL 1 DAY) > '2026-01-01'", "it asks for a time"),
        ("'today'::DATE::VARCHAR > '2026'", "it asks for a time"),
    ],
)
def test_what_is_no_predicate_is_refused_without_a_catalog(tmp_path: Path, where: str, reason: str) -> None:
    (secret := tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(SettingsError) as caught:
        require_predicate(where.format(secret=secret))
    first, second = str(caught.value).split("\n")
    assert first.startswith("distill.yaml: training.where (") and reason in first
    assert all(name in second for name in COLUMNS)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("tokens > 1000000", "no training example fulfils it"),
        ("shard = 'heldout'", "no training example fulfils it"),
        ("mean_entropy IS NULL", "no training example fulfils it"),
        ("key::INTEGER > 3", "Could not convert string"),
    ],
)
def test_what_chooses_nothing_or_cannot_be_computed_is_refused(catalogued: Catalogued, where: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        catalogued.choose(where)
    assert reason in str(caught.value) and str(caught.value).count("\n") == 1


def test_another_catalog_than_the_current_is_not_asked(catalogued: Catalogued, tmp_path: Path) -> None:
    home = catalogued.bench.home
    before = catalog_identity(home.root, catalogued.entries[1:])
    with pytest.raises(StaleInputs, match="`distill run` refreshes it"):
        chosen_rows(home.catalog, home.captures, before, "true")
    with pytest.raises(DistillError, match="does not exist yet"):
        chosen_rows(tmp_path / "catalog.duckdb", home.captures, before, "true")
