"""A home on the bench: its capture spec, shards and store, looked at anew each time."""

from __future__ import annotations

from pathlib import Path

from distill_assets.dataset_shards.discover import Shard, discover_shards
from distill_assets.foundation.home import Home
from distill_assets.teacher_capture.identity import CaptureSpec, capture_spec
from distill_assets.teacher_capture.store import CaptureStore


class Bench:
    """What is on disk in one home now."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.store = CaptureStore(self.home.captures)

    @property
    def spec(self) -> CaptureSpec:
        return capture_spec(self.home, self.home.settings(), self.home.hashes())

    @property
    def shards(self) -> dict[str, Shard]:
        found = discover_shards(self.home.root, self.home.settings().data, self.home.hashes())
        return {shard.key: shard for shard in found.shards}
