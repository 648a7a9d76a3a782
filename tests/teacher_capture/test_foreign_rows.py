"""Lines of other engines: what is taken, how it is read, and what is refused with which words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from distill_assets.dataset_shards.encode import Encoder, row_key
from distill_assets.dataset_shards.rows import BadRow
from distill_assets.foundation.settings import DataSettings
from distill_assets.teacher_capture.foreign_rows import ForeignRow, ForeignRows
from tests.bench import Bench

HALF, QUARTER, EIGHTH = math.log(0.5), math.log(0.25), math.log(0.125)


@pytest.fixture
def encoder(bench: Bench) -> Encoder:
    return bench.spec.encoder


def line(**changes: Any) -> dict[str, Any]:
    """Five tokens, of which the second and the fourth are targets; a key that is None is left out."""
    values: dict[str, Any] = {
        "input_ids": [7, 8, 9, 10, 11],
        "topk_ids": [[8, 20], [], [30, 31, 10], [], []],
        "topk_logprobs": [[HALF, QUARTER], [], [HALF, QUARTER, EIGHTH], [], []],
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def read(encoder: Encoder, value: object, shifted: bool = False) -> ForeignRow:
    row = ForeignRows(encoder, shifted).read(1, value)
    assert isinstance(row, ForeignRow), row
    return row


def refusal(encoder: Encoder, value: object, shifted: bool = False) -> str:
    row = ForeignRows(encoder, shifted).read(1, value)
    assert isinstance(row, BadRow)
    return row.reason


def test_a_line_of_three_keys(encoder: Encoder) -> None:
    row = read(encoder, line(other="the user's own", loss_mask=None))
    targets = row.targets
    assert targets.positions_P.tolist() == [0, 2] and targets.offsets_P1.tolist() == [0, 2, 5]
    assert targets.support_ids_N.tolist() == [8, 20, 30, 31, 10]
    assert targets.support_logprobs_N == pytest.approx([HALF, QUARTER, HALF, QUARTER, EIGHTH])
    assert np.exp(targets.tail_logprob_P) == pytest.approx([0.25, 0.125])
    assert targets.gold_logprob_P == pytest.approx([HALF, EIGHTH])  # token 8 came, then 10
    assert np.isnan(targets.entropy_P).all()
    mask = [0, 1, 0, 1, 0]
    assert row.encoded.key == row_key(np.array([7, 8, 9, 10, 11], dtype=np.int32), np.array(mask, dtype=bool))
    assert row.own == {"input_ids": [7, 8, 9, 10, 11], "loss_mask": mask}
    assert (row.dropped_last, row.dropped_unsupervised) == (False, 0)


def test_a_gold_token_that_was_not_kept_is_not_known(encoder: Encoder) -> None:
    row = read(encoder, line(topk_ids=[[9, 20], [], [30, 31, 10], [], []]))
    assert np.isnan(row.targets.gold_logprob_P[0]) and row.targets.gold_logprob_P[1] == pytest.approx(EIGHTH)


def test_what_is_given_is_taken(encoder: Encoder) -> None:
    row = read(
        encoder,
        line(
            tail_logprob=[QUARTER, None, EIGHTH, 5, "of no position"],
            gold_logprob=[-0.7, None, None, None, None],
            entropy=[None, None, 2.0, None, None],
            id=7,
            weight=0.5,
        ),
    )
    targets = row.targets
    assert targets.tail_logprob_P == pytest.approx([QUARTER, EIGHTH])
    assert targets.gold_logprob_P[0] == np.float32(-0.7) and np.isnan(targets.gold_logprob_P[1])
    assert np.isnan(targets.entropy_P[0]) and targets.entropy_P[1] == 2.0
    assert (row.encoded.id, row.encoded.weight) == ("7", 0.5)
    assert {key: row.own[key] for key in ("id", "weight")} == {"id": 7, "weight": 0.5}


def test_no_tail_where_nothing_is_outside(encoder: Encoder) -> None:
    everything = sorted(encoder.ids_with_token)
    even = [math.log(0.9999 / len(everything))] * len(everything)  # rounded: not quite one
    row = read(encoder, line(topk_ids=[everything, [], [], [], []], topk_logprobs=[even, [], [], [], []]))
    assert row.targets.tail_logprob_P.tolist() == [-math.inf]
    full = line(topk_ids=[[8, 20], [], [], [], []], topk_logprobs=[[HALF + 0.01, HALF], [], [], [], []])
    assert read(encoder, full).targets.tail_logprob_P.tolist() == [-math.inf]
    assert read(encoder, full | {"tail_logprob": [None] * 5}).targets.tail_logprob_P.tolist() == [-math.inf]


def test_the_mask_chooses_among_what_is_filled(encoder: Encoder) -> None:
    row = read(encoder, line(loss_mask=[1, 0, 0, True, 0]))
    assert row.targets.positions_P.tolist() == [2] and row.dropped_unsupervised == 1
    assert row.own["loss_mask"] == [0, 0, 0, 1, 0]


def test_the_last_position_is_dropped(encoder: Encoder) -> None:
    row = read(encoder, line(topk_ids=[[], [], [], [5], [6]], topk_logprobs=[[], [], [], [HALF], [HALF]]))
    assert row.targets.positions_P.tolist() == [3] and row.dropped_last
    assert row.dropped_unsupervised == 0


def test_shifted_lists_lack_the_last_position_and_mean_the_same(encoder: Encoder) -> None:
    whole = line(tail_logprob=[QUARTER, None, EIGHTH, None, None], loss_mask=[0, 1, 0, 1, 0])
    short = {key: value[:-1] if key.startswith(("topk", "tail")) else value for key, value in whole.items()}
    ours, theirs = read(encoder, whole), read(encoder, short, shifted=True)
    assert ours.own == theirs.own and ours.encoded.key == theirs.encoded.key
    for name in ("positions_P", "support_ids_N", "support_logprobs_N", "tail_logprob_P", "gold_logprob_P"):
        assert np.array_equal(getattr(ours.targets, name), getattr(theirs.targets, name))
    assert "use --rows shifted" in refusal(encoder, short)
    assert "topk_ids has 5 entries for 5 input_ids; it must have 4" in refusal(encoder, whole, shifted=True)


def test_rounding_is_put_right(encoder: Encoder) -> None:
    row = read(
        encoder,
        line(
            topk_ids=[[20, 8, 9], [], [30], [], []],
            topk_logprobs=[[HALF - 5e-7, HALF, -20.0], [], [5e-5], [], []],
        ),
    )
    assert row.targets.support_ids_N.tolist() == [8, 20, 9, 30]
    assert row.targets.support_logprobs_N[-1] == 0.0
    assert (np.diff(row.targets.support_logprobs_N[:3]) <= 0).all()


def test_numbers_no_float16_holds_stay_finite(encoder: Encoder) -> None:
    row = read(encoder, line(topk_ids=[[20, 8], [], [], [], []], topk_logprobs=[[0.0, -1e6], [], [], [], []]))
    assert row.targets.gold_logprob_P.tolist() == [-65504.0]


OTHERS = {"topk_ids": [[9, 20], [], [30, 31, 10], [], []]}  # token 8, which comes first, is not kept


@pytest.mark.parametrize(
    "changes",
    [
        {"gold_logprob": [HALF + 0.1, None, -2.0, None, None]},  # each rounded to a decimal, as an API may
        {"gold_logprob": [HALF - 1 / 32 - 1 / 128, None, EIGHTH + 1 / 32, None, None]},  # the compact code, and float16
        {"gold_logprob": [None, None, None, None, None]},
        {"topk_logprobs": [[0.0, -15.9375], [], [HALF, QUARTER, EIGHTH], [], []]}
        | {"topk_ids": [[20, 8], [], [30, 31, 10], [], []], "gold_logprob": [-60.0, None, None, None, None]},
        OTHERS | {"gold_logprob": [math.log(0.25), None, None, None, None]},  # all of the tail
        OTHERS | {"gold_logprob": [-40.0, None, None, None, None]},
        OTHERS
        | {"topk_logprobs": [[math.log(0.99), math.log(0.015)], [], [HALF, QUARTER, EIGHTH], [], []]}
        | {"gold_logprob": [math.log(0.03), None, None, None, None]},  # rounded numbers leave no tail
    ],
)
def test_a_gold_token_that_agrees_but_for_rounding_is_taken(encoder: Encoder, changes: dict[str, Any]) -> None:
    given = changes["gold_logprob"][0]
    found = read(encoder, line(**changes)).targets.gold_logprob_P[0]
    assert np.isnan(found) if given is None else found == pytest.approx(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gold_logprob": [HALF, None, -1.0, None, None]},
            r"position 2: gold_logprob is -1, but topk_logprobs has -2.07944 for the token that comes next \(10\)",
        ),
        ({"gold_logprob": [-1.0, None, None, None, None]}, "position 0: gold_logprob is -1, but .* -0.693147 for"),
        ({"gold_logprob": [HALF / math.log(10), None, None, None, None]}, "position 0: gold_logprob is -0.30103"),
        ({"gold_logprob": [-60.0, None, None, None, None]}, "position 0: gold_logprob is -60, but"),
        (
            OTHERS | {"gold_logprob": [math.log(0.3), None, None, None, None]},
            r"position 0: gold_logprob is -1.20397, a probability of 0.300, but the token that comes next \(8\) is not "
            "among topk_ids, and all ids that are not have 0.250 together",
        ),
        (
            OTHERS | {"gold_logprob": [HALF, *[None] * 4], "tail_logprob": [QUARTER, None, EIGHTH, None, None]},
            "all ids that are not have 0.250 together",
        ),
        (
            {"topk_ids": [[9], *[[]] * 4], "topk_logprobs": [[0.0], *[[]] * 4]}
            | {"gold_logprob": [-3.0, *[None] * 4], "tail_logprob": [None] * 5},
            "position 0: .* a probability of 0.050, .* have 0.000 together",
        ),
    ],
)
def test_a_gold_token_that_contradicts_the_kept_ids_is_refused(
    encoder: Encoder, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(refusal(encoder, line(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "input_ids is missing; a line needs input_ids, topk_ids, topk_logprobs"),
        ({"topk_logprobs": None}, "topk_logprobs is missing"),
        ({"input_ids": "abc"}, "input_ids must be a list"),
        ({"input_ids": [7, 8.0, 9, 10, 11]}, r"input_ids\[1\] is 8.0"),
        ({"input_ids": [7, 8, 9, 10, 320]}, r"input_ids\[4\] is 320, but the teacher's ids end at 319"),
        ({"topk_ids": [[8, 20], [], [30, 31, 10], []]}, "topk_ids has 4 entries for 5 input_ids; it must have 5"),
        ({"topk_logprobs": [[]] * 6}, "topk_logprobs has 6 entries for 5 input_ids; it must have 5$"),
        ({"topk_ids": {"0": [1]}}, "topk_ids is no list"),
        ({"topk_ids": [None, [], [30, 31, 10], [], []]}, r"topk_ids\[0\] is no list; write \[\]"),
        ({"topk_ids": [[8], [], [30, 31, 10], [], []]}, "position 0 has 1 topk_ids and 2 topk_logprobs"),
        ({"topk_ids": [[8, True], [], [30, 31, 10], [], []]}, "position 0: id True is not one of 0 to 319"),
        ({"topk_ids": [[8, 20], [], [30, "31", 10], [], []]}, "position 2: id '31' is not one of 0 to 319"),
        ({"topk_ids": [[8, 20], [], [30, 31, -1], [], []]}, "position 2: id -1 is not one of"),
        ({"topk_ids": [[8, 20], [], [30, 10**30, 10], [], []]}, "position 2: id 1000"),
        ({"topk_ids": [[8, 20], [], [30, 10, 30], [], []]}, "position 2: id 30 stands there twice"),
        ({"topk_logprobs": [[HALF, "-1"], [], [HALF, QUARTER, EIGHTH], [], []]}, "position 0: .* '-1', which is no"),
        ({"topk_logprobs": [[HALF, None], [], [HALF, QUARTER, EIGHTH], [], []]}, "None, which is no number"),
        ({"topk_logprobs": [[HALF, -math.inf], [], [HALF, QUARTER, EIGHTH], [], []]}, "-inf, which is not finite"),
        ({"topk_logprobs": [[math.nan, QUARTER], [], [HALF, QUARTER, EIGHTH], [], []]}, "nan, which is not finite"),
        ({"topk_logprobs": [[HALF, -1e300], [], [HALF, QUARTER, EIGHTH], [], []]}, "-1e.300, which is not finite"),
        ({"topk_logprobs": [[HALF, -(10**400)], [], [HALF, QUARTER, EIGHTH], [], []]}, "far too large"),
        ({"topk_logprobs": [[0.2, QUARTER], [], [HALF, QUARTER, EIGHTH], [], []]}, "position 0: .* has 0.2; natural"),
        ({"topk_logprobs": [[QUARTER, HALF], [], [HALF, QUARTER, EIGHTH], [], []]}, "position 0: topk_logprobs rises"),
        ({"topk_logprobs": [[HALF, HALF], [], [-0.1, -0.2, -0.3], [], []]}, "position 2: .* probability of 2.464"),
        ({"tail_logprob": [HALF, None, EIGHTH, None, None]}, "position 0: .* 1.250; it must be 0.96 to 1.04"),
        ({"tail_logprob": [QUARTER, None, None, None, None]}, "position 2: .* 0.875; it must be 0.96 to 1.04"),
        ({"tail_logprob": [QUARTER, EIGHTH]}, "tail_logprob has 2 entries"),
        ({"tail_logprob": [QUARTER, None, "x", None, None]}, "position 2: tail_logprob has 'x'"),
        ({"gold_logprob": [0.5, None, None, None, None]}, "position 0: gold_logprob has 0.5; natural"),
        ({"entropy": [None, None, -1.0, None, None]}, "position 2: entropy is -1, not 0 to"),
        ({"entropy": [7.0, None, 1.0, None, None]}, "position 0: entropy is 7, not 0 to 5.82 nats"),
        ({"loss_mask": [0, 1, 0, 1]}, "loss_mask has 4 entries for 5 input_ids"),
        ({"loss_mask": [0, 2, 0, 1, 0]}, r"loss_mask\[1\] is 2"),
        ({"loss_mask": [0, 1, 1, 1, 0]}, r"position 1 is \[\], but token 2 is a target"),
        ({"loss_mask": [1, 0, 0, 0, 0]}, "no position is scored"),
        ({"topk_ids": [[]] * 5, "topk_logprobs": [[]] * 5}, "no position is scored"),
        ({"topk_ids": [[]] * 4 + [[8]], "topk_logprobs": [[]] * 4 + [[HALF]]}, "no position is scored"),
        ({"id": [1]}, "id must be text or an integer"),
        ({"weight": -1}, "weight is -1.0"),
    ],
)
def test_refusals(encoder: Encoder, changes: dict[str, Any], message: str) -> None:
    read(encoder, line())  # what is changed is all that is wrong
    with pytest.raises(ValueError, match=message):
        raise ValueError(refusal(encoder, line(**changes)))


def test_a_line_must_be_an_object(encoder: Encoder) -> None:
    assert refusal(encoder, [line()]) == "a line must be a JSON object"
    assert refusal(encoder, BadRow(1, "not valid JSON")) == "not valid JSON"


def test_a_row_that_would_be_cut_is_refused(encoder: Encoder) -> None:
    length = encoder._data.max_length
    lists = {"topk_ids": [[8], *[[]] * length], "topk_logprobs": [[HALF], *[[]] * length]}
    assert f"it has {length + 1} tokens, more than data.max_length ({length})" in refusal(
        encoder, {"input_ids": [7] * (length + 1), **lists}
    )
    read(encoder, {"input_ids": [7] * length, **{name: value[:-1] for name, value in lists.items()}})


def test_where_every_token_is_a_target_every_position_must_be_filled(encoder: Encoder) -> None:
    every = Encoder(encoder._tokenizer, DataSettings(max_length=64, supervise="all"), encoder.n_real)
    assert "position 1 is [], but token 2 is a target (loss_mask, or data.supervise: all)" in refusal(every, line())
    filled = line(topk_ids=[[8]] * 4 + [[]], topk_logprobs=[[HALF]] * 4 + [[]], loss_mask=[0, 0, 0, 0, 1])
    row = read(every, filled)
    assert row.targets.positions_P.tolist() == [0, 1, 2, 3] and row.own["loss_mask"] == [0, 1, 1, 1, 1]


def test_an_id_without_a_token_is_refused(encoder: Encoder) -> None:
    wider = Encoder(encoder._tokenizer, DataSettings(max_length=64), encoder.n_real + 5)
    changed = line(topk_ids=[[8, 321], [], [30, 31, 10], [], []])
    assert refusal(wider, changed) == "position 0: the teacher's tokenizer has no token for id 321"
