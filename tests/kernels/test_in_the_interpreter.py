"""The tests of triton's kernels in its interpreter, on any machine.

Whether kernels are interpreted is decided when triton is imported: hence processes of their own, of
which there are two, as starting one takes seconds.
"""

from pathlib import Path

import pytest
from support.interpreter import run_in_the_interpreter
from support.kernels import in_this_process

pytest.importorskip("triton")

FILES = [
    path
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if "\n@needs_kernels\n" in path.read_text("utf-8")
]


def test_files_were_found():
    assert len(FILES) >= 9


@in_this_process
@pytest.mark.parametrize("attention", [True, False], ids=["attention", "others"])
def test_in_the_interpreter(attention, root):
    """Run the tests of all operators; they are skipped in this process."""
    run_in_the_interpreter(
        root, *(str(path) for path in FILES if ("attention" in path.name) == attention)
    )
