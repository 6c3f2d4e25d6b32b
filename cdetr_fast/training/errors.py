"""What can go wrong in training through no fault of the program."""


class DataError(ValueError):
    """Data or settings that cannot be used; the message names the file, the id and what to do.

    Args:
        message: See above.
        said_elsewhere: Whether another process of the run says the same, and is the one to.
    """

    def __init__(self, message: str, *, said_elsewhere: bool = False) -> None:
        super().__init__(message)
        self.said_elsewhere = said_elsewhere


class TrainingStopped(RuntimeError):
    """Training ended before its last step; the state is saved where the message says.

    Args:
        message: Reason, and how to go on.
        exit_code: What the command line exits with.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
