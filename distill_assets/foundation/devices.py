"""Which device a model runs on, whose turn it is there, and what running out of its memory looks like."""

from __future__ import annotations

import gc
import getpass
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from distill_assets.foundation.errors import DeviceError
from distill_assets.foundation.memory import memory_ran_out

# Devices are the machine's, not a home's: one lock file each, for all processes of a user. (A container may have users
# without a name, and only Unix numbers them.)
LOCKS = Path(tempfile.gettempdir()) / f"distill_assets-devices-{getattr(os, 'getuid', getpass.getuser)()}"
_LOOK_SECONDS = 0.2  # between two looks at devices that are all taken
_IDLE_SECONDS = 1.0  # between two looks whether others wait for a device that is leased here
_WAITING = "waiting.lock"  # held by one that waits for a device


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


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU takes one of the host when its turn comes: the host waits for nothing."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def cuda_choices(name: str) -> list[str]:
    """The CUDA devices `name` leaves to choose from; none where it names one, or there is only one."""
    if resolve_device(name).type != "cuda" or ":" in name or torch.cuda.device_count() < 2:
        return []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def fits_one(n_bytes: int, choices: Sequence[str]) -> bool:
    """Whether weights of `n_bytes` leave at least a fifth of the smallest device's memory to activations."""
    return all(n_bytes < 0.8 * torch.cuda.get_device_properties(name).total_memory for name in choices)


@contextmanager
def leased(
    choices: Sequence[str],
    every: bool = False,
    folder: Path = LOCKS,
    on_wait: Callable[[str], None] = lambda said: None,
) -> Iterator[str | None]:
    """The first device of `choices` that no other process has leased; waits until there is one, and tells `on_wait` so.

    `every`: all of them at once, for a model that needs them together. Yields None where nothing is to
    choose. The locks lie in `folder`; the system frees those of a process that dies.
    """
    if not choices:
        yield None
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as stack:
        if every:
            for name in choices:  # always in the same order: nobody waits for somebody who waits
                _first_free([name], folder, stack, on_wait)
            yield None
        else:
            yield _first_free(choices, folder, stack, on_wait)


def _first_free(names: Sequence[str], folder: Path, stack: ExitStack, on_wait: Callable[[str], None]) -> str:
    """The first of these devices that is free, locked until `stack` ends. Others can see that somebody waits."""
    # For all threads: the one that gives them back is another.
    locks = {name: FileLock(folder / f"{name.replace(':', '-')}.lock", thread_local=False) for name in names}
    waiting = FileLock(folder / _WAITING)
    try:
        said = False
        while True:
            for name, lock in locks.items():
                with suppress(Timeout):
                    lock.acquire(timeout=0)
                    stack.callback(lock.release)
                    return name
            if not said:
                on_wait(f"waits for {' or '.join(names)}, which other processes use")
                said = True
            with suppress(Timeout):  # one that is seen to wait is enough
                if not waiting.is_locked:
                    waiting.acquire(timeout=0)
            time.sleep(_LOOK_SECONDS)
    finally:
        waiting.release()


def _somebody_waits(folder: Path) -> bool:
    """Whether a process waits for devices that others have leased. Who asks the same holds its lock for a moment."""
    for _ in range(3):
        try:
            with FileLock(folder / _WAITING).acquire(timeout=0):
                return False
        except Timeout:
            time.sleep(random.uniform(0.01, 0.1))
        except OSError:
            return False  # asked again soon
    return True


class Turn:
    """Devices that stay leased between uses, as long as what is loaded on them stays there.

    While nothing uses them, a thread gives them back as soon as another process waits for one: whoever holds one may
    himself be waiting for what that process has. `let_go` is called before they go back, to unload what is there, and
    says whether nothing holds on to it any more: until then they stay here, unless they are given back.
    """

    def __init__(self, folder: Path = LOCKS, let_go: Callable[[], bool] = lambda: True) -> None:
        self._folder, self._let_go = folder, let_go
        self._in_use = threading.RLock()
        self._stack = ExitStack()
        self._held: tuple[object, str | None] | None = None

    @contextmanager
    def taken(
        self,
        asked: object,
        choices: Sequence[str],
        every: bool = False,
        on_wait: Callable[[str], None] = lambda said: None,
    ) -> Iterator[str | None]:
        """As `leased`, for whoever `asked`: the device held for them already, else another, given back first. In use
        until the block ends, and leased until `give_back`, or until another process waits for it.
        """
        if not choices:
            yield None
            return
        with self._in_use:
            if self._held is None or self._held[0] != asked:
                self.give_back()
                self._held = (asked, self._stack.enter_context(leased(choices, every, self._folder, on_wait)))
                threading.Thread(target=self._make_way, args=(self._held,), daemon=True).start()
            yield self._held[1]

    def give_back(self) -> None:
        """Let other processes have the devices."""
        with self._in_use:
            self._held = None
            self._let_go()
            self._stack.close()

    def _make_way(self, held: tuple[object, str | None]) -> None:
        while True:
            time.sleep(_IDLE_SECONDS)
            with self._in_use:
                if self._held is not held:
                    return
                if _somebody_waits(self._folder) and self._let_go():
                    self.give_back()
                    return


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or memory_ran_out(error)


def free_memory() -> None:
    """Give back what nothing uses any more. Outside an `except` block: a traceback holds on to what failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
