from __future__ import annotations

import gzip
import hashlib
import math
import os
from pathlib import Path

import pyarrow as pa
import pytest

from distill_assets.foundation.errors import UnreadableFile
from distill_assets.foundation.files import write_text
from distill_assets.foundation.fingerprints import HashCache, content_hash, digest

DATA = b"".join(b'{"text": "line %d"}\n' % (7919 * i) for i in range(3000))
GZ = gzip.compress(DATA, mtime=0)  # with the time in it, two processes would name a test differently
ZST = pa.compress(DATA, codec="zstd", asbytes=True)


def test_digest_is_the_sha256_of_canonical_json() -> None:
    expected = hashlib.sha256(rb'{"a":[1,2.5,null],"b":"\u00e4"}').hexdigest()
    assert digest({"b": "ä", "a": [1, 2.5, None]}) == expected[:16]
    assert digest({"a": (1, 2.5, None), "b": "ä"}, 64) == expected
    assert digest({"a": 1}) != digest({"a": 1.0}) != digest({"a": "1"})


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", Path("x"), {"a": [object()]}])
def test_digest_refuses_what_json_cannot_hold(value: object) -> None:
    with pytest.raises(TypeError):
        digest(value)


def test_digest_refuses_numbers_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(math.nan)


@pytest.mark.parametrize(
    ("ending", "data"),
    [("jsonl", DATA), ("jsonl.gz", GZ), ("jsonl.gz", gzip.compress(DATA, 1, mtime=0)), ("jsonl.zst", ZST)],
)
def test_a_compressed_file_has_the_hash_of_its_content(tmp_path: Path, ending: str, data: bytes) -> None:
    file = tmp_path / f"a.{ending}"
    file.write_bytes(data)
    assert content_hash(file) == hashlib.sha256(DATA).hexdigest()


TWO_ZST = b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (DATA[:900], DATA[900:]))
TWO_GZ = gzip.compress(DATA[:900], mtime=0) + gzip.compress(DATA[900:], mtime=0)


@pytest.mark.parametrize(("name", "data"), [("a.zst", TWO_ZST), ("a.gz", TWO_GZ)])
def test_several_compressed_members_are_one_content(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert content_hash(tmp_path / name) == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.gz", GZ[:-40]),
        ("not.gz", b"plain text"),
        ("no-block.gz", GZ[:10] + b"\xff" * 40),
        ("cut.zst", ZST[:-1]),
        ("not.zst", b"plain text"),
    ],
)
def test_a_damaged_compressed_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableFile, match=f"{name}: cannot be read to its end"):
        content_hash(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"a\.txt: the file is gone"):
        content_hash(tmp_path / "a.txt")
    with pytest.raises(UnreadableFile, match=r"a\.txt: the file is gone"):
        HashCache(tmp_path / "cache.json").hash_of(tmp_path / "a.txt")


class Readings:
    """A way to hash a file that counts how often files were read."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, path: Path) -> str:
        self.n += 1
        return content_hash(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "shard.jsonl"
    file.write_text("one\n")
    return file


def remembered(tmp_path: Path, file: Path) -> tuple[HashCache, Readings]:
    """A cache from disk, as another process would open it, after one process read `file`."""
    first = HashCache(tmp_path / "cache.json")
    first.hash_of(file)
    first.save()
    return HashCache(tmp_path / "cache.json"), Readings()


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, file: Path) -> None:
    cache, readings = remembered(tmp_path, file)
    assert cache.hash_of(file, readings) == content_hash(file)
    assert readings.n == 0


def test_a_touched_file_is_read_again_and_has_its_old_hash(tmp_path: Path, file: Path) -> None:
    cache, readings = remembered(tmp_path, file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert cache.hash_of(file, readings) == hashlib.sha256(b"one\n").hexdigest()
    assert readings.n == 1
    cache.hash_of(file, readings)
    assert readings.n == 1


def test_a_changed_file_of_the_same_size_and_time_has_a_new_hash(tmp_path: Path, file: Path) -> None:
    cache, readings = remembered(tmp_path, file)
    before = file.stat()
    file.write_text("two\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of change, ctime, cannot be set back
    assert cache.hash_of(file, readings) == hashlib.sha256(b"two\n").hexdigest()


def test_a_replaced_file_of_the_same_size_and_time_has_a_new_hash(tmp_path: Path, file: Path) -> None:
    cache, readings = remembered(tmp_path, file)
    before = file.stat()
    write_text(file, "two\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.hash_of(file, readings) == hashlib.sha256(b"two\n").hexdigest()


def test_rehash_reads_once_whatever_is_remembered(tmp_path: Path, file: Path) -> None:
    _, readings = remembered(tmp_path, file)
    cache = HashCache(tmp_path / "cache.json", rehash=True)
    cache.hash_of(file, readings)
    cache.hash_of(file, readings)
    assert readings.n == 1


@pytest.mark.parametrize("damage", [b"", b"{half", b"[1, 2]", b"\xff\xfe", b'{"%s": 3}', b'{"%s": [1]}'])
def test_a_damaged_cache_costs_reading_and_nothing_else(tmp_path: Path, file: Path, damage: bytes) -> None:
    _, readings = remembered(tmp_path, file)
    (tmp_path / "cache.json").write_bytes(damage.replace(b"%s", str(file.resolve()).encode()))
    cache = HashCache(tmp_path / "cache.json")
    assert cache.hash_of(file, readings) == content_hash(file)
    assert readings.n == 1
    cache.save()
    HashCache(tmp_path / "cache.json").hash_of(file, readings)
    assert readings.n == 1


def test_a_cache_that_learnt_nothing_writes_nothing(tmp_path: Path) -> None:
    HashCache(tmp_path / "cache.json").save()
    assert not (tmp_path / "cache.json").exists()


def test_a_file_has_one_memory_by_whatever_links_it_is_reached(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (folder / "a").write_bytes(b"a")
    (tmp_path / "linked").symlink_to(folder)
    (other / "a").symlink_to(folder / "a")
    cache = HashCache(tmp_path / "hashes.json")
    found = cache.hash_of(folder / "a")
    for path in (tmp_path / "linked" / "a", other / "a"):
        assert cache.hash_of(path, lambda path: f"read {path}") == found
    (other / "b").write_bytes(b"a")
    assert cache.hash_of(other / "b", lambda path: "another file") == "another file"
