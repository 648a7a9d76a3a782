"""What the benchmarks share: real text, two teachers, homes to capture in, and a way to print.

Each benchmark is a script of its own: it prints a table, or with `--json` one JSON object. All that
is compared is measured in one run, by turns, so that a noisy machine is equally unkind to all.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_assets.dataset_shards.discover import Shard, discover_shards
from distill_assets.demo import TEACHER, TEACHER_PACKAGE, convert_teacher, demo_corpus, find_gguf
from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.home import Home
from distill_assets.foundation.model_folders import resolve_model
from distill_assets.foundation.progress import ignore_progress
from distill_assets.foundation.settings import TargetSettings
from distill_assets.foundation.tokenizers import load_tokenizer
from distill_assets.teacher_capture.identity import CaptureSpec, capture_spec
from distill_assets.teacher_capture.store import Capture, CaptureStore, read_capture

CHECKOUT = Path(__file__).resolve().parents[1]
WIDE_VOCABULARY = 151_936  # as many ids as Qwen2.5 has
_PIECE = 1500  # characters of a docstring or function in one row at most
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Row:
    """A row by its ids; the first `n_prompt` tokens are no targets."""

    ids: Sequence[int]
    n_prompt: int = 1

    def as_json(self) -> str:
        mask = [0] * self.n_prompt + [1] * (len(self.ids) - self.n_prompt)
        return json.dumps({"input_ids": list(map(int, self.ids)), "loss_mask": mask})


class BenchHome:
    """A home in a folder of its own, its capture spec and store."""

    def __init__(self, root: Path, teacher: Path, **targets: Any) -> None:
        settings = {
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "student": {"from_teacher_layers": [0]},
            "targets": targets,
        }
        root.mkdir(parents=True, exist_ok=True)
        (root / "shards").mkdir(exist_ok=True)
        (root / "distill.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        self.home = Home(root)
        self.store = CaptureStore(self.home.captures)
        self.hashes = self.home.hashes()
        self.spec: CaptureSpec = capture_spec(self.home, self.home.settings(), self.hashes)

    def write(self, key: str, rows: Iterable[Row]) -> None:
        lines = "".join(row.as_json() + "\n" for row in rows)
        (self.home.root / "shards" / f"{key}.jsonl").write_text(lines, encoding="utf-8")

    def shards(self) -> dict[str, Shard]:
        found = discover_shards(self.home.root, self.home.settings().data, self.home.hashes())
        return {shard.key: shard for shard in found.shards}


def as_shard(home: BenchHome, capture: Capture, shard: str, version: str) -> Capture:
    """The same captured rows as another shard's capture, under row keys of their own: a teacher's time saved."""
    table = pq.read_table(capture.path)
    keys = [hashlib.md5(f"{version} {key}".encode()).hexdigest() for key in table["key"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("key"), table.schema.field("key"), pa.array(keys))
    return publish(home, capture, shard, version, table, home.spec.targets)


def publish(
    home: BenchHome, capture: Capture, shard: str, version: str, table: pa.Table, targets: TargetSettings
) -> Capture:
    """Captured rows as a file of the store that says of itself what another capture says, its targets aside."""
    identity = {**capture.identity, "targets": targets.identity}
    capture_id = digest(identity)
    footer = {
        "capture_id": capture_id,
        "shard": shard,
        "version": version,
        "identity": identity,
        "teacher": capture.teacher,
        "created": capture.created,
    }
    with home.store.publishing(capture_id, shard, version, targets) as file:
        file.append(table)
        file.describe(footer, capture.stats)
    return read_capture(file.path)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as `make demo` makes it, converted once into the checkout's data/ if it is not there."""
    folder = CHECKOUT / "data" / TEACHER
    if not (folder / "model.safetensors").is_file():
        convert_teacher(find_gguf(TEACHER_PACKAGE), folder, ignore_progress)
    return folder


def random_model(folder: Path, vocabulary: int = WIDE_VOCABULARY, width: int = 512, layers: int = 12) -> Path:
    """A small random Llama with a vocabulary of words t0, t1, ..."""
    words = {f"t{i}": i for i in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    random_llama(vocabulary, width, layers).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", pad_token="t2").save_pretrained(folder)
    return folder


def random_llama(vocabulary: int, width: int, layers: int) -> LlamaForCausalLM:
    """Random float32 weights, input embeddings and head tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def real_rows(teacher: Path, n_tokens: int) -> list[Row]:
    """Prompt/completion rows of Python's documentation, of their own lengths, in the corpus's order."""
    tokenizer = load_tokenizer(resolve_model(str(teacher), None, teacher))
    rows: list[Row] = []
    for row in (row for rows in demo_corpus().values() for row in rows):
        prompt, completion = (tokenizer(text)["input_ids"] for text in (row.prompt, row.completion))
        rows.append(Row([*prompt, *completion], max(1, len(prompt))))
        if sum(len(r.ids) for r in rows) >= n_tokens:
            break
    return rows


def standard_library_rows(teacher: Path, n_tokens: int) -> list[Row]:
    """Docstrings of the standard library, and where these are not enough its functions, long ones in pieces, with what
    they are of as prompts, none twice: up to `n_tokens`, or all that this Python has.
    """
    tokenizer = load_tokenizer(resolve_model(str(teacher), None, teacher))
    rows: list[Row] = []
    seen: set[str] = set()
    total = 0
    for name, text in chain(_docstrings(), _functions()):
        for piece in (text[start : start + _PIECE] for start in range(0, len(text), _PIECE)):
            if len(piece) < 80 or piece in seen:
                continue
            seen.add(piece)
            prompt, completion = (tokenizer(part)["input_ids"] for part in (f"{name}:\n", piece))
            rows.append(Row([*prompt, *completion], len(prompt)))
            total += len(rows[-1].ids)
            if total >= n_tokens:
                return rows
    return rows


def _docstrings() -> Iterator[tuple[str, str]]:
    for file, _, node in _documented():
        yield file.stem if isinstance(node, ast.Module) else node.name, ast.get_docstring(node) or ""


def _functions() -> Iterator[tuple[str, str]]:
    for _, lines, node in _documented():
        if isinstance(node, ast.FunctionDef):
            yield node.name, "".join(lines[node.lineno - 1 : node.end_lineno])


def _documented() -> Iterator[tuple[Path, list[str], _Documented]]:
    """All that may have a docstring, with its file and the file's lines."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if {"test", "tests", "site-packages"} & set(file.parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            tree, lines = ast.parse(source), source.splitlines(keepends=True)
        except (SyntaxError, UnicodeDecodeError):
            continue  # samples for parsers
        for node in ast.walk(tree):
            if isinstance(node, _Documented):
                yield file, lines, node


def with_random_ids(rows: Iterable[Row], vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of the same shape for a model that reads no text."""
    random = np.random.default_rng(seed)
    return [Row(random.integers(3, vocabulary, len(row.ids)).tolist(), row.n_prompt) for row in rows]


def uniform(rows: Iterable[Row], length: int) -> list[Row]:
    """The same tokens in rows of one length, all of them targets; what is left over is dropped."""
    ids = [token for row in rows for token in row.ids]
    return [Row(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


def all_targets(rows: Iterable[Row]) -> list[Row]:
    return [Row(row.ids) for row in rows]


def n_tokens(rows: Iterable[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def seconds_of(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def by_turns(ways: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; every round runs all of them, the first round is warm-up and not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            took = seconds_of(way)
            if turn:
                seconds[name].append(took)
    return seconds


def peak_bytes(way: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at once while `way` runs, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="distill-bench-")


def machine() -> dict[str, Any]:
    """Where figures come from."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def arguments(description: str | None, **options: tuple[type, Any, str]) -> argparse.Namespace:
    """`--json` and the benchmark's own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name, (kind, default, text) in options.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    return parser.parse_args()


def show(name: str, rows: Sequence[Mapping[str, Any]], as_json: bool, **more: Any) -> None:
    """The benchmark's table, or all of it as JSON."""
    if as_json:
        sys.stdout.write(json.dumps({"benchmark": name, "machine": machine(), "results": list(rows), **more}) + "\n")
        return
    table = Table(title=f"{name} ({machine()['device']}, {machine()['threads']} threads)", title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=160)
    console.print(table)
    for key, value in more.items():
        console.print(f"{key}: {value}")
