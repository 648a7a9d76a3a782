"""A tokenizer small enough to encode by hand: one token a character, ids written below."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, USER, BOT, END, UNK, A, B, C, D, NL, BLANK = range(12)
_CHARACTERS = {"a": A, "b": B, "c": C, "d": D, "\n": NL, " ": BLANK}

CHATML = (
    "{% for m in messages %}{{ ('<bot>' if m['role'] == 'assistant' else '<user>') + '\n' + m['content'] + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot>\n' }}{% endif %}"
)


def letters(
    *, bos: bool = False, chat_template: str | None = CHATML, rstrip: bool = False, hole: bool = False
) -> PreTrainedTokenizerFast:
    """`bos`: encoding inserts BOS. `rstrip`: special tokens swallow blanks behind them. `hole`: no id 12."""
    names = ["<s>", "</s>", "<user>", "<bot>", "<end>", "?"]
    vocabulary = {**dict(zip(names, range(6), strict=True)), **_CHARACTERS, **({"e": 13} if hole else {})}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, rstrip=rstrip, special=True) for name in names[:5]])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?", add_bos_token=bos
    )
    tokenizer.chat_template = chat_template
    return tokenizer
