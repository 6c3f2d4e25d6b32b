"""Short descriptions of errors."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error or its message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
