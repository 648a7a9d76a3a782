"""A causal language model split where distillation needs it split.

Legend: B = batch, T = tokens of a row, N = chosen positions, D = width, W = head width,
V = real vocabulary ids (0..V-1), W >= V when the head is padded.

The body gives hidden states for every token; the head is computed only at chosen positions, a
bounded number of rows at a time, so that no [B, T, V] tensor exists. `verify_split` proves on
each loaded model that body, head and logit transform give what its own forward gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_assets.foundation.cpu_products import fast_product, is_fast, products_of, whole_rows, whole_shape
from distill_assets.foundation.devices import is_out_of_memory, sent
from distill_assets.foundation.errors import ModelError, OutOfMemory, first_line
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.settings import Dtype
from distill_assets.foundation.tokenizers import quiet_transformers

# Most float32 logits held at once, in rows of the whole head and in bytes. A GPU reads the head from its
# memory for each chunk, and wants many rows for it; a CPU is fastest while a chunk stays in its caches.
HEAD_ROWS, HEAD_BYTES = 128, 24 << 20
BLOCK_BYTES = 8 << 20  # of a block of the vocabulary, on a CPU
_GPU_HEAD_ROWS, _GPU_HEAD_BYTES = 4096, 256 << 20
NEVER = -1.0e30  # logit of an id that is not real; finite, so that 0 * NEVER stays 0


def load_model(folder: ModelFolder, dtype: Dtype, device: torch.device, spread: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode, from safetensors only, in the dtype given.

    `spread` puts its layers on all CUDA devices together, as accelerate sees fit.
    """
    folder.config()
    folder.weight_files()
    try:
        with quiet_transformers():
            both: Any = AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **({"device_map": "auto"} if spread else {}),
            )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        raise ModelError(f"{folder.name}: the model in {folder.path} cannot be loaded ({first_line(error)})") from error
    model: PreTrainedModel
    model, loaded = both
    # What a file lacks, transformers fills with random numbers and a warning.
    if lacking := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise ModelError(
            f"{folder.name}: {len(lacking)} weights are missing or of another shape in {folder.path}, "
            f"{lacking[0]} first; save or download the model again"
        )
    if not spread:
        _move(model, device, folder.name)
    model.eval()
    verify_split(model, folder.name)
    return model


def _move(model: PreTrainedModel, device: torch.device, name: str) -> None:
    try:
        model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        gib = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**30
        raise OutOfMemory(
            f"{name}: {device} has no room for {gib:.1f} GiB of {model.dtype} weights; "
            "use a device with more memory, or a narrower dtype"
        ) from error


def forward_batch_tokens(device: torch.device) -> int:
    """Padded tokens in one forward pass without gradients, unless somebody says otherwise.

    A CPU is fastest while activations stay in its caches (SmolLM2-135M on two cores, without the head:
    640 tokens/s with 512, 761 with 1024, 645 with 2048); a GPU wants to be filled.
    """
    return 1024 if device.type == "cpu" else 8192


def head_rows(model: PreTrainedModel) -> int:
    """Rows of logits to hold at once, so that memory does not grow with the vocabulary."""
    on_cpu = model.device.type == "cpu"
    rows, n_bytes = (HEAD_ROWS, HEAD_BYTES) if on_cpu else (_GPU_HEAD_ROWS, _GPU_HEAD_BYTES)
    return max(16, min(rows, n_bytes // (4 * head_width(model))))


def head_device(model: PreTrainedModel) -> torch.device:
    """Where logits come out: where its layers are spread over devices, not always where hidden states do."""
    head: Any = model.get_output_embeddings()
    if head.weight.device.type != "meta":
        return torch.device(head.weight.device)
    return torch.device(getattr(head._hf_hook, "execution_device", model.device))  # accelerate fetches it when called


def head_width(model: PreTrainedModel) -> int:
    """W: rows of the output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def hidden_states(model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Final hidden states [B, T, D] of right-padded rows, after the body's last normalisation.

    No attention mask: in a causal model a token never sees what stands to its right, so padding
    on the right changes nothing at real tokens, and attention takes its fast causal path. Where the
    faster product wants whole passes (`cpu_products`), rows are padded, and rows of padding added, for it.

    With `positions_BT`, B is 1: rows one after another, whose positions begin anew at 0. For a model that
    `keeps_packed_rows_apart`.
    """
    if positions_BT is not None:
        return model.base_model(input_ids=ids_BT, use_cache=False, **_packed_arguments(positions_BT)).last_hidden_state
    n_rows, length = ids_BT.shape
    with products_of(model) as whole:
        if whole > 1:
            rows, wide = whole_shape(n_rows, length, whole, longest_padding(model))
            ids_BT = pad(ids_BT, (0, wide - length, 0, rows - n_rows))
        return model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[:n_rows, :length]


def longest_padding(model: PreTrainedModel) -> float:
    """To how many tokens a row can be padded so that nothing changes: as many as there are positions that were learned,
    and none where rotary embeddings are those of the longest row.
    """
    if any(rope.get("rope_type") in ("dynamic", "longrope") for rope in _ropes(model)):
        return 0
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return min((limit for limit in limits if limit), default=math.inf)


def turning_length(model: PreTrainedModel) -> float:
    """Rows above so many tokens turn all positions of their batch by other angles; infinite where none do."""
    limits = (
        rope.get("original_max_position_embeddings") for rope in _ropes(model) if rope.get("rope_type") == "longrope"
    )
    return min((limit for limit in limits if limit), default=math.inf)


def _ropes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The parameters of its rotary embeddings: one kind for all layers, or one for each kind of layer."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def _packed_arguments(positions_BT: Tensor) -> dict[str, Any]:
    """What tells any attention of transformers where rows begin. Flash attention would look for it in each layer."""
    starts_R = (positions_BT[0] == 0).nonzero()[:, 0]
    ends_R1 = torch.cat([starts_R, starts_R.new_tensor([positions_BT.shape[1]])]).int()
    longest = int(ends_R1.diff().max())
    return {
        "position_ids": positions_BT,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends_R1),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


@torch.no_grad()
def keeps_packed_rows_apart(model: PreTrainedModel) -> bool:
    """Whether two short rows, one after the other without padding, get the hidden states that each gets alone.

    Not so where something other than attention looks back, as convolutions and recurrent layers do.
    """
    first, length, kind = 9, 16, model.device.type
    embeddings: Any = model.get_input_embeddings()
    n_ids = min(head_width(model), len(embeddings.weight))
    # All over the vocabulary: many of the first ids are special and hardly trained, and blow rounding up.
    ids_BT = (torch.arange(1, length + 1, device=model.device) * n_ids // (length + 1))[None]
    other_BT = ids_BT.clone()
    other_BT[:, :first] = (ids_BT[:, :first] + 1) % n_ids
    positions_BT = torch.arange(length, device=model.device)[None].remainder(first)
    was_training = model.training
    model.eval()
    try:
        packed_BTD = hidden_states(model, ids_BT, positions_BT)
        beside_other_BTD = hidden_states(model, other_BT, positions_BT)
        alone_BTD = torch.cat([hidden_states(model, ids_BT[:, :first]), hidden_states(model, ids_BT[:, first:])], dim=1)
    except TypeError:  # a body that is not told positions
        return False
    finally:
        model.train(was_training)
    # In passes of one shape nothing is rounded otherwise: whatever of the first row reaches the second, shows.
    if not packed_BTD[:, first:].equal(beside_other_BTD[:, first:]):
        return False
    # Positions that do not begin anew change whole states, by more than rounding. (SmolLM2's is 3e-6 of them in float32
    # and 0.03 in bfloat16; single dimensions, of which some are a hundred times as large as others, are off by more.)
    tolerance = 0.1 if torch.is_autocast_enabled(kind) or model.dtype != torch.float32 else 1e-4
    off_BT = (packed_BTD - alone_BTD).float().norm(dim=-1)
    return bool((off_BT <= tolerance * alone_BTD.float().norm(dim=-1)).all() and alone_BTD.isfinite().all())


def head_logits(
    model: PreTrainedModel, hidden_ND: Tensor, columns: slice | None = None, out: Tensor | None = None
) -> Tensor:
    """Logits [N, W] in the model's dtype, with the architecture's scaling and soft-capping.

    `columns` asks for some ids only, and needs a head that `is_plain`; without gradients their logits may be
    written to `out`, which saves fresh memory where MKL multiplies.
    """
    head = model.get_output_embeddings()
    fast = is_plain(head) and hidden_ND.dtype == torch.float32 and is_fast(head.weight)
    if columns is None and not fast:
        logits_NW: Tensor = head(hidden_ND)
    else:
        part = columns or slice(None)
        weight_WD = head.weight[part]
        logits_NW = fast_product(hidden_ND, weight_WD) if fast else torch.mm(hidden_ND, weight_WD.t(), out=out)
        if head.bias is not None:
            logits_NW += head.bias[part]
    scale, cap = _logit_transform(model)
    if scale != 1.0:
        logits_NW = logits_NW * scale
    if cap is not None:
        logits_NW = torch.tanh(logits_NW / cap) * cap
    return logits_NW


def _logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """What the architecture multiplies its logits with, and where it caps them softly."""
    config: Any = model.config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(config, "final_logit_softcapping", None) or None  # Gemma


@dataclass(frozen=True)
class PlainHead:
    """A head in its parts: logits = cap x tanh(scale x (hidden W^T + bias) / cap), without `cap` the scaled product."""

    weight_WD: Tensor
    bias_W: Tensor | None
    scale: float = 1.0
    cap: float | None = None


def plain_head(model: PreTrainedModel) -> PlainHead:
    """The head's parts, the parameters themselves. ModelError where it is not plain."""
    head = model.get_output_embeddings()
    if not is_plain(head):
        raise ModelError(
            f"the head of this {type(model).__name__} is a {type(head).__name__}, not one matrix in memory; "
            "leave it out of adapters, quantisation and offloading"
        )
    return PlainHead(head.weight, head.bias, *_logit_transform(model))


def is_plain(head: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a head is one matrix in memory: no other kind of layer, and none that accelerate fetches when called."""
    return type(head) is torch.nn.Linear and not hasattr(head, "_hf_hook")


@torch.no_grad()
def head_blocks(model: PreTrainedModel, hidden_ND: Tensor, n_real: int, unused: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Float32 logits [N, C] of the ids from `start` on, block after block of the real vocabulary: (start, logits).

    A block is yours to overwrite until the next one comes, which may take its memory: fresh memory costs a CPU
    more than what is computed in it. Ids without a token, `unused`, ascending and on the host, are at NEVER. A head
    that is not plain comes in one.
    """
    head = model.get_output_embeddings()
    if not is_plain(head):
        yield 0, real_logits(model, hidden_ND, n_real, unused)
        return
    limit = _GPU_HEAD_BYTES if hidden_ND.device.type == "cuda" else BLOCK_BYTES
    width = max(1024, limit // (4 * len(hidden_ND)) // 1024 * 1024)
    n_rows, memory = len(hidden_ND), None
    if is_fast(head.weight):
        hidden_ND = whole_rows(hidden_ND)  # once for all blocks
    else:
        memory = hidden_ND.new_empty(n_rows * min(width, n_real))
    for start in range(0, n_real, width):
        stop = min(start + width, n_real)
        out_NC = None if memory is None else memory[: n_rows * (stop - start)].view(n_rows, stop - start)
        logits_NC = head_logits(model, hidden_ND, slice(start, stop), out_NC)[:n_rows].float()
        if unused.numel():
            first, last = torch.searchsorted(unused, torch.tensor([start, stop])).tolist()
            logits_NC.index_fill_(1, sent(unused[first:last] - start, logits_NC.device), NEVER)
        yield start, logits_NC


def real_logits(model: PreTrainedModel, hidden_ND: Tensor, n_real: int, unused: Tensor | None = None) -> Tensor:
    """Float32 logits [N, V] over real ids: the head's padding cut off, ids without a token at NEVER."""
    logits_NV = head_logits(model, hidden_ND)[:, :n_real].float()
    if unused is not None and unused.numel():
        logits_NV = logits_NV.index_fill(1, sent(unused, logits_NV.device), NEVER)
    return logits_NV


@torch.no_grad()
def verify_split(model: PreTrainedModel, name: str) -> None:
    """ModelError unless body + head + transform equal the model's own logits on a short row, causally."""
    width = head_width(model) if model.get_output_embeddings() is not None else 0
    if not width:
        raise ModelError(f"{name}: {type(model).__name__} has no language-model head to distil from")
    ids_BT = torch.arange(1, 17, device=model.device).remainder(width).view(2, 8)
    with products_of(model):  # as `hidden_states` has them: rounding is not what is asked for here
        own = model(input_ids=ids_BT, use_cache=False).logits.float()
    if not own.isfinite().all():
        raise ModelError(f"{name}: its logits are not finite; its weights are damaged, or its dtype too narrow")
    ours = head_logits(model, hidden_states(model, ids_BT)).float().to(own.device)  # of layers that are spread
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{name}: {type(model).__name__} changes its logits after the head in a way this version does not know; "
            "it cannot be used"
        )
    ids_BT[:, -1] = 0
    with products_of(model):
        changed = model(input_ids=ids_BT, use_cache=False).logits.float()
    if not torch.allclose(own[:, :-1], changed[:, :-1], atol=tolerance):
        raise ModelError(f"{name}: {type(model).__name__} lets a token see what comes after it; use a causal model")
