"""Parquet files of captured rows that are noticed to be damaged wherever a bit flips.

Parquet has checksums for its pages only. A bit that flips in the footer, half of a small file, can give other rows
without an error, or an exception from deep inside a reader. So the footer is sealed: one of its own key-value pairs
is the SHA-256 of all its bytes, with zeros where that hash stands. A file without a seal (other tools, versions
before it) is read as ever.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import LEVEL, parquet_writer

SEAL = b"distill_footer_sha256"  # the key; no older file says this anywhere
_BLANK = b"0" * 64
_SEALED = re.compile(SEAL + b"\x18@([0-9a-f]{64})")  # Thrift: a string follows, of 64 bytes
_END = 8  # bytes after a footer: its length, and PAR1


@contextmanager
def sealed_writer(
    path: Path, targets: TargetSettings, level: int = LEVEL, position_weights: bool = False
) -> Iterator[pq.ParquetWriter]:
    """A writer of captured rows, as `parquet_writer`, whose file is sealed when the block ends well."""
    with parquet_writer(path, targets, level, position_weights) as writer:
        yield writer
        writer.add_key_value_metadata({SEAL.decode(): _BLANK.decode()})
    with path.open("r+b") as stream:
        start, footer = _footer(stream)
        [place] = _SEALED.finditer(footer)
        stream.seek(start + place.start(1))
        stream.write(hashlib.sha256(footer).hexdigest().encode())


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A file of captured rows, its seal checked before anything is made of its footer; ValueError when it is broken.

    Pages are checked as they are read. Readers of Parquet raise what they like on other damage.
    """
    with path.open("rb") as stream:
        _, footer = _footer(stream)
    _check(footer)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        yield file


def _footer(stream: BinaryIO) -> tuple[int, bytes]:
    """Where the footer begins, and its bytes."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - _END))
    start = max(0, size - _END - int.from_bytes(stream.read(4), "little"))
    stream.seek(start)
    return start, stream.read(max(0, size - _END - start))


def _check(footer: bytes) -> None:
    places = list(_SEALED.finditer(footer))
    if not places and SEAL not in footer:
        return
    if len(places) == 1:
        start, end = places[0].span(1)
        if hashlib.sha256(footer[:start] + _BLANK + footer[end:]).hexdigest().encode() == places[0][1]:
            return
    raise ValueError("its footer is not what was written")
