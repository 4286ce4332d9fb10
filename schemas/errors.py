"""The failures a user may meet, one class for each thing the user would do next.

The command line prints `str(error)` and exits with `error.exit_code`; anything that is not a MasklakeError is
our own fault and keeps its traceback.
"""


class MasklakeError(Exception):
    """A failure that a user can understand: what, got, wanted, where, the remedy, and what state is left.

    Its text is one printable line, whatever went into it: names from storage and libraries' messages may hold
    line breaks or terminal escapes.
    """

    exit_code: int = 1

    def __init__(self, message: str) -> None:
        one_line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in one_line))


class UsageError(MasklakeError):
    """The spec, a flag, a checkpoint, a bucket or credentials as given cannot work. Nothing was written."""

    exit_code = 2


class StorageError(MasklakeError):
    """Object storage or the disk refused, after retries."""


class FailureBudgetExceeded(MasklakeError):
    """More images failed than `failures.budget` allows. What was committed stays."""

    exit_code = 3


class GateRefused(MasklakeError):
    """A check between two steps said no, and the step after it was not taken."""

    exit_code = 4


class LeaseHeldError(MasklakeError):
    """Another run is at work on the same source, or source and model."""

    exit_code = 5


class CommitConflictError(MasklakeError):
    """Another writer moved the table's app transaction; nothing of this commit is visible. Run it again."""


class CommitStateUnknownError(MasklakeError):
    """A commit may have happened or not, and the table could not be read back. Look first, then run again."""


class SchemaMismatchError(MasklakeError):
    """Rows or a table do not have the columns that the label schema says."""
