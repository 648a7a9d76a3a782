"""Texts on which tokenizers of one vocabulary have been seen to disagree, and how to shorten one.

Each exercises a rule that differs between families: normalisation, digit grouping, runs of blanks,
word boundaries, byte fallback, merges of long words, special tokens written out in a text.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from random import Random

_SCRIPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Übermäßig große Änderungen für Straßen",
    "Déjà vu, naïve café, garçon, œuvre",
    "Быстрая коричневая лиса прыгает",
    "Η γρήγορη καφέ αλεπού πηδάει",
    "敏捷的棕色狐狸跳过了懒狗。",
    "素早い茶色の狐がのろまな犬を飛び越える",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다",
    "الثعلب البني السريع يقفز فوق الكلب",
    "השועל החום המהיר קופץ מעל הכלב",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดด",
    "İstanbul ıssız IĞDIR",
    "𐍈𐌰𐌹 𝒳𝓎𝓏 𠀀𠮷",
)
_NUMBERS = (
    "0",
    "42",
    "1234567890",
    "3.14159 2,718,281.8",
    "1e-5 0xFF 0b1010",
    "١٢٣٤ ①②③ ½ ⅔ Ⅷ",
    "2024-02-29T12:34:56Z",
)
_BLANKS = (
    " ", "  ", "   a", "a    b     c", "a \n b", "\n\n\n", "a\n\n  b", "\t\ttab", " \t \n mixed", "a\r\nb\rc",
    "trailing ", "trailing\n", " leading", "a\u00a0b\u2003c\u3000d", "a\u200bb\ufeffc", "a\u2028b\u0085c",
)  # fmt: skip
_WORDS = (
    "don't can't we'll I'VE they're DON'T", "don’t ‘quoted’ “text”", "HelloWORLDcamelCase snake_case kebab-case",
    "e-mail@example.org https://example.org/a?b=c&d=%20#e", "hello!!! ... -- --- —– …", "(a)[b]{c}<d>/*e*/",
    "$€£¥ ±×÷ ≤≥≠ →←",
    "a.b.c,d;e:f!g?h", "'''\"\"\"```", "ALLCAPS lowercase Title", "antidisestablishmentarianism" * 3,
    "a" * 100, "ab" * 60,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
)  # fmt: skip
_CODE = (
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(x)]\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "<div class=\"x\">&nbsp;</div>\n<!-- c -->",
    "SELECT * FROM t WHERE a<>'b' AND c>=1;",
    "#include <stdio.h>\n#define X 1\n",
    "\\frac{\\alpha}{\\beta} \\sum_{i=0}^{n} x_i",
)  # fmt: skip
_MARKS = (
    "é è ñ ü Å",  # composed
    "e\u0301 e\u0300 n\u0303 u\u0308 A\u030a",  # the same, decomposed
    "ﬁ ﬂ ﬀ Ａｂｃ １２３ ² ³ ™ ℌ",  # compatibility forms
    "한글 한글",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ❤️ ☺ 1️⃣",
    "Z̸̢̛͇͙̱a̶̺̝͐l̷̛̦̈́g̵̢̊o̴͖͝",
    "\u202eright to left\u202c",
)  # fmt: skip
_CONTROLS = (
    "\x00",
    "a\x00b",
    "\x01\x02\x1b[0m\x7f",
    "\ufffd\ufffe",
    "▁a▁b",
    "Ġa Ċ",
    "<0x0A>",
    "##ing a##b",
    "@@ a@@ b",
)
_SPECIAL = (
    "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>", "<|eot_id|>",
    "[CLS] [SEP] [MASK]", "[INST] a [/INST]", "<bos><eos>",
    "<think>\n</think>", "<tool_call>", "<|", "|>", "<|a", "< s >", "<start_of_turn>",
)  # fmt: skip

PROBES: tuple[str, ...] = (
    "", *_SCRIPTS, *_NUMBERS, *_BLANKS, *_WORDS, *_CODE, *_MARKS, *_CONTROLS, *_SPECIAL,
)  # fmt: skip


def in_context(tokens: Iterable[str]) -> list[str]:
    """Each token's text alone, inside a word, between blanks, and in other letters: its flags show there."""
    return [
        text
        for token in tokens
        for text in (token, f"a{token}b", f"a  {token}  b", *dict.fromkeys((token.lower(), token.upper())))
    ]


# Names of characters that come by the thousand and are treated alike.
_MANY = (
    "CJK UNIFIED",
    "HANGUL SYLLABLE",
    "TANGUT",
    "EGYPTIAN",
    "CUNEIFORM",
    "YI SYLLABLE",
    "ANATOLIAN",
    "KHITAN",
    "NUSHU",
)


@cache
def each_character() -> tuple[str, ...]:
    """Every assigned character within a word, eight words a text; of ideographs and syllables every 64th."""
    assigned = (chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in _NO_TEXT)
    words = [
        f"a{letter}b"
        for letter in assigned
        if ord(letter) % 64 == 0 or not unicodedata.name(letter, "").startswith(_MANY)
    ]
    return tuple(" ".join(words[i : i + 8]) for i in range(0, len(words), 8))


_NO_TEXT = frozenset({"Cn", "Cs", "Co"})  # unassigned, halves of pairs, private


def side_by_side(tokens: Sequence[str], n: int = 5_000) -> list[str]:
    """`n` texts of two or three tokens each, the same ones every time."""
    random = Random(0)
    return ["".join(random.choices(tokens, k=random.choice((2, 3)))) for _ in range(n)]


def shortest(text: str, differs: Callable[[str], bool]) -> str:
    """A piece of `text` that still differs and from which no half, quarter, ... can be dropped.

    Greedy, so not always the shortest there is; the number of calls is about |text| log |text|.
    """
    size = len(text) // 2
    while size >= 1:
        start = 0
        while start < len(text):
            shorter = text[:start] + text[start + size :]
            if differs(shorter):
                text = shorter
            else:
                start += size
        size //= 2
    return text
