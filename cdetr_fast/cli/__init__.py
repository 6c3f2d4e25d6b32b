"""The command line: one file per command, `app` puts them together.

Heavy imports are inside the commands, so that `--help` and usage errors come at once.
"""

from cdetr_fast.cli.app import main

__all__ = ["main"]
