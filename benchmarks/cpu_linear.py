"""A teacher's float32 layers on a CPU, multiplied by oneDNN, against PyTorch's own choice.

The same passes of SmolLM2-135M without its head, by turns; the fastest of some rounds counts. It tells whether
`one_dnn_is_faster` should say yes on the processor at hand, and is no part of `make bench`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from workload import arguments, by_turns, show, smollm2

from distill_assets.foundation.language_model import forward_batch_tokens, load_model
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.teacher_capture.cpu_linear import OneDnnLinear

LENGTHS = (64, 256, 1024)


def main() -> None:
    options = arguments(__doc__, repeats=(int, 7, "rounds that count"))
    cpu = torch.device("cpu")
    plain, fast = (load_model(ModelFolder("SmolLM2-135M", smollm2(), None), "float32", cpu) for _ in range(2))
    for layer in fast.base_model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDnnLinear
    results = []
    for length in LENGTHS:
        ids_BT = torch.randint(3, 1000, (forward_batch_tokens(cpu) // length, length))
        ways = {"PyTorch's": partial(body, plain, ids_BT), "oneDNN's": partial(body, fast, ids_BT)}
        seconds = {way: min(rounds) for way, rounds in by_turns(ways, options.repeats).items()}
        results.append(
            {
                "rows": "{} x {}".format(*ids_BT.shape),
                **{f"{way} tokens/s": ids_BT.numel() / least for way, least in seconds.items()},
                "times as fast": seconds["PyTorch's"] / seconds["oneDNN's"],
                "furthest apart": float((body(plain, ids_BT) - body(fast, ids_BT)).abs().max()),
            }
        )
    show("cpu_linear", results, options.json, instructions=torch.backends.cpu.get_cpu_capability())


@torch.inference_mode()
def body(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD: torch.Tensor = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


if __name__ == "__main__":
    main()
