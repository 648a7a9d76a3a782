"""Whether `torch.compile` would pay: the teacher's layers compiled for changing shapes, against as they are.

The passes are those the capture engine makes of ragged rows. Needs a C++ compiler; takes minutes, and is no part of
`make bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from workload import all_targets, arguments, by_turns, real_rows, seconds_of, show, smollm2

from distill_assets.foundation.devices import resolve_device
from distill_assets.foundation.language_model import forward_batch_tokens, load_model
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.teacher_capture.engine import plan_batches


def main() -> None:
    options = arguments(
        __doc__,
        tokens=(int, 8000, "tokens of a round"),
        repeats=(int, 4, "rounds that count"),
        device=(str, "auto", "device"),
    )
    device = resolve_device(options.device)
    model = load_model(ModelFolder("SmolLM2-135M", smollm2(), None), "float32", device)
    lengths = [len(row.ids) for row in all_targets(real_rows(smollm2(), options.tokens))]
    batches = plan_batches(lengths, forward_batch_tokens(device))
    shapes = [(len(batch), max(lengths[i] for i in batch)) for batch in batches]
    passes = [torch.randint(3, 1000, shape, device=device) for shape in shapes]

    @torch.inference_mode()
    def run(layers: Callable[..., Any]) -> None:
        for ids_BT in passes:
            layers(input_ids=ids_BT, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    eager, compiled = model.base_model, torch.compile(model.base_model, dynamic=True)
    first = seconds_of(lambda: run(compiled))
    seconds = by_turns({"eager": lambda: run(eager), "compiled": lambda: run(compiled)}, options.repeats)
    ratios = sorted(e / c for e, c in zip(seconds["eager"], seconds["compiled"], strict=True))
    line = {
        "passes": len(passes),
        "first round, compiling": first,
        "a round, eager": min(seconds["eager"]),
        "a round, compiled": min(seconds["compiled"]),
        "times as fast, least": ratios[0],
        "times as fast, most": ratios[-1],
    }
    show("torch_compile", [line], options.json, tokens=sum(lengths))


if __name__ == "__main__":
    main()
