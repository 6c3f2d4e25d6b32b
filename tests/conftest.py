"""Fixtures and settings of the whole suite."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from support.accelerate_state import forget_accelerate_state

ROOT = Path(__file__).resolve().parents[1]

# Time limits per example fail on busy machines; the same examples on every run.
settings.register_profile("cdetr_fast", deadline=None, derandomize=True)
settings.load_profile("cdetr_fast")


_CACHE = tempfile.mkdtemp(prefix="cdetr_fast_tests_")


def pytest_configure() -> None:
    """Give tests, and the processes that they start, another cache than the user's."""
    os.environ.setdefault("CDETR_FAST_CACHE", _CACHE)


def pytest_unconfigure() -> None:
    """Remove the cache."""
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch before a test's fixtures, so that its weights don't go by what ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _own_accelerate_state():
    """Reset the settings that Accelerate keeps for the whole process after each test."""
    yield
    forget_accelerate_state()


@pytest.fixture(scope="session")
def data_folder() -> Path | None:
    """Return the folder of real images that are not part of the project, or None without one."""
    folder = Path(os.environ.get("CDETR_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def photo(data_folder: Path | None) -> Image.Image:
    """Return a real photograph if there is one, else a generated image; RGB, 640 x 480."""
    path = data_folder / "coco_sample" / "000000039769.png" if data_folder else None
    if path and path.is_file():
        return Image.open(path).convert("RGB")
    cells = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((640, 480), Image.Resampling.BICUBIC)
