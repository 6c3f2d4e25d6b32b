"""`python -m cdetr_kernels.qualification [OPERATOR ...]`: a qualification, with no other package.

`cdetr-fast qualify` is the same as a command.
"""

import argparse

from cdetr_kernels import registry
from cdetr_kernels.qualification.plan import LEVELS
from cdetr_kernels.qualification.run import qualify


def main() -> None:
    """Qualify; print a line for each operator, and what was found."""
    parser = argparse.ArgumentParser(description="Find out which kernels are right and faster.")
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(registry.NAMES)}; all")
    parser.add_argument("--level", choices=LEVELS, default="quick")
    parser.add_argument("--device", help="a GPU; the current one")
    options = parser.parse_args()
    report = qualify(options.device, options.operators or None, options.level, say=_say)
    for line in report.details():
        print(f"  {line}")
    print(report.summary())


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
