"""A model's float32 layers on a CPU, multiplied by oneDNN, against PyTorch's own choice.

The same passes of SmolLM2-135M without its head, by turns; the fastest of some rounds counts. It tells whether
`one_dnn_is_faster` should say yes on the processor at hand, and what oneDNN keeps in memory of passes of ragged
rows. No part of `make bench`.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from workload import arguments, by_turns, show, smollm2

from distill_assets.foundation.cpu_products import ROWS, OneDnnProducts, fast_product, whole_shape
from distill_assets.foundation.language_model import BLOCK_BYTES, forward_batch_tokens, load_model
from distill_assets.foundation.model_folders import ModelFolder

LENGTHS = (64, 256, 1024)
CPU = torch.device("cpu")


def main() -> None:
    options = arguments(__doc__, repeats=(int, 7, "rounds that count"), passes=(int, 200, "ragged passes for memory"))
    model = load_model(ModelFolder("SmolLM2-135M", smollm2(), None), "float32", CPU)
    results = []
    for length in LENGTHS:
        ids_BT = torch.randint(3, 1000, (forward_batch_tokens(CPU) // length, length))
        ways = {
            "PyTorch's": partial(body, model, ids_BT, nullcontext()),
            "oneDNN's": partial(body, model, ids_BT, OneDnnProducts()),
        }
        seconds = {way: min(rounds) for way, rounds in by_turns(ways, options.repeats).items()}
        results.append(
            {
                "rows": "{} x {}".format(*ids_BT.shape),
                **{f"{way} tokens/s": ids_BT.numel() / least for way, least in seconds.items()},
                "times as fast": seconds["PyTorch's"] / seconds["oneDNN's"],
                "furthest apart": float((ways["PyTorch's"]() - ways["oneDNN's"]()).abs().max()),
            }
        )
    kept = {f"MiB more after {options.passes} ragged passes": mib_kept(model, options.passes)}
    show("cpu_products", results, options.json, instructions=torch.backends.cpu.get_cpu_capability(), **kept)


@torch.inference_mode()
def body(model: PreTrainedModel, ids_BT: Tensor, products: AbstractContextManager[object]) -> Tensor:
    with products:
        hidden_BTD: Tensor = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


@torch.inference_mode()
def mib_kept(model: PreTrainedModel, passes: int) -> float:
    """What memory grows by, in MiB, over passes of 1 to 16 rows that are padded as `hidden_states` does it, and the
    head, a block of ids at a time, at up to all of their tokens.
    """
    lengths, before = random.Random(0), resident_mib()
    head = model.get_output_embeddings().weight
    for _ in range(passes):
        rows = lengths.randint(1, 16)
        shape = whole_shape(rows, lengths.randint(700, 1000) // rows, ROWS, float("inf"))
        hidden_ND = body(model, torch.ones(shape, dtype=torch.int64), OneDnnProducts()).flatten(0, 1)
        scored_ND = hidden_ND[: lengths.randint(len(hidden_ND) // 4, len(hidden_ND))]
        width = BLOCK_BYTES // (4 * len(scored_ND)) // 1024 * 1024
        for weight_CD in head.split(width):
            fast_product(scored_ND, weight_CD)
    return resident_mib() - before


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()
