"""One comparison per kind of difference between two loaded tokenizers.

A comparison takes a `Pair` and returns a named `Difference` with evidence, or None. Blocking are those
that make a captured id mean something else or a text get other ids; the rest are told. A text that gets
other ids settles it. Without one, rules that differ (merges, normaliser, ...) block under `segmentation`
unless they are proven to be the same in effect; under their own names they are told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.inserted_ids import inserted_ids
from distill_assets.tokenizer_compatibility.chat_templates import chat_template
from distill_assets.tokenizer_compatibility.definition import flat
from distill_assets.tokenizer_compatibility.fingerprint import SPECIAL_ROLES, special_ids
from distill_assets.tokenizer_compatibility.report import NO_IDS, Difference, cut, ranges
from distill_assets.tokenizer_compatibility.sides import Pair, TokenizerSide

_SHOWN = 5  # examples in one piece of evidence


def token_ids(pair: Pair) -> Difference | None:
    if not (first := pair.first_difference):
        return None
    examples = [
        {"id": i, "teacher": pair.teacher.tokens.get(i), "student": pair.student.tokens.get(i)}
        for i in pair.conflicts[:_SHOWN]
    ]
    count = len(pair.conflicts)
    more = ""
    if first.teacher == first.student:
        more = f": bytes {first.teacher_bytes} in the one and {first.student_bytes} in the other"
    elif first.student is None and first.teacher is not None:
        more = f", which has it as id {pair.student.vocabulary[first.teacher]}"
    elif first.teacher is None and first.student is not None:
        more = f"; the teacher has it as id {pair.teacher.vocabulary[first.student]}"
    teacher, student = ("no token" if token is None else repr(token) for token in (first.teacher, first.student))
    return Difference(
        "token_ids",
        True,
        f"id {first.id} is {teacher} in the teacher and {student} in the student{more}"
        f" ({count} {'id differs' if count == 1 else 'ids differ'})",
        {"count": count, "first": examples},
    )


def segmentation(pair: Pair) -> Difference | None:
    """The same text, other ids: shown by a text, or not ruled out by the rules."""
    rules = [{"part": part.part, "what": part.what} for part in pair.open_parts]
    if draw := pair.draw:
        owners = " and the ".join(f"{side}'s" for side in draw)
        said = f"the {owners} dropout leaves out merges at random, so a text gets other ids each time"
        return Difference("segmentation", True, said, {"text": None, "n_texts": 0, "rules": rules})
    if probe := pair.probe:
        return Difference(
            "segmentation",
            True,
            f"the text {cut(probe.text)} becomes {_said(probe.teacher_ids)} in the teacher"
            f" and {_said(probe.student_ids)} in the student",
            {
                "text": probe.text,
                "teacher": list(probe.teacher_tokens),
                "student": list(probe.student_tokens),
                "rules": rules,
            },
        )
    if not rules:
        return None
    n_texts = len(pair.encoded)
    differing = ", ".join(part.what for part in pair.open_parts)
    return Difference(
        "segmentation",
        True,
        f"the two sides differ in {differing}; none of {n_texts} texts shows it, but that none does cannot be shown",
        {"text": None, "n_texts": n_texts, "rules": rules},
    )


def _said(ids: tuple[int, ...]) -> str:
    return "what cannot be encoded" if ids == NO_IDS else cut(list(ids))


def loader(pair: Pair) -> Difference | None:
    """Rules in code, which cannot be compared; and classes that differ, which need not mean anything."""
    kinds = [type(side.tokenizer).__name__ for side in (pair.teacher, pair.student)]
    evidence = {"teacher": kinds[0], "student": kinds[1]}
    in_code = [kind for kind, side in zip(kinds, (pair.teacher, pair.student), strict=True) if side.definition is None]
    if in_code:
        detail = (
            f"{' and '.join(dict.fromkeys(in_code))} has rules in code, which cannot be compared: what both sides make"
            f" of {len(pair.encoded)} texts stands for them"
        )
        return Difference("loader", False, detail, evidence)
    if kinds[0] == kinds[1]:
        return None
    return Difference("loader", False, f"the teacher is loaded as {kinds[0]}, the student as {kinds[1]}", evidence)


def teacher_head(pair: Pair) -> Difference | None:
    return _narrow_head("teacher", pair.teacher.head_width, pair.teacher.n_real)


def student_head(pair: Pair) -> Difference | None:
    return _narrow_head("student", pair.student.head_width, pair.student.n_real)


def _narrow_head(side: str, width: int | None, n_real: int) -> Difference | None:
    if width is None or width >= n_real:
        return None
    return Difference(
        f"{side}_head",
        True,
        f"the {side}'s head has {width} rows for {n_real} token ids",
        {"head_width": width, "n_real": n_real},
    )


def missing_ids(pair: Pair) -> Difference | None:
    return _lacking("missing_ids", "student", pair.missing, pair.teacher)


def extra_ids(pair: Pair) -> Difference | None:
    return _lacking("extra_ids", "teacher", pair.extra, pair.student)


def _lacking(name: str, lacks: str, ids: tuple[int, ...], owner: TokenizerSide) -> Difference | None:
    if not ids:
        return None
    first = [{"id": i, "token": owner.tokens[i]} for i in ids[:_SHOWN]]
    detail = (
        f"the {lacks} has no token for {len(ids)} ids of the other side (the first is {ids[0]}, {first[0]['token']!r})"
    )
    return Difference(name, False, detail, {"count": len(ids), "ranges": ranges(ids)[:_SHOWN], "first": first})


def head_padding(pair: Pair) -> Difference | None:
    widths = pair.teacher.head_width, pair.student.head_width
    if None in widths or widths[0] == widths[1]:
        return None
    return Difference(
        "head_padding",
        False,
        f"the teacher's head has {widths[0]} rows, the student's {widths[1]}; rows without a token are masked",
        {"teacher": widths[0], "student": widths[1]},
    )


def tied_heads(pair: Pair) -> Difference | None:
    tied = pair.teacher.tied, pair.student.tied
    if None in tied or tied[0] == tied[1]:
        return None
    words = ["the input embedding too" if side else "a matrix of its own" for side in tied]
    return Difference(
        "tied_heads",
        False,
        f"the teacher's head is {words[0]}, the student's {words[1]}",
        {"teacher": tied[0], "student": tied[1]},
    )


def normalizer(pair: Pair) -> Difference | None:
    return _rule(pair, "normalizer", "normalizers")


def pre_tokenizer(pair: Pair) -> Difference | None:
    return _rule(pair, "pre_tokenizer", "pretokenizers")


def decoder(pair: Pair) -> Difference | None:
    """How ids become text again; no id depends on it, and the student is saved with the teacher's."""
    written = _rule(pair, "decoder", "decoders")
    if not (shown := pair.decoded):
        return written
    ids, teacher, student = shown
    detail = f"ids {cut(ids)} become {cut(teacher)} in the teacher and {cut(student)} in the student"
    evidence = written.evidence if written else {}
    return Difference("decoder", False, detail, {**evidence, "ids": ids, "texts": [teacher, student]})


def merges(pair: Pair) -> Difference | None:
    """BPE merges and the model's options; the scores of a Unigram vocabulary. Never the id map."""
    if pair.rules is None:
        return None
    teacher, student = (_model_rules(side) for side in (pair.teacher, pair.student))
    names = sorted(name for name in teacher.keys() | student.keys() if teacher.get(name) != student.get(name))
    if not names:
        return None
    evidence: dict[str, Any] = {"keys": names}
    if "merges" in names:
        lists = teacher.get("merges") or [], student.get("merges") or []
        longer = max(map(len, lists))
        differing = [rank for rank in range(longer) if lists[0][rank : rank + 1] != lists[1][rank : rank + 1]]
        evidence |= {"count": len(differing), "first": differing[:_SHOWN]}
        evidence |= {side: [merge for rank in differing[:_SHOWN] for merge in merges_[rank : rank + 1]]
                     for side, merges_ in zip(("teacher", "student"), lists, strict=True)}  # fmt: skip
    said = f"the segmentation models differ in {', '.join(names)}{_effect(pair, 'merges')}"
    return Difference("merges", False, said, evidence)


def _model_rules(side: TokenizerSide) -> dict[str, Any]:
    model = dict(side.state["model"])
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        model["scores"] = [score for _, score in vocabulary]
    return model


def _effect(pair: Pair, part: str) -> str:
    """What a difference in the writing of a rule comes to."""
    return "" if any(open_.part == part for open_ in pair.open_parts) else ", which changes no text's ids"


def added_tokens(pair: Pair) -> Difference | None:
    """Flags (lstrip, rstrip, single_word, normalized, special) of added tokens that both sides have."""
    teacher, student = (
        {token["id"]: token for token in side.state.get("added_tokens", [])} for side in (pair.teacher, pair.student)
    )
    shared = pair.teacher.tokens.keys() & pair.student.tokens.keys() - set(pair.conflicts)
    ids = sorted(i for i in (teacher.keys() | student.keys()) & shared if teacher.get(i) != student.get(i))
    if not ids:
        return None
    examples = [{"id": i, "teacher": teacher.get(i), "student": student.get(i)} for i in ids[:_SHOWN]]
    detail = f"{len(ids)} added tokens differ in their flags (the first is {pair.teacher.tokens[ids[0]]!r})"
    detail += _effect(pair, "added_tokens")
    return Difference("added_tokens", False, detail, {"count": len(ids), "first": examples})


def special_tokens(pair: Pair) -> Difference | None:
    teacher, student = special_ids(pair.teacher.tokenizer), special_ids(pair.student.tokenizer)
    roles = [role for role in SPECIAL_ROLES if teacher[role] != student[role]]
    if not roles:
        return None
    told = "; ".join(
        f"{role.upper()} is {teacher[role]} in the teacher and {student[role]} in the student" for role in roles
    )
    return Difference(
        "special_tokens",
        False,
        f"{told}; the teacher's is used",
        {"teacher": teacher, "student": student},
    )


def inserted(pair: Pair) -> Difference | None:
    teacher, student = _inserted(pair.teacher), _inserted(pair.student)
    if teacher == student:
        return None
    told = [f"{side[0]} and {side[1]}" if side else "what is unclear" for side in (teacher, student)]
    return Difference(
        "inserted",
        False,
        f"around a text the teacher inserts {told[0]}, the student {told[1]}; rows are encoded as the teacher does",
        {"teacher": teacher, "student": student},
    )


def _inserted(side: TokenizerSide) -> list[list[int]] | None:
    """[ids in front, ids behind]; None where that cannot be told."""
    try:
        return list(map(list, inserted_ids(side.tokenizer)))
    except ModelError:
        return None


def _rule(pair: Pair, name: str, nested: str) -> Difference | None:
    teacher, student = (side.state.get(name) for side in (pair.teacher, pair.student))
    if teacher == student or pair.rules is None:
        return None
    detail = f"the {name.replace('_', '-')}s differ"
    if flat(teacher, nested) == flat(student, nested):
        detail += " in writing only"
    elif name != "decoder":
        detail += _effect(pair, name)
    return Difference(name, False, detail, {"teacher": teacher, "student": student})


Comparison = Callable[[Pair], Difference | None]
# What each comparison is called for people.
COMPARED: dict[Comparison, str] = {
    token_ids: "id -> token, bytes",
    segmentation: "ids of texts",
    teacher_head: "rows of the teacher's head",
    student_head: "rows of the student's head",
    missing_ids: "ids the student lacks",
    extra_ids: "ids the teacher lacks",
    head_padding: "widths of the heads",
    tied_heads: "tied heads",
    merges: "segmentation model",
    normalizer: "normalizer",
    pre_tokenizer: "pre-tokenizer",
    decoder: "decoder",
    added_tokens: "added tokens' flags",
    loader: "loader",
    special_tokens: "BOS, EOS, PAD, UNK",
    inserted: "inserted ids",
    chat_template: "chat template",
}
COMPARISONS: dict[str, Comparison] = {comparison.__name__: comparison for comparison in COMPARED}
HEAD_COMPARISONS = ("teacher_head", "student_head", "head_padding")
