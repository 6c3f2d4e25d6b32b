"""Files that come with the package.

`DEMO` is the folder of a small checkpoint that detects the shapes of `cdetr_fast.scenes`; it goes
where `from_pretrained` takes the name of a model.
"""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
