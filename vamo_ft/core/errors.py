"""Every way a run ends early, with the exit code the command line gives it; and what libraries say of theirs."""

from typing import ClassVar


def first_line(error: BaseException, *, otherwise: str | None = None) -> str:
    """What a library says, on one line; `otherwise` (None: the error's type) where it says nothing."""
    return (str(error).splitlines() or [otherwise or type(error).__name__])[0]


class VamoFtError(Exception):
    """A failure that the user is told in one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class DataError(VamoFtError):
    """The data, or the model folder, is not what the configuration says; names the place and the fix."""

    exit_code = 2


class SaveError(DataError):
    """A checkpoint, or another file of the run, could not be written; earlier checkpoints are untouched.

    Its exit code is that of what the user has to mend before the run can go on. The code of a stop would have a
    scheduler start the run again, onto the same full disk.
    """


class UsageError(VamoFtError):
    """What was asked for cannot be done this way; says what to do instead."""

    exit_code = 2


class DivergenceError(VamoFtError):
    """The loss or an estimate is not finite; raised before the update.

    Attributes:
        step: the update, counted from 0, that a run can leave out to go on; None: leaving one out would not help.
        samples: those that were being looked at, where they are known.
    """

    exit_code = 3

    def __init__(self, message: str, *, step: int | None = None, samples: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.samples = samples


class StopRequested(VamoFtError):
    """A signal asked the run to stop; whoever raises this has left its state in order for a checkpoint."""

    exit_code = 75


class DeviceMemoryError(VamoFtError):
    """Out of memory; names the part that did not fit and what to change."""

    exit_code = 4


class ProcessLostError(VamoFtError):
    """Another process of the run is gone and has not said why; the last checkpoint stays."""


class DriftError(VamoFtError):
    """The processes of a run no longer hold the same parameters; the last checkpoint is from before."""
