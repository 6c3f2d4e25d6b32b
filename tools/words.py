"""Word list: phrases and names that the project's style rules out, each with what to write.

`python tools/words.py` checks every file that git tracks, `python tools/words.py FILE ...` those.
It prints `file:line: 'found' -> replacement` for each hit, and exits with 1 if there is any.
"""

import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PHRASES = {
    r"in place of": "instead of; replaces",
    r"tak(e|es|en|ing) the place of": "replace",
    r"anew": "again; from scratch",
    r"lies": "is",
    r"one an? (image|layer|step|query|head|key|row|box|object|class|process|epoch)": "one per ...",
    r"(targets|frames|images|tiles|steps) an? (image|second|epoch)": "... per ...",
    r"there (is|are) none of": "has no ...; without",
    r"what there is": "(name the thing)",
    r"(that|which) (is|are) no (?!longer|more|worse|better)\w+": "is not a ...",
    r"(go|goes|going|went) on": "continue; resume",
    r"said once": "stated once",
    r"as of (?!v?\d|torch|triton|transformers|timm|Python)\w+": "like that of; since",
}
"""Phrases of any file, as regular expressions between word boundaries, and their replacements."""

DOCSTRINGS = {
    r'"""(What|How|Says|Tells)\b': "a noun phrase (module, class), an imperative (function)",
}
"""Openings of docstrings, and their replacements."""

NAMES = {
    "Draw": "(what is drawn)",
    "Kind": "(what it is a kind of)",
    "Place": "(what it is a place of)",
    "everywhere": "all_gather_object",
    "forward_above": "(what the function does)",
    "held_back": "unsupported_reason",
    "lines_about": "(what the lines describe)",
    "outlive_in_worker": "(what the function does)",
    "reason_against": "unsupported_reason",
    "strays": "unexpected",
    "twin_of": "(what it is a copy of)",
    "way": "implementation",
}
"""Names in Python code, and their replacements."""

CHECKED = {".cpp", ".cu", ".h", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
"""Suffixes of the files that are checked, beside the Makefile and CI's script."""


def _patterns(table: dict[str, str], template: str) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(template.format(k), re.IGNORECASE), v) for k, v in table.items()]


TEXT_PATTERNS = _patterns(PHRASES, r"\b(?:{})\b")
PYTHON_PATTERNS = TEXT_PATTERNS + _patterns(DOCSTRINGS, "{}")
NAME_PATTERN = re.compile(r"\b(?:{})\b".format("|".join(NAMES)))


def tracked_files() -> list[Path]:
    """Return the files that git tracks below the current folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name]


def is_checked(path: Path) -> bool:
    """Tell whether a file has text or code of ours; this one has to name what it forbids."""
    text = path.suffix in CHECKED or path.name == "Makefile" or path.match(".ci/run")
    return text and path.is_file() and path.resolve() != Path(__file__).resolve()


def hits(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, the text and the replacement of each hit in a file."""
    text = path.read_text("utf-8")
    for pattern, replacement in PYTHON_PATTERNS if path.suffix == ".py" else TEXT_PATTERNS:
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, match.group(), replacement
    if path.suffix == ".py" and NAME_PATTERN.search(text):
        with path.open("rb") as file:
            before = ""
            for token in tokenize.tokenize(file.readline):
                # A capital behind a dot is another module's class, such as PIL's ImageDraw.Draw.
                foreign = before == "." and token.string[:1].isupper()
                before = token.string
                if token.type == tokenize.NAME and token.string in NAMES and not foreign:
                    yield token.start[0], token.string, NAMES[token.string]


def main(arguments: list[str]) -> int:
    """Print the hits in the files given, or in all that git tracks; return the exit code."""
    paths = [Path(name) for name in arguments] or tracked_files()
    found = [(path, *hit) for path in paths if is_checked(path) for hit in sorted(hits(path))]
    for path, line, text, replacement in found:
        print(f"{path}:{line}: {text!r} -> {replacement}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
