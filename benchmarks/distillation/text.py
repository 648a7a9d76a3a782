"""Real text that is on every machine with the same pins: docstrings of the standard library and of packages.

A document is a docstring. Sources are read, never imported. All docstrings of a file are on the same side of the
split, and a paragraph that is anywhere held out is nowhere trained on.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "sqlalchemy")  # beside the standard library
_HELDOUT_SHARE = 16  # one file in so many is held out
_LEAST_CHARS = 200  # of a document
_NOT_TEXT = {"test", "tests", "testing", "site-packages", "_vendor"}


def sources() -> dict[str, str]:
    """What the text is cut from, and which version of it."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def documents(train_chars: int, heldout_chars: int) -> tuple[list[str], list[str]]:
    """(training, held-out) documents of about so many characters, in the order of their files' hashes."""
    files = sorted(_files(), key=_order)
    seen: set[bytes] = set()
    heldout = _documents([file for file in files if _order(file) % _HELDOUT_SHARE == 0], heldout_chars, seen)
    train = _documents([file for file in files if _order(file) % _HELDOUT_SHARE], train_chars, seen)
    return train, heldout


def _files() -> list[tuple[str, Path]]:
    """(name on any machine, path) of every source file."""
    roots = {name: Path(sysconfig.get_path("purelib")) / name for name in PACKAGES}
    roots["stdlib"] = Path(sysconfig.get_path("stdlib"))
    found = []
    for package, root in roots.items():
        for path in root.glob("**/*.py"):
            relative = path.relative_to(root)
            if not _NOT_TEXT.intersection(relative.parts):
                found.append((f"{package}/{relative.as_posix()}", path))
    return found


def _order(file: tuple[str, Path]) -> int:
    return int.from_bytes(hashlib.sha256(file[0].encode()).digest()[:8], "big")


def _documents(files: list[tuple[str, Path]], most_chars: int, seen: set[bytes]) -> list[str]:
    """The files' docstrings without paragraphs in `seen`, which grows."""
    chosen: list[str] = []
    n_chars = 0
    for _, path in files:
        for docstring in _docstrings(path):
            paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", docstring) if part.strip()]
            hashes = [hashlib.md5(part.encode()).digest() for part in paragraphs]
            text = "\n\n".join(part for part, digest in zip(paragraphs, hashes, strict=True) if digest not in seen)
            seen.update(hashes)
            if len(text) < _LEAST_CHARS:
                continue
            chosen.append(text)
            n_chars += len(text)
            if n_chars >= most_chars:
                return chosen
    raise SystemExit(f"the installed packages have only {n_chars:,} characters of docstrings; ask for fewer tokens")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # samples for parsers
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
