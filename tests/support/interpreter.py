"""Kernel tests in triton's interpreter: in a process of their own, as triton decides at import."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_in_the_interpreter(root: Path, *arguments: str, **environment: str) -> None:
    """Run tests (files, options of pytest) with TRITON_INTERPRET=1; fail with their output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
