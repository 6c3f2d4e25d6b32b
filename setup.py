"""Build entry point: the extension, where it can be built. All metadata is in pyproject.toml.

A wheel with the extension is for one platform and any Python; without it, for any platform.
pip builds in an environment without torch unless told `--no-build-isolation`: then nothing is
compiled, and `cdetr-fast build-native` does it after the installation.
"""

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUILD = runpy.run_path(str(ROOT / "kernels/cdetr_kernels/build.py"))


class BuildWithExtension(build_py):
    """Also build the extension into the package, and add its sources for a later build."""

    built = ()

    def run(self) -> None:
        """Build; in an editable installation the extension goes into the checkout."""
        super().run()
        if self.editable_mode:
            BUILD["build"](ROOT / "kernels/cdetr_kernels")
            return
        package = Path(self.build_lib) / "cdetr_kernels"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        BuildWithExtension.built = BUILD["build"](package)


class PlatformWheel(bdist_wheel):
    """Wheel tagged by what was built."""

    def run(self) -> None:
        """Build first: the tag depends on the result."""
        self.run_command("build")
        self.root_is_pure = not BuildWithExtension.built
        self.distribution.has_ext_modules = lambda: bool(BuildWithExtension.built)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return any Python, and this platform if there is an extension."""
        if not BuildWithExtension.built:
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithExtension, "bdist_wheel": PlatformWheel})
