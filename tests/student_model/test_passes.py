"""Steps cut into passes, and memory that runs out for real: a process with little address space, a GPU with little."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.progress import Progress
from distill_assets.foundation.settings import StudentSettings
from distill_assets.student_model.initial import initial_student
from distill_assets.student_model.passes import Passes, prefers_packed_rows
from distill_assets.student_model.saving import read_student
from distill_assets.student_model.training import train_student
from tests.devices import NEEDS_CUDA
from tests.student_model.rows import row_of
from tests.student_model.test_training import spec_of, weights

MIB = 1 << 20


def row(length: int) -> Any:
    ids = [5 + (7 * t) % 300 for t in range(length)]
    at = range(length - 1)
    return row_of(ids, at, [{ids[t + 1]: 0.9} for t in at], [0.1] * (length - 1))


def wide_student(width: int) -> PreTrainedModel:
    """Of which a token takes much and weights take little; with dropout, to tell whether a step begins anew whole."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=width,
        num_hidden_layers=16,
        num_attention_heads=2,
        attention_dropout=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


NARROW = wide_student(16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 90), st.booleans())
def test_passes_hold_all_rows_in_order_and_as_many_as_fit(lengths: list[int], tokens: int, packed: bool) -> None:
    rows = [row(n) for n in lengths]
    passes = Passes(NARROW, tokens, packed).of(rows)
    assert [r for part in passes for r in part] == rows

    def size(rows: list[Any]) -> int:
        lengths = [len(r.input_ids) for r in rows]
        return sum(lengths) if packed else len(rows) * max(lengths)

    assert all(size(part) <= tokens or len(part) == 1 for part in passes if rows)
    assert all(size([*part, after[0]]) > tokens for part, after in pairwise(passes))
    assert passes == [[]] or all(passes)


def test_without_room_passes_are_halved_then_layers_recomputed_then_it_is_an_error() -> None:
    model = wide_student(16)
    passes = Passes(model, 1000)
    passes.take_less([row(40), row(30), row(20)])
    assert passes.tokens == 60 and passes.note == "memory ran out: 60 tokens a pass"
    passes.take_less([row(40)])
    assert passes.tokens == 60 and model.is_activation_checkpointing
    assert passes.note == "memory ran out: 60 tokens a pass, layers computed twice"
    with pytest.raises(TrainingError, match=r"cpu has no memory left .* a row of 40 tokens.*\nlower data.max_length"):
        passes.take_less([row(40)])


def test_only_a_gpu_with_flash_attention_has_rows_packed() -> None:
    model = wide_student(16)
    assert not prefers_packed_rows(model, "bfloat16") and model.config._attn_implementation == "sdpa"


def trained(
    tokenizer: PreTrainedTokenizerFast, folder: Path, width: int, length: int = 256, device: str = "cpu", **how: Any
) -> list[str]:
    """Train on 4 rows of that many tokens and less, a step an epoch; the notes of progress."""
    notes: list[str] = []

    def listen(progress: Progress) -> None:
        notes.append(progress.note)

    rows = [row(length - i) for i in range(4)]
    spec = spec_of(batch_tokens=4 * length, epochs=2)
    model = wide_student(width).to(device)  # type: ignore[arg-type]
    train_student(spec, model, tokenizer, rows, folder, device=device, on_progress=listen, **how)
    return notes


def started(teacher: Path, layers: int) -> None:
    """Random weights of some 10 MiB a layer."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers}
    origin = StudentSettings(config={"model_type": "llama", **shape})
    initial_student(origin, ModelFolder("tiny", teacher, None), None, 320, 0, torch.device("cpu"))


@contextmanager
def room(n_bytes: int) -> Iterator[None]:
    """Let this process have so much more address space, for a while."""
    gc.collect()
    sizes = Path("/proc/self/status").read_text().splitlines()
    used = 1024 * int(next(line for line in sizes if line.startswith("VmSize")).split()[1])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


WITHOUT_ROOM = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from tests.student_model import test_passes as t

teacher, out, answers = Path(sys.argv[1]), Path(sys.argv[2]), {}
tokenizer = AutoTokenizer.from_pretrained(teacher)
t.started(teacher, 1)
t.trained(tokenizer, out / "warm", 64, 8)  # libraries and threads are up

def answer(name, mib, call, *words, **named):
    try:
        with t.room(mib * t.MIB):
            answers[name] = call(*words, **named)
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"

# rooms in the middle of what gives the answer, at least a fifth from where it is another
answer("halved", 260, t.trained, tokenizer, out / "halved", t.WIDTH)
answer("recomputed", 85, t.trained, tokenizer, out / "recomputed", t.WIDTH)
answer("row", 60, t.trained, tokenizer, out / "row", t.WIDTH, 1024)
answer("moments", 145, t.trained, tokenizer, out / "moments", 8 * t.WIDTH, 8)
answer("weights", 40, t.started, teacher, 8)
print(json.dumps(answers))
"""
WIDTH = 2_048


def test_a_cpu_without_room(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, teacher_folder: Path) -> None:
    """A step begun anew ends in the bits of one that had passes of that size at once: nothing of the first try is left
    in gradients, moments or random numbers.
    """
    words = [sys.executable, "-c", WITHOUT_ROOM, str(teacher_folder), str(tmp_path)]
    freed_is_given_back = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | freed_is_given_back)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["row"].startswith("TrainingError: cpu has no memory left for a training step with a row of 1,02")
    assert answers["moments"].startswith(
        "TrainingError: cpu has no memory left for the student's weights, gradients and"
    )
    assert answers["weights"].startswith("TrainingError: cpu has no memory left for the student's weights\n")
    for name, note in (("halved", ""), ("recomputed", ", layers computed twice")):
        found = [re.fullmatch(rf"loss .*, memory ran out: (\d+) tokens a pass{note}", said) for said in answers[name]]
        assert all(found), answers
        [tokens] = {int(match[1]) for match in found if match}  # in the second step as in the first
        trained(tokenizer, tmp_path / "at once", WIDTH, pass_tokens=tokens)
        assert weights(tmp_path / name) == weights(tmp_path / "at once")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_gpu_without_room(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
    """A whole pass needs some 1 GiB, weights and optimiser 100 MiB."""
    shape: dict[str, Any] = {"width": 4 * WIDTH, "length": 128, "device": device}
    assert trained(tokenizer, tmp_path / "roomy", **shape)[-1].startswith("loss ")
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 700 * MIB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        notes = trained(tokenizer, tmp_path / "tight", **shape)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ", memory ran out: " in notes[-1]
    curves = [read_student(tmp_path / name).report.curve for name in ("roomy", "tight")]
    assert [p.tokens for p in curves[0]] == [p.tokens for p in curves[1]]
    assert curves[1][-1].loss == pytest.approx(curves[0][-1].loss, rel=0.02)  # other dropout
