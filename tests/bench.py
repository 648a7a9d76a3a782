"""A home on the bench: its capture spec, shards and store, looked at anew each time; edited, and put back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

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


def edit(root: Path, **sections: object) -> None:
    """Change keys of sections of a home's distill.yaml, and leave their other keys."""
    settings = yaml.safe_load((root / "distill.yaml").read_text())
    merged = {
        name: {**settings.get(name, {}), **section} if isinstance(section, dict) else section
        for name, section in sections.items()
    }
    replace(root, **merged)


def replace(root: Path, **sections: object) -> None:
    """Put sections into a home's distill.yaml in place of what they were."""
    file, beside = root / "distill.yaml", root / "distill.yaml.new"  # a server looks at any moment
    beside.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **sections}))
    beside.replace(file)


@contextmanager
def put_back(root: Path) -> Iterator[None]:
    """What happens to a home in the block is undone: its path is part of its catalog, so no copy would do."""
    backup = root.with_name("backup")
    shutil.copytree(root, backup, symlinks=True)
    yield
    shutil.rmtree(root)
    backup.rename(root)
