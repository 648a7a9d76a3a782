from __future__ import annotations

import time

import pytest

from distill_assets.dataset_shards.chat import ChatEncoder, ChatProblem
from distill_assets.dataset_shards.rows import Message
from distill_assets.foundation.errors import ModelError
from tests.dataset_shards.letters import BLANK, BOT, CHATML, END, EOS, NL, USER, A, B, C, D, letters

TALK = (Message("user", "a"), Message("assistant", "bb"), Message("user", "c"), Message("assistant", "d"))


def encode(
    template: str,
    messages: tuple[Message, ...] = TALK,
    *,
    max_length: int = 100,
    every: bool = False,
    rstrip: bool = False,
) -> tuple[list[int], list[int], bool]:
    tokenizer = letters(chat_template=template, rstrip=rstrip)
    ids, mask, _, truncated = ChatEncoder(tokenizer).encode(messages, max_length, every)
    return ids.tolist(), mask.astype(int).tolist(), truncated


def test_content_and_end_of_turn_are_supervised_and_headers_are_not() -> None:
    ids, mask, truncated = encode(CHATML)
    #      <user> \n a <end> \n <bot> \n b  b <end> \n <user> \n c <end> \n <bot> \n d <end> \n
    assert ids == [
        USER, NL, A, END, NL, BOT, NL, B, B, END, NL, USER, NL, C, END, NL, BOT, NL, D, END, NL,
    ]  # fmt: skip
    assert mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert not truncated


def test_every_token_with_supervise_all() -> None:
    ids, mask, _ = encode(CHATML, every=True)
    assert mask == [1] * len(ids)


def test_a_turn_weighs_what_it_says_content_and_end_alike() -> None:
    talk = (Message("user", "a"), Message("assistant", "bb", 0.5), Message("user", "c"), Message("assistant", "d", 0.0))
    encoder = ChatEncoder(letters(chat_template=CHATML))
    plain, _, nothing, _ = encoder.encode(TALK, 100, False)
    assert nothing is None
    for every in (False, True):
        ids, _, weights, _ = encoder.encode(talk, 100, every)
        assert weights is not None and ids.tolist() == plain.tolist()
        assert weights.tolist() == [1.0] * 7 + [0.5] * 3 + [1.0] * 8 + [0.0] * 2 + [1.0]
    ids, _, weights, _ = encoder.encode(talk, 9, False)
    assert weights is not None and weights.tolist() == [1.0] * 7 + [0.5] * 2


def test_a_cut_conversation_keeps_the_turns_before_the_cut() -> None:
    full = encode(CHATML)
    for length in range(2, 22):
        ids, mask, truncated = encode(CHATML, max_length=length)
        assert ids == full[0][:length]
        assert mask == full[1][:length]
        assert truncated == (length < 21)


def test_special_tokens_that_swallow_blanks_stay_targets_and_headers_stay_headers() -> None:
    ids, mask, _ = encode(CHATML, (Message("user", "a"), Message("assistant", "\nb")), rstrip=True)
    assert ids == [USER, A, END, BOT, B, END]
    assert mask == [0, 0, 0, 0, 1, 1]


def test_blanks_are_part_of_the_content_but_not_what_follows_the_end_of_turn() -> None:
    _, mask, _ = encode(CHATML, (Message("user", "a"), Message("assistant", " b\n\n")))
    #               <user> \n a <end> \n <bot> \n " " b \n \n <end> \n
    assert mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]


def test_an_end_of_turn_made_of_text_is_supervised() -> None:
    template = (
        "{% for m in messages %}{{ ('b ' if m.role == 'assistant' else 'a ') + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'b ' }}{% endif %}"
    )
    ids, mask, _ = encode(template, (Message("user", "c"), Message("assistant", "d")))
    assert ids == [A, BLANK, C, NL, B, BLANK, D, NL]
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1]


def test_a_template_without_generation_prompt_shows_its_header_by_another_content() -> None:
    template = CHATML.partition("{% if add")[0]
    assert encode(template) == encode(CHATML)


def test_a_conversation_may_begin_with_the_assistant() -> None:
    _, mask, _ = encode(CHATML, (Message("assistant", "a"), Message("user", "b")))
    #               <bot> \n a <end> \n <user> \n b <end> \n
    assert mask == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]


# Drops an assistant's turn from history once the conversation goes on, as templates do with reasoning.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{{ m.content if loop.last else 'd' }}<end>"
    "{% else %}<user>{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_prefixes_that_do_not_nest_are_refused_with_the_turn() -> None:
    with pytest.raises(ChatProblem, match=r"messages\[1\] differently depending on what follows"):
        encode(FORGETFUL)
    assert encode(FORGETFUL, TALK[:2])[1] == [0, 0, 0, 0, 1, 1, 1]  # a last turn is never history


def test_generation_marks_help_where_prefixes_do_not_nest() -> None:
    marked = FORGETFUL.replace("<bot>{{", "<bot>{% generation %}{{").replace(
        "<end>{% else", "<end>{% endgeneration %}{% else"
    )
    ids, mask, _ = encode(marked)
    assert ids == [USER, A, END, BOT, D, END, USER, C, END, BOT, D, END]
    assert mask == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    with pytest.raises(ChatProblem, match="differently depending on what follows"):  # marks do not say which turn it is
        encode(marked, (*TALK[:3], Message("assistant", "d", 2.0)))


def test_what_a_template_raises_is_the_reason() -> None:
    with pytest.raises(ChatProblem, match="roles must alternate"):
        encode("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("code", "ids"), [("%d", [5, 5]), ("%Y-%m-%d", [5] * 10), ("%d %b %Y", [5, 5, BLANK, 5, 5, 5])]
)
def test_a_template_that_asks_for_today_always_gets_the_same_day(code: str, ids: list[int]) -> None:
    tokenizer = letters(chat_template="{{ strftime_now('" + code + "') }}")
    encoder = ChatEncoder(tokenizer)
    assert encoder.encode(TALK[:1], 100, True)[0].tolist()[: len(ids)] == ids
    expected = code.replace("%d", "26").replace("%b", "Jul").replace("%Y", "2024").replace("%m", "07")
    assert encoder._render(TALK[:1]) == expected


def test_a_template_that_asks_for_the_time_of_day_is_refused() -> None:
    with pytest.raises(ChatProblem, match="time of day: %H:%M"):
        encode("{{ strftime_now('%H:%M') }}")


def test_no_template_and_no_offsets_are_said_once_for_all() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        ChatEncoder(letters(chat_template=None))


def test_a_text_that_looks_like_eos_is_one() -> None:
    ids, _, _ = encode(CHATML, (Message("user", "a</s>b"), Message("assistant", "c")))
    assert ids[2:5] == [A, EOS, B]


def test_a_thousand_turns_do_not_cost_a_thousand_renderings() -> None:
    talk = tuple(Message("user" if i % 2 == 0 else "assistant", "abcd " * 100) for i in range(2000))
    started = time.monotonic()
    _, mask, truncated = encode(CHATML, talk, max_length=1500)
    assert truncated and sum(mask) > 400
    assert time.monotonic() - started < 10
