"""What identities need to know of a tokenizer, without loading it when it was loaded before."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import FileStamp, ModelFolder
from distill_assets.foundation.tokenizers import TokenIds, load_tokenizer
from distill_assets.tokenizer_compatibility.fingerprint import tokenizer_fingerprint

FACTS = 1  # raised when a fingerprint would come out differently
# Who builds a tokenizer from its files; which of the last three are there decides what class it has.
_LIBRARIES = ("transformers", "tokenizers", "mistral-common", "sentencepiece", "tiktoken")


@dataclass(frozen=True)
class TokenizerFacts:
    """`fingerprint` is `tokenizer_fingerprint`'s answer, `stamp` what its files were then."""

    fingerprint: str
    ids: TokenIds
    stamp: tuple[FileStamp, ...]


def tokenizer_facts(folder: ModelFolder, hashes: HashCache) -> TokenizerFacts:
    """Facts of a folder's tokenizer. Remembered as long as the files keep their dates and the libraries their
    versions; ModelError when there is none that can be loaded.
    """
    stamp = folder.tokenizer_stamp()
    name = f"tokenizer {folder.path.resolve()}"
    signature = [FACTS, *map(_version, _LIBRARIES), *map(list, stamp)]

    def find_out() -> dict[str, Any]:
        tokenizer = load_tokenizer(folder)
        ids = TokenIds.of(tokenizer)
        return {"fingerprint": tokenizer_fingerprint(tokenizer), "n_real": ids.n_real, "unused": list(ids.unused)}

    try:
        return _facts(hashes.value_of(name, signature, find_out), stamp)
    except (KeyError, TypeError):  # somebody's hand was in the file; what it says is no reason to fail
        return _facts(hashes.value_of(name, signature, find_out, anew=True), stamp)


def _facts(found: Any, stamp: tuple[FileStamp, ...]) -> TokenizerFacts:
    fingerprint, n_real, unused = found["fingerprint"], found["n_real"], found["unused"]
    if not isinstance(fingerprint, str) or not all(isinstance(i, int) for i in (n_real, *unused)):
        raise TypeError
    return TokenizerFacts(fingerprint, TokenIds(n_real, tuple(unused)), stamp)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
