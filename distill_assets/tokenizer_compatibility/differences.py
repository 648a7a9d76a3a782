"""One comparison per kind of difference between two loaded tokenizers.

A comparison takes a `Pair` and returns a named `Difference` with evidence, or None. Blocking are
those that make a captured id mean something else or a text get other ids; the rest are told.
Rules (merges, normaliser, ...) that differ are told; what blocks is a text that shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_assets.foundation.inserted_ids import inserted_ids
from distill_assets.tokenizer_compatibility.fingerprint import SPECIAL_ROLES, special_ids
from distill_assets.tokenizer_compatibility.report import Difference, ranges
from distill_assets.tokenizer_compatibility.sides import Pair, TokenizerSide

_SHOWN = 5  # examples in one piece of evidence

_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
)


def token_ids(pair: Pair) -> Difference | None:
    if not (first := pair.first_difference):
        return None
    examples = [
        {"id": i, "teacher": pair.teacher.tokens[i], "student": pair.student.tokens[i]} for i in pair.conflicts[:_SHOWN]
    ]
    count = len(pair.conflicts)
    return Difference(
        "token_ids",
        True,
        f"id {first.id} is {first.teacher!r} in the teacher and {first.student!r} in the student"
        f" ({count} {'id differs' if count == 1 else 'ids differ'})",
        {"count": count, "first": examples},
    )


def segmentation(pair: Pair) -> Difference | None:
    if not (probe := pair.probe):
        return None
    return Difference(
        "segmentation",
        True,
        f"the text {_cut(probe.text)} becomes {_cut(list(probe.teacher_ids))} in the teacher"
        f" and {_cut(list(probe.student_ids))} in the student",
        {"text": probe.text, "teacher": list(probe.teacher_tokens), "student": list(probe.student_tokens)},
    )


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


def normalizer(pair: Pair) -> Difference | None:
    return _rule(pair, "normalizer")


def pre_tokenizer(pair: Pair) -> Difference | None:
    return _rule(pair, "pre_tokenizer")


def merges(pair: Pair) -> Difference | None:
    """BPE merges and the model's options; the scores of a Unigram vocabulary. Never the id map."""
    teacher, student = (_model_rules(side) for side in (pair.teacher, pair.student))
    names = sorted(name for name in teacher.keys() | student.keys() if teacher.get(name) != student.get(name))
    if not names:
        return None
    evidence: dict[str, Any] = {"keys": names}
    if differing := pair.differing_merges:
        evidence |= {"count": len(differing), "first": differing[:_SHOWN]}
    return Difference("merges", False, f"the segmentation models differ in {', '.join(names)}", evidence)


def _model_rules(side: TokenizerSide) -> dict[str, Any]:
    model = dict(side.state.get("model", {}))
    vocabulary = model.pop("vocab", None)
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        model["scores"] = [score for _, score in vocabulary]
    return model


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
    teacher, student = (list(map(list, inserted_ids(side.tokenizer))) for side in (pair.teacher, pair.student))
    if teacher == student:
        return None
    return Difference(
        "inserted",
        False,
        f"around a text the teacher inserts {teacher[0]} and {teacher[1]}, the student {student[0]} and {student[1]};"
        " rows are encoded as the teacher does",
        {"teacher": teacher, "student": student},
    )


def chat_template(pair: Pair) -> Difference | None:
    for conversation in _CONVERSATIONS:
        teacher, student = (_rendered(side, conversation) for side in (pair.teacher, pair.student))
        if teacher != student:
            return Difference(
                "chat_template",
                False,
                "the chat templates render a conversation differently; the teacher's is used",
                {"conversation": conversation, "teacher": teacher, "student": student},
            )
    return None


def _rendered(side: TokenizerSide, conversation: list[dict[str, str]]) -> list[int] | str:
    """Ids of the conversation, or why there are none."""
    if not side.tokenizer.chat_template:
        return "no chat template"
    try:
        text = str(side.tokenizer.apply_chat_template(conversation, tokenize=False))
    except Exception as error:  # a template is its author's program and raises what it likes
        return f"{type(error).__name__}: {error}"
    return side.encode([text])[0]


def _rule(pair: Pair, name: str) -> Difference | None:
    teacher, student = (side.state.get(name) for side in (pair.teacher, pair.student))
    if teacher == student:
        return None
    detail = f"the {name.replace('_', '-')}s differ"
    return Difference(name, False, detail, {"teacher": teacher, "student": student})


def _cut(value: object, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


Comparison = Callable[[Pair], Difference | None]
COMPARISONS: dict[str, Comparison] = {
    comparison.__name__: comparison
    for comparison in (
        token_ids, segmentation, teacher_head, student_head, missing_ids, extra_ids, head_padding,
        merges, normalizer, pre_tokenizer, added_tokens, special_tokens, inserted, chat_template,
    )
}  # fmt: skip
HEAD_COMPARISONS = ("teacher_head", "student_head", "head_padding")
