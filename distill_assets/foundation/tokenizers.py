"""A model folder's tokenizer, and which ids it has a token for.

transformers brings torch along, which takes seconds, so it is imported when a tokenizer is loaded and not before:
whoever only asks what is current reads what was found out last time (`tokenizer_compatibility.facts`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from distill_assets.foundation.errors import ModelError, first_line
from distill_assets.foundation.model_folders import FileStamp, ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenIds:
    """The ids a tokenizer has a token for: those below `n_real` (V), except `unused` (ascending)."""

    n_real: int
    unused: tuple[int, ...] = ()

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
        used = set(tokenizer.get_vocab().values())
        n_real = max(used) + 1
        return TokenIds(n_real, tuple(i for i in range(n_real) if i not in used))

    def __len__(self) -> int:
        return self.n_real - len(self.unused)

    def below(self, stop: int) -> set[int]:
        """Those below `stop`."""
        return set(range(min(self.n_real, stop))).difference(self.unused)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars and advice while a model loads; ours say what matters."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Where the Rust behind fast tokenizers gives up, on a damaged rule for instance, it raises no Exception."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from panic


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The tokenizer exactly as the code that encodes uses it; remote code is refused.

    A process loads an unchanged tokenizer once; do not change the one you get.
    """
    return _load_tokenizer(folder, folder.tokenizer_stamp())


@lru_cache(maxsize=8)
def _load_tokenizer(folder: ModelFolder, stamp: tuple[FileStamp, ...]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        with quiet_transformers(), panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each backend raises its own kinds for a damaged file
        if "custom code" in str(error):
            raise ModelError(
                f"{folder.name}: the tokenizer in {folder.path} needs code of its own (auto_map in its "
                "tokenizer_config.json), which is never run; use one that transformers has itself"
            ) from None
        raise ModelError(
            f"{folder.name}: the tokenizer in {folder.path} cannot be loaded ({first_line(error)})"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
