"""Where a model lies on disk: hub ids and folders resolved to a local folder, and its fingerprint.

Only files are looked at here; nothing is loaded and torch is not imported.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill_assets.foundation.errors import ModelError, first_line
from distill_assets.foundation.fingerprints import HashCache, digest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WITH_WEIGHTS = (*_WITHOUT_WEIGHTS, "*.safetensors")
_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


FileStamp = tuple[str, int, int, int, int]  # path, size, dates, inode: other bytes, another stamp


@dataclass(frozen=True)
class ModelFolder:
    """A local folder of a model. `name` is what the user wrote; `revision` a commit for hub ids."""

    name: str
    path: Path
    revision: str | None

    def config(self) -> dict[str, Any]:
        """config.json as a mapping; ModelError when it is missing or not one."""
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{self.name}: no config.json in {self.path}; name a transformers model folder") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.name}: config.json in {self.path} cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise ModelError(f"{self.name}: config.json in {self.path} is not a mapping")
        return config

    def tokenizer_stamp(self) -> tuple[FileStamp, ...]:
        """Stamps of all files a tokenizer may be made of; ModelError when there is no tokenizer."""
        if not any((self.path / name).exists() for name in _TOKENIZER_FILES):
            raise ModelError(f"{self.name}: no tokenizer in {self.path}; save one there with save_pretrained")
        files = (
            file for file in self.path.rglob("*") if file.suffix not in (".safetensors", ".lock") and file.is_file()
        )
        return _stamps(files, self.path)

    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted; ModelError when there are none, or an index names a missing one."""
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{self.name}: no .safetensors in {self.path}; other weight formats can run code and are not read "
                "(convert with save_pretrained)"
            )
        if (self.path / _ADAPTER).exists():
            raise ModelError(
                f"{self.name}: {self.path} has an {_ADAPTER}, which transformers would put on top of the weights; "
                "merge the adapter (peft's merge_and_unload) and save the model, or move that file away"
            )
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            try:
                named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{self.name}: {index.name} in {self.path} cannot be read ({error})") from error
            if missing := sorted(named - {file.name for file in files}):
                raise ModelError(f"{self.name}: {missing[0]} is missing in {self.path}; download or save it again")
        return files

    def fingerprint(self, hashes: HashCache) -> str:
        """Hash of the weights' bytes and the configuration; equal for a hub id and a copy of its folder."""
        config = {key: value for key, value in self.config().items() if key not in _VOLATILE_CONFIG}
        return digest({"config": config, "weights": [[f.name, hashes.hash_of(f)] for f in self.weight_files()]})

    def weights(self, hashes: HashCache) -> Weights:
        """These weights as they are now; what changes while they are hashed shows in the stamp."""
        stamp = self.stamp()
        return Weights(self, self.fingerprint(hashes), stamp)

    def stamp(self) -> tuple[FileStamp, ...]:
        """Stamps of configuration and weight files."""
        return _stamps([self.path / "config.json", *self.weight_files()], self.path)

    def n_parameters(self) -> int:
        """Numbers in the weight files, from their headers."""
        return sum(_n_parameters(file) for file in self.weight_files())


@dataclass(frozen=True)
class Weights:
    """A model folder with the hash of its content, and the stamp its files had when they were hashed."""

    folder: ModelFolder
    fingerprint: str
    stamp: tuple[FileStamp, ...]


def _stamps(files: Iterable[Path], root: Path) -> tuple[FileStamp, ...]:
    stats = [(str(file.relative_to(root)), file.stat()) for file in files]
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats))


def _n_parameters(file: Path) -> int:
    try:
        with safe_open(file, "numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged ({error}); download or save it again") from error


# Written by whoever saved the model and without effect on what it computes.
_VOLATILE_CONFIG = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})


_HUB_SECONDS = 600.0
_HUB_TIMEOUT_SECONDS = 10.0
# Which commit a branch stands for is asked once in _HUB_SECONDS: sensors look at a home every few seconds.
_fetched: dict[tuple[str, str | None, bool], tuple[float, Path]] = {}


def is_hub_id(name: str) -> bool:
    """Whether it is written as the hub writes ids: owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def resolve_model(
    name: str, revision: str | None, root: Path, weights: bool = True, called: str = "model"
) -> ModelFolder:
    """Find the folder of a hub id or path (relative to `root`).

    A hub id is fetched into the hub's cache and answered with the commit its revision stands for (asked
    anew every ten minutes), without its `weights` where they are not needed; HF_HUB_OFFLINE is honoured.
    Where the hub cannot be asked, what the cache has is used with a warning. Raises ModelError with where
    was looked, and what the model is `called`, the key of distill.yaml that names it.
    """
    folder = (root / Path(name).expanduser()).resolve()
    if folder.is_dir():
        return ModelFolder(name, folder, None)
    if not is_hub_id(name):
        raise ModelError(f"{called} {name}: no folder at {folder}; give an existing folder or a hub id (owner/name)")
    asked, now = (name, revision, weights), time.monotonic()
    at, path = _fetched.get(asked, (-math.inf, folder))
    if now - at > _HUB_SECONDS or not path.is_dir():
        path = _fetch(called, name, revision, folder, _WITH_WEIGHTS if weights else _WITHOUT_WEIGHTS)
        _fetched[asked] = (now, path)
    return ModelFolder(name, path, path.name)


def _fetch(called: str, name: str, revision: str | None, folder: Path, wanted: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    unanswered: Exception | None = None
    if not constants.HF_HUB_OFFLINE and not (revision and _COMMIT.fullmatch(revision)):
        try:  # `snapshot_download` alone takes an old commit from the cache without a word
            HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
        except Exception as error:  # the hub's own errors and those of its HTTP library have no base in common
            unanswered = error
    try:
        cached_only = unanswered is not None
        path = Path(snapshot_download(name, revision=revision, allow_patterns=[*wanted], local_files_only=cached_only))
    except Exception as error:
        cause = unanswered or error
        if isinstance(cause, RepositoryNotFoundError):
            raise ModelError(
                f"{called} {name}: no folder at {folder}, and the hub has no such model (or it needs a login); "
                "correct the name"
            ) from None
        offline = " while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise ModelError(
            f"{called} {name}: no folder at {folder}, and it could not be fetched from the hub{offline} "
            f"({first_line(cause)}); correct the path if a folder is meant"
        ) from None
    if unanswered:
        said = first_line(unanswered)
        warnings.warn(
            f"{called} {name}: the hub gave no answer ({said}); using cached commit {path.name}", stacklevel=3
        )
    return path
