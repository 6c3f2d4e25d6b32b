"""Errors of training whose cause is outside the program: data, settings, signals."""


class DataError(ValueError):
    """Data or settings that cannot be used.

    Args:
        message: Names the file, the id and what to do.
        reported_elsewhere: Whether another process of the run reports the same error.
    """

    def __init__(self, message: str, *, reported_elsewhere: bool = False) -> None:
        super().__init__(message)
        self.reported_elsewhere = reported_elsewhere


class TrainingStopped(RuntimeError):
    """Training ended before its last step, and its state is saved.

    Args:
        message: Reason, where the state is, and how to resume.
        exit_code: Exit code of the command line.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
