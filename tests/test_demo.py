from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distill_assets import demo
from distill_assets.foundation.errors import HomeError, ModelError
from distill_assets.foundation.progress import Progress, ignore_progress
from distill_assets.foundation.settings import load_settings
from tests import tiny

REPOSITORY = Path(__file__).resolve().parents[1]


# The settings


def test_the_committed_settings_are_the_demo_s(tmp_path: Path) -> None:
    """Write it again with: python -c "from distill_assets import demo; print(demo.settings_text(), end='')" """
    committed = REPOSITORY / "data" / "distill.yaml"
    assert committed.read_text(encoding="utf-8") == demo.settings_text()
    assert load_settings(committed) == demo.SETTINGS


def test_the_teacher_s_package_is_the_one_make_setup_installs() -> None:
    assert f"--no-deps {demo.TEACHER_REQUIREMENT} " in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


# The corpus


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[demo.DemoRow]]:
    return demo.demo_corpus()


def test_the_corpus_is_the_same_every_time(corpus: dict[str, list[demo.DemoRow]]) -> None:
    assert demo.demo_corpus() == corpus


def test_the_corpus_has_the_size_the_demo_is_planned_for(corpus: dict[str, list[demo.DemoRow]]) -> None:
    characters = {key: sum(len(row.prompt + row.completion) for row in rows) for key, rows in corpus.items()}
    heldout = characters.pop("heldout")
    assert len(characters) >= 6
    assert 9_000 <= heldout <= 10_500, "about 2,500 tokens"
    assert all(7_000 <= n <= 9_000 for n in characters.values()), characters
    assert 57_000 <= sum(characters.values()) <= 63_000, "about 16,000 tokens at 3.85 characters each"
    for row in (row for rows in corpus.values() for row in rows):
        assert 150 <= len(row.completion) <= 650
        assert row.prompt.endswith("\n")
        assert row.completion == row.completion.rstrip()


def test_no_text_is_both_held_out_and_trained_on(corpus: dict[str, list[demo.DemoRow]]) -> None:
    def paragraphs(rows: list[demo.DemoRow]) -> list[str]:
        return [part for row in rows for part in row.completion.split("\n\n") if part.strip()]

    training = [row for key, rows in corpus.items() if key != "heldout" for row in rows]
    assert not set(paragraphs(training)) & set(paragraphs(corpus["heldout"]))
    ids = [row.id for row in training + corpus["heldout"]]
    assert len(ids) == len(set(ids))
    completions = [row.completion for row in training]
    assert len(completions) == len(set(completions))


def test_the_held_out_rows_are_like_the_training_rows(corpus: dict[str, list[demo.DemoRow]]) -> None:
    kinds = {"topics" if row.id.startswith("topics.") else "docstrings" for row in corpus["heldout"]}
    assert kinds == {"topics", "docstrings"}


def test_an_excerpt_is_whole_paragraphs_or_whole_sentences() -> None:
    long = "One sentence of text. " * 12  # 264 characters
    assert demo._excerpt([long, long, long]) == f"{long}\n\n{long}"
    assert demo._excerpt([long * 3]) == ("One sentence of text. " * 29).rstrip()
    assert demo._excerpt(["short", "also short"]) is None
    assert demo._excerpt(["x" * 1000]) is None
    assert demo._excerpt([]) is None


# The home


@pytest.fixture
def root(tmp_path: Path, teacher_folder: Path) -> Path:
    """A folder in which a whole (tiny) teacher already lies, so that nothing is converted."""
    shutil.copytree(teacher_folder, tmp_path / "home" / demo.TEACHER)
    return tmp_path / "home"


def test_a_home_is_filled_and_then_whole(root: Path, corpus: dict[str, list[demo.DemoRow]]) -> None:
    first = demo.prepare_demo(root, ignore_progress)
    assert first.root == root.resolve()
    assert (first.settings_written, first.teacher_written) == (True, False)
    assert set(first.shards_written) == set(corpus)
    assert (root / "dagster" / "dagster.yaml").exists()
    assert load_settings(root / "distill.yaml") == demo.SETTINGS
    for key, rows in corpus.items():
        lines = (root / "shards" / f"{key}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [demo.DemoRow(**json.loads(line)) for line in lines] == rows

    second = demo.prepare_demo(root, ignore_progress)
    assert (second.settings_written, second.teacher_written, second.shards_written) == (False, False, ())
    assert second.seconds < 1.0


def test_what_the_user_changed_stays(root: Path) -> None:
    edited = tiny.write_jsonl(root / "shards" / "topics-a-c.jsonl", [{"text": "mine"}])
    demo.prepare_demo(root, ignore_progress)
    assert edited.read_text() == '{"text": "mine"}\n'

    heldout = root / "shards" / "heldout.jsonl"
    heldout.write_text('{"text": "mine too"}\n')
    (root / "shards" / "docstrings-text.jsonl").unlink()
    (root / "distill.yaml").write_text("teacher: {model: my/teacher}\nstudent: {model: my/student}\n")
    again = demo.prepare_demo(root, ignore_progress)
    assert again.shards_written == ()
    assert heldout.read_text() == '{"text": "mine too"}\n'
    assert not (root / "shards" / "docstrings-text.jsonl").exists()
    assert load_settings(root / "distill.yaml").teacher.model == "my/teacher"

    (root / demo.MARKER).unlink()
    (root / "distill.yaml").unlink()
    assert demo.prepare_demo(root, ignore_progress).shards_written == ("docstrings-text",)


def test_in_place_of_a_file_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HomeError, match="file is a file; name a folder"):
            demo.prepare_demo(root, ignore_progress)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_home_with_another_teacher_is_not_filled(home: Path) -> None:
    before = sorted(path for path in home.rglob("*"))
    with pytest.raises(HomeError, match=r"is a home with the teacher .*; give the demo a folder of its own"):
        demo.prepare_demo(home, ignore_progress)
    assert sorted(path for path in home.rglob("*")) == before


# The teacher


def test_the_installed_package_has_one_gguf_file() -> None:
    assert demo.find_gguf(demo.TEACHER_PACKAGE).name.startswith("SmolLM2-135M-Instruct")


def test_an_absent_package_says_how_to_install_it() -> None:
    with pytest.raises(ModelError, match=r"no_such_package, which is not installed; run `make setup`, or: pip install"):
        demo.find_gguf("no_such_package")


def test_a_file_that_is_no_gguf_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be read as a GGUF model"):
        demo.convert_teacher(tmp_path / "broken.gguf", tmp_path / "out", ignore_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a query or key projection in GGUF's order: each rotary pair side by side."""
    n_rows, width = weight.shape
    return weight.view(n_heads, 2, n_rows // n_heads // 2, width).transpose(1, 2).reshape(n_rows, width)


def write_gguf(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A Llama with tied embeddings and its byte-level tokenizer as a GGUF file, unquantized."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{its}.weight" for ours, its in parts.items()}
    weights = model.state_dict()
    for ours, its in names.items():
        weight = weights[ours]
        if "attn_q" in its:
            weight = interleaved(weight, config.num_attention_heads)
        if "attn_k" in its:
            weight = interleaved(weight, config.num_key_value_heads)
        writer.add_tensor(its, weight.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_the_model_it_was_written_from(tmp_path: Path, teacher_folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.bfloat16)
    source = AutoTokenizer.from_pretrained(teacher_folder)
    (tmp_path / "package").mkdir()
    write_gguf(tmp_path / "package" / "tiny.gguf", original, source)
    progress: list[Progress] = []

    demo.convert_teacher(tmp_path / "package" / "tiny.gguf", tmp_path / "home" / demo.TEACHER, progress.append)

    assert [report.done for report in progress] == [0, 1, 2]
    folder = tmp_path / "home" / demo.TEACHER
    assert all((folder / name).is_file() for name in demo._TEACHER_FILES)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    assert converted.dtype == torch.bfloat16
    ids_BT = torch.arange(6, 40)[None]
    with torch.no_grad():
        expected, given = original(input_ids=ids_BT).logits, converted(input_ids=ids_BT).logits
    assert torch.equal(given, expected)

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers adds GPT-2's <|endoftext|>, which SmolLM2 has and this small vocabulary has not
    assert tokenizer.get_vocab() == source.get_vocab() | {"<|endoftext|>": len(source)}
    assert (tokenizer.eos_token, tokenizer.chat_template) == (source.eos_token, source.chat_template)
    text = "The cat: déjà vu 🙂"
    assert tokenizer(text).input_ids == source(text).input_ids
    written = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.json"))
    assert str(tmp_path) not in written
    assert "quantization" not in written


def test_digits_stand_alone_and_leave_the_spaces_before_them_together(tmp_path: Path) -> None:
    """As SmolLM2 was trained; plain byte level cuts "   12345" into "ĠĠ" and "Ġ12345"."""
    texts = ["   x =   12\n    345   67", "a   b   c"] * 20
    source = tiny.train_tokenizer(texts, vocab_size=300)
    (tmp_path / "package").mkdir()
    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "model", source))
    write_gguf(tmp_path / "package" / "tiny.gguf", model, source)
    demo.convert_teacher(tmp_path / "package" / "tiny.gguf", tmp_path / "out", ignore_progress)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x =   12345\n   6")
    assert [piece for piece, _ in pieces] == ["x", "Ġ=", "ĠĠĠ", "1", "2", "3", "4", "5", "ĊĠĠĠ", "6"]
    assert tokenizer.decode(tokenizer("x =   12345\n   6").input_ids) == "x =   12345\n   6"
