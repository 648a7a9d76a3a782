"""Which targets make the best student, and at how many bytes a position on disk.

A teacher is trained here on docstrings of the standard library and of installed packages, and captured by the
product for each kind of targets. Students see a part of that text once, by the product's losses, those of one seed
from the same start and with the same rows in the same order. The gap is what full distillation (KL over every id)
gains on cross-entropy, held out: KL from the teacher over every id, and negative log-likelihood. An arm closes a
share of it. All arms are trained on the first seeds; the best of few bytes and the best others are chosen, and
judged on fresh seeds, which chose nothing; so is what the product recommends. Intervals are Student's t over seeds;
the held-out documents are the same for all. Where the gap itself may be chance, the run is void and says so.

Everything made is kept in the cache, and what was interrupted goes on: the same command again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distillation.arms import ARMS, BY_NAME, DENSE, HARD, JUDGED, QUICK_ARMS
from distillation.figures import Interval, best_arms, gap_shares, over_seeds
from distillation.gradients import figures_file
from distillation.plot import draw
from distillation.setting import FULL, QUICK
from distillation.stages import compare, prepare, train
from distillation.students import Workshop, means, read_run
from distillation.text import sources
from workload import show

from distill_assets.student_evaluation.bootstrap import bootstrap_sums
from distill_assets.teacher_capture.store import Capture

CACHE = Path(__file__).resolve().parent / ".cache"
MOST_BYTES = 28.0  # a position: what is asked of the targets that are to close most of the gap
GRADIENTS = ("angle", "norm_ratio", "mean_error")
MEASURES = ("nll", "kl")


def main() -> None:
    options = parse_options()
    setting = QUICK if options.quick else FULL
    arms = [arm for arm in ARMS if not options.quick or arm.name in QUICK_ARMS]
    shop, captures = prepare(setting, options.cache, arms, say)
    sizes = {name: capture.bytes_per_token for name, capture in captures.items()}
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        train(pool, shop, arms, setting.first_seeds, say)
        compare(pool, shop, arms, say)
        first = Seeds(shop, setting.first_seeds)
        best = best_arms({n: first.share(n, "kl").mean for n in sizes}, sizes, setting.n_best, MOST_BYTES)
        chosen = sorted({*best, *(name for name in JUDGED if name in sizes)})
        train(pool, shop, [BY_NAME[name] for name in (HARD, DENSE, *chosen)], setting.fresh_seeds, say)
    fresh = Seeds(shop, setting.fresh_seeds)
    gaps = {measure: fresh.gap(measure) for measure in MEASURES}
    results = [line(arm.name, first, fresh if arm.name in chosen else None, captures) for arm in arms]
    report(results, described(shop, gaps), options.json)
    if options.plot:
        seeds = (len(setting.first_seeds), len(setting.fresh_seeds))
        draw([result for result in results if result["bytes a position"]], seeds, MOST_BYTES, options.plot)
    if not all(gap.is_real for gap in gaps.values()):
        say("void: the gap between cross-entropy and dense distillation may be chance, so shares of it mean nothing")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small run of a few arms: minutes, not hours")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"folder of what is made (default: {CACHE.name} beside)"
    )
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="students trained at a time, a thread each"
    )
    return parser.parse_args()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Gap:
    """Cross-entropy less dense, nats a position: over seeds, and over held-out rows drawn again."""

    over_seeds: Interval
    over_rows: tuple[float, float]

    @property
    def is_real(self) -> bool:
        return self.over_seeds.is_positive and self.over_rows[0] > 0


class Seeds:
    """What students of some seeds came to."""

    def __init__(self, shop: Workshop, seeds: Sequence[int]) -> None:
        self.shop, self._seeds = shop, seeds

    def of(self, name: str, measure: str) -> list[float]:
        return [means(read_run(self.shop, BY_NAME[name], seed))[measure] for seed in self._seeds]

    def share(self, name: str, measure: str) -> Interval:
        return over_seeds(gap_shares(self.of(HARD, measure), self.of(DENSE, measure), self.of(name, measure)))

    def gap(self, measure: str) -> Gap:
        differences = np.subtract(self.of(HARD, measure), self.of(DENSE, measure))
        column = MEASURES.index(measure)  # of a run's sums
        hard_RC, dense_RC = (
            np.mean([read_run(self.shop, BY_NAME[name], seed) for seed in self._seeds], axis=0)
            for name in (HARD, DENSE)
        )
        sums_SC = bootstrap_sums(np.stack([hard_RC[:, column] - dense_RC[:, column], hard_RC[:, 2]], axis=1))
        low, high = np.quantile(sums_SC[:, 0] / sums_SC[:, 1], [0.025, 0.975])
        return Gap(over_seeds(differences), (float(low), float(high)))


def line(name: str, first: Seeds, fresh: Seeds | None, captures: Mapping[str, Capture]) -> dict[str, Any]:
    capture = captures.get(name)
    judged = None if fresh is None else fresh.share(name, "kl")
    return {
        "arm": name,
        "family": BY_NAME[name].family,
        "bytes a position": None if capture is None else capture.bytes_per_token,
        "ids": None if capture is None else capture.stats.mean_kept_ids,
        "held-out nll": float(np.mean(first.of(name, "nll"))),
        "held-out kl": float(np.mean(first.of(name, "kl"))),
        "share of the gap": first.share(name, "kl").mean,
        "share by nll": first.share(name, "nll").mean,
        "fresh share": None if judged is None else judged.mean,
        "fresh low": None if judged is None else judged.low,
        "fresh high": None if judged is None else judged.high,
        "fresh by nll": None if fresh is None else fresh.share(name, "nll").mean,
        **json.loads(figures_file(first.shop, BY_NAME[name]).read_text(encoding="utf-8")),
    }


def described(shop: Workshop, gaps: Mapping[str, Gap]) -> dict[str, Any]:
    """The setting, and the gap on the fresh seeds."""
    return {
        "setting": asdict(shop.setting),
        "sources": sources(),
        "gap": {name: asdict(gap) for name, gap in gaps.items()},
    }


def report(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any], as_json: bool) -> None:
    """One JSON object, or two tables: of students, and of gradients."""
    if as_json:
        show("quality", results, True, **about)
        return
    of_students = [{n: v for n, v in line.items() if n not in (*GRADIENTS, "family")} for line in results]
    of_gradients = [{name: line[name] for name in ("arm", *GRADIENTS)} for line in results]
    show("quality: gradients", of_gradients, False)
    show("quality", of_students, False, **about)


if __name__ == "__main__":
    main()
