"""Command line: `python -m benchmarks` lists the benchmarks, with a name it runs one."""

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import results
from benchmarks.case import OptionError
from benchmarks.registry import BENCHMARKS, REGISTRY, TOOLS, Entry
from cdetr_fast.common import progress
from cdetr_fast.common.validation import did_you_mean
from cdetr_kernels.qualification import ensure_qualified

USAGE = "python -m benchmarks NAME [options]   (NAME --help: the options)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a provider failed, or 2 for a wrong command."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("", "-h", "--help"):
        print(listing())
        return 0
    if name not in REGISTRY:
        hint = did_you_mean(name, REGISTRY) or "; python -m benchmarks lists them"
        print(f"{name}: no such benchmark{hint}", file=sys.stderr)
        return 2
    entry = REGISTRY[name]
    if missing := entry.missing():
        print(f"{name} needs {', '.join(missing)}: pip install cdetr-fast[test]", file=sys.stderr)
        return 2
    return entry.load().main(rest) if entry.tool else run(entry, rest)


def listing() -> str:
    """Return every name with its line and what it needs."""
    lines = [USAGE]
    for title, entries in (("Benchmarks", BENCHMARKS), ("Tools", TOOLS)):
        lines += ["", f"{title}:"]
        for entry in entries:
            needs = f" (needs {', '.join(entry.needs)})" if entry.needs else ""
            lines.append(f"  {entry.name:16} {entry.summary}{needs}")
    return "\n".join(lines)


def make_parser(entry: Entry) -> argparse.ArgumentParser:
    """Return the parser of a benchmark: the options that all share, and its own."""
    module = entry.load()
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {entry.name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each provider")
    parser.add_argument("--device", default=entry.devices[0], help=" or ".join(entry.devices))
    parser.add_argument("--output", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    module.add_options(parser)
    return parser


def run(entry: Entry, arguments: Sequence[str]) -> int:
    """Measure the cases of a benchmark, print their rows and write them if asked to."""
    parser = make_parser(entry)
    options = parser.parse_args(arguments)
    if options.device.split(":")[0] not in entry.devices:
        parser.error(f"--device: expected {' or '.join(entry.devices)}, got {options.device}")
    torch.set_num_threads(options.threads)
    ensure_qualified(torch.device(options.device))
    rows: list[results.Row] = []
    failures = 0
    # Not drawn while something is timed.
    shows = sys.stderr.isatty() and not options.quiet
    display = progress.Bars(animated=False) if shows else progress.Display()
    try:
        for case in entry.load().cases(options):
            doing = f"measuring {case.work} {case.shape}: {len(case.providers)} providers"
            with display.task(doing):
                measured = case.measure(options.repeats)
            new = [{"benchmark": entry.name, **row} for row in measured]
            results.print_table([{k: v for k, v in row.items() if k != "benchmark"} for row in new])
            failures += len(case.failures(new))
            rows += new
    except OptionError as error:
        parser.error(str(error))
    if options.output:
        command = results.command_line(entry.name, arguments)
        print("written to", results.save(options.output, rows, command))
    return 1 if failures else 0
