"""The errors a user can cause, each with the exit code that the command line gives for it."""


class LsagError(Exception):
    """What went wrong, and what to do about it. `exit_code` is the command line's exit status."""

    exit_code = 70

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what} — {fix}" if fix else what)
        self.what = what
        self.fix = fix


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, on a GPU or in torch's allocator for the CPU; by name, to not import torch."""
    return (
        isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "DefaultCPUAllocator" in str(error)
    )


class UsageError(LsagError, ValueError):
    """A name, option or configuration value that cannot be used."""

    exit_code = 2


class InputError(LsagError, ValueError):
    """A dataset, image, checkpoint or ONNX file that is missing, damaged or of another kind."""

    exit_code = 3


class DamagedError(InputError):
    """A file whose content is not what was written."""


class UnreachableError(InputError):
    """Data behind a connection that stays dead; the data itself may be whole."""


class UnavailableError(LsagError, RuntimeError):
    """A device, execution provider, package or network that this machine does not have."""

    exit_code = 4


class CheckError(LsagError, RuntimeError):
    """A check of our own work that failed: an export that differs, a training that diverged."""

    exit_code = 5


class WorkerError(LsagError, RuntimeError):
    """A process that trains or prepares images has died."""

    exit_code = 7


class PeerLostError(WorkerError):
    """Another process of the same training has gone. What happened there is the cause, this is a consequence."""


class InterruptedByUserError(LsagError):
    """Ctrl-C."""

    exit_code = 130


class TerminatedError(LsagError):
    """SIGTERM or SIGHUP."""

    exit_code = 143


class OutputError(LsagError, RuntimeError):
    """A place that cannot be written to."""

    exit_code = 6
