"""The pictures are PNGs of a sensible size, the same each time, and not empty."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image

from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.plots import draw_curves, draw_kept_mass, draw_pictures

CURVES = {
    "student": [{"step": i, "loss": 3.0 / i, "kd": 2.0 / i, "ce": 4.0 / i} for i in range(1, 60)],
    "control": [{"step": i, "loss": 4.0 / i, "kd": None, "ce": 4.0 / i} for i in range(1, 60)],
}


@pytest.fixture(scope="module")
def pictures(evaluation: Evaluation) -> dict[str, bytes]:
    return draw_pictures(evaluation, CURVES)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(picture.astype(int) - colour).max(-1) < 24).sum())


def test_sizes_and_background(pictures: dict[str, bytes]) -> None:
    assert list(pictures) == ["metrics", "entropy", "kept_mass", "loss"]
    for png in pictures.values():
        assert len(png) <= 60_000
        picture = pixels(png)
        assert picture.shape[1] == 1152
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] > 245).all()  # solid and light, not transparent
        assert Image.open(io.BytesIO(png)).info.get("transparency") is None


def test_each_model_has_its_colour(pictures: dict[str, bytes]) -> None:
    for name in ("metrics", "entropy", "loss"):
        picture = pixels(pictures[name])
        assert near(picture, (0x1F, 0x5F, 0xBF)) > 50, name
        assert near(picture, (0xC9, 0x57, 0x1B)) > 50, name


def test_only_what_exists_is_drawn(evaluation: Evaluation) -> None:
    assert list(draw_pictures(replace(evaluation, entropy_bins=()), {})) == ["metrics", "kept_mass"]
    only_control = pixels(draw_curves({"control": CURVES["control"]}))
    assert near(only_control, (0x1F, 0x5F, 0xBF)) == 0


def test_one_id_and_one_step_can_be_drawn() -> None:
    assert pixels(draw_kept_mass([0.4])).std() > 1
    assert pixels(draw_curves({"student": CURVES["student"][:1]})).std() > 1


def test_same_bytes_and_no_global_state(evaluation: Evaluation, pictures: dict[str, bytes]) -> None:
    before = matplotlib.rcParams["font.size"]
    assert draw_pictures(evaluation, CURVES) == pictures
    assert matplotlib.rcParams["font.size"] == before
    assert "matplotlib.pyplot" not in sys.modules
