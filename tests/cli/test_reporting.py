"""Progress, warnings, logs and errors of commands: once, on stderr, as the flags ask for."""

import errno
import io
import logging
import os
import sys
import warnings

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st

from cdetr_fast.cli.errors import UserError, errors_as_lines
from cdetr_fast.cli.reporting import OncePerRun, Verbosity, reporting
from cdetr_fast.common import progress
from cdetr_fast.training.errors import DataError, TrainingStopped

NORMAL, QUIET, VERBOSE = Verbosity(), Verbosity(quiet=True), Verbosity(verbose=True)


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    """Makes stderr a terminal of 100 columns, and returns it."""

    def make() -> Terminal:  # in the test: pytest sets stderr again after the fixtures
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return make


def save(epoch: int) -> None:
    """Warn as saving a model does at each epoch."""
    warnings.warn(f"runs/{epoch}/model: transformers computes other numbers", stacklevel=1)


@pytest.mark.parametrize(
    ("verbosity", "shown"), [(NORMAL, 1), (QUIET, 0), (VERBOSE, 5)], ids=["normal", "quiet", "all"]
)
def test_a_warning_comes_once_and_without_its_source(capsys, verbosity, shown):
    with reporting(verbosity):
        for epoch in range(5):
            save(epoch)
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if "transformers computes" in line]
    assert len(warned) == shown
    assert all(line.startswith("cdetr-fast: warning: runs/") for line in warned)
    assert all((__file__ in line) == verbosity.verbose for line in warned)
    assert not any("warnings.warn(" in line for line in lines)
    rest = [line for line in lines if line not in warned]
    assert rest == (
        ["cdetr-fast: 4 more warnings like these; --verbose shows them"] if shown == 1 else []
    )


def test_different_warnings_all_come(capsys):
    texts = ["the learning rate is high", "the learning rate is low", "no scheduler"]
    with reporting(NORMAL):
        for text in texts:
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "".join(f"cdetr-fast: warning: {x}\n" for x in texts)


def test_settings_of_the_process_come_back(capsys):
    before = (
        warnings.showwarning, warnings.filters[:], logging.Logger.callHandlers,
        logging.getLogger("cdetr_fast").level, progress.chosen(), dict(os.environ),
    )  # fmt: skip
    with reporting(VERBOSE):
        warnings.simplefilter("ignore")
        assert progress.chosen() is not None
    with reporting(QUIET):
        pass
    assert before == (
        warnings.showwarning, warnings.filters[:], logging.Logger.callHandlers,
        logging.getLogger("cdetr_fast").level, progress.chosen(), dict(os.environ),
    )  # fmt: skip


@pytest.mark.parametrize("propagates", [True, False])
def test_libraries_that_log_to_stderr_themselves_are_heard_once(capsys, propagates):
    """As huggingface_hub, transformers and torch do, each with a handler of its own."""
    library = logging.getLogger(f"some_library_{propagates}")
    library.propagate = propagates
    with reporting(NORMAL):
        library.addHandler(logging.StreamHandler())  # at its import
        library.warning("unauthenticated requests")
        library.warning("unauthenticated requests")
        library.info("connected")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cdetr-fast: warning: unauthenticated requests"
    assert len(lines) == 2
    assert "1 more" in lines[1]


def test_handlers_that_write_elsewhere_still_do(tmp_path, caplog):
    file = logging.FileHandler(tmp_path / "log.txt")
    logger = logging.getLogger("another_library")
    logger.addHandler(file)
    with reporting(NORMAL):
        logger.error("disk is full")
    file.close()
    assert (tmp_path / "log.txt").read_text() == "disk is full\n"
    assert caplog.messages == ["disk is full"]


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (NORMAL, ["note", "cdetr-fast: warning: careful", "cdetr-fast: skipped: a.jpg"]),
        (QUIET, ["cdetr-fast: skipped: a.jpg"]),
        (VERBOSE, ["detail", "note", "cdetr-fast: warning: careful", "cdetr-fast: skipped: a.jpg"]),
    ],
    ids=["normal", "quiet", "verbose"],
)
def test_levels(capsys, verbosity, expected):
    logger = logging.getLogger("cdetr_fast.somewhere")
    with reporting(verbosity):
        logger.debug("detail")
        logger.info("note")
        logger.warning("careful")
        logger.error("skipped: %s", "a.jpg")
    done = capsys.readouterr()
    lines = [line.partition(f" ({__file__}")[0] for line in done.err.splitlines()]
    assert (lines, done.out) == (expected, "")


def test_one_process_of_a_distributed_run_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with reporting(NORMAL):
        save(1)
        logging.getLogger("cdetr_fast").error("image 3 cannot be read")
        assert not progress.current().shows_lines
    assert capsys.readouterr().err == "cdetr-fast: image 3 cannot be read\n"


def test_forked_workers_do_not_repeat(capfd):
    """The workers of a data loader warn of what this process has warned of."""
    with reporting(NORMAL):
        save(1)
        for epoch in (2, 3):
            child = os.fork()
            if child == 0:
                save(epoch)
                warnings.warn(f"worker {epoch}", stacklevel=1)
                sys.stderr.flush()
                os._exit(0)
            os.waitpid(child, 0)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "more" not in line] == [
        "cdetr-fast: warning: runs/1/model: transformers computes other numbers",
        "cdetr-fast: warning: worker 2",
    ]


@given(st.integers(), st.integers(), st.from_regex(r"[a-z]+\.(jpg|json|pth)", fullmatch=True))
def test_paths_files_and_numbers_make_no_new_sentence(first, second, file):
    once = OncePerRun()
    assert once.is_first(f"/data/{first}/{file}: {second} boxes are flat")
    assert not once.is_first(f"/data/{second}/{file}: {first} boxes are flat")
    assert not once.is_first(f"other.png: {first} boxes are flat")
    assert once.is_first(f"/data/{first}/{file}: {second} boxes are inverted")


def test_a_terminal_gets_bars_and_they_vanish(open_terminal, capsys):
    terminal = open_terminal()
    with reporting(NORMAL):
        for _ in progress.track("abc", "counting letters"):
            logging.getLogger("cdetr_fast").warning("look")
        progress.current().result("3 letters")
    assert "counting letters" in terminal.getvalue()
    assert "0/3" in terminal.getvalue()
    assert "look\n" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith("--verbose shows them")
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back
    assert capsys.readouterr().out == "3 letters\n"


@pytest.mark.parametrize("animated", [True, False])
def test_bars_end_with_an_error(open_terminal, animated):
    terminal = open_terminal()
    with pytest.raises(UserError), reporting(NORMAL, animated), progress.task("working", 10):
        raise UserError("stop")
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_no_bars_for_quiet_and_for_files(open_terminal, capsys, monkeypatch):
    terminal = open_terminal()
    with reporting(QUIET):
        assert list(progress.track([1, 2], "counting")) == [1, 2]
    assert terminal.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with reporting(NORMAL):
        assert list(progress.track([1, 2], "counting")) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_library_call_shows_nothing(open_terminal):
    terminal = open_terminal()
    assert list(progress.track(iter([1, 2]), "counting")) == [1, 2]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--model x: no such folder"), 1, "cdetr-fast: --model x: no such folder"),
        (DataError("a.json: broken"), 1, "cdetr-fast: a.json: broken"),
        (DataError("a.json: broken", reported_elsewhere=True), 1, None),
        (TrainingStopped("saved", 143), 143, "cdetr-fast: saved"),
        (KeyboardInterrupt(), 130, "cdetr-fast: interrupted"),
        (MemoryError(), 1, "cdetr-fast: out of memory (MemoryError); use a smaller --batch-size"),
        (
            torch.OutOfMemoryError("CUDA out of memory\nmore"), 1,
            "cdetr-fast: out of memory (CUDA out of memory); use a smaller --batch-size",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"), 1,
            "cdetr-fast: runs/a: No space left on device; free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "cdetr-fast: x: Permission"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)  # fmt: skip
@pytest.mark.parametrize("verbose", [False, True])
def test_errors_end_as_a_line_with_a_code(error, code, line, verbose):
    written = []
    with pytest.raises(typer.Exit) as stopped, errors_as_lines(written.append, verbose):
        raise error
    assert stopped.value.exit_code == code
    text = "\n".join(written)
    assert ("Traceback" in text) == (verbose and not isinstance(error, KeyboardInterrupt))
    if line is not None:
        assert written[-1].startswith(line)
    elif not verbose:
        assert written == []


@pytest.mark.parametrize("error", [KeyError("x"), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)), errors_as_lines(print):
        raise error
