"""One line of the JSONL interchange as a row with its targets, or the reason why it cannot be one.

Legend: T = tokens of a row, L = lists of a line (T, or T - 1 with `shifted`), P = scored positions,
N = ids kept in the whole row (see sparse_targets).

Other engines wrote these lines, so nothing is taken on trust: what would train a student on something
else than what a teacher said is refused, and nothing is mended in silence. Keys of other names are
the user's own and are ignored; a null counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_assets.dataset_shards.encode import EncodedRow, Encoder
from distill_assets.dataset_shards.rows import BadRow, Ids, parse_row
from distill_assets.teacher_capture.sparse_targets import LEAST_MASS, MOST_MASS, SparseTargets
from distill_assets.teacher_capture.target_rules import LOWEST_CODE

NEEDED = ("input_ids", "topk_ids", "topk_logprobs")
OWN_KEYS = ("input_ids", "loss_mask", "token_weights", "id", "weight")  # what the shard's own row has
_ABOVE_ZERO = 1e-4  # nats that rounding may lift a log-probability above 0
_ASCENT = 1e-6  # nats that an id may be likelier than the one before it
_NO_MASS = 1e-6  # less than this is what float32 log-probabilities are off one, and no tail
_LOWEST = float(np.finfo(np.float16).min)  # tail and gold are stored as float16
_ENTROPY_OFF = 0.05  # nats that a rounded entropy may exceed that of the uniform distribution
_GOLD_OFF = 1 / 8  # nats between two accounts of one token: each rounded to a decimal, or to a step of bfloat16 logits
_GOLD_OFF_RELATIVE = 1 / 128  # of their size besides: two roundings to bfloat16


@dataclass(frozen=True)
class ForeignRow:
    """A line that can be used. `own` is the shard's own row, which encodes to `encoded`.

    `dropped_last`: the last position was filled, and nothing comes after it. `dropped_unsupervised`
    counts filled positions whose next token is no target.
    """

    own: Mapping[str, Any]
    encoded: EncodedRow
    targets: SparseTargets
    dropped_last: bool
    dropped_unsupervised: int


class _Refused(Exception):
    """Carries the reason from where it is found to `ForeignRows.read`."""


class ForeignRows:
    """Reads lines with the encoder of one home. `shifted`: lists lack the last position."""

    def __init__(self, encoder: Encoder, shifted: bool) -> None:
        self._encoder, self._shifted = encoder, shifted
        self._is_real_V = np.zeros(encoder.n_real, dtype=bool)
        self._is_real_V[list(encoder.ids_with_token)] = True

    def read(self, line: int, value: object) -> ForeignRow | BadRow:
        """The row of one decoded line, or why it is none."""
        if isinstance(value, BadRow):
            return value
        try:
            return self._read(line, value)
        except _Refused as refused:
            return BadRow(line, str(refused))

    def _read(self, line: int, value: object) -> ForeignRow:
        if not isinstance(value, Mapping):
            raise _Refused("a line must be a JSON object")
        values = {key: part for key, part in value.items() if part is not None}
        if missing := [name for name in NEEDED if name not in values]:
            raise _Refused(f"{missing[0]} is missing; a line needs {', '.join(NEEDED)}")
        row = parse_row(line, {key: values[key] for key in OWN_KEYS if key in values})
        if isinstance(row, BadRow):
            raise _Refused(row.reason)
        assert isinstance(row.content, Ids)
        ids, mask = row.content.input_ids, row.content.loss_mask
        filled_T = self._filled(values, len(ids))
        if mask is None:
            mask = (False, *filled_T[:-1].tolist())
        encoded = self._encoder.encode(replace(row, content=replace(row.content, loss_mask=mask)))
        if isinstance(encoded, BadRow):
            raise _Refused(encoded.reason)
        if encoded.truncated:
            raise _Refused(f"it has {len(ids)} tokens, more than data.max_length ({len(encoded.input_ids)}); raise it")
        positions_P = self._scored(filled_T, encoded)
        own = {key: values[key] for key in OWN_KEYS if key in values}
        return ForeignRow(
            own=own | {"loss_mask": encoded.loss_mask.astype(int).tolist()},
            encoded=encoded,
            targets=self._targets(values, encoded.input_ids, positions_P),
            dropped_last=bool(filled_T[-1]),
            dropped_unsupervised=int(filled_T[:-1].sum()) - len(positions_P),
        )

    def _filled(self, values: Mapping[str, Any], n_tokens: int) -> NDArray[np.bool_]:
        """Which positions [T] have entries; both lists must agree on how many."""
        counts = {name: [len(part) for part in self._lists(name, values[name], n_tokens)] for name in NEEDED[1:]}
        n_ids, n_logprobs = (np.array(lengths, dtype=np.int64) for lengths in counts.values())
        if (different := np.flatnonzero(n_ids != n_logprobs)).size:
            t = int(different[0])
            raise _Refused(f"position {t} has {n_ids[t]} topk_ids and {n_logprobs[t]} topk_logprobs")
        filled_T = np.zeros(n_tokens, dtype=bool)
        filled_T[: len(n_ids)] = n_ids > 0
        return filled_T

    def _lists(self, name: str, value: object, n_tokens: int) -> Sequence[Sequence[Any]]:
        parts: Sequence[Any] = self._of_length(name, value, n_tokens)
        for t, part in enumerate(parts):
            if type(part) is not list:
                raise _Refused(f"{name}[{t}] is no list; write [] where nothing was scored")
        return parts

    def _of_length(self, name: str, value: object, n_tokens: int) -> Sequence[Any]:
        if not isinstance(value, list):
            raise _Refused(f"{name} is no list")
        wanted = n_tokens - 1 if self._shifted else n_tokens
        if len(value) != wanted:
            hint = "; for lists that lack the last position use --rows shifted" if len(value) == n_tokens - 1 else ""
            raise _Refused(
                f"{name} has {len(value)} entries for {n_tokens} input_ids; it must have {wanted}"
                + (" with --rows shifted" if self._shifted else hint)
            )
        return value

    def _scored(self, filled_T: NDArray[np.bool_], encoded: EncodedRow) -> NDArray[np.int32]:
        """Positions t whose next token is a target; each must be filled."""
        wanted_T = np.append(encoded.loss_mask[1:], False)
        if not wanted_T.any():
            raise _Refused("no position is scored: all topk_ids are [], or loss_mask marks no token after the first")
        if (empty := np.flatnonzero(wanted_T & ~filled_T)).size:
            t = int(empty[0])
            raise _Refused(f"position {t} is [], but token {t + 1} is a target (loss_mask, or data.supervise: all)")
        return np.flatnonzero(wanted_T).astype(np.int32)

    def _targets(
        self, values: Mapping[str, Any], input_ids: NDArray[np.int32], positions_P: NDArray[np.int32]
    ) -> SparseTargets:
        ids = [values["topk_ids"][t] for t in positions_P]
        logprobs = [values["topk_logprobs"][t] for t in positions_P]
        offsets_P1 = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)
        at = _Places(positions_P, np.diff(offsets_P1))
        ids_N = self._ids(list(chain.from_iterable(ids)), at)
        logprobs_N = _finite("topk_logprobs", list(chain.from_iterable(logprobs)), at)
        ids_N, logprobs_N = _descending(ids_N, _at_most_zero("topk_logprobs", logprobs_N, at), at)
        mass_P = np.add.reduceat(np.exp(logprobs_N), offsets_P1[:-1])
        _require_mass(mass_P, 0.0, at.one_each)

        tail_P = self._tail(values, mass_P, at, len(input_ids))
        kept_gold_P = np.full(len(positions_P), np.nan)
        is_gold_N = ids_N == input_ids[positions_P + 1][at.slot_N]
        kept_gold_P[at.slot_N[is_gold_N]] = logprobs_N[is_gold_N]
        gold_P = self._given("gold_logprob", values, at.one_each, len(input_ids))
        if gold_P is None:
            gold_P = kept_gold_P
        gold_P = _at_most_zero("gold_logprob", gold_P, at.one_each)
        _require_same_gold(gold_P, kept_gold_P, tail_P, input_ids[positions_P + 1], at.one_each)
        return SparseTargets(
            positions_P=positions_P,
            offsets_P1=offsets_P1,
            support_ids_N=ids_N.astype(np.int32),
            support_logprobs_N=logprobs_N.astype(np.float32),
            tail_logprob_P=tail_P.astype(np.float32),
            gold_logprob_P=np.maximum(gold_P, _LOWEST).astype(np.float32),
            entropy_P=self._entropy(values, at.one_each, len(input_ids)).astype(np.float32),
        )

    def _ids(self, flat: list[Any], at: _Places) -> NDArray[np.int64]:
        """Real ids [N], each once at a position."""
        n_real = len(self._is_real_V)
        strange = [type(i) is not int or not 0 <= i < n_real for i in flat] if _may_be_strange(flat, n_real) else []
        at.refuse(np.array(strange, dtype=bool), lambda n: f"id {flat[n]!r} is not one of 0 to {n_real - 1}")
        ids_N = np.array(flat, dtype=np.int64)
        at.refuse(~self._is_real_V[ids_N], lambda n: f"the teacher's tokenizer has no token for id {ids_N[n]}")
        order = np.lexsort((ids_N, at.slot_N))
        again = np.zeros(len(ids_N), dtype=bool)
        again[order[1:]] = (np.diff(ids_N[order]) == 0) & (np.diff(at.slot_N[order]) == 0)
        at.refuse(again, lambda n: f"id {ids_N[n]} stands there twice")
        return ids_N

    def _tail(
        self, values: Mapping[str, Any], mass_P: NDArray[np.float64], at: _Places, n_tokens: int
    ) -> NDArray[np.float64]:
        """Log of the mass outside the kept ids: as given (null: none is), else what the kept ids leave of one."""
        given_P = self._given("tail_logprob", values, at.one_each, n_tokens)
        if given_P is None:
            rest_P = 1.0 - mass_P
            has_tail_P = (rest_P > _NO_MASS) & (at.kept_P < len(self._encoder.ids_with_token))
            tail_P = np.log(rest_P, out=np.full_like(rest_P, -np.inf), where=has_tail_P)
        else:
            tail_P = _at_most_zero("tail_logprob", np.where(np.isnan(given_P), -np.inf, given_P), at.one_each)
            _require_mass(mass_P + np.exp(tail_P), LEAST_MASS, at.one_each)
        return np.where(np.isneginf(tail_P), tail_P, np.maximum(tail_P, _LOWEST))

    def _entropy(self, values: Mapping[str, Any], at: _Places, n_tokens: int) -> NDArray[np.float64]:
        entropy_P = self._given("entropy", values, at, n_tokens)
        if entropy_P is None:
            return np.full(len(at.positions_P), np.nan)
        most = math.log(len(self._encoder.ids_with_token)) + _ENTROPY_OFF
        at.refuse(
            (entropy_P < 0) | (entropy_P > most), lambda p: f"entropy is {entropy_P[p]:g}, not 0 to {most:.2f} nats"
        )
        return entropy_P

    def _given(self, name: str, values: Mapping[str, Any], at: _Places, n_tokens: int) -> NDArray[np.float64] | None:
        """The numbers of an optional key at the scored positions [P], NaN where null; None without the key."""
        if name not in values:
            return None
        given = self._of_length(name, values[name], n_tokens)
        numbers = [given[t] for t in at.positions_P]
        known_P = np.array([number is not None for number in numbers])
        values_P = np.full(len(numbers), np.nan)
        known = [number for number in numbers if number is not None]
        values_P[known_P] = _finite(name, known, _Places(at.positions_P[known_P], np.ones(len(known), dtype=np.int64)))
        return values_P


class _Places:
    """Which position each number of a row belongs to: `kept_P` of them to each."""

    def __init__(self, positions_P: NDArray[np.int32], kept_P: NDArray[np.int64]) -> None:
        self.positions_P, self.kept_P = positions_P, kept_P
        self.slot_N = np.repeat(np.arange(len(positions_P)), kept_P)

    @property
    def one_each(self) -> _Places:
        """The places of numbers of which a position has one."""
        return _Places(self.positions_P, np.ones_like(self.kept_P))

    def refuse(self, bad_N: NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        """Refuse the row for the first number that is marked; `reason` is asked about that one."""
        if bad_N.any():
            n = int(bad_N.argmax())
            raise _Refused(f"position {self.positions_P[self.slot_N[n]]}: {reason(n)}")


def _may_be_strange(flat: list[Any], n_real: int) -> bool:
    """Whether something in `flat` is no id: what costs little to ask of all at once."""
    return set(map(type, flat)) != {int} or min(flat) < 0 or max(flat) >= n_real


def _finite(name: str, numbers: list[Any], at: _Places) -> NDArray[np.float64]:
    """Numbers [N] in float64 that are finite in float32 too."""
    strange = [type(number) not in (int, float) for number in numbers] if set(map(type, numbers)) - {int, float} else []
    at.refuse(np.array(strange, dtype=bool), lambda n: f"{name} has {numbers[n]!r}, which is no number")
    try:
        values_N = np.array(numbers, dtype=np.float64)
    except OverflowError:  # an integer of hundreds of digits
        raise _Refused(f"{name} has a number that is far too large") from None
    with np.errstate(over="ignore"):
        bad_N = ~np.isfinite(values_N.astype(np.float32))
    at.refuse(bad_N, lambda n: f"{name} has {values_N[n]}, which is not finite")
    return values_N


def _at_most_zero(name: str, values_N: NDArray[np.float64], at: _Places) -> NDArray[np.float64]:
    """Log-probabilities with what rounding lifted above 0 put back; NaN stays."""
    at.refuse(
        values_N > _ABOVE_ZERO,
        lambda n: f"{name} has {values_N[n]:g}; natural logarithms of probabilities are at most 0",
    )
    return np.where(values_N > 0, 0.0, values_N)


def _descending(
    ids_N: NDArray[np.int64], logprobs_N: NDArray[np.float64], at: _Places
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Likeliest first in each position; what rounding put out of order is put right."""
    ascent_N = np.zeros(len(logprobs_N))
    ascent_N[1:] = np.where(np.diff(at.slot_N) == 0, np.diff(logprobs_N), 0.0)
    at.refuse(
        ascent_N > _ASCENT,
        lambda n: f"topk_logprobs rises from {logprobs_N[n - 1]:g} to {logprobs_N[n]:g}; the likeliest id comes first",
    )
    if not (ascent_N > 0).any():
        return ids_N, logprobs_N
    order = np.lexsort((-logprobs_N, at.slot_N))
    return ids_N[order], logprobs_N[order]


def _require_mass(mass_P: NDArray[np.float64], least: float, at: _Places) -> None:
    """`least`: 0 for the kept ids alone, LEAST_MASS for them and their tail."""
    allowed = f"{least} to {MOST_MASS}" if least else f"at most {MOST_MASS}"
    what = "topk_logprobs and tail_logprob" if least else "topk_logprobs"
    at.refuse(
        (mass_P > MOST_MASS) | (mass_P < least),
        lambda p: f"{what} add up to a probability of {mass_P[p]:.3f}; it must be {allowed}",
    )


def _require_same_gold(
    gold_P: NDArray[np.float64],
    kept_gold_P: NDArray[np.float64],
    tail_P: NDArray[np.float64],
    gold_ids_P: NDArray[np.int32],
    at: _Places,
) -> None:
    """The token that came has one log-probability: what is said of it alone must be what the kept ids say, or, where
    it is not among them (NaN), fit into their tail. Below what the compact code reaches all are alike.
    """
    difference_P = np.abs(np.maximum(gold_P, LOWEST_CODE) - np.maximum(kept_gold_P, LOWEST_CODE))
    at.refuse(
        difference_P > _GOLD_OFF + _GOLD_OFF_RELATIVE * np.abs(kept_gold_P),
        lambda p: (
            f"gold_logprob is {gold_P[p]:g}, but topk_logprobs has {kept_gold_P[p]:g} for the token that comes next "
            f"({gold_ids_P[p]})"
        ),
    )
    at.refuse(
        np.isnan(kept_gold_P) & (np.exp(gold_P) > np.exp(tail_P) + (MOST_MASS - 1)),
        lambda p: (
            f"gold_logprob is {gold_P[p]:g}, a probability of {math.exp(gold_P[p]):.3f}, but the token that comes next "
            f"({gold_ids_P[p]}) is not among topk_ids, and all ids that are not have {math.exp(tail_P[p]):.3f} together"
        ),
    )
