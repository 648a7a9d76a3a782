"""How close the capture engine is to the bare forward pass, and to the loop people write.

`engine`: `capture_shard` from the shard file to the published Parquet, teacher loaded. `bare`: the
model's own forward pass, full head at every token, on the same tokens in batches without padding, and
nothing kept. `loop`: rows in file order, padded to the longest of a batch of 8, log_softmax and topk of
all logits, written as JSONL. `bare, oneDNN`, where the engine multiplies by that instead of MKL: `bare` by oneDNN
as well, which no transformers does by itself. All take turns; compared are the fastest rounds of each, since what
else a machine does can only add time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from workload import (
    WIDE_VOCABULARY,
    BenchHome,
    Row,
    all_targets,
    arguments,
    by_turns,
    n_tokens,
    peak_bytes,
    random_model,
    real_rows,
    scratch,
    show,
    smollm2,
    uniform,
    with_random_ids,
)

from distill_assets.foundation.cpu_products import is_fast, products_of
from distill_assets.foundation.devices import resolve_device
from distill_assets.foundation.language_model import forward_batch_tokens
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.teacher import Teacher, load_teacher
from distill_assets.teacher_capture.top_k import top_k_targets

K = 32
LOOP_BATCH = 8  # rows; what transformers' own examples use
UNIFORM_LENGTH = 256


def main() -> None:
    options = arguments(
        __doc__,
        only=(str, "", "only teachers and workloads with this in their name"),
        tokens=(int, 8000, "tokens of each workload"),
        repeats=(int, 5, "rounds that count"),
        device=(str, "auto", "device"),
    )
    results: list[dict[str, Any]] = []
    with scratch() as folder:
        narrow, wide = smollm2(), random_model(Path(folder) / "wide")
        texts = real_rows(narrow, options.tokens)
        for name, teacher in (("SmolLM2-135M", narrow), (f"random, V = {WIDE_VOCABULARY:,}", wide)):
            rows = texts if teacher is narrow else with_random_ids(texts, WIDE_VOCABULARY)
            workloads = {
                "uniform, all targets": uniform(rows, UNIFORM_LENGTH),
                "ragged, all targets": all_targets(rows),
                "ragged, prompt/completion": rows,
            }
            home = BenchHome(Path(folder) / f"home-{teacher.name}", teacher, k=K)
            loaded = load_teacher(home.spec.weights, "float32", options.device)
            peak = head_peak_bytes(loaded)
            for workload, given in workloads.items():
                if options.only not in f"{name} {workload}":
                    continue
                line = measure(home, loaded, given, options.device, options.repeats)
                results.append({"teacher": name, "workload": workload, **line, "head peak MiB": peak / 2**20})
    show("capture_speed", results, options.json, k=K)


def measure(home: BenchHome, teacher: Teacher, rows: Sequence[Row], device: str, repeats: int) -> dict[str, Any]:
    home.write("s", rows)
    shard = home.shards()["s"]
    budget = forward_batch_tokens(resolve_device(device))
    ways: dict[str, Callable[[], None]] = {
        "engine": lambda: _engine(home, shard, device),
        "bare": lambda: bare_forward(teacher, rows, budget),
        "loop": lambda: naive_loop(teacher, rows, home.home.root / "loop.jsonl"),
    }
    with torch.inference_mode():
        if is_fast(teacher.model.lm_head.weight):
            ways["bare, oneDNN"] = lambda: bare_forward_by_one_dnn(teacher, rows, budget)
    seconds = by_turns(ways, repeats)
    fastest = {way: min(rounds) for way, rounds in seconds.items()}
    tokens = n_tokens(rows)
    return {
        "tokens": tokens,
        **{f"{way} tokens/s": tokens / fastest[way] for way in ways},
        **{f"engine / {way}": fastest[way] / fastest["engine"] for way in ways if way != "engine"},
    }


def _engine(home: BenchHome, shard: Any, device: str) -> None:
    capture_shard(home.spec, shard, home.store, device=device, force=True)


@torch.inference_mode()
def bare_forward(teacher: Teacher, rows: Sequence[Row], budget: int, whole: int = 1) -> None:
    """The same tokens, end to end in rows of their mean length, as many rows a pass as the budget takes. Rows are a
    multiple of `whole` long.
    """
    ids = torch.tensor([token for row in rows for token in row.ids], device=teacher.device)
    # Attention grows with length: rows of the length the average token stands in cost what the ragged ones do.
    length = -(-round(sum(len(row.ids) ** 2 for row in rows) / len(ids)) // whole) * whole
    per_pass = max(1, budget // length) * length
    for part in ids.split(per_pass):
        even = len(part) // length * length
        if even:
            teacher.model(input_ids=part[:even].view(-1, length), use_cache=False)
        if even < len(part):
            teacher.model(input_ids=part[None, even:], use_cache=False)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def bare_forward_by_one_dnn(teacher: Teacher, rows: Sequence[Row], budget: int) -> None:
    with products_of(teacher.model) as whole:
        bare_forward(teacher, rows, budget, whole)


@torch.inference_mode()
def naive_loop(teacher: Teacher, rows: Sequence[Row], out: Path) -> None:
    with out.open("w", encoding="utf-8") as stream:
        for start in range(0, len(rows), LOOP_BATCH):
            batch = rows[start : start + LOOP_BATCH]
            longest = max(len(row.ids) for row in batch)
            ids = torch.zeros((len(batch), longest), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(batch):
                ids[i, : len(row.ids)] = torch.tensor(row.ids)
                mask[i, : len(row.ids)] = 1
            logits = teacher.model(
                input_ids=ids.to(teacher.device), attention_mask=mask.to(teacher.device), use_cache=False
            ).logits
            top, top_ids = torch.log_softmax(logits.float(), -1).topk(K, -1)
            for i, row in enumerate(batch):
                part = slice(row.n_prompt - 1, len(row.ids) - 1)
                line = {"ids": row.ids, "topk_ids": top_ids[i, part].tolist(), "topk_logprobs": top[i, part].tolist()}
                stream.write(json.dumps(line) + "\n")


@torch.inference_mode()
def head_peak_bytes(teacher: Teacher) -> int:
    """Most bytes allocated at once by head, log-sum-exp and top-k of one full forward pass, its hidden states aside."""
    positions = forward_batch_tokens(teacher.device)
    width = teacher.model.config.hidden_size
    hidden_ND = torch.randn(positions, width, device=teacher.device)
    gold_N = torch.zeros(positions, dtype=torch.int64, device=teacher.device)
    return peak_bytes(lambda: top_k_targets(teacher, hidden_ND, gold_N, TargetSettings(k=K)), teacher.device)


if __name__ == "__main__":
    main()
