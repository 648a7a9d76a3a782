"""The two divergences on K + 1 outcomes against loops and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distill_assets.student_evaluation.metrics import METRICS, compare_outcomes


def compare(p: list[float], p_tail: float, q: list[float], q_tail: float) -> tuple[float, float]:
    with np.errstate(divide="ignore"):
        kl_N, acceptance_N = compare_outcomes(
            np.log([p]), np.log(np.array([p_tail])), np.log([q]), np.log(np.array([q_tail]))
        )
    return float(kl_N[0]), float(acceptance_N[0])


def test_by_hand() -> None:
    kl, acceptance = compare([0.5, 0.25], 0.25, [0.25, 0.25], 0.5)
    assert kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert acceptance == pytest.approx(0.25 + 0.25 + 0.25)


def test_equal_distributions_have_no_distance_and_full_acceptance() -> None:
    assert compare([0.7, 0.2], 0.1, [0.7, 0.2], 0.1) == (0.0, pytest.approx(1.0))


def test_empty_slots_and_a_missing_tail_count_for_nothing() -> None:
    with_padding = compare([0.6, 0.4, 0.0], 0.0, [0.5, 0.3, 0.5], 0.2)
    without = compare([0.6, 0.4], 0.0, [0.5, 0.3], 0.2)
    assert with_padding == without
    assert without[0] == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.3))
    assert without[1] == pytest.approx(0.8)


def test_no_tail_on_either_side() -> None:
    kl, acceptance = compare([0.5, 0.5], 0.0, [0.9, 0.1], 0.0)
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert acceptance == pytest.approx(0.6)


def test_an_outcome_the_model_rules_out_is_infinitely_far() -> None:
    kl, acceptance = compare([0.5, 0.4], 0.1, [0.6, 0.4], 0.0)
    assert kl == math.inf
    assert acceptance == pytest.approx(0.9)


def test_merging_the_tail_lowers_kl_and_raises_acceptance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = rng.dirichlet(np.full(6, 0.5), size=2)
        order = np.argsort(-p)
        p, q = p[order], q[order]
        kl, acceptance = compare(p[:3].tolist(), p[3:].sum(), q[:3].tolist(), q[3:].sum())
        assert kl <= (p * np.log(p / q)).sum() + 1e-12
        assert acceptance >= np.minimum(p, q).sum() - 1e-12


def test_the_bounds_are_stated_where_the_figures_are_explained() -> None:
    meaning = {m.key: m.meaning for m in METRICS}
    assert "K + 1 outcomes" in meaning["kl_nats"] and "lower bound" in meaning["kl_nats"]
    assert "K + 1 outcomes" in meaning["acceptance_share"] and "upper bound" in meaning["acceptance_share"]
