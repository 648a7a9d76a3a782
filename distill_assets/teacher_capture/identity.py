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

from distill_assets.dataset_shards.encode import Encoder, encoding_identity
from distill_assets.foundation.errors import CaptureError, ModelError, SettingsError
from distill_assets.foundation.fingerprints import HashCache, digest
from distill_assets.foundation.home import Home
from distill_assets.foundation.model_folders import ModelFolder, Weights, resolve_model
from distill_assets.foundation.settings import DataSettings, Settings, TargetSettings
from distill_assets.foundation.tokenizers import load_tokenizer
from distill_assets.tokenizer_compatibility.facts import TokenizerFacts, tokenizer_facts
from distill_assets.tokenizer_compatibility.fingerprint import tokenizer_fingerprint

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CaptureSpec:
    """Everything a capture is made from, resolved; `identity` hashed is `capture_id`."""

    weights: Weights
    tokenizer: TokenizerFacts
    data: DataSettings
    targets: TargetSettings
    identity: Mapping[str, Any]

    @property
    def teacher(self) -> ModelFolder:
        return self.weights.folder

    @cached_property
    def capture_id(self) -> str:
        return digest(self.identity)

    @property
    def skips_bad_rows(self) -> bool:
        return self.data.on_bad_row == "skip"

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes rows for this teacher; only now is its tokenizer loaded.

        CaptureError when it is not the one the identity was made of: what is remembered decides nothing.
        """
        tokenizer = load_tokenizer(self.teacher)
        replaced = self.teacher.tokenizer_stamp() != self.tokenizer.stamp
        if replaced or tokenizer_fingerprint(tokenizer) != self.tokenizer.fingerprint:
            raise CaptureError(
                f"the tokenizer in {self.teacher.path} is not the one that was looked at; "
                f"run again{'' if replaced else ' with --rehash'}"
            )
        return Encoder(tokenizer, self.data, self.tokenizer.ids.n_real)

    @property
    def dtype(self) -> Any:
        return self.identity["dtype"]


def capture_spec(home: Home, settings: Settings, hashes: HashCache) -> CaptureSpec:
    """Resolve the teacher and its tokenizer into a capture's identity. No weights are loaded, nor a tokenizer
    of which all is known.
    """
    teacher = resolve_model(settings.teacher.model, settings.teacher.revision, home.root, called="teacher.model")
    weights = teacher.weights(hashes)
    tokenizer = tokenizer_facts(teacher, hashes)
    n_ids = len(tokenizer.ids)
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
    identity = {
        "format": FORMAT_VERSION,
        "weights": weights.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "encode": encoding_identity(settings.data),
        "targets": settings.targets.identity,
        "dtype": settings.teacher.dtype,
    }
    return CaptureSpec(weights, tokenizer, settings.data, settings.targets, identity)
