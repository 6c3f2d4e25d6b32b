"""Progress, warnings and logs of commands, on stderr, once each.

`--quiet` leaves results and errors. `--verbose` adds debug messages, every repetition of a warning
with its place in the code, and the traceback of an error.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import os
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdetr_fast.common import progress

if TYPE_CHECKING:
    from rich.console import Console

OURS = ("cdetr_fast", "cdetr_kernels")
_PROGRAM = "cdetr-fast: "
_NOTES = "cdetr_kernels"  # logs notes as warnings, which are shown where nothing is configured
_SLOTS = 1 << 20
_VARIABLE = re.compile(r"\S*[\d/\\]\S*|\S+\.\w\S*")  # paths, files and numbers


@dataclass
class Verbosity:
    """Flags of the command line: the amount of output.

    Attributes:
        quiet: Only results and errors.
        verbose: Also debug messages, repeated warnings and tracebacks.
    """

    quiet: bool = False
    verbose: bool = False


class OncePerRun:
    """Remembers sentences, for this process and those that are forked from it.

    Sentences that differ in paths and numbers alone count as one: about each of a thousand files,
    or at each epoch, the same warning would come again.
    """

    def __init__(self) -> None:
        self._slots = mmap.mmap(-1, _SLOTS)  # shared with worker processes
        self.repeated = 0

    def is_first(self, text: str) -> bool:
        """Return whether a sentence is new, and remember it."""
        slot = zlib.crc32(_VARIABLE.sub("", text).encode()) % _SLOTS
        if self._slots[slot]:
            self.repeated += 1
            return False
        self._slots[slot] = 1
        return True


class Reporter(logging.Handler):
    """Writes log records and warnings to stderr, as lines that begin with the program's name.

    Notes of this package (level INFO) are lines without it.

    Args:
        verbosity: What is asked for.
        console: Of stderr.
    """

    def __init__(self, verbosity: Verbosity, console: Console) -> None:
        super().__init__(logging.ERROR if verbosity.quiet else logging.NOTSET)
        self.verbosity = verbosity
        self.console = console
        self.once = OncePerRun()
        self.process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record; of a warning only the first."""
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit the format
            self.handleError(record)
            return
        if record.levelno < logging.WARNING:
            if self.verbosity.verbose or record.name.split(".")[0] in OURS:
                self.write(text)
            return
        is_warning = record.levelno < logging.ERROR
        if is_warning and not self._is_shown(text):
            return
        place = f" ({record.pathname}:{record.lineno})" if self.verbosity.verbose else ""
        label = "warning: " if is_warning and record.name != _NOTES else ""
        self.write(f"{_PROGRAM}{label}{text}{place}")
        if record.exc_info and self.verbosity.verbose:
            self.write("".join(traceback.format_exception(*record.exc_info)).rstrip())

    def show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
    ) -> None:
        """Write a warning; replaces `warnings.showwarning`."""
        text = " ".join(str(message).split())
        if self.verbosity.quiet or not self._is_shown(text):
            return
        place = ""
        if self.verbosity.verbose:
            place = f" ({category.__name__}, {filename}:{lineno})"
        self.write(f"{_PROGRAM}warning: {text}{place}")

    def _is_shown(self, text: str) -> bool:
        if self.verbosity.verbose:
            return True
        return _is_first_process() and self.once.is_first(text)

    def write(self, text: str) -> None:
        """Write lines to stderr, above the progress bars."""
        if os.getpid() == self.process:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:  # a forked process, whose copy of the console may be locked for ever
            print(text, file=sys.stderr, flush=True)


@contextmanager
def reporting(verbosity: Verbosity, animated: bool = True) -> Iterator[Reporter]:
    """Show progress, warnings and logs as the flags ask for.

    Args:
        verbosity: The flags.
        animated: See `Bars`.
    """
    from rich.console import Console

    console = Console(stderr=True)
    reporter = Reporter(verbosity, console)
    display: progress.Display = progress.Lines()
    if verbosity.quiet or not _is_first_process():
        display = progress.NOTHING
    elif sys.stderr.isatty():
        display = progress.Bars(console, animated)
    with ExitStack() as stack:
        stack.callback(display.close)
        stack.enter_context(progress.shown_by(display))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = reporter.show_warning  # type: ignore[assignment] # typeshed's names
        for name in OURS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.DEBUG if verbosity.verbose else logging.INFO)
        stack.enter_context(_every_record_to(reporter))
        if verbosity.quiet:
            stack.enter_context(_download_bars_hidden())
        yield reporter
        if (repeated := reporter.once.repeated) and not verbosity.quiet:
            more = "1 more warning" if repeated == 1 else f"{repeated} more warnings"
            reporter.write(f"{_PROGRAM}{more} like these; --verbose shows them")


@contextmanager
def _every_record_to(reporter: Reporter) -> Iterator[None]:
    """Make all loggers write through one handler, and not to stderr through those of libraries.

    Libraries add theirs when they are imported, some without propagation to the root.
    """
    original = logging.Logger.callHandlers

    def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= reporter.level:
            reporter.handle(record)
        logger: logging.Logger | None = self
        while logger is not None:
            for handler in logger.handlers:
                if record.levelno >= handler.level and not _writes_to_stderr(handler):
                    handler.handle(record)
            logger = logger.parent if logger.propagate else None

    logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign] # restored below
    try:
        yield
    finally:
        logging.Logger.callHandlers = original  # type: ignore[method-assign]


def _is_first_process() -> bool:
    """Return whether this is the process of a distributed run that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _writes_to_stderr(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and stream in (sys.stderr, sys.__stderr__)


@contextmanager
def _download_bars_hidden() -> Iterator[None]:
    """Hide the bars of the model hub's library, which reads the variable when it is imported."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    with ExitStack() as stack:
        if "huggingface_hub" in sys.modules:
            utils: Any = importlib.import_module("huggingface_hub.utils")

            # Two calls: in older releases the first one is no context manager.
            if not utils.are_progress_bars_disabled():
                utils.disable_progress_bars()
                stack.callback(utils.enable_progress_bars)
        elif name not in os.environ:
            os.environ[name] = "1"
            stack.callback(os.environ.pop, name, None)
        yield
