"""What a capture depends on, and its name: the capture identity (DESIGN: content, never time).

`capture_id` is a hash of teacher weights, tokenizer and chat template as loaded, encoding rules,
target settings, compute dtype and format version. It never depends on the student, on the device,
or on how rows were batched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distill_assets.dataset_shards.encode import Encoder
from distill_assets.foundation.errors import ModelError, SettingsError
from distill_assets.foundation.fingerprints import HashCache, digest
from distill_assets.foundation.home import Home
from distill_assets.foundation.language_model import load_tokenizer, real_vocabulary_size, unused_ids
from distill_assets.foundation.model_folders import ModelFolder, Weights, resolve_model
from distill_assets.foundation.settings import Settings, TargetSettings
from distill_assets.tokenizer_compatibility.fingerprint import tokenizer_fingerprint

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CaptureSpec:
    """Everything a capture is made from, resolved; `identity` hashed is `capture_id`."""

    weights: Weights
    encoder: Encoder
    targets: TargetSettings
    identity: Mapping[str, Any]

    @property
    def teacher(self) -> ModelFolder:
        return self.weights.folder

    @cached_property
    def capture_id(self) -> str:
        return digest(self.identity)

    @property
    def dtype(self) -> Any:
        return self.identity["dtype"]


def capture_spec(home: Home, settings: Settings, hashes: HashCache) -> CaptureSpec:
    """Resolve the teacher and its tokenizer (no weights are loaded) into a capture's identity."""
    teacher = resolve_model(settings.teacher.model, settings.teacher.revision, home.root)
    weights = teacher.weights(hashes)
    tokenizer = load_tokenizer(teacher)
    n_real = real_vocabulary_size(tokenizer)
    n_ids = n_real - len(unused_ids(tokenizer))
    if settings.targets.applies("k") and settings.targets.k > n_ids:
        raise SettingsError(
            f"{home.settings_file}: targets.k is {settings.targets.k}, but {teacher.name} has only {n_ids} token ids; "
            f"use at most {n_ids}"
        )
    positions = teacher.config().get("max_position_embeddings")
    if isinstance(positions, int) and settings.data.max_length > positions:
        raise ModelError(
            f"{home.settings_file}: data.max_length is {settings.data.max_length}, but {teacher.name} was made for "
            f"{positions} positions; use at most {positions}"
        )
    encoder = Encoder(tokenizer, settings.data, n_real)
    identity = {
        "format": FORMAT_VERSION,
        "weights": weights.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "encode": encoder.identity,
        "targets": settings.targets.identity,
        "dtype": settings.teacher.dtype,
    }
    return CaptureSpec(weights=weights, encoder=encoder, targets=settings.targets, identity=identity)
