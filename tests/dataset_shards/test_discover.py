from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pytest

from distill_assets.dataset_shards.discover import Discovery, discover_shards, key_problem
from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.settings import DataSettings

LINE = b'{"text": "hello"}\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    return tmp_path


def discover(root: Path, **data: object) -> Discovery:
    return discover_shards(root, DataSettings(**data), HashCache(root / "hashes.json"))  # type: ignore[arg-type]


def put(root: Path, name: str, content: bytes = LINE) -> Path:
    path = root / "shards" / name
    path.write_bytes(content)
    return path


def test_every_ending_and_the_version_of_decompressed_bytes(root: Path) -> None:
    put(root, "a.jsonl")
    put(root, "b.jsonl.gz", gzip.compress(LINE))
    with pa.CompressedOutputStream(str(root / "shards" / "c.jsonl.zst"), "zstd") as stream:
        stream.write(LINE)
    put(root, "d.txt")
    put(root, "e.parquet", b"PAR1")
    found = discover(root)
    assert found.problems == ()
    assert [shard.key for shard in found.shards] == ["a", "b", "c", "d", "e"]
    assert {shard.version for shard in found.shards[:4]} == {hashlib.sha256(LINE).hexdigest()}


def test_folders_and_hidden_files_are_no_shards(root: Path) -> None:
    put(root, ".partial-1234-a.jsonl")
    put(root, ".gitkeep")
    (root / "shards" / "folder.jsonl").mkdir()
    (root / "shards" / ".hidden").mkdir()
    put(root, ".hidden/x.jsonl")
    assert discover(root, shards="shards/**/*") == Discovery((), ())


def test_no_file_at_all_is_an_empty_discovery(root: Path) -> None:
    assert discover(root, shards="elsewhere/*.jsonl") == Discovery((), ())


def test_another_ending_is_a_problem_that_names_the_allowed_ones(root: Path) -> None:
    put(root, "good.jsonl")
    put(root, "table.csv")
    found = discover(root)
    assert [shard.key for shard in found.shards] == ["good"]
    [problem] = found.problems
    assert problem.key == "table.csv"
    assert ".jsonl.zst" in problem.message and ".parquet" in problem.message


def test_two_files_of_one_key_are_both_refused_by_name(root: Path) -> None:
    put(root, "a.jsonl")
    put(root, "a.txt")
    put(root, "b.txt")
    found = discover(root)
    assert [shard.key for shard in found.shards] == ["b"]
    [problem] = found.problems
    assert problem.key == "a"
    assert "a.jsonl" in problem.message and "a.txt" in problem.message


@pytest.mark.parametrize("key", ["plain", "with space", "it's", 'quo"te', "Äpfel", "東京", "a.b", "a@b", "k" * 200])
def test_keys_that_are_fine(key: str) -> None:
    assert key_problem(key) is None


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "empty"),
        ("..", "dot"),
        ("a..b", "'..'"),
        ("a...b", "'..'"),
        (".a", "dot"),
        (" a", "blank"),
        ("a/b", "slash"),
        ("../evil", "contains a slash or backslash; a key is a plain name"),
        ("a\\b", "slash"),
        ("a\nb", "control"),
        ("a\x7fb", "control"),
        ("a\u2028b", "control"),
        ("a\udcffb", "UTF-8"),
        ("s*", "file patterns"),
        ("q?", "file patterns"),
        ("a[1]", "file patterns"),
        ("k" * 201, "200 bytes"),
        ("ä" * 101, "200 bytes"),
    ],
)
def test_keys_that_are_refused(key: str, reason: str) -> None:
    assert reason in (key_problem(key) or "")


def test_a_refused_name_holds_nothing_back_and_can_be_printed(root: Path) -> None:
    put(root, "good.jsonl")
    put(root, "a..b.jsonl")
    (Path(os.fsdecode(os.fsencode(root / "shards") + b"/bad\xff\n.jsonl"))).write_bytes(LINE)
    found = discover(root)
    assert [shard.key for shard in found.shards] == ["good"]
    assert [problem.key for problem in found.problems] == ["a..b", "bad\\udcff\\n"]
    for problem in found.problems:
        problem.message.encode()
        assert "\n" not in problem.message


def test_a_name_that_begins_with_two_dots_is_refused_and_not_hidden(root: Path) -> None:
    put(root, "..x.jsonl")
    put(root, ".x.jsonl")
    [problem] = discover(root).problems
    assert problem.key == "..x" and "begins with a dot; rename the file" in problem.message


def test_a_damaged_or_missing_file_is_a_problem_of_its_key(root: Path) -> None:
    put(root, "cut.jsonl.gz", gzip.compress(LINE * 100)[:-12])
    (root / "shards" / "gone.jsonl").symlink_to(root / "nowhere.jsonl")
    os.mkfifo(root / "shards" / "pipe.jsonl")
    put(root, "good.jsonl")
    found = discover(root)
    assert [shard.key for shard in found.shards] == ["good"]
    assert {problem.key: problem.message for problem in found.problems}.keys() == {"cut", "gone", "pipe"}
    assert all(problem.key in problem.message for problem in found.problems)


def test_roles_are_patterns_on_keys(root: Path) -> None:
    for name in ("heldout_1.jsonl", "val.txt", "train.jsonl"):
        put(root, name)
    found = discover(root, validation=["val"])
    assert {shard.key: shard.role for shard in found.shards} == {
        "heldout_1": "heldout",
        "val": "validation",
        "train": "train",
    }


def test_a_key_with_two_roles_is_an_error_of_the_settings(root: Path) -> None:
    put(root, "heldout_val.jsonl")
    with pytest.raises(SettingsError, match=r"heldout_val .*heldout\*.*\*val"):
        discover(root, validation=["*val"])


def test_a_malformed_pattern_is_an_error_of_the_settings(root: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.shards"):
        discover(root, shards="a**/x")


def test_one_key_alone_is_found_as_among_all(root: Path) -> None:
    for name in ("a.jsonl", "a.txt", "b.jsonl", "heldout.txt", "table.csv", "..up.jsonl", "tab\there.txt"):
        put(root, name)
    put(root, "c.jsonl.gz", b"no gzip")
    found = discover(root)
    keys = [shard.key for shard in found.shards] + [problem.key for problem in found.problems]
    assert len(keys) == 7
    for key in keys:
        alone = discover_shards(root, DataSettings(shards="shards/*"), HashCache(root / "other.json"), key)
        assert alone == Discovery(
            tuple(shard for shard in found.shards if shard.key == key),
            tuple(problem for problem in found.problems if problem.key == key),
        )
    assert discover_shards(root, DataSettings(), HashCache(root / "other.json"), "nowhere") == Discovery((), ())
