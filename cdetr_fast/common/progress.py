"""Progress of long work: the work reports here, and the display that was chosen shows it.

Without a chosen display nothing is shown, so that a library call prints nothing by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")

_SECONDS_BETWEEN_DRAWS = 0.1


class Task:
    """A piece of work in progress; this one is shown nowhere."""

    def advance(self, steps: int = 1) -> None:
        """Count steps that are done."""

    def update(self, done: int | None = None, doing: str | None = None) -> None:
        """Set the number of steps that are done, or the description of the work."""


class Display:
    """Shows nothing: no tasks, no lines."""

    shows_tasks = shows_lines = False

    @contextmanager
    def task(self, doing: str, total: int | None = None) -> Iterator[Task]:
        """Show a task while the context is open; see `task`."""
        yield Task()

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def result(self, text: str) -> None:
        """Write a line of results to stdout."""
        print(text, flush=True)

    def close(self) -> None:
        """Remove what is still shown."""


class Lines(Display):
    """Writes lines to stderr, and no tasks: for files and pipes."""

    shows_lines = True

    def line(self, text: str) -> None:
        """Write a line to stderr."""
        print(text, file=sys.stderr, flush=True)


class Bars(Display):
    """Bars at the bottom of a terminal, which vanish with their tasks; lines go above them.

    Args:
        console: Of stderr; None makes one.
        animated: Draw by a thread, ten times a second; without, only when a task changes. Work that
            forks needs the latter: a process that is forked while the thread holds a lock of the
            output would wait for it at its end.
    """

    shows_tasks = shows_lines = True

    def __init__(self, console: Console | None = None, animated: bool = True) -> None:
        from rich import progress
        from rich.console import Console

        class Steps(progress.MofNCompleteColumn):
            """Steps done and total; nothing for tasks without steps."""

            def render(self, task: progress.Task) -> Any:
                return super().render(task) if task.total is not None else ""

        class Remaining(progress.TimeRemainingColumn):
            """Time that remains; the time since the start for tasks without steps."""

            def render(self, task: progress.Task) -> Any:
                if task.total is None:
                    return progress.TimeElapsedColumn().render(task)
                return super().render(task)

        self.console = console or Console(stderr=True)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
            Steps(),
            Remaining(),
            console=self.console,
            transient=True,
            auto_refresh=animated,
            redirect_stdout=False,  # data is for stdout alone
            redirect_stderr=False,
        )

    @contextmanager
    def task(self, doing: str, total: int | None = None) -> Iterator[Task]:
        """Show a bar, below those of the tasks that contain this one."""
        bar = _Bar(self._progress, doing, total)
        self._progress.start()
        self._progress.refresh()
        try:
            yield bar
        finally:
            self._progress.remove_task(bar.id)
            if not self._progress.tasks:
                self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """Write a line of results to stdout, while the bars are away."""
        self._progress.stop()
        print(text, flush=True)
        if self._progress.tasks:
            self._progress.start()

    def close(self) -> None:
        """Remove the bars, and give the terminal its cursor back."""
        self._progress.stop()


class _Bar(Task):
    def __init__(self, progress: Any, doing: str, total: int | None) -> None:
        self.progress = progress
        self.id = progress.add_task(doing, total=total)
        self.drawn = 0.0

    def advance(self, steps: int = 1) -> None:
        self.progress.advance(self.id, steps)
        self._draw()

    def update(self, done: int | None = None, doing: str | None = None) -> None:
        self.progress.update(self.id, completed=done, description=doing)
        self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if not self.progress.live.auto_refresh and now - self.drawn > _SECONDS_BETWEEN_DRAWS:
            self.drawn = now
            self.progress.refresh()


NOTHING = Display()
_CHOSEN: ContextVar[Display | None] = ContextVar("display", default=None)


def chosen() -> Display | None:
    """Return the display that a caller has chosen."""
    return _CHOSEN.get()


def current() -> Display:
    """Return the display that a caller has chosen, or the one that shows nothing."""
    return _CHOSEN.get() or NOTHING


def suitable() -> Display:
    """Return bars that processes may be forked under if stderr is a terminal, else lines."""
    return Bars(animated=False) if sys.stderr.isatty() else Lines()


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Show the tasks of this context by a display."""
    token = _CHOSEN.set(display)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def task(doing: str, total: int | None = None) -> Any:
    """Return a context in which a task is shown; it gives the `Task`.

    Args:
        doing: What is being done, such as "reading annotations".
        total: Number of steps; None if that is not known.
    """
    return current().task(doing, total)


def track(items: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
    """Yield items while a task is shown that advances with each of them.

    Args:
        items: Of any kind.
        doing: What is being done with them.
        total: Their number; None takes their length, if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(doing, total) as shown:
        for item in items:
            yield item
            shown.advance()
