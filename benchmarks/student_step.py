"""What a distillation step costs beside a cross-entropy step of the same student on the same tokens.

Forward and backward pass with the head, the optimiser's own step left out, as it is the same for all. `distil`:
DistillationModule with k kept ids at each position; `cross-entropy`: the same module without targets, as the
control is trained; `transformers`: the model's own loss, from all logits. Ratios are medians over rounds in
which all three take turns. Peaks are bytes allocated at once beyond weights: activations, logits and gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from workload import WIDE_VOCABULARY, arguments, by_turns, peak_bytes, random_llama, show

from distill_assets.foundation.devices import resolve_device
from distill_assets.student_model.batches import IGNORED
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule
from distill_assets.student_model.vocabulary import StudentVocabulary

VOCABULARIES = (4_096, 49_152, WIDE_VOCABULARY)
LENGTH = 256  # positions of a row


def main() -> None:
    options = arguments(
        __doc__,
        vocabulary=(int, 0, "only the student with this many ids; 0 is all"),
        positions=(int, 4096, "supervised positions of a step"),
        k=(int, 32, "ids kept at a position"),
        width=(int, 256, "width of the student"),
        layers=(int, 4, "layers of the student"),
        repeats=(int, 3, "rounds that count"),
        device=(str, "auto", "device"),
    )
    chosen = [options.vocabulary] if options.vocabulary else VOCABULARIES
    results = [measure(vocabulary, options) for vocabulary in chosen]
    sizes = {name: getattr(options, name) for name in ("positions", "k", "width", "layers")}
    show("student_step", results, options.json, **sizes)


def measure(vocabulary: int, options: Any) -> dict[str, Any]:
    device = resolve_device(options.device)
    model = random_llama(vocabulary, options.width, options.layers).to(device).train()
    module = DistillationModule(model, StudentVocabulary(vocabulary), LossMixture(kd_weight=0.9)).to(device)
    batch = {name: tensor.to(device) for name, tensor in random_batch(vocabulary, options.positions, options.k).items()}
    hard = {name: batch[name] for name in ("ids_BT", "labels", "weight_N")}

    def step(loss_of: Callable[[], Tensor]) -> None:
        loss_of().backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    ways: dict[str, Callable[[], None]] = {
        "distil": lambda: step(lambda: module(**batch)["loss"]),
        "cross-entropy": lambda: step(lambda: module(**hard)["loss"]),
        "transformers": lambda: step(lambda: model(input_ids=batch["ids_BT"], labels=batch["ids_BT"]).loss),
    }
    peaks = {name: peak_bytes(way, device) / 2**20 for name, way in ways.items()}
    seconds = by_turns(ways, options.repeats)

    def times(other: str) -> float:
        return statistics.median(d / o for d, o in zip(seconds["distil"], seconds[other], strict=True))

    return {
        "vocabulary": vocabulary,
        **{f"{name} s": statistics.median(values) for name, values in seconds.items()},
        "times cross-entropy": times("cross-entropy"),
        "times transformers": times("transformers"),
        **{f"{name} peak MiB": peak for name, peak in peaks.items()},
        "peak times transformers'": peaks["distil"] / peaks["transformers"],
    }


def random_batch(vocabulary: int, positions: int, k: int) -> dict[str, Tensor]:
    """Rows of LENGTH supervised positions, and targets at each: k different ids anywhere, and a tail."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (max(1, positions // LENGTH), LENGTH + 1), generator=generator)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT[:, :-1] = ids_BT[:, 1:]
    n = labels_BT[:, :-1].numel()
    stripe = vocabulary // k
    support_ids_NK = torch.randint(stripe, (n, k), generator=generator) + stripe * torch.arange(k)
    logprobs_NJ = (3.0 * torch.randn(n, k + 1, generator=generator)).log_softmax(-1)
    return {
        "ids_BT": ids_BT,
        "labels": labels_BT,
        "weight_N": torch.ones(n),
        "support_ids_NK": support_ids_NK,
        "support_logprobs_NK": logprobs_NJ[:, :k].contiguous(),
        "tail_logprob_N": logprobs_NJ[:, k].contiguous(),
    }


if __name__ == "__main__":
    main()
