"""When two lists of BPE merges give every text the same tokens, and texts that may show that they do not.

Two merges *can meet* when they share a token: one needs what the other needs or makes, so that in some
text applying either first may take the other's chance. Merges that cannot meet act on places of a text
that have nothing to do with each other.

If every merge comes after all those that make its parts, then while merges of one rank are applied no
earlier one becomes possible again. So two neighbours in the list that cannot meet may change places
without any effect, and so may, step by step, any list that keeps the order of those that can meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby, islice

from distill_assets.tokenizer_compatibility.definition import Merge

_Use = tuple[str, Merge]  # how a merge has to do with a token, and the merge
_COMPARED = 100  # merges around one token that are looked at for texts


def same_effect(teacher: Sequence[Merge], student: Sequence[Merge]) -> bool:
    """Whether both lists are proven to tokenise every text alike. False means not proven."""
    if list(teacher) == list(student):
        return True
    return (
        len(set(teacher)) == len(teacher)
        and len(student) == len(teacher)
        and set(teacher) == set(student)
        and _in_order(teacher)
        and not any(True for _ in _reordered(teacher, student))
    )


def telling_texts(teacher: Sequence[Merge], student: Sequence[Merge], limit: int) -> list[str]:
    """Token strings, at most 2 `limit`, on which lists without the `same_effect` are likely to differ.

    What a merge makes that only one list has; and, where two that can meet changed order, the shortest
    piece both want a part of.
    """
    alone = set(teacher) ^ set(student)
    one_sided = [left + right for left, right in (*teacher, *student) if (left, right) in alone]
    shared = [[merge for merge in merges if merge not in alone] for merges in (teacher, student)]
    return [*islice(one_sided, limit), *islice(_contested(shared[0], shared[1]), limit)]


def _in_order(merges: Sequence[Merge]) -> bool:
    """Whether each merge comes after every merge that makes one of its parts."""
    used: set[str] = set()
    for left, right in merges:
        if left + right in used:
            return False
        used |= {left, right}
    return True


def _around(merges: Sequence[Merge]) -> dict[str, list[_Use]]:
    """Token -> the merges that take it on their left or right, take it twice, or make it, in the order of ranks.

    Two of them can meet at this token unless they have to do with it in the same way.
    """
    found: dict[str, list[_Use]] = defaultdict(list)
    for merge in merges:
        left, right = merge
        if left == right:
            found[left].append(("twice", merge))
        else:
            found[left].append(("left", merge))
            found[right].append(("right", merge))
        found[left + right].append(("makes", merge))
    return found


def _runs(around: list[_Use]) -> list[frozenset[Merge]]:
    """Merges between which no other kind stands: the order within a run has no effect."""
    return [frozenset(merge for _, merge in run) for _, run in groupby(around, key=lambda item: item[0])]


def _reordered(teacher: Sequence[Merge], student: Sequence[Merge]) -> Iterator[tuple[str, list[_Use], list[_Use]]]:
    """Tokens at which two merges that can meet changed their order, with the merges around it in both lists."""
    first, second = _around(teacher), _around(student)
    for token, around in first.items():
        if around != second[token] and _runs(around) != _runs(second[token]):
            yield token, around, second[token]


def _contested(teacher: Sequence[Merge], student: Sequence[Merge]) -> Iterator[str]:
    for token, around, there in _reordered(teacher, student):
        places = {use: place for place, use in enumerate(there)}
        moved = [place for place, use in enumerate(around) if places[use] != place]
        for i, j in combinations(moved[:_COMPARED], 2):
            if around[i][0] != around[j][0] and places[around[i]] > places[around[j]]:
                yield _joined(token, dict([around[i], around[j]]))


def _joined(token: str, uses: Mapping[str, Merge]) -> str:
    """The shortest piece in which both uses of a token are wanted."""
    before = uses["right"][0] if "right" in uses else ""
    after = uses["left"][1] if "left" in uses else ""
    return before + token * (2 if "twice" in uses else 1) + after
