"""Demonstration: procedural scenes and the checkpoint shipped with the package."""

from pathlib import Path

DEMO = Path(__file__).parent / "assets"
"""Folder of a small checkpoint that detects the shapes of `scenes`, for `from_pretrained`."""
