"""Errors a user can act on, each with the exit code a launcher reads.

The codes follow sysexits.h where it has a word for the case, so that a job script can tell
"do not retry" from "resume me" without parsing a log.
"""

EXIT_RESUME = 75  # EX_TEMPFAIL: stopped after a clean save; start it again
STOP_FILE_CAUSE = "the stop file"  # of a stop that the user asked for by ``RUN/stop``


class KuroshioError(Exception):
    """Base of every error shown without a traceback: message = key, value, reason, remedy."""

    exit_code = 70  # EX_SOFTWARE


class ConfigError(KuroshioError):
    """A configuration that cannot run; no retry cures it."""

    exit_code = 78  # EX_CONFIG


class DataError(KuroshioError):
    """Input data that cannot be used; no retry cures it."""

    exit_code = 65  # EX_DATAERR


class CheckpointError(KuroshioError):
    """A checkpoint or run folder that is damaged or belongs to another run."""

    exit_code = 66  # EX_NOINPUT


class LostRankError(KuroshioError):
    """Another rank is gone; its own message says why, if it could.

    Attributes:
        names_rank: whether this message says which one, since it fell silent.
    """

    exit_code = 69  # EX_UNAVAILABLE

    def __init__(self, message: str, names_rank: bool = False) -> None:
        super().__init__(message)
        self.names_rank = names_rank


class PortTakenError(KuroshioError):
    """The port where the ranks were to meet is another process's; another start takes another."""

    exit_code = 68  # EX_NOHOST


class LeaseError(KuroshioError):
    """The run folder belongs to another living or newer life; this one must not write into it."""

    exit_code = 73  # EX_CANTCREAT


class StorageError(KuroshioError):
    """Disk full, quota reached or folder not writable; what was committed before is intact."""

    exit_code = 74  # EX_IOERR


class NumericsError(KuroshioError):
    """NaN, Inf or a collapsed loss scale; a retry would replay it."""

    exit_code = 76


class RollBackError(NumericsError):
    """A NumericsError that the run answers by going back to a checkpoint, if it has one.

    Attributes:
        step: whose update must not be, from 0.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class CorruptionError(KuroshioError):
    """Ranks hold different values of what must be equal: a memory, a device or a link failed."""

    exit_code = 72  # EX_OSFILE; another start, on other machines, may do


class RanksDisagreeError(KuroshioError):
    """Ranks started with different configs, run folders or code."""

    exit_code = 71  # EX_OSERR


class StopRequestedError(KuroshioError):
    """Not a failure: the run was asked to stop and did so after a clean save.

    Attributes:
        cause: a signal's name, ``STOP_FILE_CAUSE``, or why the time left is too short.
    """

    exit_code = EXIT_RESUME

    def __init__(self, step: int, cause: str) -> None:
        self.cause = cause or "a request on another rank"
        super().__init__(
            f"stopped by {self.cause} after step {step}, saved; the same command resumes"
        )
