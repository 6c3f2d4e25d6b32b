"""Summary of the last test run's branch coverage: the total and the least covered files."""

import json
import tempfile
from pathlib import Path

import coverage

LEAST_COVERED = 10


def main() -> None:
    """Print the coverage that the tests left in `.coverage`, if there is any."""
    measured = coverage.Coverage()
    if not Path(measured.config.data_file).is_file():
        print("no coverage was measured")
        return
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(report), ignore_errors=True)
        content = json.loads(report.read_text("utf-8"))
    files = [
        (entry["summary"]["percent_covered"], entry["summary"]["missing_lines"], name)
        for name, entry in content["files"].items()
    ]
    print(f"branch coverage {content['totals']['percent_covered']:.1f} %; least covered:")
    for percent, missing, name in sorted(files)[:LEAST_COVERED]:
        print(f"{percent:6.1f} %  {missing:4d} lines missed  {name}")


if __name__ == "__main__":
    main()
