"""Every failure a user can mend has a name here and says what, where and what to do.

A `DistillError` is printed as it stands, in one or two lines, without a traceback; any other
exception is a defect of ours. Each class carries the exit code of the command line.
"""


class DistillError(Exception):
    """A failure the user can mend; `str(error)` is the whole message."""

    exit_code = 1


class UsageError(DistillError):
    """The command was called in a way that makes no sense."""

    exit_code = 2


class SettingsError(DistillError):
    """distill.yaml is missing, unreadable, or says something impossible."""


class HomeError(DistillError):
    """A home folder is missing, not a home, or contradicts DAGSTER_HOME."""


class ShardError(DistillError):
    """A shard file, its name, or a row in it cannot be used."""


class UnreadableFile(DistillError):
    """A file that should be read is gone, truncated or damaged."""


class ModelError(DistillError):
    """A model or tokenizer cannot be found, loaded or used safely."""


class DeviceError(DistillError):
    """The device asked for is not there."""


class OutOfMemory(DistillError):
    """A device, or the machine, has too little memory. `rows` were in the forward pass that failed, if one did."""

    def __init__(self, message: str, rows: int = 0) -> None:
        super().__init__(message)
        self.rows = rows


class IncompatibleTokenizers(DistillError):
    """Teacher and student do not mean the same thing by an id, or segment text differently."""


class CaptureError(DistillError):
    """A capture could not be made, or a stored one cannot be read."""


class CaptureOutOfReach(CaptureError):
    """The system does not give a stored capture just now. It may be whole: nothing may be put in its place."""


class InterchangeError(DistillError):
    """A JSONL file of another engine's log-probabilities cannot be imported as it is."""


class PinnedCapture(CaptureError):
    """A shard was imported, but its imported capture does not fit it as it is now. The teacher must not stand in."""


class EditedImport(PinnedCapture):
    """A shard was imported, but with other content than it has now: its rows may have been imported all the same."""


# What is wrong with one shard and says nothing about the others.
SHARD_FAILURES = (ShardError, UnreadableFile, CaptureError)


class CatalogError(DistillError):
    """The catalog is missing, unreadable, or was asked for something it refuses."""


class TrainingError(DistillError):
    """A student cannot be trained from what is there."""


class StaleInputs(DistillError):
    """What was asked for needs something that is not up to date."""


def first_line(error: Exception) -> str:
    """What an error of somebody else's says first, printable; it may go on for a page, or say nothing but its kind."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
