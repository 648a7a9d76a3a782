"""Which device a model runs on, whose turn it is there, and what running out of its memory looks like."""

from __future__ import annotations

import gc
import getpass
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from distill_assets.foundation.errors import DeviceError

# Devices are the machine's, not a home's: one lock file each, for all processes of a user.
LOCKS = Path(tempfile.gettempdir()) / f"distill_assets-devices-{getpass.getuser()}"
_LOOK_SECONDS = 0.2  # between two looks at devices that are all taken
_MEMORY_WORDS = (  # of what raises no exception of its own: host and pinned memory, libraries beside the allocator
    "can't allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "Allocation error : not enough memory",  # zstd, through Arrow
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N` as a device; DeviceError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name} is not known; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {name} was asked for, but PyTorch {torch.__version__} sees no CUDA device here; "
            "use device auto or cpu, or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps was asked for, but PyTorch sees no Apple GPU here; use device auto or cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"device {name} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def cuda_choices(name: str) -> list[str]:
    """The CUDA devices `name` leaves to choose from; none where it names one, or there is only one."""
    if resolve_device(name).type != "cuda" or ":" in name or torch.cuda.device_count() < 2:
        return []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def fits_one(n_bytes: int, choices: Sequence[str]) -> bool:
    """Whether weights of `n_bytes` leave at least a fifth of the smallest device's memory to activations."""
    return all(n_bytes < 0.8 * torch.cuda.get_device_properties(name).total_memory for name in choices)


@contextmanager
def leased(choices: Sequence[str], every: bool = False, folder: Path = LOCKS) -> Iterator[str | None]:
    """The first device of `choices` that no other process has leased; waits until there is one.

    `every`: all of them at once, for a model that needs them together. Yields None where nothing is to
    choose. The locks lie in `folder`; the system frees those of a process that dies.
    """
    if not choices:
        yield None
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks = {name: FileLock(folder / f"{name.replace(':', '-')}.lock") for name in choices}
    if every:
        with ExitStack() as stack:
            for lock in locks.values():  # always in the same order: nobody waits for somebody who waits
                stack.enter_context(lock)
            yield None
        return
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield name
            finally:
                lock.release()
            return
        time.sleep(_LOOK_SECONDS)


class Turn:
    """Devices that stay leased between uses, as long as what is loaded on them stays there."""

    def __init__(self, folder: Path = LOCKS) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._held: tuple[object, str | None] | None = None

    def take(self, asked: object, choices: Sequence[str], every: bool = False) -> str | None:
        """As `leased`, for whoever `asked`: the device held for them already, else another, given back first."""
        if self._held is None or self._held[0] != asked:
            self.give_back()
            self._held = (asked, self._stack.enter_context(leased(choices, every, self._folder)))
        return self._held[1]

    def give_back(self) -> None:
        """Let other processes have the devices."""
        self._held = None
        self._stack.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _MEMORY_WORDS)
    )


def free_memory() -> None:
    """Give back what nothing uses any more. Outside an `except` block: a traceback holds on to what failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
