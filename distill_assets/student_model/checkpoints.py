"""A training under way: what a killed one goes on from.

Trainer writes a checkpoint file after file, its state last, and then removes the one before; so the newest whose
state can be read is whole.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

from distill_assets.foundation.fingerprints import digest

CHECKPOINT_SECONDS = 300.0  # of training that a kill may cost
_TOOLS = ("torch", "transformers", "accelerate")


def folder_under_way(root: Path, student_id: str, device: str) -> Path:
    """Where below `root` a student's checkpoints lie. Another device, or other versions, round otherwise: they start
    over.
    """
    return root / f"{student_id}-{digest([device, *map(version, _TOOLS)])}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; those that a kill cut off are removed."""
    latest, latest_step = None, -1
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            step = int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(checkpoint)
            continue
        if step > latest_step:
            latest, latest_step = checkpoint, step
    return latest
