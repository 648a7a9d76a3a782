"""What identities need to know of a tokenizer, without loading it when it was loaded before."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import FileStamp, ModelFolder
from distill_assets.foundation.tokenizers import TokenIds, load_tokenizer
from distill_assets.tokenizer_compatibility.fingerprint import tokenizer_fingerprint

FACTS = 1  # raised when a fingerprint would come out differently
_LIBRARIES = ("transformers", "tokenizers")  # who builds a tokenizer from its files


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
    signature = [FACTS, *map(version, _LIBRARIES), *map(list, stamp)]

    def find_out() -> dict[str, Any]:
        tokenizer = load_tokenizer(folder)
        ids = TokenIds.of(tokenizer)
        return {"fingerprint": tokenizer_fingerprint(tokenizer), "n_real": ids.n_real, "unused": list(ids.unused)}

    found = hashes.value_of(f"tokenizer {folder.path.resolve()}", signature, find_out)
    return TokenizerFacts(found["fingerprint"], TokenIds(found["n_real"], tuple(found["unused"])), stamp)
