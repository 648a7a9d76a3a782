"""Small real things: a byte-level BPE trained on the spot, tiny Llama models, homes with shards.

Nothing here is a stand-in: the same loading, encoding, capture and training code runs on these as
on a real teacher.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "The cat sat on the mat and looked at the moon over the quiet sea.",
    "A function returns a value; a generator yields many, one after another.",
    "def add(a, b):\n    return a + b\n",
    "Numbers such as 3.14159 and 2,718 are split into digits: 0 1 2 3 4 5 6 7 8 9.",
    "Äpfel, Öl und Übermut – déjà vu, naïve café, 東京, привет, 🙂.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def train_tokenizer(texts: Iterable[str] = TEXT, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, EOS, PAD and a chat template; encoding inserts nothing."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, pad_head: int = 0, **config: Any
) -> Path:
    """A tiny random Llama with its tokenizer, as a transformers folder of safetensors."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer) + pad_head,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.35,  # wide enough that the distributions are not all flat
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def example_rows(n: int, start: int = 0) -> list[dict[str, str]]:
    """Prompt/completion rows of different lengths, all different."""
    return [
        {
            "prompt": f"Question {i}: {TEXT[i % len(TEXT)][: 12 + i % 7]}",
            "completion": f" {TEXT[(i + 1) % len(TEXT)]} {i}",
        }
        for i in range(start, start + n)
    ]


def make_home(root: Path, teacher: Path, *, shards: int = 3, rows: int = 6, **sections: Any) -> Path:
    """A home with `shards` training shards s0, s1, ... and one held-out shard, for a tiny teacher.

    `sections` are merged into distill.yaml: `make_home(root, teacher, targets={"k": 4})`.
    """
    settings: dict[str, Any] = {
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"from_teacher_layers": [0, 2]},
        "data": {"shards": "shards/*", "max_length": 64},
        "targets": {"k": 8},
        "training": {"learning_rate": 1.0e-3, "batch_tokens": 256, "epochs": 1},
    }
    for name, section in sections.items():
        replaces = not isinstance(section, dict) or name == "student"
        settings[name] = section if replaces else {**settings.get(name, {}), **section}
    root.mkdir(parents=True, exist_ok=True)
    (root / "distill.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    for i in range(shards):
        write_jsonl(root / "shards" / f"s{i}.jsonl", example_rows(rows, start=100 * i))
    write_jsonl(root / "shards" / "heldout.jsonl", example_rows(rows, start=9000))
    return root
