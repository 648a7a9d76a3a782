"""The figures by held-out shard and by the teacher's entropy, each with the paired difference from the rival."""

from __future__ import annotations

from distill_assets.student_evaluation.bootstrap import Estimate
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.figures import Scope
from distill_assets.student_evaluation.identity import STUDENT
from distill_assets.student_evaluation.metrics import BY_KEY
from distill_assets.student_evaluation.wording import MINUS, NOTHING, column, number, write_estimate, write_share


def shard_tables(evaluation: Evaluation) -> list[tuple[Scope, list[dict[str, str]]]]:
    """For each held-out shard its figures, a row a metric and a column a model, ready to print."""
    return [(scope, _shard_rows(evaluation, scope)) for scope in evaluation.shards]


def _shard_rows(evaluation: Evaluation, scope: Scope) -> list[dict[str, str]]:
    rival = evaluation.rival
    rows = []
    for metric in evaluation.metrics:
        row = {"figure": column(metric)}
        row |= {name: write_estimate(metric, figures[metric.key]) for name, figures in scope.models.items()}
        if rival:
            row[f"{STUDENT} {MINUS} {rival}"] = write_estimate(
                metric, scope.differences[rival][metric.key], signed=True
            )
        rows.append(row)
    for closed in scope.closed:
        what = evaluation.kl.label if closed.measure == "kl" else "negative log-likelihood"
        share = NOTHING if closed.share is None else write_share(closed.share)
        rows.append(dict.fromkeys(rows[0], "") | {"figure": f"Share of the gap closed, by {what} (%)", STUDENT: share})
    return rows


def entropy_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """A row a bin of the teacher's entropy; intervals of the differences only, the models' own are in the picture."""
    rival, rows = evaluation.rival, []
    names = [STUDENT, *([rival] if rival else [])]
    for b in evaluation.entropy_bins:
        row = {"entropy (nats)": f"{number(b.low_nats, 2)} to {number(b.high_nats, 2)}"}
        for metric, figures, differences in (
            (evaluation.kl, b.kl_nats, b.kl_difference),
            (BY_KEY["agreement_share"], b.agreement_share, b.agreement_difference),
        ):
            unit = "nats" if metric is evaluation.kl else "%"
            for name in names:
                alone = Estimate(figures[name].value, None, None)
                row[f"{metric.label}, {name} ({unit})"] = write_estimate(metric, alone)
            if rival:
                row[f"{STUDENT} {MINUS} {rival} ({unit.replace('%', 'points')})"] = write_estimate(
                    metric, differences[rival], signed=True
                )
        rows.append(row | {"positions": f"{b.n_positions:,}", "rows": f"{b.n_rows:,}"})
    return rows
