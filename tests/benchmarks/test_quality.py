"""The arithmetic of the quality benchmark, and that its arms are what the product would be asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.distillation.arms import ARMS, BY_NAME, DENSE, FAMILIES, HARD, JUDGED, QUICK_ARMS, RECOMMENDED
from benchmarks.distillation.figures import best_arms, gap_shares, over_seeds
from distill_assets.foundation.settings import RECOMMENDED_TARGETS, TargetSettings, TrainingSettings
from distill_assets.student_model.losses import LossMixture


def test_share_is_paired_seed_by_seed() -> None:
    hard, dense = [5.0, 8.0], [4.0, 4.0]
    assert gap_shares(hard, dense, hard).tolist() == [0.0, 0.0]
    assert gap_shares(hard, dense, dense).tolist() == [1.0, 1.0]
    # Half of the way, a quarter of the way; from the means it would be (6.5 - 5.75) / 2.5.
    assert gap_shares(hard, dense, [4.5, 7.0]).tolist() == [0.5, 0.25]
    assert gap_shares(hard, dense, [6.0, 3.0]).tolist() == [-1.0, 1.25]  # worse than no teacher; better than dense


def test_interval_is_students_t_over_seeds() -> None:
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high == pytest.approx(2.0 + 4.303 / math.sqrt(3))  # 97.5% point of two degrees of freedom
    assert interval.low == pytest.approx(2.0 - 4.303 / math.sqrt(3))
    assert not interval.is_positive
    assert over_seeds([1.0, 1.1, 0.9, 1.0, 1.0]).is_positive
    assert over_seeds([0.7]).low is None
    assert not over_seeds([0.7]).is_positive  # a single seed proves nothing


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    trials = [over_seeds(random.normal(0.3, 1.0, 5)) for _ in range(2000)]
    covered = np.mean([t.low is not None and t.high is not None and t.low <= 0.3 <= t.high for t in trials])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_half_of_the_chosen_are_cheap() -> None:
    share = {"a": 0.99, "b": 0.98, "c": 0.97, "d": 0.90, "e": 0.80, "f": 0.10}
    sizes = {"a": 90.0, "b": 80.0, "c": 70.0, "d": 28.0, "e": 20.0, "f": 10.0}
    assert best_arms(share, sizes, 4, 28.0) == ["a", "b", "d", "e"]
    assert best_arms(share, dict.fromkeys(share, 90.0), 4, 28.0) == ["a", "b", "c", "d"]  # none is
    assert best_arms(share, dict.fromkeys(share, 1.0), 4, 28.0) == ["a", "b", "c", "d"]


def test_arms_are_targets_and_losses_of_the_product() -> None:
    assert len(BY_NAME) == len({arm.slug for arm in ARMS}) == len(ARMS)
    assert set(QUICK_ARMS) <= BY_NAME.keys()
    for arm in ARMS:
        LossMixture(**arm.mixture)
        assert (arm.targets is None) == (arm.name in (HARD, DENSE))
        if arm.targets is not None:
            settings = TargetSettings.model_validate(dict(arm.targets))
            assert arm.family in FAMILIES
            assert ("tail_sample_weight" in arm.mixture) == (settings.tail_samples > 0)  # else it would do nothing


def test_what_is_recommended_is_judged() -> None:
    arm = BY_NAME[RECOMMENDED]
    assert RECOMMENDED in QUICK_ARMS and set(JUDGED) <= BY_NAME.keys()
    assert TargetSettings.model_validate(dict(arm.targets or {})) == RECOMMENDED_TARGETS
    defaults = TrainingSettings()
    assert arm.mixture == {name: getattr(defaults, name) for name in ("tail_sample_weight", "kd_weight")}
    assert LossMixture(**arm.mixture).objective == defaults.objective and defaults.temperature == 1.0
