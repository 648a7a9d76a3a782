"""A training under way: what a killed one goes on from.

Trainer writes a checkpoint file after file. A list of them with their hashes comes last, and then the checkpoint
before goes; so one that has it, and fits it, is whole. Any other is no reason to fail: it is a cache, and is removed.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from distill_assets.foundation.errors import UnreadableFile
from distill_assets.foundation.files import remove, write_json
from distill_assets.foundation.fingerprints import content_hash, digest

CHECKPOINT = 2  # raised when what is written comes to mean something else
CHECKPOINT_SECONDS = 300.0  # of training that a kill may cost
_TOOLS = ("distill_assets", "torch", "transformers", "accelerate")
_LIST = "whole.json"


def folder_under_way(root: Path, student_id: str, device: str) -> Path:
    """Where below `root` a student's checkpoints lie. Another device, or other versions, round otherwise: they start
    over.
    """
    return root / f"{student_id}-{digest([CHECKPOINT, device, *map(version, _TOOLS)])}"


def student_under_way(name: str) -> str:
    """The student that a folder, or a lock, below that root belongs to."""
    return name.partition("-")[0].removesuffix(".lock")


def mark_whole(checkpoint: Path) -> None:
    """List its files, and remove the checkpoints before it."""
    write_json(checkpoint / _LIST, {file.name: content_hash(file) for file in checkpoint.iterdir()})
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            remove(other)


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint in `folder`, or None; what is not whole is removed. For one process at a time."""
    whole = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if whole is None and _is_whole(checkpoint):
            whole = checkpoint
        else:
            remove(checkpoint)
    return whole


def _is_whole(checkpoint: Path) -> bool:
    try:
        listed = json.loads((checkpoint / _LIST).read_text(encoding="utf-8"))
        return all(content_hash(checkpoint / name) == found for name, found in listed.items())
    except (OSError, ValueError, AttributeError, UnreadableFile):
        return False
