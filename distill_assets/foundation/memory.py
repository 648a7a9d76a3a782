"""What running out of the machine's memory looks like, for code that does without torch."""

from __future__ import annotations

_WORDS = (  # of what raises no exception of its own: host and pinned memory, libraries beside an allocator
    "can't allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "Allocation error : not enough memory",  # zstd, through Arrow
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left; torch's own exception is asked for in `devices`."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _WORDS)
    )
